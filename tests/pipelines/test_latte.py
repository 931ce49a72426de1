"""Latte: a tiny pipeline of the whole structure, patched against unpatched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from family_checks import check_clip, check_compiled
from tiny_pipelines import LATTE, latte
from torch import Tensor
from transformer_checks import (
    ORDERS,
    Shifted,
    check_autocast,
    check_cache,
    check_changed,
    check_corner,
    check_deaf_to_attention_backends,
    check_each_op_off,
    check_error_in_bfloat16,
    check_hooks,
    check_same,
    fallback_reasons,
    tiny_transformer,
    with_injected_lora,
)

from vidaccel import patch_module, patch_pipeline
from vidaccel.blocks.dit.latte_transformer_3d import LATTE_OPS, FusedLatteTransformerBlock


def build(dtype: torch.dtype = torch.float32) -> Any:
    return tiny_transformer("LatteTransformer3DModel", LATTE, dtype)


@torch.no_grad()
def call(model: Any, *, size: tuple[int, int] = (8, 8)) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents, text = (torch.randn(2, *shape, generator=generator) for shape in ((4, 3, *size), (5, 12)))
    return model(latents, torch.full((2,), 500), text).sample


def test_same_clip_and_exact_restore() -> None:
    pipe, arguments = latte()
    check_clip(pipe, arguments)
    with patch_pipeline(pipe, strict=True) as report:
        assert {site.op for site in report.sites if site.path.startswith("transformer.")} == {*LATTE_OPS}


@pytest.mark.parametrize("size", [(8, 8), (2, 6)])
def test_same_output(size: tuple[int, int]) -> None:
    assert not check_same(build(), lambda model: call(model, size=size)).fallbacks


@torch.no_grad()
def test_a_long_call_is_checked_on_a_corner() -> None:
    block = build().transformer_blocks[0]
    arguments = torch.randn(100, 1000, 24), None, torch.randn(100, 5, 24), None, torch.randn(100, 144), None, None, None
    check_corner(block, FusedLatteTransformerBlock, arguments)


@torch.no_grad()
def test_a_wrong_batch_of_timesteps_raises_what_stock_code_does() -> None:
    model = build()
    model.transformer_blocks[0].ff.net[2].register_forward_hook(lambda *_: None)
    with patch_module(model), pytest.raises(RuntimeError, match="must match the size"):
        model(torch.randn(2, 4, 3, 8, 8), torch.full((1,), 500), torch.randn(2, 5, 12))


def test_each_op_off() -> None:
    check_each_op_off(build(), call)


def test_deaf_to_attention_backends() -> None:
    check_deaf_to_attention_backends(build(), call)


def test_hooks() -> None:
    check_hooks(build(), call, "attn1.to_k", "0.attn2", "1.ff.net.0")


def foreign_processors(model: Any) -> None:
    for attn in (model.transformer_blocks[0].attn1, model.transformer_blocks[1].attn2):
        attn.processor = Shifted(attn.processor)


@pytest.mark.parametrize("change", [foreign_processors, with_injected_lora])
@pytest.mark.parametrize("first", ORDERS)
def test_a_changed_model(change: Callable[[Any], None], first: str) -> None:
    check_changed(build, call, change, first)


@pytest.mark.parametrize("first", ORDERS)
def test_a_step_cache(first: str) -> None:
    check_cache(build, call, "pyramid attention broadcast", first)


def test_a_feed_forward_in_chunks() -> None:
    model = build()
    for block in model.transformer_blocks:
        block.set_chunk_feed_forward(4, 1)
    assert fallback_reasons(check_same(model, call)) == {"its feed-forward works in chunks"}


@pytest.mark.slow
def test_a_patched_model_compiles_in_one_graph() -> None:
    check_compiled(build(), call)


@torch.no_grad()
def test_error_in_bfloat16() -> None:
    block = build(torch.bfloat16).transformer_blocks[0]
    x, text, temb = (torch.randn(2, *size, dtype=torch.bfloat16) for size in ((18, 24), (5, 24), (144,)))
    check_error_in_bfloat16(block, FusedLatteTransformerBlock, (x, None, text, None, temb))


def test_a_call_under_autocast_goes_the_original_way() -> None:
    check_autocast(build(), call)
