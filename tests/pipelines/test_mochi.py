"""Mochi: a tiny pipeline of the whole structure, patched against unpatched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from block_checks import relative_error
from family_checks import check_clip, check_compiled
from tiny_models import tiny_synthetic_pipeline
from torch import Tensor, nn
from transformer_checks import (
    CACHES,
    ORDERS,
    Shifted,
    check_autocast,
    check_cache,
    check_changed,
    check_corner,
    check_deaf_to_attention_backends,
    check_each_op_off,
    check_error_in_bfloat16,
    check_full_size,
    check_hooks,
    check_lora,
    check_same,
    fallback_reasons,
    tiny_transformer,
)

from vidaccel import patch_module, patch_pipeline
from vidaccel.blocks.dit import padded_text
from vidaccel.blocks.dit import transformer_mochi as blocks
from vidaccel.blocks.dit.gated_residual import FLOAT32_NORMS
from vidaccel.blocks.dit.transformer_mochi import MOCHI_OPS, FusedMochiTransformerBlock

SIZES = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3, "pooled_projection_dim": 24,
         "in_channels": 4, "text_embed_dim": 16, "time_embed_dim": 8}  # fmt: skip
TEXT = 7  # tokens, of which some are valid
VALID = [(3, 5), (3, 3), (7, 7), (0, 5), (0, 0), (2, 5, 5)]


def build(dtype: torch.dtype = torch.float32) -> Any:
    return tiny_transformer("MochiTransformer3DModel", SIZES, dtype)


def mask_of(*valid: int) -> Tensor:
    return torch.arange(TEXT) < torch.tensor(valid)[:, None]


@torch.no_grad()
def call(
    model: Any,
    *,
    valid: tuple[int, ...] = (3, 5),
    size: tuple[int, int, int] = (2, 4, 6),
    mask: Tensor | None = None,
) -> Tensor:
    """Texts of which so many tokens are ``valid``, or those that a ``mask`` says."""
    generator = torch.Generator().manual_seed(1)
    latents, texts = (torch.randn(len(valid), *x, generator=generator) for x in ((4, *size), (TEXT, 16)))
    mask = mask_of(*valid) if mask is None else mask
    return model(latents, texts, torch.full((len(valid),), 500.0), mask).sample


def test_same_clip_and_exact_restore() -> None:
    pipe, arguments = tiny_synthetic_pipeline("mochi-1")
    check_clip(pipe, arguments, reorders_sums=False)
    with patch_pipeline(pipe, strict=True) as report:
        assert {site.op for site in report.sites if site.path.startswith("transformer.")} == {*MOCHI_OPS}


def test_the_full_model_has_the_size_of_the_released_one() -> None:
    check_full_size("mochi-1", 10_027_677_744)


# text without its padding


@pytest.mark.parametrize("valid", VALID, ids=str)
def test_same_output(valid: tuple[int, ...]) -> None:
    assert not check_same(build(), lambda model: call(model, valid=valid)).fallbacks


@pytest.mark.parametrize("size", [(1, 2, 2), (3, 6, 10)])
def test_sizes(size: tuple[int, int, int]) -> None:
    assert not check_same(build(), lambda model: call(model, size=size)).fallbacks


def test_lengths_differ_from_call_to_call_and_are_found_once_in_each(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    found = padded_text._valid_lengths
    monkeypatch.setattr(padded_text, "_valid_lengths", lambda mask: asked.append(1) or found(mask))
    model = build()
    expected = {valid: call(model, valid=valid) for valid in ((3, 5), (5, 5), (0, 7))}
    with patch_module(model, strict=True):
        for valid in [*expected, *expected]:
            assert relative_error(call(model, valid=valid), expected[valid]) <= 1e-5
        asked.clear()
        call(model)
        assert len(asked) == 1


@torch.no_grad()
def test_what_a_block_hands_on_is_as_long_as_before() -> None:
    model = build()
    block = model.transformer_blocks[0]
    args = torch.randn(2, 12, 32), torch.randn(2, TEXT, 24), torch.randn(2, 32), mask_of(3, 5)
    video, text = block(*args)
    with patch_module(model, strict=True):
        found, found_text = block(*args)
    assert relative_error(found, video) <= 1e-5 and text.shape == found_text.shape
    assert relative_error(found_text[:, :5], text[:, :5]) <= 1e-5
    assert not found_text[:, 5:].any() and text[:, 5:].any()


def test_padding_between_valid_tokens_stays() -> None:
    mask = mask_of(3, 5)
    mask[:, 1] = False
    report = check_same(build(), lambda model: call(model, mask=mask))
    assert fallback_reasons(report) == {"padding stands between valid tokens"}


@pytest.mark.parametrize("whole", [True, False])
def test_a_wrong_block_is_found_out(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not whole:
        monkeypatch.setattr(blocks, "MOST_WHOLE", 0)
        monkeypatch.setattr(blocks, "CORNER_ROWS", 2)
    model = build()
    expected = call(model)
    check_same(model, call)
    right = FusedMochiTransformerBlock._add
    monkeypatch.setattr(FusedMochiTransformerBlock, "_add", lambda self, x, *args: right(self, 1.01 * x, *args))
    with patch_module(model) as report:
        assert relative_error(call(model), expected) <= 1e-5
        assert {site.state for site in report.sites} == {"failed"}


@torch.no_grad()
def test_a_long_call_is_checked_on_a_corner() -> None:
    block = build().transformer_blocks[0]
    rotary = tuple(torch.randn(70_000, 2, 8) for _ in range(2))
    arguments = torch.randn(1, 70_000, 32), torch.randn(1, TEXT, 24), torch.randn(1, 32), mask_of(5), rotary
    check_corner(block, FusedMochiTransformerBlock, arguments)


# what a user may change


def test_each_op_off() -> None:
    check_each_op_off(build(), call)


def test_deaf_to_attention_backends() -> None:
    check_deaf_to_attention_backends(build(), call)


def test_lora() -> None:
    layers = "attn1.to_q", "add_k_proj", "to_out.0", "norm1.linear", "norm1_context.linear_1", "ff.net.0.proj"
    assert not check_lora(build(), call, *layers).fallbacks


def test_hooks() -> None:
    check_hooks(build(), call, "attn1.to_k", "1.attn1.norm_q", "1.ff.net.0", "2.norm2", "0.norm4_context")


def foreign_processor(model: Any) -> None:
    attn = model.transformer_blocks[1].attn1
    attn.processor = Shifted(attn.processor)


def other_norm(model: Any) -> None:
    for block in model.transformer_blocks:
        block.attn1.norm_added_k = nn.Tanh()


def other_eps(model: Any) -> None:
    last = model.transformer_blocks[-1]
    last.norm1_context.norm.norm.eps = 1.0
    last.attn1.processor = Shifted(last.attn1.processor)  # no check, which would find out another eps


@pytest.mark.parametrize("change", [foreign_processor, other_norm, other_eps])
@pytest.mark.parametrize("first", ORDERS)
def test_a_changed_model(change: Callable[[Any], None], first: str) -> None:
    check_changed(build, call, change, first)


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("first", ORDERS)
def test_step_caches(name: str, first: str) -> None:
    check_cache(build, call, name, first)


@torch.no_grad()
def test_a_float64_model_goes_the_original_way() -> None:
    model = build(torch.float64)
    inputs = [torch.randn(1, *shape, dtype=torch.float64) for shape in ((4, 1, 2, 2), (TEXT, 16))]
    report = check_same(model, lambda model: model(*inputs, torch.full((1,), 500.0), mask_of(5)).sample)
    assert fallback_reasons(report) == {FLOAT32_NORMS}


# torch.compile, half precision


@pytest.mark.slow
def test_a_patched_model_compiles_in_one_graph() -> None:
    check_compiled(build(), call)


@pytest.mark.parametrize("last", [False, True])
@torch.no_grad()
def test_error_in_bfloat16(last: bool) -> None:
    block = build(torch.bfloat16).transformer_blocks[-1 if last else 0]
    x, text, temb = (torch.randn(2, *size, dtype=torch.bfloat16) for size in ((40, 32), (TEXT, 24), (32,)))
    rotary = tuple(torch.randn(40, 2, 8) for _ in range(2))
    check_error_in_bfloat16(block, FusedMochiTransformerBlock, (x, text, temb, mask_of(7, 7), rotary))


def test_a_call_under_autocast_goes_the_original_way() -> None:
    check_autocast(build(), call)
