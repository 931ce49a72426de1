"""The attention processor: which of its ops run, and that its classes of fidelity are what it says."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from block_checks import frozen, fused, relative_error
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from kernel_checks import FAULTS, planted

from vidaccel.blocks.unet.attention_processor import FusedAttnProcessor2_0, Processor
from vidaccel.blocks.unet.normalization import FusedGroupNorm
from vidaccel.kernels.attention.spatial_attention import SPATIAL_ATTENTION
from vidaccel.sites.site import Site


def attention(dtype: torch.dtype = torch.float32, **options: object) -> Attention:
    torch.manual_seed(0)
    return frozen(Attention(query_dim=64, heads=2, dim_head=32, processor=AttnProcessor2_0(), **options)).to(dtype)


@contextmanager
def processed(attn: Attention, *ops: str) -> Iterator[dict[str, Site]]:
    """``attn`` with our processor, and its sites of ``ops`` (none named: all) by op, inside the ``with`` block."""
    rule = Processor()
    assert rule.matches("attn", attn) and rule.left_alone_reason(attn) is None
    sites = [Site("attn", op, fidelity) for op, fidelity in rule.ops.items() if op in (ops or rule.ops)]
    patch = rule.put(attn, sites, checks=True)
    try:
        yield {site.op: site for site in sites}
    finally:
        patch.undo(attn)


@pytest.mark.parametrize("context", [None, (2, 5, 64)], ids=["self", "cross"])
@torch.no_grad()
def test_without_the_kernel_the_bits_are_the_stock_ones(context: tuple[int, ...] | None) -> None:
    attn, x = attention(residual_connection=True), torch.randn(2, 9, 64)
    context = None if context is None else torch.randn(context)
    expected, stock = attn(x, context), attn.processor
    with processed(attn, "unit_division") as sites:
        assert torch.equal(attn(x, context), expected)
    assert attn.processor is stock and sites["unit_division"].implementations


@pytest.mark.parametrize("context", [None, 5], ids=["self", "cross"])
@torch.no_grad()
def test_the_kernel_in_its_place(context: int | None, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", "spatial_attention=triton")
    attn = attention(torch.float16).to(device)
    x = torch.randn(2, 9, 64, device=device).half()
    context = None if context is None else torch.randn(2, context, 64, device=device).half()
    expected = attn(x, context)
    with processed(attn) as sites:
        out = attn(x, context)
    assert relative_error(out, expected) <= 4 * torch.finfo(torch.float16).eps
    assert sites["spatial_attention"].implementations == {"triton"} and not sites["spatial_attention"].fallbacks


@torch.no_grad()
def test_the_wide_head_of_a_vae_is_not_copied(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its image goes in and out channels-last, through the fused norm, and every reordering between is a view."""
    monkeypatch.setenv("VIDACCEL_IMPL", "spatial_attention=gemm")
    attn = Attention(288, heads=1, dim_head=288, bias=True, norm_num_groups=4, residual_connection=True)
    attn = frozen(attn).to(device, torch.float16)
    x = torch.randn(2, 4, 5, 288, device=device).half().permute(0, 3, 1, 2)
    expected, copied = attn(x), []
    for layer in (attn.to_q, attn.to_out[0]):
        layer.register_forward_pre_hook(lambda _, args: copied.append(not args[0].is_contiguous()))
    with processed(attn) as sites, fused(attn.group_norm, FusedGroupNorm) as norm:
        out = attn(x)
    assert relative_error(out, expected) <= 4 * torch.finfo(torch.float16).eps
    assert sites["spatial_attention"].implementations == {"gemm"} and not sites["spatial_attention"].fallbacks
    assert norm["group_norm_silu"].implementations == {"triton"}
    assert copied == [False, False] and out.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_a_kernel_that_does_not_serve_is_counted_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    attn, x = attention(), torch.randn(2, 9, 64)
    expected = attn(x)
    monkeypatch.setenv("VIDACCEL_IMPL", "spatial_attention=gluon")
    with processed(attn, "spatial_attention") as sites:
        assert relative_error(attn(x), expected) <= 1e-5
    assert dict(sites["spatial_attention"].fallbacks) == {"the kernel is for Hopper GPUs": 1}


@torch.no_grad()
def test_masks_go_the_original_way_and_other_factors_are_divided_by() -> None:
    x, mask = torch.randn(2, 9, 64), torch.randn(2, 1, 9)
    for attn, inputs in ((attention(), (x, None, mask)), (attention(rescale_output_factor=2.0), (x,))):
        expected = attn(*inputs)
        with processed(attn, "unit_division", "qkv_projection") as sites:
            assert torch.equal(attn(*inputs), expected)
        reasons = {"an attention mask was passed": 1} if len(inputs) == 3 else {}
        assert dict(sites["unit_division"].fallbacks) == reasons


@torch.no_grad()
def test_too_few_contexts_do_as_before() -> None:
    """Stock code makes one sample of all that it has queries of, which fits nothing; no site is at fault."""
    attn, x, context = attention(), torch.randn(4, 9, 64), torch.randn(1, 5, 64)
    expected = attn(x, context)
    with processed(attn, "unit_division") as sites:
        assert attn(x, context).shape == expected.shape == (1, 36, 64)
        assert torch.equal(attn(x, context), expected)
    assert not any(site.reason for site in sites.values())


@torch.no_grad()
def test_normed_queries_and_keys() -> None:
    attn, x = attention(qk_norm="layer_norm"), torch.randn(2, 9, 64)
    expected = attn(x)
    with processed(attn) as sites:
        assert relative_error(attn(x), expected) <= 1e-6
    assert not any(site.reason or site.fallbacks for site in sites.values())


@torch.no_grad()
def test_a_fault_of_the_kernel_is_found(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", "spatial_attention=triton")
    attn, x = attention(torch.float16).to(device), torch.randn(2, 9, 64, device=device).half()
    expected = attn(x)
    with processed(attn, "spatial_attention") as sites, planted(SPATIAL_ATTENTION, "triton", FAULTS["gain"]):
        assert relative_error(attn(x), expected) <= 2e-3
        assert sites["spatial_attention"].state == "failed"
        assert torch.equal(attn(x), expected)


@torch.no_grad()
def test_a_fault_around_the_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")
    attn, x = attention(), torch.randn(2, 9, 64)
    expected = attn(x)
    right = FusedAttnProcessor2_0.fused_forward
    monkeypatch.setattr(
        FusedAttnProcessor2_0, "fused_forward", lambda self, attn, *args: right(self, attn, *args) - attn.to_out[0].bias
    )
    with processed(attn) as sites:
        assert torch.equal(attn(x), expected)
        assert {site.state for site in sites.values()} == {"failed"}


@torch.no_grad()
def test_copies_are_stock_and_another_processor_stays() -> None:
    attn, x = attention(), torch.randn(2, 9, 64)
    expected = attn(x)
    with processed(attn) as sites:
        for twin in (copy.deepcopy(attn), pickle.loads(pickle.dumps(attn))):
            assert type(twin.processor) is AttnProcessor2_0 and torch.equal(twin(x), expected)
        attn.set_processor(mine := AttnProcessor())
        assert {site.state for site in sites.values()} == {"left alone"}
    assert attn.processor is mine
