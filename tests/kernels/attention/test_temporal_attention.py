from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import pytest
import torch
import triton
from kernel_checks import DTYPES, TARGETS, assert_close_to_gold, assert_no_spills, compile_for
from torch import Tensor

from vidaccel.kernels.attention import temporal_attention as op
from vidaccel.kernels.attention.temporal_attention import (
    TEMPORAL_ATTENTION,
    Tiling,
    bind,
    choose_tiling,
    temporal_attention,
    temporal_attention_ref,
)
from vidaccel.kernels.check import MOST_ELEMENTS
from vidaccel.kernels.op import Implementation, listening


class Shape(NamedTuple):
    samples: int
    frames: int
    pixels: int
    heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.samples}x{self.frames}f-{self.pixels}px-{self.heads}x{self.head_dim}"


SHAPES = [
    Shape(2, 14, 5, 2, 64),
    Shape(1, 16, 5, 3, 40),
    Shape(1, 16, 3, 2, 72),
    Shape(2, 16, 1, 3, 80),
    Shape(1, 16, 2, 2, 160),
    Shape(1, 25, 3, 3, 64),
    Shape(1, 7, 35, 1, 32),
    Shape(1, 13, 5, 1, 96),
    Shape(2, 3, 5, 3, 24),
    Shape(2, 1, 5, 5, 64),
    Shape(1, 32, 2, 2, 160),
]
LONG_SHAPES = [Shape(1, 49, 3, 1, 64), Shape(1, 128, 1, 2, 40), Shape(1, 101, 1, 1, 160)]
REAL_SHAPES = [
    Shape(2, 14, 9216, 5, 64),
    Shape(2, 14, 2304, 10, 64),
    Shape(2, 14, 576, 20, 64),
    Shape(2, 16, 4096, 8, 40),
    Shape(2, 16, 1024, 8, 80),
    Shape(2, 16, 256, 8, 160),
    Shape(2, 16, 1024, 16, 72),
    Shape(2, 24, 2880, 5, 64),
    Shape(2, 25, 9216, 5, 64),
]


def draw(
    shape: Shape, dtype: torch.dtype, device: torch.device, *, frames_k: int | None = None, factor: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v: slices of one packed projection, as far as they have the same frames; ``factor`` sharpens the scores."""
    torch.manual_seed(0)
    samples, frames, pixels, heads, head_dim = shape
    channels = heads * head_dim
    q, k, v = torch.randn(samples * frames, pixels, 3 * channels, device=device).to(dtype).chunk(3, dim=-1)
    if frames_k is not None:
        k, v = torch.randn(samples * frames_k, pixels, 2 * channels, device=device).to(dtype).chunk(2, dim=-1)
    return q * factor, k, v


def assert_matches_reference(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, shape: Shape, scale: float | None = None
) -> None:
    gold = temporal_attention_ref(q.double(), k.double(), v.double(), shape.frames, shape.heads, scale=scale)
    assert_close_to_gold(out, gold, temporal_attention_ref(q, k, v, shape.frames, shape.heads, scale=scale))
    assert out.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = draw(shape, dtype, device)
    out = temporal_attention(q, k, v, shape.frames, shape.heads, impl="triton")
    assert_matches_reference(out, q, k, v, shape)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32], ids=str)
@pytest.mark.parametrize("shape", LONG_SHAPES, ids=str)
def test_many_frames(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = draw(shape, dtype, device)
    out = temporal_attention(q, k, v, shape.frames, shape.heads, impl="triton")
    assert_matches_reference(out, q, k, v, shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("frames", "frames_k"), [(14, 1), (1, 14), (5, 16), (25, 8), (3, 32)])
def test_attends_to_other_frames(frames: int, frames_k: int, dtype: torch.dtype, device: torch.device) -> None:
    shape = Shape(2, frames, 3, 3, 40)
    q, k, v = draw(shape, dtype, device, frames_k=frames_k)
    out = temporal_attention(q, k, v, frames, shape.heads, impl="triton")
    assert_matches_reference(out, q, k, v, shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("frames", [7, 14])
def test_large_scores(frames: int, dtype: torch.dtype, device: torch.device) -> None:
    shape = Shape(1, frames, 5, 2, 64)
    q, k, v = draw(shape, dtype, device, factor=30.0)
    out = temporal_attention(q, k, v, frames, shape.heads, impl="triton")
    assert_matches_reference(out, q, k, v, shape)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("scale", [1.0, -0.3])
def test_scale(scale: float, impl: str, device: torch.device) -> None:
    shape = Shape(1, 7, 3, 2, 32)
    q, k, v = draw(shape, torch.float32, device)
    out = temporal_attention(q, k, v, shape.frames, shape.heads, scale=scale, impl=impl)
    assert_matches_reference(out, q, k, v, shape, scale)


def test_reference_is_softmax_over_frames_in_float64(device: torch.device) -> None:
    q, k, v = draw(Shape(2, 3, 4, 2, 8), torch.float64, device, frames_k=5)
    q_items, k_items, v_items = (x.view(2, -1, 4, 2, 8) for x in (q.contiguous(), k.contiguous(), v.contiguous()))
    scores = torch.einsum("bfphd,bgphd->bphfg", q_items, k_items) / math.sqrt(8)
    expected = torch.einsum("bphfg,bgphd->bfphd", scores.softmax(-1), v_items)
    torch.testing.assert_close(temporal_attention_ref(q, k, v, 3, 2), expected.reshape(6, 4, 16))


@pytest.mark.parametrize("programs", [1, 5, 1000])
@pytest.mark.parametrize(
    "tiling",
    [
        Tiling(16, 64, 1, 1),
        Tiling(16, 32, 1, 3),
        Tiling(32, 64, 1, 3),
        Tiling(32, 64, 2, 2),
        Tiling(64, 32, 4, 3),
        Tiling(128, 16, 8, 1),
    ],
    ids=lambda tiling: f"{tiling.rows}x{tiling.columns}",
)
def test_result_does_not_depend_on_the_cut(tiling: Tiling, programs: int, device: torch.device) -> None:
    """One item or several to a tile, one tile or several to a program, the last tile ragged."""
    shape = Shape(2, 13, 7, 1, 40)
    q, k, v = draw(shape, torch.float16, device)
    arguments = q, k, v, shape.frames, shape.heads, 40**-0.5
    out = bind(*arguments, tiling=tiling, programs=programs)(*arguments)
    assert_matches_reference(out, q, k, v, shape)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), id="pixels-first"),
        pytest.param(lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]], id="rows-cut"),
        pytest.param(lambda x: torch.nn.functional.pad(x, (3, 2))[..., 3:-2], id="rows-unaligned"),
    ],
)
def test_takes_any_row_strides(layout: Callable[[Tensor], Tensor], impl: str, device: torch.device) -> None:
    shape = Shape(2, 7, 5, 2, 40)
    q, k, v = draw(shape, torch.float16, device)
    laid_out = [layout(x) for x in (q, k, v)]
    assert not any(x.is_contiguous() for x in laid_out)
    out = temporal_attention(*laid_out, shape.frames, shape.heads, impl=impl)
    assert_matches_reference(out, q, k, v, shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_matches_reference(shape: Shape, device: torch.device) -> None:
    q, k, v = draw(shape, torch.float32, device)
    out = temporal_attention(q, k, v, shape.frames, shape.heads, impl="torch")
    assert_matches_reference(out, q, k, v, shape)


def test_torch_takes_more_pixels_than_library_kernels(device: torch.device) -> None:
    shape = Shape(2, 2, 65537, 1, 8)
    q, k, v = draw(shape, torch.float32, device)
    out = temporal_attention(q, k, v, shape.frames, shape.heads, impl="torch")
    assert_matches_reference(out, q, k, v, shape)
    ends = torch.tensor([0, 65534, 65535, 65536], device=device)
    few = temporal_attention_ref(q[:, ends], k[:, ends], v[:, ends], shape.frames, shape.heads)
    torch.testing.assert_close(out[:, ends], few)


@pytest.mark.parametrize(
    ("shape", "frames_k", "dtype", "reason"),
    [
        (Shape(1, 3, 2, 1, 64), None, torch.float64, "float16, bfloat16 and float32, x is torch.float64"),
        (Shape(1, 3, 2, 1, 12), None, torch.float32, "head_dim up to 160 in steps of 8, got 12"),
        (Shape(1, 3, 2, 1, 168), None, torch.float32, "head_dim up to 160 in steps of 8, got 168"),
        (Shape(1, 129, 2, 1, 32), None, torch.float16, "up to 128 frames of torch.float16, got 129"),
        (Shape(2, 3, 2, 1, 32), 33, torch.float32, "up to 32 frames of torch.float32, got 33"),
    ],
    ids=["float64", "odd-head", "wide-head", "many-frames", "many-frames-float32"],
)
def test_unserved_input_runs_in_torch(
    shape: Shape, frames_k: int | None, dtype: torch.dtype, reason: str, device: torch.device
) -> None:
    q, k, v = draw(shape, dtype, device, frames_k=frames_k)
    assert_runs_in_torch(q, k, v, shape, reason)


def test_strided_channels_run_in_torch(device: torch.device) -> None:
    shape = Shape(1, 3, 2, 1, 32)
    q, k, v = draw(shape, torch.float32, device)
    assert_runs_in_torch(q, k.mT.contiguous().mT, v, shape, "a last stride of 1")


def test_gradients_run_in_torch(device: torch.device) -> None:
    shape = Shape(2, 3, 2, 2, 8)
    q, k, v = (x.contiguous().requires_grad_() for x in draw(shape, torch.float32, device))
    assert_runs_in_torch(q, k, v, shape, "no backward pass")
    ours = torch.autograd.grad(temporal_attention(q, k, v, 3, 2).square().sum(), (q, k, v))
    eager = torch.autograd.grad(temporal_attention_ref(q, k, v, 3, 2).square().sum(), (q, k, v))
    torch.testing.assert_close(ours, eager)


def assert_runs_in_torch(q: Tensor, k: Tensor, v: Tensor, shape: Shape, reason: str) -> None:
    with listening() as events:
        out = temporal_attention(q, k, v, shape.frames, shape.heads)
    assert [event.implementation for event in events] == ["torch"] and reason in events[0].reason
    assert torch.equal(out, temporal_attention(q, k, v, shape.frames, shape.heads, impl="torch"))
    with pytest.raises(ValueError, match=f"temporal_attention: impl='triton' cannot run: .*{re.escape(reason)}"):
        temporal_attention(q, k, v, shape.frames, shape.heads, impl="triton")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.ones(6, 32)}, ValueError, r"q must be \[B\*F, HW, H\*D\], .* got q \(6, 32\), k \(6, 4, 32\)"),
        (
            {"k": torch.ones(3, 4, 32)},
            ValueError,
            r"k and v \[B\*Fk, HW, H\*D\], got .* k \(3, 4, 32\), v \(6, 4, 32\)",
        ),
        ({"q": torch.ones(6, 5, 32)}, ValueError, r"q must be \[B\*F, HW, H\*D\], .* got q \(6, 5, 32\)"),
        (
            {"k": torch.ones(0, 4, 32), "v": torch.ones(0, 4, 32)},
            ValueError,
            r"k and v must not be empty unless q is, got q \(6, 4, 32\), k \(0, 4, 32\)",
        ),
        ({"q": torch.ones(0, 4, 32)}, ValueError, r"the B=0 samples of q must divide the B\*Fk=6 rows of k"),
        ({"num_frames": 4}, ValueError, r"num_frames=4 must divide the B\*F=6 rows of q, got q \(6, 4, 32\)"),
        ({"num_frames": 0}, ValueError, r"num_frames=0 must divide the B\*F=6 rows of q"),
        ({"num_heads": 3}, ValueError, r"num_heads=3 must divide the H\*D=32 channels of q, got q \(6, 4, 32\)"),
        ({"q": torch.ones(12, 4, 32)}, ValueError, r"the B=4 samples of q must divide the B\*Fk=6 rows of k"),
        ({"q": torch.ones(6, 4, 32).half()}, TypeError, r"must share a dtype, got torch.float16, torch.float32 and"),
        ({"impl": "flash"}, ValueError, r"impl must be one of triton, torch, got 'flash'"),
    ],
)
def test_rejects(change: dict[str, object], error: type[Exception], message: str) -> None:
    rows = torch.ones(6, 4, 32)
    arguments = {"q": rows, "k": rows, "v": rows, "num_frames": 3, "num_heads": 2, **change}
    with pytest.raises(error, match=f"temporal_attention: .*{message}"):
        temporal_attention(**arguments)


@pytest.mark.parametrize("shape", [(0, 4, 32), (6, 0, 32), (6, 4, 0)], ids=["no sample", "no pixel", "no channel"])
def test_empty_input(shape: tuple[int, int, int], device: torch.device) -> None:
    rows = torch.empty(shape, dtype=torch.float16, device=device)
    out = temporal_attention(rows, rows, rows, 3, 2)
    assert out.shape == shape and out.dtype == torch.float16


def test_registration(device: torch.device) -> None:
    for frames_k in (None, 2):
        q, k, v = draw(Shape(2, 3, 4, 2, 16), torch.float32, device, frames_k=frames_k)
        torch.library.opcheck(TEMPORAL_ATTENTION.registered["triton"], (q, k, v, 3, 2, 0.25))


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_compiles_fullgraph(impl: str, device: torch.device) -> None:
    shape = Shape(2, 3, 4, 2, 16)
    q, k, v = draw(shape, torch.float32, device)
    attend = functools.partial(temporal_attention, num_frames=shape.frames, num_heads=shape.heads, impl=impl)
    compiled = torch.compile(lambda q, k, v: attend(q, k, v) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), attend(q, k, v) + 1)


# the check


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_check_passes_what_is_right(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = draw(shape, dtype, device, factor=3.0)
    with listening(checks=True) as events:
        temporal_attention(q, k, v, shape.frames, shape.heads, impl="triton")
    assert [(event.implementation, event.problem) for event in events] == [("triton", "")]


def of_clip(out: Tensor) -> Tensor:
    """``[B, F, HW, C]`` of five frames."""
    return out.unflatten(0, (-1, 5))


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(lambda out: out.mul_(1.01), id="off-by-a-percent"),
        pytest.param(lambda out: out[6].mul_(1.02), id="one-frame-off-by-two-percent"),
        pytest.param(lambda out: out[..., :32].mul_(1.01), id="one-head-off-by-a-percent"),
        pytest.param(lambda out: out[3, 17].zero_(), id="one-row-missing"),
        pytest.param(lambda out: out[:, 17, :32].zero_(), id="one-item-missing"),
        pytest.param(lambda out: out[:2].copy_(out[:2].flip(0)), id="two-frames-swapped"),
        pytest.param(lambda out: of_clip(out).copy_(of_clip(out).roll(1, 1)), id="off-by-one-frame"),
        pytest.param(lambda out: of_clip(out).copy_(of_clip(out).flip(0)), id="two-samples-swapped"),
        pytest.param(lambda out: out.copy_(out.roll(1, 1)), id="off-by-one-pixel"),
    ],
)
def test_the_check_finds_what_is_wrong(
    fault: Callable[[Tensor], Tensor], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: object) -> Tensor:
        out = temporal_attention_ref(*args)
        fault(out)
        return out

    assert_found(wrong, device, monkeypatch)


def test_the_check_finds_keys_of_the_next_frame(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor, *numbers: object) -> Tensor:
        return temporal_attention_ref(q, of_clip(k).roll(1, 1).flatten(0, 1), v, *numbers)

    assert_found(wrong, device, monkeypatch)


@pytest.mark.parametrize("factor", [1.01, 2.0])
def test_the_check_finds_another_scale(factor: float, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int, scale: float) -> Tensor:
        return temporal_attention_ref(q, k, v, frames, heads, scale * factor)

    assert_found(wrong, device, monkeypatch)


def assert_found(wrong: Callable[..., Tensor], device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TEMPORAL_ATTENTION.implementations, "triton", Implementation(wrong))
    q, k, v = draw(Shape(2, 5, 70, 3, 32), torch.float16, device, factor=2.0)
    with listening(checks=True) as events:
        out = temporal_attention(q, k, v, 5, 3, impl="triton")
    assert [event.implementation for event in events] == ["triton"] and events[0].problem
    assert torch.equal(out, temporal_attention_ref(q, k, v, 5, 3))


def test_the_check_works_in_parts_of_bounded_size() -> None:
    q = torch.empty(28, 9216, 1, dtype=torch.float16).expand(28, 9216, 1280)
    out = torch.zeros(28, 9216, 1, dtype=torch.uint8).expand(28, 9216, 1280)
    assert TEMPORAL_ATTENTION.parts is not None
    parts = list(TEMPORAL_ATTENTION.parts(q, q, q, 14, 20, 0.125))
    assert len(parts) <= 8
    assert sum(part.of((out,))[0].numel() for part in parts) == out.numel()
    for part in parts:
        part_q, part_k, _, frames, heads, scale = part.args
        assert part.of((out,))[0].shape == (14 * heads, 9216, 64)
        assert (frames, scale) == (14, 0.125) and part_q.numel() + part_k.numel() <= 4 * MOST_ELEMENTS
    few = q[:14, :1000, :320]
    (part,) = TEMPORAL_ATTENTION.parts(few, few, few, 14, 5, 0.125)
    assert part.args[4] == 5 and part.of((out[:14, :1000, :320],))[0].shape == (14 * 5, 1000, 64)


def test_costs_of_other_frames() -> None:
    q, k, v = draw(Shape(2, 3, 4, 2, 32), torch.float32, torch.device("cpu"), frames_k=5)
    with listening() as events:
        temporal_attention(q, k, v, 3, 2, impl="torch")
    assert events[0].costs == (4 * 2 * 4 * 64 * (2 * 3 + 2 * 5), 4 * 2 * 4 * 2 * 3 * 5 * 32)


# what the compilers make of the kernel


def compile_op(target: str, frames: int, head_dim: int, dtype: torch.dtype, tiling: Tiling) -> dict[str, str]:
    """What a launch over five heads compiles."""
    rows, columns, num_warps, stages = tiling
    block = triton.next_power_of_2(rows // frames * frames)
    pointer = {torch.float16: "*fp16:16", torch.bfloat16: "*bf16:16", torch.float32: "*fp32:16"}[dtype]
    return compile_for(
        target,
        op._temporal_attention_kernel,
        {
            **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), pointer),
            **dict.fromkeys(("num_pixels", "programs_per_sample"), "i32"),
            **{f"stride_{x}_{axis}": "i32" for x in "qkv" for axis in ("frame", "pixel")},
            "scale_log2": "fp32",
        },
        {
            **{"NUM_HEADS": 5, "HEAD_DIM": head_dim, "FRAMES_Q": frames, "FRAMES_K": frames},
            **{"ITEMS": rows // frames, "BLOCK_M": block, "BLOCK_N": block, "BLOCK_D": columns},
            **{"ALIGN": math.gcd(16, head_dim), "STAGES": stages},
        },
        num_warps=num_warps,
    )


def shared_bytes_while_streaming(asm: Mapping[str, str]) -> int:
    """Shared memory of the ring buffers that hold q, k and v."""
    buffers = re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<((?:\d+x)+)[a-z]+(\d+)", asm["ttgir"])
    return sum(math.prod(map(int, shape.rstrip("x").split("x"))) * int(bits) // 8 for shape, bits in buffers)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("frames", "head_dim", "dtype", "items"),
    [
        (14, 64, torch.float16, 5 * 9216),
        (16, 64, torch.float16, 5 * 1024),
        (16, 40, torch.bfloat16, 8 * 4096),
        (16, 160, torch.float16, 8 * 256),
        (25, 80, torch.float16, 8 * 1024),
        (25, 64, torch.float32, 5 * 9216),
        (64, 160, torch.float16, 8 * 1024),
        (128, 80, torch.float16, 8 * 1024),
    ],
    ids=str,
)
def test_compiles_to_what_the_design_promises(
    target: str, frames: int, head_dim: int, dtype: torch.dtype, items: int
) -> None:
    if target == "sm_100" and frames > op.MAX_FRAMES_BLACKWELL:
        pytest.skip("the kernel declines: Triton 3.6 makes a trap of it")
    tiling = choose_tiling(frames, head_dim, dtype, items)
    asm = compile_op(target, frames, head_dim, dtype, tiling)
    if target == "sm_100" and "UTCHMMA" in asm["sass"]:  # one scalar goes to memory and back, outside of the loop
        assert len(re.findall(r"\b(?:LDL|STL)\b", asm["sass"])) <= 2
    else:
        assert_no_spills(asm)
    if "sass" not in asm:
        assert dtype == torch.float32 or "v_mfma" in asm["amdgcn"]
        return
    accesses = re.findall(r"\b(?:LDG|STG|LDGSTS)\.\S+", asm["sass"])
    assert accesses and all(".128" in access for access in accesses)
    product = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}.get(target, "HMMA") if tiling.rows >= 64 else "HMMA"
    warpgroups = product != "HMMA"  # their operands lie in shared memory as well
    if dtype != torch.float32:
        assert product in asm["sass"]
    if frames <= 32:
        assert not re.search(r"\bLDG\.", asm["sass"]), "q, k and v are to be fetched by cp.async"
        groups_left_in_flight = [int(n) for n in re.findall(r"cp\.async\.wait_group\s+(\d+)", asm["ptx"])]
        assert max(groups_left_in_flight) > 0, "the next tile is to be on its way while this one is worked on"
        assert 0 < shared_bytes_while_streaming(asm) <= (2 + warpgroups) * op.PREFETCHED_TILE_BYTES


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", REAL_SHAPES, ids=str)
def test_real_shapes(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = draw(shape, dtype, device)
    out = temporal_attention(q, k, v, shape.frames, shape.heads, impl="triton")
    assert_matches_reference(out, q, k, v, shape)


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [1, 4])
def test_torch_takes_rows_at_any_address(offset: int, device: torch.device) -> None:
    x = torch.randn(14 * 35 * 80 + 8, device=device).half()[offset:][: 14 * 35 * 80].view(14, 35, 80)
    assert_matches_reference(temporal_attention(x, x, x, 7, 2, impl="torch"), x, x, x, Shape(2, 7, 35, 2, 40))


@pytest.mark.gpu
def test_more_rows_than_a_grid_axis_holds(device: torch.device) -> None:
    shape = Shape(2, 16, 40000, 1, 64)
    q, k, v = draw(shape, torch.float16, device)
    out = temporal_attention(q, k, v, shape.frames, shape.heads, impl="triton")
    assert_matches_reference(out, q, k, v, shape)


@pytest.mark.gpu
def test_offsets_beyond_int32(device: torch.device) -> None:
    q = torch.randn(16, 2**17 + 1, 1280, dtype=torch.float16, device=device)
    assert q.numel() > 2**31
    out = temporal_attention(q, q, q, 16, 20, impl="triton")
    last = q[:, -1:].contiguous()
    assert_matches_reference(out[:, -1:].contiguous(), last, last, last, Shape(1, 16, 1, 20, 64))
