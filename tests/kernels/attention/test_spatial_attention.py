from __future__ import annotations

import functools
import math
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from kernel_checks import TARGETS, assert_close_to_gold, assert_no_spills, compile_for, narrow_accesses
from torch import Tensor

from vidaccel.kernels import choice
from vidaccel.kernels.attention import spatial_attention as op
from vidaccel.kernels.attention.spatial_attention import (
    SPATIAL_ATTENTION,
    Blocks,
    bind_triton,
    choose_blocks,
    spatial_attention,
    spatial_attention_ref,
)
from vidaccel.kernels.check import MOST_ELEMENTS
from vidaccel.kernels.hopper import GLUON
from vidaccel.kernels.op import WHOLE_CHECKS, Implementation, listening
from vidaccel.kernels.sampling import sampling

DTYPES = [torch.float16]
if torch.cuda.is_available():
    DTYPES.append(torch.bfloat16)  # the interpreter's bfloat16 is wrong


class Shape(NamedTuple):
    batch: int
    heads: int
    seq_q: int
    seq_kv: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.heads}h-{self.seq_q}-{self.seq_kv}x{self.head_dim}"


SHAPES = [
    Shape(1, 2, 64, 64, 64),
    Shape(2, 3, 37, 37, 40),
    Shape(1, 2, 130, 131, 64),
    Shape(2, 1, 7, 77, 80),
    Shape(1, 1, 129, 1, 128),
    Shape(1, 2, 1, 97, 32),
    Shape(1, 2, 33, 65, 160),
    Shape(1, 1, 200, 200, 72),
]
GPU_SHAPES = [
    Shape(2, 5, 9216, 9216, 64),
    Shape(1, 12, 4100, 4097, 128),
    Shape(3, 2, 257, 640, 64),
    Shape(2, 3, 1, 1, 128),
    Shape(2, 8, 4096, 4096, 40),
    Shape(1, 4, 1000, 77, 80),
    Shape(2, 3, 517, 1033, 96),
    Shape(2, 5, 129, 257, 72),
    Shape(1, 3, 200, 65, 24),
    Shape(1, 4, 576, 576, 160),
    Shape(40, 20, 144, 130, 64),
]


@pytest.fixture(autouse=True)
def fresh_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VIDACCEL_CACHE_DIR", str(tmp_path))
    choice.drop(SPATIAL_ATTENTION.name)
    SPATIAL_ATTENTION.forget()
    yield
    choice.drop(SPATIAL_ATTENTION.name)
    SPATIAL_ATTENTION.forget()


def draw(
    shape: Shape, dtype: torch.dtype, device: torch.device, *, factor: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v: slices of packed projections; ``factor`` sharpens the scores."""
    generator = torch.Generator(device).manual_seed(0)
    batch, heads, seq_q, seq_kv, head_dim = shape

    def packed(rows: int) -> tuple[Tensor, ...]:
        x = torch.randn(batch, rows, 3 * heads * head_dim, generator=generator, device=device)
        return x.to(dtype).chunk(3, dim=-1)

    q, k, v = packed(seq_q)
    if seq_kv != seq_q:
        k, v, _ = packed(seq_kv)
    return q * factor if factor != 1 else q, k, v


def assert_matches_reference(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float | None = None
) -> None:
    gold = spatial_attention_ref(q.double(), k.double(), v.double(), num_heads, scale=scale)
    assert_close_to_gold(out, gold, spatial_attention_ref(q, k, v, num_heads, scale=scale))
    assert out.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = draw(shape, dtype, device)
    assert_matches_reference(spatial_attention(q, k, v, shape.heads, impl="triton"), q, k, v, shape.heads)


@pytest.mark.parametrize("impl", ["triton", "torch", "math"])
def test_large_scores_and_scale(impl: str, device: torch.device) -> None:
    shape = Shape(1, 2, 70, 70, 64)
    q, k, v = draw(shape, torch.float16, device, factor=30.0)
    out = spatial_attention(q, k, v, shape.heads, scale=0.3, impl=impl)
    assert_matches_reference(out, q, k, v, shape.heads, 0.3)


@pytest.mark.parametrize("blocks", [Blocks(16, 16, 1, 1), Blocks(64, 32, 4, 2), Blocks(32, 128, 4, 3)], ids=str)
def test_result_does_not_depend_on_the_cut(blocks: Blocks, device: torch.device) -> None:
    q, k, v = draw(Shape(2, 2, 67, 45, 40), torch.float16, device)
    arguments = q, k, v, 2, 40**-0.5
    assert_matches_reference(bind_triton(*arguments, blocks=blocks)(*arguments), q, k, v, 2)


def test_reference_is_softmax_over_keys_in_float64(device: torch.device) -> None:
    q, k, v = draw(Shape(2, 3, 5, 7, 8), torch.float64, device)
    heads = [x.unflatten(-1, (3, 8)) for x in (q, k, v)]
    scores = torch.einsum("bqhd,bkhd->bhqk", *heads[:2]) / math.sqrt(8)
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), heads[2])
    torch.testing.assert_close(spatial_attention_ref(q, k, v, 3), expected.flatten(2))


LAYOUTS = [
    pytest.param(lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), id="rows-first"),
    pytest.param(lambda x: x[:1].expand_as(x), id="batch-expanded"),
    pytest.param(lambda x: torch.nn.functional.pad(x, (3, 2))[..., 3:-2], id="rows-unaligned"),
    pytest.param(lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]], id="rows-cut"),
]


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_takes_any_row_strides(layout: Callable[[Tensor], Tensor], impl: str, device: torch.device) -> None:
    q, k, v = draw(Shape(2, 2, 35, 35, 40), torch.float16, device)
    k, v = layout(k), layout(v)
    assert not k.is_contiguous()
    assert_matches_reference(spatial_attention(q, k, v, 2, impl=impl), q, k, v, 2)


@pytest.mark.parametrize(
    ("impl", "q", "scale", "reason"),
    [
        ("triton", torch.ones(1, 4, 64), 1.0, "takes float16 and bfloat16, q is torch.float32"),
        ("triton", torch.ones(1, 4, 48).half(), 1.0, "head_dim from 32 to 160 in steps of 8, got 24"),
        ("triton", torch.ones(1, 4, 336).half(), 1.0, "head_dim from 32 to 160 in steps of 8, got 168"),
        ("triton", torch.ones(1, 4, 64).half(), -1.0, "a positive scale, got -1.0"),
        ("triton", torch.ones(1, 64, 4).half().mT, 1.0, "a last stride of 1"),
        ("gemm", torch.ones(1, 4, 512).half(), 1.0, "for head_dim beyond 256, got 256"),
        ("gemm", torch.ones(1, 4, 576), 1.0, "takes float16 and bfloat16, q is torch.float32"),
        ("gluon", torch.ones(1, 4, 128).half(), 1.0, "for Hopper GPUs"),
        ("fa3", torch.ones(1, 4, 128).half(), 1.0, "needs a Hopper GPU"),
        ("cudnn", torch.ones(1, 4, 128).half(), 1.0, "this backend of PyTorch's attention needs a GPU, q is on cpu"),
    ],
)
def test_unserved_input(
    impl: str, q: Tensor, scale: float, reason: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error if the implementation was forced, PyTorch's attention and a reason if it was only wished for."""
    q = q.to(device) if impl in ("triton", "gemm") else q
    with pytest.raises(ValueError, match=f"spatial_attention: impl='{impl}' cannot run: .*{re.escape(reason)}"):
        spatial_attention(q, q, q, 2, scale=scale, impl=impl)
    monkeypatch.setenv("VIDACCEL_IMPL", f"spatial_attention={impl}")
    with listening() as events:
        out = spatial_attention(q, q, q, 2, scale=scale)
    assert [event.implementation for event in events] == ["torch"] and reason in events[0].reason
    assert torch.equal(out, spatial_attention_ref(q, q, q, 2, scale=scale))


def test_gradients_run_in_torch(device: torch.device) -> None:
    q, k, v = (x.contiguous().requires_grad_() for x in draw(Shape(1, 2, 5, 5, 32), torch.float16, device))
    with pytest.raises(ValueError, match="no backward pass"):
        spatial_attention(q, k, v, 2, impl="triton")
    ours = torch.autograd.grad(spatial_attention(q, k, v, 2).float().square().sum(), (q, k, v))
    eager = torch.autograd.grad(spatial_attention_ref(q, k, v, 2).float().square().sum(), (q, k, v))
    torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.ones(6, 32)}, ValueError, r"q must be \[B, S, H\*D\], .* got q \(6, 32\), k \(2, 4, 32\)"),
        ({"k": torch.ones(2, 3, 32)}, ValueError, r"k and v \[B, Skv, H\*D\], got .* k \(2, 3, 32\), v \(2, 4, 32\)"),
        ({"q": torch.ones(3, 4, 32)}, ValueError, r"q must be \[B, S, H\*D\], .* got q \(3, 4, 32\)"),
        ({"q": torch.ones(2, 0, 32)}, ValueError, r"q, k and v must not be empty, got q \(2, 0, 32\)"),
        ({"num_heads": 3}, ValueError, r"num_heads=3 must divide the H\*D=32 channels of q"),
        ({"num_heads": 0}, ValueError, r"num_heads=0 must divide the H\*D=32 channels of q"),
        ({"q": torch.ones(2, 4, 32).half()}, TypeError, r"must share a dtype, got torch.float16, torch.float32 and"),
        ({"impl": "fast"}, ValueError, r"impl must be one of fa3, gluon, .*, got 'fast'"),
    ],
)
def test_rejects(change: dict[str, object], error: type[Exception], message: str) -> None:
    rows = torch.ones(2, 4, 32)
    arguments = {"q": rows, "k": rows, "v": rows, "num_heads": 2, **change}
    with pytest.raises(error, match=f"spatial_attention: .*{message}"):
        spatial_attention(**arguments)


def test_registration(device: torch.device) -> None:
    q, k, v = draw(Shape(1, 2, 9, 5, 32), torch.float16, device)
    torch.library.opcheck(SPATIAL_ATTENTION.registered["triton"], (q, k, v, 2, 0.25))


@pytest.mark.parametrize("impl", ["triton", "torch", None])
def test_compiles_fullgraph(impl: str | None, device: torch.device) -> None:
    q, k, v = draw(Shape(2, 2, 9, 9, 32), torch.float16, device)
    attend = functools.partial(spatial_attention, num_heads=2, impl=impl)
    compiled = torch.compile(lambda q, k, v: attend(q, k, v) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), attend(q, k, v) + 1)


def test_float64_in_parts_is_the_same(device: torch.device) -> None:
    """More scores than a part may have: one query row at a time, as PyTorch's own."""
    q, k, v = draw(Shape(1, 1, 3, 2**22, 2), torch.float64, device)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(spatial_attention_ref(q, k, v, 1), expected)


# which implementation runs


def test_costs_count_shared_keys_and_values_once() -> None:
    q = torch.ones(3, 5, 64)
    k = torch.ones(1, 7, 64).expand(3, 7, 64)
    with listening() as events:
        spatial_attention(q, k, k, 2)
        spatial_attention(q, k.contiguous(), k.contiguous(), 2)
    assert [event.costs.bytes for event in events] == [4 * 64 * (2 * 15 + 2 * keys) for keys in (7, 21)]
    assert {event.costs.flops for event in events} == {4 * 3 * 2 * 5 * 7 * 32}


@pytest.mark.parametrize(
    ("serving", "timed"),
    [
        (["gluon", "cudnn", "flash", "triton"], ["gluon", "cudnn", "flash"]),
        (["cudnn", "flash", "efficient", "triton"], ["cudnn", "flash", "triton"]),
        ([], []),
    ],
    ids=["gluon", "libraries", "none"],
)
def test_what_never_wins_is_not_timed(serving: list[str], timed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, way in SPATIAL_ATTENTION.implementations.items():
        reason = None if name in (*serving, "torch") else "not here"
        served = way._replace(reason=functools.partial(lambda reason, *args: reason, reason))
        monkeypatch.setitem(SPATIAL_ATTENTION.implementations, name, served)
    q = torch.ones(1, 4, 64).half()
    assert SPATIAL_ATTENTION.competitors(q, q, q, 1, 1.0) == timed


def test_threads_leave_the_flags_of_pytorch_alone() -> None:
    q, k, v = draw(SMALL, torch.float32, torch.device("cpu"))
    before = sdp_flags()
    seen = set()

    def attend(impl: str) -> None:
        for _ in range(50):
            spatial_attention(q, k, v, SMALL.heads, impl=impl)
            seen.add(sdp_flags())

    threads = [threading.Thread(target=attend, args=(impl,)) for impl in ("math", "torch", "math")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {before} and sdp_flags() == before


SMALL = Shape(1, 2, 9, 9, 32)


def sdp_flags() -> tuple[bool, ...]:
    cuda = torch.backends.cuda
    enabled = cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.cudnn_sdp_enabled, cuda.math_sdp_enabled
    return tuple(flag() for flag in enabled)


# the check


@pytest.mark.parametrize("impl", ["triton", "math"])
@pytest.mark.parametrize("shape", [*SHAPES, Shape(3, 2, 70, 33, 32)], ids=str)
def test_the_check_passes_what_is_right(shape: Shape, impl: str, device: torch.device) -> None:
    q, k, v = draw(shape, torch.float16, device, factor=3.0)
    with listening(checks=True) as events:
        spatial_attention(q, k, v, shape.heads, impl=impl)
    assert [(event.implementation, event.problem) for event in events] == [(impl, "")]


@pytest.mark.parametrize("row", [0, 437, 1000])
def test_samples_of_a_large_call_come_to_every_row_of_every_head(row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(2, 4, 1001, 1000, 32)
    q, k, v = draw(shape, torch.float32, torch.device("cpu"))
    right = spatial_attention_ref(q, k, v, shape.heads)
    wrong = right.clone()
    wrong[1, row, 32:64] = 0
    outputs = iter([right] * WHOLE_CHECKS + [wrong] * op.SAMPLES)
    ways = {"math": Implementation(lambda *args: next(outputs))}
    monkeypatch.setattr(SPATIAL_ATTENTION, "implementations", SPATIAL_ATTENTION.implementations | ways)
    monkeypatch.setenv("VIDACCEL_IMPL", "spatial_attention=math")
    with torch.no_grad(), sampling(), listening(checks=True) as events:
        returned = [spatial_attention(q, k, v, shape.heads) for _ in range(WHOLE_CHECKS + op.SAMPLES)]
    found = [bool(event.problem) for event in events]
    first = found.index(True)
    assert all(found[first:]) and not any(found[:first])
    assert all(torch.equal(out, right) for out in returned[first:])
    assert first == WHOLE_CHECKS + (row // math.ceil(1001 / op.SAMPLES) - WHOLE_CHECKS) % op.SAMPLES


def test_a_small_call_is_always_checked_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw(SMALL, torch.float32, torch.device("cpu"))
    wrong = spatial_attention_ref(q, k, v, SMALL.heads)
    outputs = iter([wrong] * WHOLE_CHECKS + [torch.cat([wrong[:, :-1], 0 * wrong[:, -1:]], 1)])
    ways = {"math": Implementation(lambda *args: next(outputs))}
    monkeypatch.setattr(SPATIAL_ATTENTION, "implementations", SPATIAL_ATTENTION.implementations | ways)
    monkeypatch.setenv("VIDACCEL_IMPL", "spatial_attention=math")
    with torch.no_grad(), sampling(), listening(checks=True) as events:
        for _ in range(WHOLE_CHECKS + 1):
            spatial_attention(q, k, v, SMALL.heads)
    assert [bool(event.problem) for event in events] == [False] * WHOLE_CHECKS + [True]


def first_head(out: Tensor) -> Tensor:
    return out[..., :32]


FAULTS = [
    pytest.param(lambda out: out.mul_(1.01), id="off-by-a-percent"),
    pytest.param(lambda out: first_head(out).mul_(1.01), id="one-head-off-by-a-percent"),
    pytest.param(lambda out: out[1].mul_(1.02), id="one-sample-off-by-two-percent"),
    pytest.param(lambda out: out[-1, -1].zero_(), id="one-row-missing"),
    pytest.param(lambda out: first_head(out)[0, 3].zero_(), id="one-row-of-a-head-missing"),
    pytest.param(lambda out: out.copy_(out.flip(0)), id="two-samples-swapped"),
    pytest.param(lambda out: out.copy_(out.roll(1, 1)), id="off-by-a-row"),
    pytest.param(lambda out: out[0, 0, 0].fill_(float("nan")), id="one-nan"),
    pytest.param(lambda out: out.fill_(float("inf")), id="overflow"),
]


@pytest.mark.parametrize("impl", [None, "triton"])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_finds_what_is_wrong(
    fault: Callable[[Tensor], Tensor], impl: str | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: Any) -> Tensor:
        out = spatial_attention_ref(*args)
        fault(out)
        return out

    if impl is None:
        monkeypatch.setenv("VIDACCEL_IMPL", "spatial_attention=triton")
    monkeypatch.setitem(SPATIAL_ATTENTION.implementations, "triton", Implementation(wrong))
    assert_found(draw(Shape(2, 3, 70, 65, 32), torch.float16, device), 3, impl=impl)


@pytest.mark.parametrize("scale", [1.01, 2.0])
def test_the_check_finds_another_scale(scale: float, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor, num_heads: int, right: float) -> Tensor:
        return spatial_attention_ref(q, k, v, num_heads, right * scale)

    monkeypatch.setitem(SPATIAL_ATTENTION.implementations, "triton", Implementation(wrong))
    assert_found(draw(Shape(2, 3, 70, 65, 32), torch.float16, device, factor=2.0), 3, impl="triton")


def test_the_check_judges_a_small_head_by_its_own_scale(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any) -> Tensor:
        out = spatial_attention_ref(*args)
        first_head(out).mul_(1.01)
        return out

    q, k, v = draw(Shape(2, 3, 70, 65, 32), torch.float16, device)
    v = v.clone()
    first_head(v).mul_(2**-8)
    monkeypatch.setitem(SPATIAL_ATTENTION.implementations, "triton", Implementation(wrong))
    assert_found((q, k, v), 3, impl="triton")


def assert_found(tensors: tuple[Tensor, Tensor, Tensor], heads: int, impl: str | None) -> None:
    with torch.no_grad(), listening(checks=True) as events:
        out = spatial_attention(*tensors, heads, impl=impl)
    assert [event.implementation for event in events] == ["triton"] and events[0].problem
    assert torch.equal(out, spatial_attention_ref(*tensors, heads))


def test_the_check_works_in_parts_of_bounded_size() -> None:
    q = torch.empty(28, 9216, 1, dtype=torch.float16).expand(28, 9216, 320)
    k = torch.empty(1, 9216, 1, dtype=torch.float16).expand(28, 9216, 320)
    out = torch.zeros(28, 9216, 1, dtype=torch.uint8).expand(28, 9216, 320)
    assert SPATIAL_ATTENTION.parts is not None
    parts = list(SPATIAL_ATTENTION.parts(q, k, k, 5, 0.125))
    assert len(parts) <= 30
    assert sum(part.of((out,))[0].numel() for part in parts) == out.numel()
    for part in parts:
        part_q, part_k, _, heads, scale = part.args
        assert part.of((out,))[0].shape == part_q.shape
        assert heads == 1 and scale == 0.125 and part_q.numel() + part_k.numel() <= MOST_ELEMENTS
    (part,) = SPATIAL_ATTENTION.parts(q[:2], k, k, 5, 0.125)
    assert part.args[3] == 5 and part.of((out[:2],))[0].shape == (2 * 5, 9216, 64)


# what the compilers make of the kernels


def compile_triton(target: str, head_dim: int, even: bool) -> dict[str, str]:
    rows, columns, num_warps, stages = choose_blocks(head_dim)
    return compile_for(
        target,
        op._spatial_attention_kernel,
        {
            **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*fp16:16"),
            **dict.fromkeys(("seq_q", "seq_kv"), "i32"),
            **{f"stride_{x}_{axis}": "i32" for x in "qkv" for axis in ("batch", "row")},
            "scale_log2": "fp32",
        },
        {
            **{"NUM_HEADS": 5, "HEAD_DIM": head_dim, "EVEN_N": even, "ALIGN": math.gcd(16, head_dim)},
            **{"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_D": triton.next_power_of_2(head_dim), "STAGES": stages},
        },
        num_warps=num_warps,
    )


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("head_dim", "even"), [(40, True), (64, True), (64, False), (128, False), (160, True)])
def test_triton_kernel_prefetches_and_does_not_spill(target: str, head_dim: int, even: bool) -> None:
    asm = compile_triton(target, head_dim, even)
    assert_no_spills(asm)
    if "sass" in asm:
        assert not narrow_accesses(asm)
        assert "LDGSTS" in asm["sass"], "k and v are to be fetched by cp.async"
        assert {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}.get(target, "HMMA") in asm["sass"]


def compile_gluon(head_dim: int, config: Any) -> dict[str, str]:
    gluon = pytest.importorskip("vidaccel.kernels.attention.spatial_attention_gluon")
    block = [1, 64, 1, gluon._padded(head_dim)]
    layout = gluon.gl.NVMMASharedLayout.get_default_for(block, gluon.gl.float16)

    def descriptor(rows: int) -> str:
        return f"tensordesc<fp16{[1, rows, 1, block[3]]},{layout!r}>"

    return compile_for(
        "sm_90",
        gluon.spatial_attention_gluon_kernel,
        {
            **dict.fromkeys(("q_desc", "out_desc"), descriptor(gluon.CONSUMER_ROWS)),
            **dict.fromkeys(("k_desc", "v_desc"), descriptor(config.columns)),
            **dict.fromkeys(("num_tiles", "tiles_per_head", "num_heads", "seq_kv", "kv_batch_step"), "i32"),
            "scale_log2": "fp32",
        },
        {"CONSUMERS": config.consumers, "STAGES": config.stages, "REGISTERS": config.registers},
    )


@pytest.mark.slow
@pytest.mark.skipif(not GLUON, reason="another Gluon")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_gluon_kernel_overlaps_products_with_the_softmax(head_dim: int) -> None:
    from vidaccel.kernels.attention.spatial_attention_gluon import choose_config

    config = choose_config(head_dim)
    asm = compile_gluon(head_dim, config)
    sass = asm["sass"]
    assert "UTMALDG" in sass and "UTMASTG" in sass and "USETMAXREG" in sass
    # ptxas may let two consumers share a piece of code; waits beyond four for each would mean serialised products
    assert 4 * (config.consumers - 1) < sass.count("WARPGROUP.DEPBAR") <= 4 * config.consumers
    loop = re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1;(.*?)WARPGROUP\.DEPBAR\.LE gsb0, 0x0;", sass, re.DOTALL)
    assert loop is not None
    assert loop[1].count("MUFU.EX2") >= config.columns // 2, "the softmax is to run before the wait for p @ v"
    if config.consumers == 2:
        assert_no_spills(asm)
    else:  # three leave 160 registers a thread: at most two scalars of each go to memory and back, once a tile
        assert len(re.findall(r"\bLDL\b", sass)) <= 2 * config.consumers
        assert not re.search(r"\b(?:LDL|STL)\b", loop[1])


@pytest.mark.parametrize("head_dim", range(8, 129, 8))
def test_gluon_configurations_hold_a_head(head_dim: int) -> None:
    gluon = pytest.importorskip("vidaccel.kernels.attention.spatial_attention_gluon")
    configs = gluon.gluon_configs(head_dim)
    assert len(set(configs)) == len(configs)
    for config in configs:
        numbers = 2 * gluon._padded(head_dim) * (64 * config.consumers + config.columns * config.stages)
        assert gluon._padded(head_dim) >= head_dim and 2 * numbers <= 226 * 1024


# on a GPU


def skip_unserved(impl: str, q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> None:
    if reason := SPATIAL_ATTENTION.unserved(q, k, v, num_heads, 0.125, impl=impl):
        pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["fa3", "gluon", "cudnn", "flash", "efficient", "math", "triton"])
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_implementations_on_a_gpu(shape: Shape, impl: str, dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = draw(shape, dtype, device)
    skip_unserved(impl, q, k, v, shape.heads)
    if impl == "math" and shape.seq_q > 4096:
        pytest.skip("its scores take too much memory")
    with listening(checks=True) as events:
        out = spatial_attention(q, k, v, shape.heads, impl=impl)
    assert [event.problem for event in events] == [""]
    assert out.is_contiguous() and out.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["cudnn", "flash", "efficient"])
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.id != "rows-unaligned"])
def test_backends_take_any_row_strides(layout: Callable[[Tensor], Tensor], impl: str, device: torch.device) -> None:
    q, k, v = (layout(x) for x in draw(Shape(3, 2, 130, 130, 64), torch.float16, device))
    skip_unserved(impl, q, k, v, 2)
    assert_matches_reference(spatial_attention(q, k, v, 2, impl=impl), q, k, v, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["cudnn", "flash", "efficient", "torch"])
@pytest.mark.parametrize("offset", [1, 4])
def test_backends_take_rows_at_any_address(offset: int, impl: str, device: torch.device) -> None:
    """cuDNN would return nonsense, the others would raise."""
    q = torch.randn(2, 35, 80, device=device).half()
    k = torch.randn(2 * 35 * 80 + 8, device=device).half()[offset:][: 2 * 35 * 80].view(2, 35, 80)
    skip_unserved(impl, q, k, k, 2)
    out = spatial_attention(q, k, k, 2, impl=impl)
    assert_matches_reference(out, q, k, k, 2)
    gold = spatial_attention_ref(q.double(), k.double(), k.double(), 2)
    assert (out.double() - gold).norm() <= 4 * torch.finfo(out.dtype).eps * gold.norm(), "not only as wrong as PyTorch"


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["cudnn", "flash", "efficient"])
def test_backends_that_the_user_has_turned_off_decline(impl: str, device: torch.device) -> None:
    q, k, v = draw(Shape(2, 2, 64, 64, 64), torch.float16, device)
    skip_unserved(impl, q, k, v, 2)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with pytest.raises(ValueError, match="PyTorch declines"):
            spatial_attention(q, k, v, 2, impl=impl)
        with listening() as events, torch.no_grad():
            spatial_attention(q, k, v, 2)
        assert [event.implementation for event in events] == ["torch"]


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.id != "rows-unaligned"])
@pytest.mark.parametrize("head_dim", [40, 64, 80, 128])
def test_gluon_takes_any_row_strides(head_dim: int, layout: Callable[[Tensor], Tensor], device: torch.device) -> None:
    q, k, v = draw(Shape(3, 2, 517, 517, head_dim), torch.bfloat16, device)
    q, k, v = (q if layout(q).stride(0) == 0 else layout(q)), layout(k), layout(v)
    skip_unserved("gluon", q, k, v, 2)
    assert_matches_reference(spatial_attention(q, k, v, 2, impl="gluon"), q, k, v, 2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("head_dim", "reason"),
    [
        *((head_dim, None) for head_dim in (8, 40, 80, 128)),
        (20, "steps of 8, got 20"),
        (160, "up to 128 in steps of 8, got 160"),
    ],
)
def test_head_dims_of_the_gluon_kernel(head_dim: int, reason: str | None, device: torch.device) -> None:
    x = torch.ones(1, 4, 128, dtype=torch.float16, device=device)
    skip_unserved("gluon", x, x, x, 2)
    q = torch.ones(1, 4, 2 * head_dim, dtype=torch.float16, device=device)
    unserved = SPATIAL_ATTENTION.unserved(q, q, q, 2, 1.0, impl="gluon")
    assert unserved is None if reason is None else reason in str(unserved)


@pytest.mark.gpu
def test_gluon_gives_way_at_addresses_that_tma_does_not_take(device: torch.device) -> None:
    """One signature, prepared once, at another address."""
    memory = torch.randn(2 * 256 * 128 + 4, dtype=torch.float16, device=device)
    aligned, unaligned = (memory[start:][: 2 * 256 * 128].view(2, 256, 128) for start in (0, 4))
    skip_unserved("gluon", aligned, aligned, aligned, 2)
    bind = SPATIAL_ATTENTION.implementations["gluon"].bind
    assert bind is not None
    run = bind(aligned, aligned, aligned, 2, 0.125)
    for x in (aligned, unaligned, aligned):
        assert_matches_reference(run(x, x, x, 2, 0.125), x, x, x, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [40, 64, 80, 96, 128])
def test_every_gluon_configuration(head_dim: int, device: torch.device) -> None:
    """Against a race the same input many times: every run has the same bits."""
    shape = Shape(2, 8, 1000, 1000, head_dim)
    q, k, v = draw(shape, torch.float16, device)
    skip_unserved("gluon", q, k, v, shape.heads)
    from vidaccel.kernels.attention.spatial_attention_gluon import bind, gluon_configs

    for config in gluon_configs(head_dim):
        attend = bind(q, k, v, shape.heads, head_dim**-0.5, config=config)
        first = torch.empty_like(q, memory_format=torch.contiguous_format)
        attend(q, k, v, first)
        assert_matches_reference(first, q, k, v, shape.heads)
        for _ in range(20):
            again = torch.empty_like(first)
            attend(q, k, v, again)
            assert torch.equal(again, first), config


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [Shape(2, 3, 130, 257, head_dim) for head_dim in (8, 24, 40, 56, 72, 80, 88, 104)] + [Shape(3, 1, 1, 1, 40)],
    ids=str,
)
def test_gluon_writes_every_head_and_nothing_beyond(shape: Shape, device: torch.device) -> None:
    q, k, v = draw(shape, torch.float16, device)
    skip_unserved("gluon", q, k, v, shape.heads)
    from vidaccel.kernels.attention.spatial_attention_gluon import bind, gluon_configs

    for config in gluon_configs(shape.head_dim):
        memory = torch.full((3, *q.shape), float("nan"), dtype=q.dtype, device=device)
        bind(q, k, v, shape.heads, shape.head_dim**-0.5, config=config)(q, k, v, memory[1])
        assert memory[::2].isnan().all(), config
        assert_matches_reference(memory[1], q, k, v, shape.heads)


@pytest.mark.gpu
@torch.no_grad()
def test_a_large_shape_is_measured_once_and_remembered(
    device: torch.device, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="vidaccel")
    shape = Shape(4, 8, 2048, 2048, 64)
    q, k, v = draw(shape, torch.bfloat16, device)

    def attend() -> tuple[Tensor, str]:
        with listening() as events:
            out = spatial_attention(q, k, v, shape.heads)
        assert events[0].reason == "", "kernels of ours that fail are said here"
        return out, events[0].implementation

    out, chosen = attend()
    assert_matches_reference(out, q, k, v, shape.heads)
    [(name, key, measured)] = choice.remembered()
    assert name == "spatial_attention" and measured.winner == chosen
    assert measured.milliseconds.keys() | measured.problems.keys() >= {*key["competitors"]}
    [path] = tmp_path.rglob("*.json")
    written = path.stat().st_mtime_ns
    SPATIAL_ATTENTION.forget()
    again, chosen_again = attend()
    assert chosen_again == chosen and torch.equal(again, out)
    assert path.stat().st_mtime_ns == written


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("rows", [77, 144], ids=["text", "few"])
def test_texts_and_tiny_shapes_are_not_measured(rows: int, device: torch.device) -> None:
    q, k = (
        torch.randn(2, count, 320, dtype=torch.float16, device=device) for count in (144 if rows == 144 else 4096, rows)
    )
    spatial_attention(q, k, k, 5)
    assert not list(choice.remembered())


@pytest.mark.gpu
@torch.no_grad()
def test_nothing_is_measured_during_capture(device: torch.device) -> None:
    q, k, v = draw(Shape(4, 8, 2048, 2048, 64), torch.float16, device)
    expected = spatial_attention_ref(q, k, v, 8)
    default = "cudnn" if SPATIAL_ATTENTION.unserved(q, k, v, 8, 0.125, impl="cudnn") is None else "torch"
    spatial_attention(q, k, v, 8, impl=default)  # warms the library up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = spatial_attention(q, k, v, 8)
    assert not list(choice.remembered())
    graph.replay()
    assert_close_to_gold(out, expected.double(), expected)
    spatial_attention(q, k, v, 8)
    assert len(list(choice.remembered())) == 1, "the question was put off"


@pytest.mark.gpu
@torch.no_grad()
def test_a_compiled_graph_takes_the_choice_made_before(device: torch.device) -> None:
    q, k, v = draw(Shape(4, 8, 2048, 2048, 64), torch.bfloat16, device)
    attend = functools.partial(spatial_attention, num_heads=8)
    expected = attend(q, k, v)
    compiled = torch.compile(lambda q, k, v: attend(q, k, v) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), expected + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["gluon", "cudnn", "flash", "efficient", "triton"])
def test_compiles_fullgraph_on_a_gpu(impl: str, device: torch.device) -> None:
    q, k, v = draw(Shape(2, 2, 130, 130, 64), torch.float16, device)
    skip_unserved(impl, q, k, v, 2)
    attend = functools.partial(spatial_attention, num_heads=2, impl=impl)
    compiled = torch.compile(lambda q, k, v: attend(q, k, v) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), attend(q, k, v) + 1)


@pytest.mark.gpu
def test_offsets_beyond_int32(device: torch.device) -> None:
    q = torch.randn(2**13 + 1, 1024, 256, dtype=torch.float16, device=device)
    assert q.numel() > 2**31
    for impl in ("triton", "gluon"):
        if SPATIAL_ATTENTION.unserved(q, q, q, 4, 0.125, impl=impl) is None:
            out = spatial_attention(q, q, q, 4, impl=impl)
            last = q[-1:]
            assert torch.equal(out[-1:], spatial_attention(last, last, last, 4, impl=impl)), impl
            del out


@pytest.mark.gpu
def test_compiles_for_variable_sizes(device: torch.device) -> None:
    compiled = torch.compile(lambda q, k, v: spatial_attention(q, k, v, 2) + 1, fullgraph=True, dynamic=True)
    for shape in (Shape(2, 2, 130, 77, 64), Shape(3, 2, 4096, 4096, 64)):
        q, k, v = draw(shape, torch.float16, device)
        torch.testing.assert_close(compiled(q, k, v) - 1, spatial_attention_ref(q, k, v, 2), rtol=0, atol=4e-3)
