from __future__ import annotations

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15Upsample
from kernel_checks import DTYPES, FAULTS, TARGETS, assert_no_spills, compile_for, narrow_accesses, planted
from torch import Tensor

from vidaccel.kernels import check
from vidaccel.kernels.conv import depth_to_space as op
from vidaccel.kernels.conv.depth_to_space import DEPTH_TO_SPACE, depth_to_space, depth_to_space_ref
from vidaccel.kernels.op import listening

CASES = [  # frames, height, width, channels of y, of the source, factor of time, first frame
    pytest.param((3, 2, 3, 6, 12, 2, True), id="first"),
    pytest.param((3, 3, 1, 6, 24, 2, False), id="following"),
    pytest.param((1, 1, 2, 6, 12, 2, True), id="one-frame"),
    pytest.param((2, 3, 2, 6, 12, 1, True), id="pixels-only"),
    pytest.param((2, 2, 2, 3, 6, 1, False), id="pixels-only-following"),
    pytest.param((2, 1, 3, 40, 80, 2, True), id="several-tiles-a-line"),
    pytest.param((2, 1, 2, 2, 8, 1, False), id="none-repeated"),
]


def draw(case: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    frames, height, width, channels, of_source, factor_t, _ = case
    depth = 4 * factor_t * channels
    x = torch.randn(2, frames, height, width, depth, device=device)
    source = torch.randn(2, frames, height + 2, width + 2, of_source, device=device)[:, :, 1:-1, 1:-1]
    return x.to(dtype), torch.randn(depth, device=device).to(dtype), source.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    tensors, options = draw(case, dtype, device), {"factor_t": case[5], "first": bool(case[6])}
    out = depth_to_space(*tensors, **options, impl="triton")
    assert out.is_contiguous() and torch.equal(out, depth_to_space_ref(*tensors, **options))


def test_lines_of_source_that_are_too_long_to_count_in_32_bits(device: torch.device) -> None:
    x, bias, source = draw((3, 2, 4, 6, 12, 2, False), torch.float32, device)
    for pixel, served in ((2**29 - 1, True), (2**29, False)):
        wide = torch.empty_strided(source.shape, (1, 1, 1, pixel, 1), device="meta")
        reason = DEPTH_TO_SPACE.unserved(x, bias, wide, 2, False, impl="triton")
        assert reason is None if served else "lines span less than 2**31 numbers" in reason


@pytest.mark.parametrize("temporal", [True, False], ids=["time-too", "pixels-only"])
@pytest.mark.parametrize("frames", [1, 3])
@torch.no_grad()
def test_reference_is_what_diffusers_does(frames: int, temporal: bool) -> None:
    torch.manual_seed(0)
    upsample = HunyuanVideo15Upsample(8, 4, temporal)
    x = torch.randn(2, 8, frames, 3, 2)
    expected = upsample(x)
    bias = upsample.conv.conv.bias.clone()
    upsample.conv.conv.bias.zero_()
    rows = upsample.conv(x).permute(0, 2, 3, 4, 1)
    out = depth_to_space_ref(rows, bias, x.permute(0, 2, 3, 4, 1), 2 if temporal else 1, True)
    torch.testing.assert_close(out.permute(0, 4, 1, 2, 3), expected)


@pytest.mark.parametrize("most", [2**23, 40], ids=["whole", "in-frames"])
@pytest.mark.parametrize("fault", [None, *FAULTS])
@pytest.mark.parametrize("case", [CASES[0].values[0], CASES[1].values[0]], ids=["first", "following"])
@torch.no_grad()
def test_a_fault_is_found(
    case: tuple[int, ...], fault: str | None, most: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "MOST_ELEMENTS", most)
    tensors, options = draw(case, torch.float16, device), {"factor_t": case[5], "first": bool(case[6])}

    def spoil(out: Tensor) -> None:
        if fault:
            FAULTS[fault](out.flatten(0, 1))

    with planted(DEPTH_TO_SPACE, "triton", spoil), listening(checks=True) as events:
        out = depth_to_space(*tensors, **options)
    assert [event.implementation for event in events] == ["triton"] and bool(events[0].problem) == bool(fault)
    assert torch.equal(out, depth_to_space_ref(*tensors, **options))


@pytest.mark.parametrize("of_source", [16, 10], ids=["three-each", "across-lines"])
def test_a_source_that_the_kernel_cannot_repeat_runs_in_torch(of_source: int, device: torch.device) -> None:
    case = 1, 2, 3, of_source * (3 if of_source == 16 else 4) // 8, of_source, 2, False
    tensors = draw(case, torch.float32, device)
    with listening() as events:
        out = depth_to_space(*tensors, factor_t=2)
    assert torch.equal(out, depth_to_space_ref(*tensors, 2))
    assert [event.implementation for event in events] == ["torch"] and "must serve 2^n channels" in events[0].reason


def test_unserved_input_runs_in_torch(device: torch.device) -> None:
    x, bias, source = (tensor.double() for tensor in draw(CASES[0].values[0], torch.float32, device))
    with listening() as events:
        out = depth_to_space(x, bias, source, factor_t=2, first=True)
    assert torch.equal(out, depth_to_space_ref(x, bias, source, 2, True))
    assert [event.implementation for event in events] == ["torch"] and "float64" in events[0].reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(1, 2, 3, 3, 12)}, r"x must be \[B, F, H, W, 8 C\]"),
        ({"bias": torch.ones(1)}, r"bias must be \[16\]"),
        ({"source": torch.ones(1, 2, 3, 2, 8)}, r"source must be x's shape"),
        ({"source": torch.ones(1, 2, 3, 3, 16)}, r"an even number of channels"),
        ({"factor_t": 3}, r"factor_t must be 1 or 2, got 3"),
    ],
)
def test_rejects(change: dict[str, object], message: str) -> None:
    arguments = {"x": torch.ones(1, 2, 3, 3, 16), "bias": torch.ones(16), "source": torch.ones(1, 2, 3, 3, 8)}
    with pytest.raises(ValueError, match=f"depth_to_space: .*{message}"):
        depth_to_space(**{**arguments, "factor_t": 2, "first": True, **change})


def test_registration(device: torch.device) -> None:
    tensors = draw(CASES[0].values[0], torch.float32, device)
    torch.library.opcheck(DEPTH_TO_SPACE.registered["triton"], (*tensors, 2, True))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("channels", "repeats", "factor_t", "alone"),
    [(128, 2, 1, False), (1024, 8, 2, False), (1024, 4, 1, True)],
    ids=["pixels-only", "time-too", "first"],
)
def test_kernel_reads_wide_and_does_not_spill(
    channels: int, repeats: int, factor_t: int, alone: bool, target: str
) -> None:
    places = ["x_sample", "y_sample", *(f"source_{dim}" for dim in ("sample", "frame", "row", "pixel"))]
    block_c = channels if alone else 2 * channels
    asm = compile_for(
        target,
        op._depth_to_space_kernel,
        {
            **dict.fromkeys(["x_ptr", "bias_ptr", "source_ptr", "y_ptr"], "*bf16:16"),
            **dict.fromkeys(["frames", "height", "width"], "i32"),
            **dict.fromkeys(["channels", "depth", "source_step", *(f"stride_{place}" for place in places)], "i32:16"),
        },
        {
            **{"FACTOR_T": factor_t, "ALONE": alone, "REPEATS": repeats},
            **{"BLOCK_M": op.TILE // block_c, "BLOCK_C": block_c},
        },
        num_warps=op.NUM_WARPS,
    )
    assert_no_spills(asm)
    narrow = narrow_accesses(asm)
    assert len(narrow) <= 2, narrow  # the bias, and the source where a thread repeats few channels often


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "case", [(31, 16, 16, 1024, 1024, 2, True), (121, 128, 128, 128, 256, 1, True)], ids=["bottom", "top"]
)
def test_real_shapes(case: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    tensors, options = draw(case, dtype, device), {"factor_t": case[5], "first": bool(case[6])}
    assert torch.equal(depth_to_space(*tensors, **options, impl="triton"), depth_to_space_ref(*tensors, **options))
