from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from kernel_checks import TARGETS, assert_close_to_gold, assert_no_spills, compile_for, narrow_accesses
from torch import Tensor

from vidaccel.kernels import tuning_cache
from vidaccel.kernels.attention import spatial_attention as op
from vidaccel.kernels.attention.spatial_attention import (
    IMPLEMENTATIONS,
    Blocks,
    Implementation,
    choose_blocks,
    spatial_attention,
    spatial_attention_ref,
)
from vidaccel.kernels.dispatch import record_choices

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
def fresh_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(op, "_chosen", {})


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
    assert_matches_reference(op._launch(q, k, v, 2, 40**-0.5, blocks=blocks), q, k, v, 2)


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
    with record_choices() as choices:
        out = spatial_attention(q, q, q, 2, scale=scale)
    assert [choice.impl for choice in choices] == ["torch"] and reason in choices[0].reason
    assert torch.equal(out, spatial_attention_ref(q, q, q, 2, scale=scale))


@pytest.mark.parametrize(
    ("head_dim", "reason"),
    [
        (8, None),
        (40, None),
        (80, None),
        (128, None),
        (20, "steps of 8, got 20"),
        (160, "up to 128 in steps of 8, got 160"),
    ],
)
def test_head_dims_of_the_gluon_kernel(head_dim: int, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vidaccel.kernels.attention.spatial_attention_gluon")
    monkeypatch.setattr(op, "_on_hopper", lambda x: True)
    monkeypatch.setattr(op, "GLUON_VERSIONS", (triton.__version__,))
    q = torch.ones(1, 4, 2 * head_dim).half()
    problem = op._gluon_problem(q, q, q, 2, 1.0)
    assert problem is None if reason is None else reason in str(problem)


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
    torch.library.opcheck(op._spatial_attention_triton, (q, k, v, 2, 0.25))


@pytest.mark.parametrize("impl", ["triton", "torch", None])
def test_compiles_fullgraph(impl: str | None, device: torch.device) -> None:
    q, k, v = draw(Shape(2, 2, 9, 9, 32), torch.float16, device)
    attend = functools.partial(spatial_attention, num_heads=2, impl=impl)
    compiled = torch.compile(lambda q, k, v: attend(q, k, v) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), attend(q, k, v) + 1)


def test_a_compiled_graph_takes_the_choice_made_before(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw(Shape(2, 2, 9, 9, 32), torch.float16, device)
    op._chosen[op._shape(q, k, 2)] = "triton", ""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    out = torch.compile(lambda q, k, v: spatial_attention(q, k, v, 2), fullgraph=True, backend=backend)(q, k, v)
    assert "spatial_attention_triton" in graphs[0].code
    assert torch.equal(out, spatial_attention(q, k, v, 2, impl="triton"))


# the choice, with made-up implementations and clocks


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Every shape is measured, as on a GPU, by a clock that the test sets: milliseconds by implementation."""
    times: dict[str, float] = {}
    right = {name: Implementation(functools.partial(named_run, name), op._no_problem) for name in ("new", "torch")}
    monkeypatch.setattr(op, "IMPLEMENTATIONS", right)
    monkeypatch.setattr(op, "_measures", lambda q, k: True)
    monkeypatch.setattr(op, "_cache_key", lambda *args: {"shape": str(op._shape(*args[:3]))})
    monkeypatch.setattr(tuning_cache, "cuda_milliseconds", lambda run: times[run.args[0]])
    return times


def named_run(name: str, q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    return spatial_attention_ref(q, k, v, num_heads, scale=scale)


SMALL = Shape(1, 2, 9, 9, 32)


def ran(shape: Shape = SMALL) -> tuple[str, str]:
    q, k, v = draw(shape, torch.float32, torch.device("cpu"))
    with record_choices() as choices:
        spatial_attention(q, k, v, shape.heads)
    [choice] = choices
    return choice.impl, choice.reason


@pytest.mark.parametrize("winner", ["new", "torch"])
def test_the_fastest_runs(winner: str, measuring: dict[str, float]) -> None:
    measuring.update({"new": 2.0, "torch": 2.0, winner: 1.0})
    assert ran() == (winner, "")


def test_a_shape_is_measured_once_and_remembered_on_disk(
    measuring: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    measuring.update({"new": 1.0, "torch": 2.0})
    assert ran() == ("new", "")
    measuring["new"] = 3.0
    assert ran() == ("new", "")
    monkeypatch.setattr(op, "_chosen", {})  # as in another process
    assert ran() == ("new", "")
    assert ran(Shape(1, 2, 9, 10, 32)) == ("torch", ""), "another shape is another question"


def test_a_winner_that_is_gone_is_measured_anew(measuring: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    measuring.update({"new": 1.0, "torch": 2.0})
    assert ran() == ("new", "")
    monkeypatch.setattr(op, "_chosen", {})
    monkeypatch.delitem(op.IMPLEMENTATIONS, "new")
    assert ran() == ("torch", "")


def test_tuning_can_be_turned_off(measuring: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("VIDACCEL_TUNE", "0")
    q = torch.ones(1, 200, 64)
    assert not op._measures(q, q)


def test_texts_and_tiny_shapes_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cuda = True

        def __init__(self, *shape: int) -> None:
            self.shape = shape

        def numel(self) -> int:
            return math.prod(self.shape)

    assert op._measures(OnGpu(2, 4096, 320), OnGpu(2, 4096, 320))
    assert not op._measures(OnGpu(2, 4096, 320), OnGpu(2, 77, 320))
    assert not op._measures(OnGpu(2, 144, 320), OnGpu(2, 144, 320))
    assert not op._measures(torch.ones(2, 4096, 32), torch.ones(2, 4096, 32)), "nothing is measured on a CPU"


@pytest.mark.parametrize(
    ("hopper", "serving", "timed"),
    [
        (True, ["gluon", "cudnn", "torch", "flash", "triton"], ["gluon", "cudnn", "torch"]),
        (True, ["torch", "flash", "triton"], ["torch", "flash", "triton"]),
        (False, ["cudnn", "torch", "flash", "triton"], ["cudnn", "torch", "flash", "triton"]),
    ],
    ids=["hopper", "hopper-alone", "ampere"],
)
def test_what_never_wins_is_not_timed(
    hopper: bool, serving: list[str], timed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = {name: IMPLEMENTATIONS[name]._replace(problem=op._no_problem) for name in serving}
    monkeypatch.setattr(op, "IMPLEMENTATIONS", ways)
    monkeypatch.setattr(op, "_on_hopper", lambda x: hopper)
    q = torch.ones(1, 4, 64).half()
    assert list(op._competitors(q, q, q, 1, 1.0)) == timed


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda out: out * 1.01, id="off-by-a-percent"),
        pytest.param(lambda out: torch.full_like(out, float("nan")), id="nan"),
        pytest.param(lambda out: out.index_fill(1, torch.tensor([3]), 0.0), id="one-row-missing"),
    ],
)
def test_a_wrong_result_never_wins(wrong: Callable[[Tensor], Tensor], measuring: dict[str, float]) -> None:
    measuring.update({"new": 1.0, "torch": 2.0})
    run = op.IMPLEMENTATIONS["new"].run
    op.IMPLEMENTATIONS["new"] = Implementation(lambda *args: wrong(run(*args)), op._no_problem)
    assert ran() == ("torch", "")


def test_a_kernel_of_ours_that_fails_is_reported(measuring: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_shared_memory(*args: object) -> Tensor:
        raise RuntimeError("out of resource: shared memory")

    measuring["torch"] = 1.0
    op.IMPLEMENTATIONS["gluon"] = Implementation(out_of_shared_memory, op._no_problem)
    expected = ("torch", "gluon: RuntimeError: out of resource: shared memory")
    assert ran() == expected
    monkeypatch.setattr(op, "_chosen", {})
    assert ran() == expected, "the reason is remembered with the choice"


def test_a_choice_that_fails_later_gives_way(measuring: dict[str, float]) -> None:
    measuring.update({"new": 1.0, "torch": 2.0})
    assert ran() == ("new", "")

    def fails(*args: object) -> Tensor:
        raise RuntimeError("no kernel image is available\nfor this GPU")

    op.IMPLEMENTATIONS["new"] = Implementation(fails, op._no_problem)
    for _ in range(2):
        assert ran() == ("torch", "new: RuntimeError: no kernel image is available")


def test_float64_rows_catch_what_the_norm_lets_pass() -> None:
    q, k, v = draw(Shape(1, 2, 9, 9, 32), torch.float16, torch.device("cpu"))
    expected = spatial_attention_ref(q, k, v, 2)
    arguments = (q, k, v, 2, 32**-0.5)
    assert op._why_wrong(arguments, expected, expected) is None
    assert "against float64" in str(op._why_wrong(arguments, expected, expected * (1 + 2**-8)))


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


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("head_dim", "even"), [(40, True), (64, True), (64, False), (128, False), (160, True)])
def test_triton_kernel_prefetches_and_does_not_spill(target: str, head_dim: int, even: bool) -> None:
    asm = compile_triton(target, head_dim, even)
    assert_no_spills(asm)
    if "sass" in asm:
        assert not narrow_accesses(asm)
        assert "LDGSTS" in asm["sass"], "k and v are to be fetched by cp.async"
        assert ("HGMMA" if target == "sm_90" else "HMMA") in asm["sass"]


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
        {
            **{"CONSUMERS": config.consumers, "STAGES": config.stages},
            **{"PING_PONG": config.ping_pong, "REGISTERS": config.registers},
        },
    )


@pytest.mark.skipif(not triton.__version__.startswith(op.GLUON_VERSIONS), reason="another Gluon")
@pytest.mark.parametrize("ping_pong", [True, False], ids=["ping-pong", "free"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_gluon_kernel_overlaps_products_with_the_softmax(head_dim: int, ping_pong: bool) -> None:
    from vidaccel.kernels.attention.spatial_attention_gluon import choose_config

    config = choose_config(head_dim)._replace(ping_pong=ping_pong)
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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["fa3", "gluon", "cudnn", "flash", "triton"])
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_implementations_on_a_gpu(shape: Shape, impl: str, dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = draw(shape, dtype, device)
    arguments = (q, k, v, shape.heads, shape.head_dim**-0.5)
    if problem := IMPLEMENTATIONS[impl].problem(*arguments):
        pytest.skip(problem)
    out = spatial_attention(q, k, v, shape.heads, impl=impl)
    assert op._why_wrong(arguments, spatial_attention_ref(q, k, v, shape.heads), out) is None
    assert out.is_contiguous() and out.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.id != "rows-unaligned"])
@pytest.mark.parametrize("head_dim", [40, 64, 80, 128])
def test_gluon_takes_any_row_strides(head_dim: int, layout: Callable[[Tensor], Tensor], device: torch.device) -> None:
    q, k, v = draw(Shape(3, 2, 517, 517, head_dim), torch.bfloat16, device)
    k, v = layout(k), layout(v)
    if problem := IMPLEMENTATIONS["gluon"].problem(q, k, v, 2, 0.125):
        pytest.skip(problem)
    assert_matches_reference(spatial_attention(q, k, v, 2, impl="gluon"), q, k, v, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [40, 64, 80, 96, 128])
def test_every_gluon_configuration(head_dim: int, device: torch.device) -> None:
    """Against a race the same input many times: every run has the same bits."""
    shape = Shape(2, 8, 1000, 1000, head_dim)
    q, k, v = draw(shape, torch.float16, device)
    if problem := IMPLEMENTATIONS["gluon"].problem(q, k, v, shape.heads, 0.125):
        pytest.skip(problem)
    from vidaccel.kernels.attention.spatial_attention_gluon import gluon_configs, launch

    for config in gluon_configs(head_dim):
        first = torch.empty_like(q, memory_format=torch.contiguous_format)
        launch(q, k, v, first, shape.heads, head_dim**-0.5, config=config)
        assert_matches_reference(first, q, k, v, shape.heads)
        for _ in range(20):
            again = torch.empty_like(first)
            launch(q, k, v, again, shape.heads, head_dim**-0.5, config=config)
            assert torch.equal(again, first), config


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [Shape(2, 3, 130, 257, head_dim) for head_dim in (8, 24, 40, 56, 72, 80, 88, 104)] + [Shape(3, 1, 1, 1, 40)],
    ids=str,
)
def test_gluon_writes_every_head_and_nothing_beyond(shape: Shape, device: torch.device) -> None:
    q, k, v = draw(shape, torch.float16, device)
    if problem := IMPLEMENTATIONS["gluon"].problem(q, k, v, shape.heads, 0.125):
        pytest.skip(problem)
    from vidaccel.kernels.attention.spatial_attention_gluon import gluon_configs, launch

    for config in gluon_configs(shape.head_dim):
        memory = torch.full((3, *q.shape), float("nan"), dtype=q.dtype, device=device)
        launch(q, k, v, memory[1], shape.heads, shape.head_dim**-0.5, config=config)
        assert memory[::2].isnan().all(), config
        assert_matches_reference(memory[1], q, k, v, shape.heads)


@pytest.mark.gpu
def test_the_choice_on_a_gpu(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(4, 8, 2048, 2048, 64)
    q, k, v = draw(shape, torch.bfloat16, device)
    with record_choices() as choices:
        out = spatial_attention(q, k, v, shape.heads)
    assert_matches_reference(out, q, k, v, shape.heads)
    assert len(list(tmp_path.rglob("*.json"))) == 1
    assert choices[0].reason == "", "kernels of ours that fail are said here"
    monkeypatch.setattr(op, "_chosen", {})
    monkeypatch.setattr(op, "_measure", None)  # nothing is to be measured again
    with record_choices() as again:
        assert torch.equal(spatial_attention(q, k, v, shape.heads), out)
    assert again == choices


@pytest.mark.gpu
def test_nothing_is_measured_during_capture(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw(Shape(4, 8, 2048, 2048, 64), torch.float16, device)
    monkeypatch.setattr(op, "_measure", None)
    expected = spatial_attention_ref(q, k, v, 8)  # warms the library up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = spatial_attention(q, k, v, 8)
    graph.replay()
    assert_close_to_gold(out, expected.double(), expected)


@pytest.mark.gpu
def test_offsets_beyond_int32(device: torch.device) -> None:
    q = torch.randn(2**13 + 1, 1024, 256, dtype=torch.float16, device=device)
    assert q.numel() > 2**31
    for impl in ("triton", "gluon"):
        if IMPLEMENTATIONS[impl].problem(q, q, q, 4, 0.125) is None:
            out = spatial_attention(q, q, q, 4, impl=impl)
            last = q[-1:]
            assert torch.equal(out[-1:], spatial_attention(last, last, last, 4, impl=impl)), impl
            del out
