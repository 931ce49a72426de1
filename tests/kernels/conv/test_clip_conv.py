from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import (
    FAULTS,
    TARGETS,
    assert_close_to_gold,
    assert_no_spills,
    compile_for,
    narrow_accesses,
    planted,
)
from torch import Tensor

from vidaccel.kernels.choice import remembered
from vidaccel.kernels.conv import clip_conv as op
from vidaccel.kernels.conv import clip_conv_winograd as winograd
from vidaccel.kernels.conv.clip_conv import CLIP_CONV, clip_conv, clip_conv_ref
from vidaccel.kernels.hopper import GLUON
from vidaccel.kernels.op import WHOLE_CHECKS, Implementation, listening
from vidaccel.kernels.sampling import sampling

# samples, frames, height and width of the output; channels; frames that the convolution sees
SHAPES = [
    pytest.param((1, 4, 16, 16, 96, 3), id="one-tile-a-frame"),
    pytest.param((2, 3, 13, 37, 96, 3), id="odd-sides"),
    pytest.param((1, 1, 1, 1, 32, 1), id="one-pixel"),
    pytest.param((3, 2, 40, 5, 64, 2), id="narrow"),
    pytest.param((1, 2, 17, 33, 192, 3), id="wide-channels"),
]
Shape = tuple[int, int, int, int, int, int]


def draw(shape: Shape, device: torch.device, dtype: torch.dtype, channels_out: int = 96) -> tuple[Tensor, Tensor]:
    samples, frames, height, width, channels, seen = shape
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(samples, frames + seen - 1, height, width, channels, generator=generator)
    weight = torch.randn(channels_out, channels, seen, 3, 3, generator=generator) * (9 * seen * channels) ** -0.5
    return rows.to(device, dtype), weight.to(device, dtype)


def skip_unless_served(rows: Tensor, weight: Tensor) -> None:
    """Where the kernel is not for this machine; anything else that it may say here is a failure."""
    reason = CLIP_CONV.unserved(rows, weight, None, False, impl="gluon")
    if reason and ("Hopper" in reason or "Triton" in reason):
        pytest.skip(reason)
    assert not reason


def assert_right(out: Tensor, rows: Tensor, weight: Tensor) -> None:
    gold = clip_conv_ref(rows.double().cpu(), weight.double().cpu()).to(out.device)
    assert_close_to_gold(out, gold, clip_conv_ref(rows, weight))


@pytest.mark.parametrize("impl", [None, "library", "torch"])
def test_a_convolution_without_its_bias(impl: str | None, device: torch.device) -> None:
    rows, weight = draw((2, 3, 5, 6, 8, 3), device, torch.float32, channels_out=10)
    padded = F.pad(rows, (0, 0, 1, 1, 1, 1))
    expected = torch.zeros(2, 3, 5, 6, 10, device=device, dtype=torch.float64)
    for t, y, x in torch.cartesian_prod(*(torch.arange(3),) * 3).tolist():
        expected += padded[:, t : t + 3, y : y + 5, x : x + 6].double() @ weight[:, :, t, y, x].T.double()
    out = clip_conv(rows, weight, impl=impl)
    assert out.is_contiguous() and out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_weight_is_rounded_to_the_rows(device: torch.device) -> None:
    rows, weight = draw((1, 2, 4, 4, 8, 3), device, torch.float16, channels_out=4)
    precise = weight.float() * 1.0001
    assert torch.equal(clip_conv(rows, precise), clip_conv(rows, precise.half()))


def test_without_pixels(device: torch.device) -> None:
    rows, weight = draw((0, 2, 4, 4, 8, 3), device, torch.float32)
    assert clip_conv(rows, weight).shape == (0, 2, 4, 4, 96)


@pytest.mark.parametrize("fault", [None, *FAULTS])
@torch.no_grad()
def test_a_fault_is_found(fault: str | None, device: torch.device) -> None:
    rows, weight = draw((2, 3, 6, 6, 8, 3), device, torch.float32)

    def spoil(out: Tensor) -> None:
        if fault:
            FAULTS[fault](out.flatten(0, 1))

    with planted(CLIP_CONV, "library", spoil), listening(checks=True) as events:
        out = clip_conv(rows, weight)
    torch.testing.assert_close(out, clip_conv_ref(rows, weight))
    assert [bool(event.problem) for event in events if event.op == "clip_conv"] == [fault is not None]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda rows, weight: (rows.float(), weight.float()), "takes float16 and bfloat16, rows is torch.float32"),
        (lambda rows, weight: (rows, weight[:95]), r"C'=96, C in steps of 32 and 3 x 3 taps, got \(95, 64, 3, 3, 3\)"),
        (lambda rows, weight: (rows[..., :48].contiguous(), weight[:, :48]), r"got \(96, 48, 3, 3, 3\)"),
        (lambda rows, weight: (rows, weight[..., :1]), r"got \(96, 64, 3, 3, 1\)"),
        (lambda rows, weight: (rows.transpose(2, 3), weight), "TMA takes contiguous rows"),
        (lambda rows, weight: (rows[:, :, :0], weight), "there is nothing to multiply"),
    ],
)
def test_what_the_kernel_does_not_serve(change: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "gluon_reason", lambda rows: None)
    rows, weight = change(*draw((1, 2, 4, 4, 64, 3), torch.device("cpu"), torch.float16))
    found = CLIP_CONV.unserved(rows, weight, None, False, impl="gluon")
    assert found is not None and re.search(reason, found)


@pytest.mark.parametrize(
    ("rows", "weight", "message"),
    [
        ((2, 3, 4, 5), (1, 4, 1, 3, 3), r"rows must be \[B, F, H, W, C\] with channels, got \(2, 3, 4, 5\)"),
        ((1, 3, 4, 5, 6), (1, 4, 1, 3, 3), r"weight must be \[C', 6, T, Y, X\], got \(1, 4, 1, 3, 3\)"),
        ((1, 3, 4, 5, 6), (1, 6, 1, 2, 3), r"weight must have odd sides, got \(1, 6, 1, 2, 3\)"),
        ((1, 2, 4, 5, 6), (1, 6, 3, 3, 3), r"rows must have 3 frames at least, got 2"),
    ],
)
def test_rejects(rows: tuple[int, ...], weight: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"clip_conv: {message}"):
        clip_conv(torch.ones(rows), torch.ones(weight))


def test_rejects_a_border_or_a_size_that_cannot_be() -> None:
    rows, weight = torch.ones(1, 3, 2, 5, 6), torch.ones(1, 6, 3, 3, 3)
    with pytest.raises(ValueError, match=r"clip_conv: rows must bring a border, got \(1, 3, 2, 5, 6\)"):
        clip_conv(rows, weight, bordered=True)
    with pytest.raises(ValueError, match=r"clip_conv: largest must be \[1\] and float32, got \(2,\) torch.float32"):
        clip_conv(rows, weight, torch.ones(2))


@pytest.mark.parametrize("impl", [None, "library", "torch"])
def test_rows_that_bring_their_border(impl: str | None, device: torch.device) -> None:
    rows, weight = draw((2, 3, 5, 6, 8, 3), device, torch.float32, channels_out=10)
    padded = F.pad(rows, (0, 0, 1, 1, 1, 1))
    expected = clip_conv(rows, weight)
    torch.testing.assert_close(clip_conv(padded, weight, bordered=True, impl=impl), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not GLUON, reason="another Gluon")
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_products_overlap_and_nothing_spills(dtype: str) -> None:
    gluon = pytest.importorskip("vidaccel.kernels.conv.clip_conv_gluon")

    def descriptor(*block: int) -> str:
        of = gluon.gl.float16 if dtype == "fp16" else gluon.gl.bfloat16
        return f"tensordesc<{dtype}{list(block)},{gluon.gl.NVMMASharedLayout.get_default_for(list(block), of)!r}>"

    pixels = 1, gluon.ROWS, gluon.COLUMNS
    asm = compile_for(
        "sm_90",
        gluon.clip_conv_gluon_kernel,
        {
            "rows_desc": descriptor(*pixels, gluon.BLOCK_K),
            "wide_weight_desc": descriptor(64, gluon.BLOCK_K),
            "narrow_weight_desc": descriptor(32, gluon.BLOCK_K),
            "wide_out_desc": descriptor(*pixels, 64),
            "narrow_out_desc": descriptor(*pixels, 32),
            **dict.fromkeys(("num_tiles", "frames", "across", "down"), "i32"),
        },
        {"TAPS": 27, "CHUNKS": 3, "STAGES": gluon.STAGES, "REGISTERS": gluon.REGISTERS},
    )
    assert "UTMALDG" in asm["sass"] and "UTMASTG" in asm["sass"] and "USETMAXREG" in asm["sass"]
    # three of each consumer: a wait behind every product would mean that they are serialised
    assert asm["sass"].count("WARPGROUP.DEPBAR") <= 6 < asm["sass"].count("HGMMA")
    assert_no_spills(asm)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    """Against a race the same input many times: every run has the same bits."""
    rows, weight = draw(shape, device, dtype)
    skip_unless_served(rows, weight)
    out = clip_conv(rows, weight, impl="gluon")
    assert out.is_contiguous()
    assert_right(out, rows, weight)
    for _ in range(20):
        assert torch.equal(clip_conv(rows, weight, impl="gluon"), out)


@pytest.mark.gpu
def test_more_tiles_than_programs(device: torch.device) -> None:
    rows, weight = draw((2, 21, 70, 90, 96, 3), device, torch.bfloat16)
    skip_unless_served(rows, weight)
    out = clip_conv(rows, weight, impl="gluon")
    gold = clip_conv_ref(rows.double(), weight.double())
    assert_close_to_gold(out, gold, clip_conv_ref(rows, weight))


@pytest.mark.gpu
def test_nothing_is_written_beyond_the_output(device: torch.device) -> None:
    rows, weight = draw((1, 3, 19, 21, 96, 3), device, torch.float16)
    skip_unless_served(rows, weight)
    from vidaccel.kernels.conv.clip_conv_gluon import prepare

    memory = torch.full((3, 1, 3, 19, 21, 96), 77.0, dtype=rows.dtype, device=device)
    laid_out = weight.contiguous(memory_format=torch.channels_last_3d)
    prepare(tuple(rows.shape), 3, rows.dtype, device)(rows, laid_out, laid_out, memory[1], memory[1])
    assert (memory[::2] == 77).all()
    assert_right(memory[1], rows, weight)


@pytest.mark.gpu
def test_addresses_that_tma_does_not_take(device: torch.device) -> None:
    rows, weight = draw((1, 2, 9, 8, 32, 3), device, torch.float16)
    skip_unless_served(rows, weight)
    memory = rows.new_empty(rows.numel() + 1)[1:].view(rows.shape).copy_(rows)
    assert memory.data_ptr() % 16
    assert torch.equal(clip_conv(memory, weight, impl="gluon"), clip_conv(rows, weight, impl="gluon"))


@pytest.mark.gpu
def test_nan_reaches_its_neighbours_only(device: torch.device) -> None:
    rows, weight = draw((1, 4, 20, 20, 96, 3), device, torch.float16)
    skip_unless_served(rows, weight)
    rows[0, 3, 10, 11, 5] = float("nan")
    spoilt = clip_conv(rows, weight, impl="gluon").isnan().any(-1)[0].nonzero()
    assert {tuple(at) for at in spoilt.tolist()} == {
        (f, y, x) for f in (1, 2, 3) for y in (9, 10, 11) for x in (10, 11, 12)
    }


@pytest.mark.gpu
def test_a_clip_of_more_than_2_31_numbers(device: torch.device) -> None:
    rows = torch.randn(1, 59, 480, 832, 96, device=device, dtype=torch.bfloat16)
    _, weight = draw((1, 1, 1, 1, 96, 3), device, torch.bfloat16)
    skip_unless_served(rows, weight)
    out = clip_conv(rows, weight)
    for f in (0, 56):
        some = rows[:, f : f + 3]
        assert_close_to_gold(
            out[:, f : f + 1], clip_conv_ref(some.double(), weight.double()), clip_conv_ref(some, weight)
        )


@pytest.mark.gpu
def test_registration(device: torch.device) -> None:
    rows, weight = draw((1, 2, 8, 8, 32, 3), device, torch.float16)
    skip_unless_served(rows, weight)
    torch.library.opcheck(CLIP_CONV.registered["gluon"], (rows, weight, None, False))


# two frames by four products


def longest(rows: Tensor) -> Tensor:
    """The length of the longest pixel."""
    return torch.linalg.vector_norm(rows.float(), dim=-1).amax().view(1)


@pytest.fixture
def winograd_dtype(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """What it is for; the interpreter's bfloat16 is wrong."""
    if device.type == "cuda":
        return torch.bfloat16
    monkeypatch.setattr(op, "WINOGRAD_DTYPES", (torch.float16,))
    return torch.float16


def assert_winograd_right(rows: Tensor, weight: Tensor, bordered: bool = False) -> Tensor:
    """Its error is no larger than that of a convolution in bfloat16, and a little more."""
    out = clip_conv(rows, weight, longest(rows), bordered=bordered, impl="winograd")
    gold = clip_conv_ref(rows.double(), weight.to(rows.dtype).double(), bordered=bordered)
    rounded = clip_conv_ref(rows.float(), weight.to(rows.dtype).float(), bordered=bordered).bfloat16()
    assert out.dtype == rows.dtype and out.is_contiguous()
    error, of_rounding = (torch.linalg.vector_norm(x.double() - gold) for x in (out, rounded))
    assert error <= 1.1 * of_rounding
    return out


WINOGRAD_SHAPES = [
    pytest.param((1, 4, 6, 5, 16, 3), 24, id="even"),
    pytest.param((2, 5, 7, 3, 8, 3), 8, id="odd-frames-of-two-clips"),
    pytest.param((5, 4, 3, 2, 8, 3), 16, id="five-clips"),
    pytest.param((1, 1, 4, 4, 8, 3), 16, id="one-frame"),
    pytest.param((1, 2, 1, 1, 24, 3), 8, id="one-pixel"),
]


@pytest.mark.parametrize("bordered", [False, True], ids=["zeros", "bordered"])
@pytest.mark.parametrize("pairs", [1, 2, 4, 100])
@pytest.mark.parametrize(("shape", "channels_out"), WINOGRAD_SHAPES)
def test_winograd(
    shape: Shape,
    channels_out: int,
    pairs: int,
    bordered: bool,
    winograd_dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(winograd, "pairs_at_once", lambda *args: pairs)
    CLIP_CONV.forget()
    rows, weight = draw(shape, device, winograd_dtype, channels_out)
    if bordered:
        rows = F.pad(rows, (0, 0, 1, 1, 1, 1), value=0.7)
    assert_winograd_right(rows, weight, bordered)


@pytest.mark.parametrize(
    ("scale", "weight_scale"),
    [
        (1.0, 1.0),
        (1e-3, 300.0),
        (2000.0, 1e-2),
        pytest.param(2000.0, 300.0, marks=pytest.mark.gpu),  # float16, as the interpreter has it, holds no such result
        pytest.param(1e-3, 1e-6, marks=pytest.mark.gpu),
    ],
)
def test_winograd_of_any_size(
    scale: float, weight_scale: float, winograd_dtype: torch.dtype, device: torch.device
) -> None:
    """What float16 would not hold: products to a million, and sums where float16 has few bits left."""
    rows, weight = draw((1, 3, 5, 4, 16, 3), device, torch.float32, 8)
    assert_winograd_right((rows * scale).to(winograd_dtype), weight * weight_scale)


@pytest.mark.parametrize("exponent", [-8, -16])
def test_an_output_channel_of_small_weights_is_right_by_its_own_scale(
    exponent: int, winograd_dtype: torch.dtype, device: torch.device
) -> None:
    rows, weight = draw((1, 4, 12, 12, 64, 3), device, winograd_dtype, 24)
    weight *= 2.0**8
    weight[17] *= 2.0**exponent
    out = clip_conv(rows, weight, longest(rows), impl="winograd")
    gold = clip_conv_ref(rows.double(), weight.double())
    error = torch.linalg.vector_norm((out.double() - gold).flatten(0, -2), dim=0)
    size = torch.linalg.vector_norm(gold.flatten(0, -2), dim=0)
    assert (error <= 2.5e-3 * size).all(), "bfloat16 rounds by 1.7e-3, at the root mean square"


@pytest.mark.parametrize("what", ["rows", "weight"])
def test_winograd_of_nothing_but_zeros(what: str, winograd_dtype: torch.dtype, device: torch.device) -> None:
    rows, weight = draw((1, 3, 5, 4, 16, 3), device, winograd_dtype, 8)
    (rows if what == "rows" else weight).zero_()
    assert not clip_conv(rows, weight, longest(rows), impl="winograd").any()


def test_winograd_leaves_nan_where_it_belongs(winograd_dtype: torch.dtype, device: torch.device) -> None:
    for at in range(6):
        rows, weight = draw((1, 4, 6, 6, 8, 3), device, winograd_dtype, 8)
        largest = longest(rows)
        rows[0, at, 2, 3, 5] = float("nan")
        found = clip_conv(rows, weight, largest, impl="winograd").isnan()
        assert torch.equal(found.cpu(), clip_conv_ref(rows.float().cpu(), weight.float().cpu()).isnan())


def test_winograd_takes_any_weight(winograd_dtype: torch.dtype, device: torch.device) -> None:
    rows, weight = draw((1, 2, 4, 4, 8, 3), device, torch.float32, 16)
    rows = rows.to(winograd_dtype)
    out = clip_conv(rows, weight, longest(rows), impl="winograd")
    for other in (weight.to(winograd_dtype), weight.contiguous(memory_format=torch.channels_last_3d), weight.double()):
        assert torch.equal(clip_conv(rows, other, longest(rows), impl="winograd"), out)


def test_winograd_finds_no_memory(
    winograd_dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(winograd, "prepare", lambda *args: fails)
    CLIP_CONV.forget()
    rows, weight = draw((1, 2, 4, 4, 8, 3), device, winograd_dtype, 16)
    out = clip_conv(rows, weight, longest(rows), impl="winograd")
    assert torch.equal(out, clip_conv(rows, weight, impl="library"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"largest": None}, "nobody says how large"),
        ({"dtype": torch.float32}, "small beside those of bfloat16 alone, rows is torch.float32"),
        ({"channels_out": 12}, r"channels in steps of 8, got \(12, 16, 3, 3, 3\)"),
        ({"seen": 1}, r"takes 3 x 3 x 3 taps .* got \(8, 16, 1, 3, 3\)"),
        ({"transposed": True}, "takes contiguous rows"),
        ({"samples": 0}, "there is nothing to multiply"),
    ],
)
def test_what_winograd_does_not_serve(
    change: dict[str, Any], reason: str, winograd_dtype: torch.dtype, device: torch.device
) -> None:
    shape = (change.get("samples", 1), 3, 4, 4, 16, change.get("seen", 3))
    rows, weight = draw(shape, device, change.get("dtype", winograd_dtype), change.get("channels_out", 8))
    if "transposed" in change:
        rows = rows.transpose(2, 3)
    largest = change.get("largest", torch.ones(1, device=device))
    found = CLIP_CONV.unserved(rows, weight, largest, False, impl="winograd")
    assert found is not None and re.search(reason, found)


@pytest.mark.parametrize(
    ("shape", "channels_out", "bordered", "pays"),
    [
        ((1, 8, 352, 640, 256, 3), 256, False, True),
        ((1, 8, 352, 640, 256, 3), 256, True, False),  # the library is faster there
        ((1, 3, 352, 640, 256, 3), 256, False, False),  # a fourth frame for nothing
        ((1, 8, 352, 640, 96, 3), 256, False, False),
        ((1, 8, 16, 16, 256, 3), 256, False, False),
    ],
    ids=["large", "bordered", "three-frames", "few-channels", "small"],
)
@pytest.mark.gpu
def test_where_winograd_runs_if_nothing_is_measured(
    shape: Shape, channels_out: int, bordered: bool, pays: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDACCEL_TUNE", "off")
    assert ran_for(shape, channels_out, bordered, device) == [("winograd" if pays else "library", "")]


@pytest.mark.gpu
def test_the_faster_of_winograd_and_the_library_runs(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDACCEL_CACHE_DIR", str(tmp_path))
    ((ran, problem),) = ran_for((2, 9, 128, 128, 256, 3), 256, True, device)
    assert not problem
    ((_, _, measured),) = remembered()
    assert set(measured.milliseconds) == {"winograd", "library"}
    assert measured.milliseconds[ran] <= 1.03 * min(measured.milliseconds.values())


def ran_for(shape: Shape, channels_out: int, bordered: bool, device: torch.device) -> list[tuple[str, str]]:
    """What ran for such rows, and what was wrong with it."""
    samples, frames, height, width, channels, seen = shape
    border = 2 * bordered
    rows = torch.randn(samples, frames + 2, height + border, width + border, channels, device=device).bfloat16()
    weight = torch.randn(channels_out, channels, seen, 3, 3, device=device).bfloat16() / 48
    with listening(checks=True) as events:
        clip_conv(rows, weight, longest(rows), bordered=bordered)
    return [(event.implementation, event.problem) for event in events if event.op == "clip_conv"]


@pytest.mark.parametrize("frame", [0, 9, 20])
def test_samples_of_a_large_call_come_to_every_frame_of_every_clip(frame: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "SAMPLED_FLOPS", 0)
    rows, weight = draw((2, 21, 3, 4, 8, 3), torch.device("cpu"), torch.float32, 8)
    right = clip_conv_ref(rows, weight)
    wrong = right.clone()
    wrong[1, frame, 1, 2] = 0
    outputs = iter([right] * WHOLE_CHECKS + [wrong] * op.SAMPLES)
    ways = {"library": Implementation(lambda *args: next(outputs))}
    monkeypatch.setattr(CLIP_CONV, "implementations", CLIP_CONV.implementations | ways)
    CLIP_CONV.forget()
    with torch.no_grad(), sampling(), listening(checks=True) as events:
        returned = [clip_conv(rows, weight) for _ in range(WHOLE_CHECKS + op.SAMPLES)]
    CLIP_CONV.forget()
    found = [bool(event.problem) for event in events]
    first = found.index(True)
    assert all(found[first:]) and all(torch.equal(out, right) for out in returned[first:])
    step = math.ceil(21 / op.SAMPLES)
    assert first == WHOLE_CHECKS + (frame // step - WHOLE_CHECKS) % math.ceil(21 / step)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "channels_out"),
    [((1, 8, 352, 640, 256, 3), 256), ((2, 24, 60, 104, 384, 3), 512), ((8, 31, 16, 16, 1024, 3), 1024)],
    ids=["one", "some", "tiles"],
)
def test_memory_of_winograd(shape: Shape, channels_out: int, device: torch.device) -> None:
    samples, frames, height, width, channels, seen = shape
    rows = torch.randn(samples, frames + 2, height, width, channels, device=device).bfloat16()
    weight = torch.randn(channels_out, channels, seen, 3, 3, device=device).bfloat16() / 48
    largest = longest(rows)
    clip_conv(rows, weight, largest, impl="winograd")
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    out = clip_conv(rows, weight, largest, impl="winograd")
    peak = torch.cuda.max_memory_allocated(device) - before - out.nbytes
    counted = op.workspace_bytes(rows, frames, height * width, channels, channels_out)
    assert 0.9 * counted <= peak <= 1.2 * counted + 20 * weight.nbytes, f"{peak / 2**20:.0f} MiB"


@pytest.mark.gpu
def test_winograd_of_many_numbers(device: torch.device) -> None:
    """Offsets beyond 2**31."""
    rows = torch.randn(1, 34, 352, 640, 288, device=device, dtype=torch.bfloat16)
    weight = torch.randn(8, 288, 3, 3, 3, device=device, dtype=torch.bfloat16) / 50
    out = clip_conv(rows, weight, longest(rows[:, :1]) + 10, impl="winograd")
    for f in (0, 31):
        some = rows[:, f : f + 3, -9:]
        gold = clip_conv_ref(some.double(), weight.double())[:, :, 1:]
        assert_close_to_gold(out[:, f : f + 1, -8:], gold, clip_conv_ref(some, weight)[:, :, 1:])


def test_winograd_registration(winograd_dtype: torch.dtype, device: torch.device) -> None:
    rows, weight = draw((1, 2, 4, 4, 8, 3), device, winograd_dtype, 16)
    torch.library.opcheck(CLIP_CONV.registered["winograd"], (rows, weight, longest(rows), False))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_winograd_kernels_compile(target: str) -> None:
    for kernel, pointers in (
        (winograd._spread_kernel, {"rows_ptr": "*bf16:16", "sums_ptr": "*fp16:16"}),
        (winograd._join_kernel, {f"m{at}_ptr": "*fp16:16" for at in range(4)} | {"out_ptr": "*bf16:16"}),
    ):
        signature = {
            **pointers,
            "scale_ptr": "*fp32:16",
            "inverses_ptr": "*fp32:16",
            "numbers": "i32:16",
            "sample_frames": "i32",
        }
        constants = {"ODD": True, "BLOCK": winograd.BLOCK, "CHANNELS": 384}
        asm = compile_for(target, kernel, signature, constants, num_warps=winograd.NUM_WARPS)
        assert_no_spills(asm)
        if "sass" in asm:
            single = ["LDG.E"] if kernel is winograd._spread_kernel else []  # the input's scale
            assert narrow_accesses(asm) == single
