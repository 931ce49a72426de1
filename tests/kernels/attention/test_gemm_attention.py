"""The parts of attention by two matrix products; as an implementation of the op it is in test_spatial_attention.py."""

from __future__ import annotations

import pytest
import torch
import triton
from kernel_checks import TARGETS, assert_close_to_gold, assert_no_spills, compile_for, narrow_accesses
from torch import Tensor

from vidaccel.kernels.attention import gemm_attention as op
from vidaccel.kernels.attention.gemm_attention import bind_gemm_attention
from vidaccel.kernels.attention.spatial_attention import SPATIAL_ATTENTION, spatial_attention, spatial_attention_ref
from vidaccel.kernels.op import listening


def draw(*shape: int, device: torch.device, factor: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of ``[B, S, H*D]``: slices of a packed projection; ``factor`` sharpens the scores."""
    batch, tokens, channels = shape
    generator = torch.Generator(device).manual_seed(0)
    packed = torch.randn(batch, tokens, 3 * channels, generator=generator, device=device).half()
    q, k, v = packed.chunk(3, dim=-1)
    return q * factor if factor != 1 else q, k, v


@pytest.mark.parametrize("scores_bytes", [2**27, 4 * 67 * 140, 1], ids=["batch", "two-samples", "rows"])
@pytest.mark.parametrize("tokens", [1, 67, 300])
def test_result_does_not_depend_on_the_parts(tokens: int, scores_bytes: int, device: torch.device) -> None:
    q, _, _ = draw(3, tokens, 288, device=device)
    _, k, v = draw(3, 67, 288, device=device)
    arguments = q, k, v, 1, 288**-0.5
    out = bind_gemm_attention(*arguments, scores_bytes=scores_bytes)(*arguments)
    gold = spatial_attention_ref(q.double(), k.double(), v.double(), 1)
    assert_close_to_gold(out, gold, spatial_attention_ref(q, k, v, 1))


def test_probabilities_too_small_for_float16(device: torch.device) -> None:
    """Keys that all but one get 2e-6 each, where float16 has steps of 6e-8, and 4 % of the weight together."""
    q = torch.zeros(1, 1, 288, dtype=torch.float16, device=device)
    k, v = (torch.zeros(1, 16384, 288, dtype=torch.float16, device=device) for _ in range(2))
    q[..., 0], k[:, 1:, 0], v[:, 1:] = 1, -13, 1
    out = spatial_attention(q, k, v, 1, scale=1.0, impl="gemm").double()
    gold = spatial_attention_ref(q.double(), k.double(), v.double(), 1, 1.0)
    torch.testing.assert_close(out, gold, rtol=torch.finfo(torch.float16).eps, atol=0)


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
    torch.library.opcheck(SPATIAL_ATTENTION.registered["gemm"], (*draw(1, 9, 288, device=device), 1, 0.25))


def test_compiles_fullgraph(device: torch.device) -> None:
    q, k, v = draw(2, 9, 288, device=device)
    compiled = torch.compile(
        lambda q, k, v: spatial_attention(q, k, v, 1, impl="gemm") + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(q, k, v), spatial_attention(q, k, v, 1, impl="gemm") + 1)


def test_the_check_passes_what_is_right(device: torch.device) -> None:
    q, k, v = draw(2, 67, 576, device=device, factor=3.0)
    with listening(checks=True) as events:
        spatial_attention(q, k, v, 2, impl="gemm")
    assert [(event.implementation, event.problem) for event in events] == [("gemm", "")]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("steps", [False, True], ids=["whole-rows", "in-steps"])
@pytest.mark.parametrize("columns", [4096, 9216, 16384])
def test_kernel_reads_wide_and_does_not_spill(target: str, columns: int, steps: bool) -> None:
    asm = compile_for(
        target,
        op._softmax_kernel,
        {
            **{"s_ptr": "*fp32:16", "p_ptr": "*fp16:16", "scale_log2": "fp32"},
            **dict.fromkeys(["columns", "rows", "seen", "step"], "i32:16"),
        },
        {"STEPS": steps, "P_SCALE": op.P_SCALE, "BLOCK": triton.next_power_of_2(columns)},
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
    spatial_attention(q, k, v, 1, impl="gemm")  # cuBLAS keeps the workspace of its first call
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    out = spatial_attention(q, k, v, 1, impl="gemm")
    scratch = torch.cuda.max_memory_allocated(device) - held - out.nbytes
    assert scratch <= 1.6 * op.SCORES_BYTES, "scores, and probabilities of half the width"
    with listening(checks=True) as events:
        spatial_attention(q, k, v, 1, impl="gemm")
    assert [event.problem for event in events] == [""]


@pytest.mark.gpu
@torch.no_grad()
def test_is_captured_and_chosen_unmeasured(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_TUNE", "0")
    q, k, v = draw(2, 2048, 512, device=device)
    with listening() as events:
        expected = spatial_attention(q, k, v, 1)  # warms the library up
        spatial_attention(q[:, :64], k[:, :64], v[:, :64], 1)
    assert [event.implementation for event in events] == ["gemm", "gemm"]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = spatial_attention(q, k, v, 1)
    graph.replay()
    assert_close_to_gold(out, expected.double(), expected)
