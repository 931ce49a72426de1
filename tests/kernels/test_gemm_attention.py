"""The parts of attention by two matrix products; as an implementation of the op it is in test_spatial_attention.py."""

from __future__ import annotations

import math

import pytest
import torch
import triton
from kernel_checks import TARGETS, assert_close_to_gold, assert_no_spills, compile_for, narrow_accesses
from torch import Tensor

from vidaccel.kernels.attention import gemm_attention as op
from vidaccel.kernels.attention import spatial_attention as attention
from vidaccel.kernels.attention.spatial_attention import spatial_attention, spatial_attention_ref


@pytest.fixture(autouse=True)
def fresh_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_chosen", {})


def draw(*shape: int, device: torch.device, factor: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of ``[B, S, H*D]``: slices of a packed projection; ``factor`` sharpens the scores."""
    batch, tokens, channels = shape
    generator = torch.Generator(device).manual_seed(0)
    packed = torch.randn(batch, tokens, 3 * channels, generator=generator, device=device).half()
    q, k, v = packed.chunk(3, dim=-1)
    return q * factor if factor != 1 else q, k, v


@pytest.mark.parametrize("scores_bytes", [2**27, 4 * 67 * 140, 1], ids=["batch", "two-samples", "rows"])
@pytest.mark.parametrize("tokens", [1, 67, 300])
def test_result_does_not_depend_on_the_parts(
    tokens: int, scores_bytes: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "SCORES_BYTES", scores_bytes)
    q, _, _ = draw(3, tokens, 288, device=device)
    _, k, v = draw(3, 67, 288, device=device)
    out = spatial_attention(q, k, v, 1, impl="gemm")
    gold = spatial_attention_ref(q.double(), k.double(), v.double(), 1)
    assert_close_to_gold(out, gold, spatial_attention_ref(q, k, v, 1))


@pytest.mark.parametrize(
    ("batch", "seq_q", "seq_kv"),
    [
        (14, 9216, 9216),
        (16, 4096, 4096),
        (5, 1024, 1024),
        (3, 16384, 16384),
        (2, 14080, 14080),
        (2, 1, 77),
        (7, 999, 3),
    ],
)
def test_parts_cover_every_row_once_and_keep_to_their_memory(batch: int, seq_q: int, seq_kv: int) -> None:
    seen = torch.zeros(batch, seq_q, dtype=torch.int)
    for samples, rows in op._parts(batch, seq_q, seq_kv):
        part = seen[samples, rows]
        assert 4 * part.numel() * seq_kv <= op.SCORES_BYTES
        part += 1
    assert (seen == 1).all()


def test_probabilities_too_small_for_float16(device: torch.device) -> None:
    """Keys that all but one get so little each, and a fifth of the weight together."""
    scores = torch.full((1, 1, 16384), -11.0, device=device)
    scores[..., 0] = 0
    p = op._softmax(scores, 1.0, torch.float16).double() / op.P_SCALE
    gold = scores.double().softmax(-1)
    assert gold[0, 0, 1] < torch.finfo(torch.float16).smallest_normal
    torch.testing.assert_close(p, gold, rtol=torch.finfo(torch.float16).eps, atol=0)


@pytest.mark.parametrize("scale", [1e-4, 3.0], ids=["flat", "sharp"])
def test_large_values_and_any_scale(scale: float, device: torch.device) -> None:
    """Values that would not survive the factor of 64 in float16."""
    q, k, v = draw(1, 40, 288, device=device, factor=30.0)
    v = v * 8000
    assert v.isfinite().all() and v.max() * op.P_SCALE > torch.finfo(torch.float16).max
    out = spatial_attention(q, k, v, 1, scale=scale, impl="gemm")
    gold = spatial_attention_ref(q.double(), k.double(), v.double(), 1, scale=scale)
    assert_close_to_gold(out, gold, spatial_attention_ref(q, k, v, 1, scale=scale))


@pytest.mark.parametrize("num_heads", [1, 2])
def test_takes_any_row_strides(num_heads: int, device: torch.device) -> None:
    q, k, v = draw(2, 35, 288 * num_heads, device=device)
    q = q.transpose(0, 1).contiguous().transpose(0, 1)
    k, v = k[:1].expand_as(k), v[:1].expand_as(v)
    out = spatial_attention(q, k, v, num_heads, impl="gemm")
    gold = spatial_attention_ref(q.double(), k.double(), v.double(), num_heads)
    assert_close_to_gold(out, gold, spatial_attention_ref(q, k, v, num_heads))
    assert out.is_contiguous()


def test_keys_beyond_what_a_row_of_scores_may_have(device: torch.device) -> None:
    q = torch.ones(1, 1, 288, dtype=torch.float16, device=device)
    k = q.expand(1, op.MOST_KEYS + 1, 288)
    with pytest.raises(ValueError, match="impl='gemm' cannot run: its softmax takes at most 16384 keys, got 16385"):
        spatial_attention(q, k, k, 1, impl="gemm")


def test_registration(device: torch.device) -> None:
    torch.library.opcheck(attention._spatial_attention_gemm, (*draw(1, 9, 288, device=device), 1, 0.25))


def test_compiles_fullgraph(device: torch.device) -> None:
    q, k, v = draw(2, 9, 288, device=device)
    compiled = torch.compile(
        lambda q, k, v: spatial_attention(q, k, v, 1, impl="gemm") + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(q, k, v), spatial_attention(q, k, v, 1, impl="gemm") + 1)


@pytest.mark.parametrize(
    ("tokens", "capability", "serves", "chosen"),
    [
        (4096, (8, 0), True, "gemm"),
        (4096, (9, 0), True, "gemm"),
        (4096, (9, 0), False, "cudnn"),
        (4096, (8, 0), False, "torch"),
        (64, (8, 0), True, "torch"),
    ],
    ids=["ampere", "hopper", "hopper-unserved", "ampere-unserved", "few-tokens"],
)
def test_default_of_unmeasured_shapes(
    tokens: int, capability: tuple[int, int], serves: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnGpu:
        is_cuda, device, shape = True, torch.device("cuda"), (2, tokens, 512)

        def numel(self) -> int:
            return math.prod(self.shape)

    ways = attention.IMPLEMENTATIONS
    monkeypatch.setattr(attention, "_capability", lambda device: capability)
    monkeypatch.setitem(ways, "cudnn", ways["cudnn"]._replace(problem=attention._no_problem))
    gemm_problem = attention._no_problem if serves else lambda *args: "it does not serve"
    monkeypatch.setitem(ways, "gemm", ways["gemm"]._replace(problem=gemm_problem))
    assert attention._default(OnGpu(), OnGpu(), OnGpu(), 1, 1.0) == chosen


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("columns", [4096, 9216, 16384])
def test_kernel_reads_wide_and_does_not_spill(target: str, columns: int) -> None:
    asm = compile_for(
        target,
        op._softmax_kernel,
        {"s_ptr": "*fp32:16", "p_ptr": "*fp16:16", "columns": "i32:16", "scale_log2": "fp32"},
        {"P_SCALE": op.P_SCALE, "BLOCK": triton.next_power_of_2(columns)},
        num_warps=op.NUM_WARPS,
    )
    assert_no_spills(asm)
    if "sass" in asm:
        assert not narrow_accesses(asm)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "tokens"), [(3, 9216), (5, 4096), (2, 1000)])
def test_error_and_memory_on_a_gpu(batch: int, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = (x.to(dtype) for x in draw(batch, tokens, 512, device=device, factor=3.0))
    arguments = (q, k, v, 1, 512**-0.5)
    expected = spatial_attention_ref(q, k, v, 1)
    spatial_attention(q, k, v, 1, impl="gemm")  # cuBLAS keeps the workspace of its first call
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    out = spatial_attention(q, k, v, 1, impl="gemm")
    scratch = torch.cuda.max_memory_allocated(device) - held - out.nbytes
    assert scratch <= 1.6 * op.SCORES_BYTES, "scores, and probabilities of half the width"
    assert attention._why_wrong(arguments, expected, out) is None


@pytest.mark.gpu
def test_is_captured_and_chosen_unmeasured(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_TUNE", "0")
    q, k, v = draw(2, 2048, 512, device=device)
    assert attention._default(q, k, v, 1, 1.0) == "gemm"
    expected = spatial_attention(q, k, v, 1)  # warms the library up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = spatial_attention(q, k, v, 1)
    graph.replay()
    assert_close_to_gold(out, expected.double(), expected)
