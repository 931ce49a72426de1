from __future__ import annotations

import weakref

import pytest
import torch
from kernel_checks import DTYPES, FAULTS, TARGETS, assert_close_to_gold, assert_no_spills, compile_for, planted
from torch import Tensor

from vidaccel.kernels import check
from vidaccel.kernels.conv import pixel_conv as op
from vidaccel.kernels.conv.pixel_conv import PIXEL_CONV, pixel_conv, pixel_conv_ref
from vidaccel.kernels.op import listening

SHAPES = [
    pytest.param((1, 3, 1, 1, 8), (3, 3, 3, 3), id="one-pixel"),
    pytest.param((2, 5, 3, 7, 13), (3, 3, 3, 3), id="odd"),
    pytest.param((1, 4, 6, 5, 96), (3, 3, 3, 3), id="wan2.1"),
    pytest.param((1, 3, 4, 4, 32), (12, 3, 3, 3), id="wan2.2"),
    pytest.param((2, 2, 5, 1, 16), (1, 1, 3, 1), id="one-tap"),
    pytest.param((1, 6, 2, 9, 16), (4, 2, 1, 5), id="wide-taps"),
]


def draw(
    shape: tuple[int, ...], taps: tuple[int, ...], dtype: torch.dtype, device: torch.device, centre: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    channels, *window = taps
    rows = (torch.randn(shape, device=device) + centre).to(dtype)
    weight = torch.randn(channels, shape[-1], *window, device=device).to(dtype)
    return rows, weight, torch.randn(channels, device=device).to(dtype)


def assert_matches(out: Tensor, rows: Tensor, weight: Tensor, bias: Tensor, bordered: bool = False) -> None:
    with torch.backends.cudnn.flags(allow_tf32=False):
        eager = pixel_conv_ref(rows, weight, bias, bordered)
    assert out.is_contiguous() and out.dtype == eager.dtype
    assert_close_to_gold(out, pixel_conv_ref(rows.double(), weight.double(), bias.double(), bordered), eager)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "taps"), SHAPES)
@pytest.mark.parametrize("centre", [0.0, 30.0], ids=["centred", "off-centre"])
def test_matches_reference(
    shape: tuple[int, ...], taps: tuple[int, ...], centre: float, dtype: torch.dtype, device: torch.device
) -> None:
    given = draw(shape, taps, dtype, device, centre)
    assert_matches(pixel_conv(*given, impl="taps"), *given)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.itemsize == 2])
def test_taps_that_cancel(dtype: torch.dtype, device: torch.device) -> None:
    """As where a picture is plain: the sum is as small as the roundings of what is added up."""
    rows, weight, bias = draw((1, 4, 6, 5, 96), (3, 3, 3, 3), dtype, device)
    edge = torch.tensor([1.0, 0.0, -1.0], device=device).to(dtype)
    given = 0.1 * rows + 30, weight[..., :1] * edge, bias
    out, eager = (pixel_conv(*given, impl=impl)[..., 1:-1] for impl in ("taps", "torch"))  # zeros cancel nothing
    assert_close_to_gold(out, pixel_conv_ref(*(t.double() for t in given))[..., 1:-1], eager)


@pytest.mark.parametrize("impl", ["taps", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "taps"), SHAPES)
@torch.no_grad()
def test_a_border_that_the_rows_bring(
    shape: tuple[int, ...], taps: tuple[int, ...], dtype: torch.dtype, impl: str, device: torch.device
) -> None:
    samples, frames, height, width, channels = shape
    rows, *others = draw((samples, frames, height + taps[2] - 1, width + taps[3] - 1, channels), taps, dtype, device)
    out = pixel_conv(rows, *others, bordered=True, impl=impl)
    assert out.shape == (samples, taps[0], frames - taps[1] + 1, height, width)
    assert_matches(out, rows, *others, bordered=True)
    whole = pixel_conv_ref(rows.double(), *(t.double() for t in others))
    inner = whole[..., taps[2] // 2 :, taps[3] // 2 :][..., :height, :width]
    torch.testing.assert_close(pixel_conv_ref(rows.double(), *(t.double() for t in others), True), inner)


@pytest.mark.parametrize("most", [1, 2**12, 2**14])
def test_result_does_not_depend_on_the_cut(most: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "MOST_PRODUCTS", most)
    given = draw((2, 7, 3, 5, 96), (3, 3, 3, 3), torch.float32, device)
    assert_matches(pixel_conv(*given, impl="taps"), *given)


def test_half_precision_rows_of_a_float32_model(device: torch.device) -> None:
    rows, weight, bias = draw((1, 4, 3, 5, 16), (3, 3, 3, 3), torch.float32, device)
    out = pixel_conv(rows.half(), weight, bias, impl="taps")
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, pixel_conv_ref(rows, weight, bias), rtol=0, atol=0.1)


def test_takes_any_strides(device: torch.device) -> None:
    rows, weight, bias = draw((2, 4, 3, 5, 16), (3, 3, 3, 3), torch.float32, device)
    expected = pixel_conv(rows, weight, bias, impl="taps")
    strided = [t.repeat_interleave(2, -1)[..., ::2] for t in (rows, weight, bias)]
    assert torch.equal(pixel_conv(*strided, impl="taps"), expected)


@torch.no_grad()
def test_no_tensor_outlives_its_call(device: torch.device) -> None:
    given = list(draw((1, 4, 3, 5, 24), (3, 3, 3, 3), torch.float32, device))
    given.append(pixel_conv(*given))
    alive = [weakref.ref(t) for t in given]
    given.clear()
    assert not any(ref() is not None for ref in alive)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.ones(3, 4, 5)}, r"rows must be \[B, F, H, W, C\] with channels, got \(3, 4, 5\)"),
        ({"rows": torch.ones(1, 1, 4, 5, 8)}, r"rows must have 3 frames at least, got 1"),
        ({"weight": torch.ones(3, 9, 3, 3, 3)}, r"weight must be \[C', 8, T, Y, X\], got"),
        ({"weight": torch.ones(3, 8, 3, 2, 3)}, r"weight must have odd sides, got"),
        ({"rows": torch.ones(1, 3, 4, 2, 8), "bordered": True}, r"rows with a border must be as large as weight"),
        ({"bias": torch.ones(4)}, r"bias must be \[3\], got \(4,\)"),
        ({"impl": "triton"}, r"impl must be one of taps, cudnn, torch, got 'triton'"),
    ],
)
def test_rejects(change: dict[str, object], message: str) -> None:
    given = {"rows": torch.ones(1, 3, 4, 5, 8), "weight": torch.ones(3, 8, 3, 3, 3), "bias": torch.ones(3)}
    with pytest.raises(ValueError, match=f"pixel_conv: {message}"):
        pixel_conv(**{**given, **change})


def test_many_channels_run_in_torch(device: torch.device) -> None:
    given = draw((1, 3, 2, 2, 8), (17, 3, 3, 3), torch.float32, device)
    with pytest.raises(ValueError, match="up to 16 channels of a pixel, got 17"):
        pixel_conv(*given, impl="taps")
    assert_matches(pixel_conv(*given), *given)


def test_registration(device: torch.device) -> None:
    given = draw((1, 4, 3, 4, 8), (3, 3, 3, 3), torch.float32, device)
    torch.library.opcheck(PIXEL_CONV.registered["taps"], (*given, True))


@pytest.mark.parametrize("most", [2**23, 200], ids=["whole", "in-frames"])
@pytest.mark.parametrize("fault", [None, *FAULTS])
@torch.no_grad()
def test_check(fault: str | None, most: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MOST_ELEMENTS", most)
    given = draw((2, 5, 4, 5, 24), (3, 3, 3, 3), torch.float32, device)
    with planted(PIXEL_CONV, "taps", FAULTS[fault] if fault else lambda out: None), listening(checks=True) as events:
        pixel_conv(*given)
    assert [(event.implementation, bool(event.problem)) for event in events] == [("taps", fault is not None)]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bordered", [False, True])
def test_compiles_without_spills(bordered: bool, target: str) -> None:
    asm = compile_for(
        target,
        op._sum_taps_kernel,
        {
            **{"products_ptr": "*fp32:16", "rows_ptr": "*bf16:16", "bias_ptr": "*bf16:16", "y_ptr": "*bf16:16"},
            **{"frames": "i32", "height": "i32:16", "width": "i32:16", "pitch": "i32:16", "stride_y_c": "i32:16"},
        },
        {"CHANNELS": 3, "T": 3, "Y": 3, "X": 3, "BORDERED": bordered, "BLOCK": op.BLOCK},
        num_warps=op.NUM_WARPS,
    )
    assert_no_spills(asm)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", ["taps", "cudnn"])
@torch.no_grad()
@pytest.mark.parametrize(
    ("shape", "bordered"), [((1, 83, 480, 832, 96), False), ((1, 123, 258, 258, 128), True)], ids=["wan2.1", "tile"]
)
def test_real_shape(
    shape: tuple[int, ...], bordered: bool, impl: str, dtype: torch.dtype, device: torch.device
) -> None:  # fmt: skip
    """Of Wan's more than 2 ** 31 numbers; some frames are looked at."""
    rows, weight, bias = draw(shape, (3, 3, 3, 3), dtype, device)
    out = pixel_conv(rows, weight, bias, bordered=bordered, impl=impl)
    for frame in (0, 40, 80):
        seen = rows[:, frame : frame + 3]
        assert_matches(out[:, :, frame : frame + 1].contiguous(), seen, weight, bias, bordered)
