"""The attention processor: which of its ops run, and that its classes of fidelity are what it says."""

from __future__ import annotations

import pytest
import torch
from block_checks import fused
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from vidaccel.blocks.unet.attention_processor import FusedAttnProcessor2_0
from vidaccel.blocks.unet.normalization import FusedGroupNorm
from vidaccel.sites.site import Site


def attention(dtype: torch.dtype = torch.float32, **options: object) -> Attention:
    torch.manual_seed(0)
    return Attention(query_dim=64, heads=2, dim_head=32, processor=AttnProcessor2_0(), **options).to(dtype).eval()


def sites(*ops: str) -> list[Site]:
    return [Site("attn", name, "math-exact" if name == "spatial_attention" else "bit-exact") for name in ops]


@torch.no_grad()
def both(attn: Attention, ours: FusedAttnProcessor2_0, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    expected = attn(*inputs)
    attn.set_processor(ours)
    return attn(*inputs), expected


@pytest.mark.parametrize("ops", [(), ("unit_division",)], ids=["none", "unit_division"])
@pytest.mark.parametrize("context", [None, (2, 5, 64)], ids=["self", "cross"])
def test_without_the_kernel_the_bits_are_the_stock_ones(ops: tuple[str, ...], context: tuple[int, ...] | None) -> None:
    x = torch.randn(2, 9, 64)
    context = None if context is None else torch.randn(context)
    out, expected = both(attention(residual_connection=True), FusedAttnProcessor2_0(sites(*ops)), x, context)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("tokens", [9, 5], ids=["self", "cross"])
def test_the_kernel_in_its_place(tokens: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", "spatial_attention=triton")
    x, context = (torch.randn(2, rows, 64, device=device).half() for rows in (9, tokens))
    own = sites("spatial_attention", "unit_division")
    out, expected = both(attention(torch.float16).to(device), FusedAttnProcessor2_0(own), x, context)
    assert (out - expected).norm() <= 4 * torch.finfo(torch.float16).eps * expected.norm()
    assert own[0].implementations == {"triton"} and not own[0].fallbacks


@torch.no_grad()
def test_the_wide_head_of_a_vae_is_not_copied(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its image goes in and out channels-last, through the fused norm, and every reordering between is a view."""
    monkeypatch.setenv("VIDACCEL_IMPL", "spatial_attention=gemm")
    attn = Attention(288, heads=1, dim_head=288, bias=True, norm_num_groups=4, residual_connection=True)
    attn = attn.to(device, torch.float16).eval()
    x = torch.randn(2, 4, 5, 288, device=device).half().permute(0, 3, 1, 2)
    expected, copied = attn(x), []
    own = sites("spatial_attention", "unit_division")
    attn.set_processor(FusedAttnProcessor2_0(own))
    for layer in (attn.to_q, attn.to_out[0]):
        layer.register_forward_pre_hook(lambda _, args: copied.append(not args[0].is_contiguous()))
    with fused(attn.group_norm, FusedGroupNorm) as norm:
        out = attn(x)
    assert (out - expected).norm() <= 4 * torch.finfo(torch.float16).eps * expected.norm()
    assert own[0].implementations == {"gemm"} and not own[0].fallbacks
    assert norm["group_norm_silu"].implementations == {"triton"}
    assert copied == [False, False] and out.is_contiguous(memory_format=torch.channels_last)


def test_a_kernel_that_does_not_serve_is_counted_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", "spatial_attention=gluon")
    own = sites("spatial_attention")
    processor = FusedAttnProcessor2_0(own)
    x = torch.randn(2, 9, 64)
    out, expected = both(attention(), processor, x)
    assert torch.equal(out, expected)
    assert own[0].implementations == {"torch"} and dict(own[0].fallbacks) == {"the kernel is for Hopper GPUs": 1}


def test_masks_and_other_factors_run_the_stock_processor() -> None:
    x, mask = torch.randn(2, 9, 64), torch.zeros(2, 1, 9)
    own = sites("spatial_attention", "unit_division")
    for attn, inputs in ((attention(), (x, None, mask)), (attention(rescale_output_factor=2.0), (x,))):
        assert torch.equal(*both(attn, FusedAttnProcessor2_0(own), *inputs))
    assert not own[0].implementations


def test_normed_queries_and_keys() -> None:
    attn = attention(qk_norm="layer_norm")
    assert torch.equal(*both(attn, FusedAttnProcessor2_0(sites("spatial_attention")), torch.randn(2, 9, 64)))
