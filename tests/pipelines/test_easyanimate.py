"""EasyAnimate: a tiny pipeline of the whole structure, patched against unpatched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from family_checks import check_clip, check_compiled
from tiny_pipelines import EASYANIMATE, easyanimate
from torch import Tensor, nn
from transformer_checks import (
    ORDERS,
    Shifted,
    check_autocast,
    check_changed,
    check_corner,
    check_deaf_to_attention_backends,
    check_each_op_off,
    check_error_in_bfloat16,
    check_hooks,
    check_same,
    fallback_reasons,
    tiny_transformer,
)

from vidaccel import patch_pipeline
from vidaccel.blocks.dit.gated_residual import FLOAT32_NORMS
from vidaccel.blocks.dit.transformer_easyanimate import EASYANIMATE_OPS, FusedEasyAnimateTransformerBlock, _here
from vidaccel.sites.memo import Memo, holding


def build(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return tiny_transformer("EasyAnimateTransformer3DModel", EASYANIMATE | options, dtype)


@torch.no_grad()
def call(model: Any, *, batch: int = 2, size: tuple[int, int, int] = (3, 4, 6)) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents, text = (torch.randn(batch, *shape, generator=generator) for shape in ((4, *size), (5, 12)))
    return model(latents, torch.full((batch,), 500.0), encoder_hidden_states=text).sample


def test_same_clip_and_exact_restore() -> None:
    pipe, arguments = easyanimate()
    check_clip(pipe, arguments, reorders_sums=False)
    with patch_pipeline(pipe, strict=True) as report:
        assert {site.op for site in report.sites} == {*EASYANIMATE_OPS}


@pytest.mark.parametrize("size", [(3, 4, 6), (1, 2, 2)])
@pytest.mark.parametrize("options", [{}, {"after_norm": False, "norm_elementwise_affine": False}])
def test_same_output(size: tuple[int, int, int], options: dict[str, Any]) -> None:
    assert not check_same(build(**options), lambda model: call(model, size=size)).fallbacks


@torch.no_grad()
def test_a_long_call_is_checked_on_a_corner() -> None:
    block = build().transformer_blocks[0]
    tables = torch.randn(2, 70_000, 8).repeat_interleave(2, dim=2)
    arguments = torch.randn(1, 70_000, 32), torch.randn(1, 5, 32), torch.randn(1, 8), tuple(tables)
    check_corner(block, FusedEasyAnimateTransformerBlock, arguments)


# what a user may change


def test_each_op_off() -> None:
    check_each_op_off(build(), call)


def test_deaf_to_attention_backends() -> None:
    check_deaf_to_attention_backends(build(), call)


def test_hooks() -> None:
    check_hooks(build(), call, "attn1.to_k", "0.attn1.norm_q", "1.ff.net.0", "0.attn1.to_add_out")


def foreign_processors(model: Any) -> None:
    for block in model.transformer_blocks:
        block.attn1.processor = Shifted(block.attn1.processor)


def other_norms(model: Any) -> None:
    model.transformer_blocks[0].attn1.norm_added_k = nn.Tanh()
    model.transformer_blocks[1].attn1.norm_k = nn.Tanh()


def cross_attention(model: Any) -> None:
    for block in model.transformer_blocks:
        block.attn1.is_cross_attention = True
        block.ff.net[2].register_forward_hook(lambda *_: None)  # no check, which would find it out


def with_lora(model: Any) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(init_lora_weights=False, target_modules=["to_q", "add_v_proj", "norm1.linear", "net.2"])
    peft.inject_adapter_in_model(config, model)
    model.requires_grad_(False)


@pytest.mark.parametrize("change", [foreign_processors, other_norms, cross_attention, with_lora])
@pytest.mark.parametrize("first", ORDERS)
def test_a_changed_model(change: Callable[[Any], None], first: str) -> None:
    check_changed(build, call, change, first)


def test_a_table_for_blocks_on_several_devices() -> None:
    table = torch.ones(2)
    with holding(Memo()):
        found = [_here(table, torch.device(name)) for name in ("meta", "cpu", "meta")]
    assert [x.device.type for x in found] == ["meta", "cpu", "meta"] and found[0] is found[2]


@torch.no_grad()
def test_norms_in_float32_of_a_float64_model() -> None:
    model = build(torch.float64)
    latents, text = (torch.randn(1, *shape, dtype=torch.float64) for shape in ((4, 3, 4, 6), (5, 12)))
    report = check_same(model, lambda model: model(latents, torch.ones(1), encoder_hidden_states=text).sample)
    assert fallback_reasons(report) == {FLOAT32_NORMS}


# torch.compile, half precision


@pytest.mark.slow
def test_a_patched_model_compiles_in_one_graph() -> None:
    check_compiled(build(), call)


@pytest.mark.parametrize("place", [0, 1])
@torch.no_grad()
def test_error_in_bfloat16(place: int) -> None:
    block = build(torch.bfloat16).transformer_blocks[place]
    x, text, temb = (torch.randn(2, *size, dtype=torch.bfloat16) for size in ((18, 32), (5, 32), (8,)))
    rotary = get_3d_rotary_pos_embed(16, ((0, 0), (2, 3)), (2, 3), 3)
    check_error_in_bfloat16(block, FusedEasyAnimateTransformerBlock, (x, text, temb, rotary))


def test_a_call_under_autocast_goes_the_original_way() -> None:
    check_autocast(build(), call)
