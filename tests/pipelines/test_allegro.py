"""Allegro: a tiny pipeline of the whole structure, patched against unpatched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro
from family_checks import check_clip, check_compiled
from tiny_pipelines import ALLEGRO, allegro
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
from vidaccel.blocks.dit.transformer_allegro import ALLEGRO_OPS, FusedAllegroTransformerBlock


def build(dtype: torch.dtype = torch.float32) -> Any:
    return tiny_transformer("AllegroTransformer3DModel", ALLEGRO, dtype)


def rotary(frames: int, height: int, width: int) -> Any:
    *tables, t, h, w = get_3d_rotary_pos_embed_allegro(24, ((0, 0), (height, width)), (height, width), frames)
    return tables, torch.cartesian_prod(t.long(), h.long(), w.long()).T.reshape(3, 1, -1).unbind(0)


@torch.no_grad()
def call(model: Any, *, size: tuple[int, int, int] = (3, 4, 6), attention_mask: Tensor | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents, text = (torch.randn(2, *shape, generator=generator) for shape in ((4, *size), (5, 12)))
    mask = torch.arange(5)[None] < torch.tensor([[3], [5]])
    places = rotary(size[0], size[1] // 2, size[2] // 2)
    timestep = torch.full((2,), 500)
    return model(latents, text, timestep, attention_mask, mask, image_rotary_emb=places).sample


def test_same_clip_and_exact_restore() -> None:
    pipe, arguments = allegro()
    check_clip(pipe, arguments, reorders_sums=False)
    with patch_pipeline(pipe, strict=True) as report:
        assert {site.op for site in report.sites} == {*ALLEGRO_OPS}


@pytest.mark.parametrize("size", [(3, 4, 6), (1, 4, 2)])
def test_same_output(size: tuple[int, int, int]) -> None:
    assert not check_same(build(), lambda model: call(model, size=size)).fallbacks


def test_one_token_is_as_wrong_as_in_the_stock_model() -> None:
    model = build()
    model.transformer_blocks[0].ff.net[2].register_forward_hook(lambda *_: None)
    with patch_module(model), pytest.raises(ValueError, match="not enough values to unpack"):
        call(model, size=(1, 2, 2))


def test_a_masked_video() -> None:
    mask = torch.ones(2, 3, 4, 6)
    mask[:, 2] = 0
    report = check_same(build(), lambda model: call(model, attention_mask=mask))
    assert fallback_reasons(report) == {"its attention is masked"}


@torch.no_grad()
def test_a_long_call_is_checked_on_a_corner() -> None:
    block = build().transformer_blocks[0]
    x, temb = torch.randn(1, 48_000, 48), torch.randn(1, 288)
    arguments = x, torch.randn(1, 5, 48), temb, None, None, rotary(30, 40, 40)
    check_corner(block, FusedAllegroTransformerBlock, arguments)


def test_each_op_off() -> None:
    check_each_op_off(build(), call)


def test_deaf_to_attention_backends() -> None:
    check_deaf_to_attention_backends(build(), call)


def test_hooks() -> None:
    check_hooks(build(), call, "attn1.to_k", "0.attn2", "1.ff.net.0")


def foreign_processors(model: Any) -> None:
    first, second = model.transformer_blocks
    for attn in (first.attn1, second.attn2):
        attn.processor = Shifted(attn.processor)


def scaled(model: Any) -> None:
    model.transformer_blocks[0].attn1.rescale_output_factor = 2.0
    model.transformer_blocks[1].attn1.residual_connection = True


@pytest.mark.parametrize("change", [foreign_processors, scaled, with_injected_lora])
@pytest.mark.parametrize("first", ORDERS)
def test_a_changed_model(change: Callable[[Any], None], first: str) -> None:
    check_changed(build, call, change, first)


@pytest.mark.parametrize("first", ORDERS)
def test_a_step_cache(first: str) -> None:
    check_cache(build, call, "pyramid attention broadcast", first)


@pytest.mark.slow
def test_a_patched_model_compiles_in_one_graph() -> None:
    check_compiled(build(), call)


@torch.no_grad()
def test_error_in_bfloat16() -> None:
    block = build(torch.bfloat16).transformer_blocks[0]
    x, text, temb = (torch.randn(2, *size, dtype=torch.bfloat16) for size in ((18, 48), (5, 48), (288,)))
    check_error_in_bfloat16(block, FusedAllegroTransformerBlock, (x, text, temb, None, None, rotary(3, 2, 3)))


def test_a_call_under_autocast_goes_the_original_way() -> None:
    check_autocast(build(), call)
