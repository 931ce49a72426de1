"""Sana-Video: tiny pipelines of the whole structure, patched against unpatched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_checks import relative_error
from diffusers import SanaImageToVideoPipeline, SanaVideoPipeline
from family_checks import check_clip, check_compiled
from tiny_models import tiny_video
from tiny_pipelines import SANA_VIDEO, sana_video
from torch import Tensor
from transformer_checks import (
    ORDERS,
    Shifted,
    check_changed,
    check_corner,
    check_each_op_off,
    check_error_in_bfloat16,
    check_hooks,
    check_lora,
    check_same,
    fallback_reasons,
    tiny_transformer,
)

from vidaccel import patch_module, patch_pipeline
from vidaccel.blocks.dit import modulation_rows
from vidaccel.blocks.dit.transformer_sana_video import FusedSanaVideoTransformerBlock


def build(dtype: torch.dtype = torch.float32) -> Any:
    return tiny_transformer("SanaVideoTransformer3DModel", SANA_VIDEO, dtype)


@torch.no_grad()
def call(model: Any, *, size: tuple[int, int, int] = (3, 4, 6), given: bool = True) -> Tensor:
    """``given``: the first frame has a timestep of its own."""
    generator = torch.Generator().manual_seed(1)
    latents, text = (torch.randn(2, *shape, generator=generator) for shape in ((16, *size), (5, 12)))
    timestep = torch.full((2,), 500.0)
    if given:
        frames, height, width = size
        timestep = torch.full((2, 1, frames, height // 2, width // 2), 500.0)
        timestep[:, :, 0] = 0
    return model(latents, text, timestep, encoder_attention_mask=(torch.arange(5) < 3)[None].repeat(2, 1)).sample


@pytest.mark.parametrize(
    ("pipeline_class", "given"),
    [(SanaVideoPipeline, {}), (SanaImageToVideoPipeline, {"image": tiny_video(1, 32, 32)[0]})],
)
def test_same_clip_and_exact_restore(pipeline_class: type[Any], given: dict[str, Any]) -> None:
    pipe, arguments = sana_video(pipeline_class)
    check_clip(pipe, arguments | given, reorders_sums=False)
    with patch_pipeline(pipe, strict=True) as report:
        ops = {site.op for site in report.sites if site.path.startswith("transformer.")}
        assert ops == {"gated_residual_norm", "modulation_rows"}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("size", [(3, 4, 6), (1, 2, 2)])
def test_same_output(size: tuple[int, int, int], given: bool) -> None:
    assert not check_same(build(), lambda model: call(model, size=size, given=given)).fallbacks


def test_one_modulation_for_each_timestep(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    expected = call(model)
    for most in (modulation_rows.MOST_ROWS, 1):
        monkeypatch.setattr(modulation_rows, "MOST_ROWS", most)
        with patch_module(model, strict=True):
            assert relative_error(call(model), expected) <= 1e-5


@torch.no_grad()
def test_a_long_call_is_checked_on_a_corner() -> None:
    block = build().transformer_blocks[0]
    x, tables = torch.randn(1, 120_000, 24), torch.randn(2, 1, 120_000, 1, 12)
    text, temb = torch.randn(1, 5, 24), torch.randn(1, 1, 144)
    arguments = x, None, text, None, temb, 1000, 10, 12, tuple(tables)
    check_corner(block, FusedSanaVideoTransformerBlock, arguments)


def test_each_op_off() -> None:
    check_each_op_off(build(), call)


def test_lora() -> None:
    assert not check_lora(build(), call, "attn1.to_q", "attn2.to_v", "attn1.to_out.0").fallbacks


def test_hooks() -> None:
    check_hooks(build(), call, "attn1.to_k", "0.attn2", "1.ff.conv_inverted")


def foreign_processor(model: Any) -> None:
    attn = model.transformer_blocks[1].attn2
    attn.processor = Shifted(attn.processor)


@pytest.mark.parametrize("first", ORDERS)
def test_a_foreign_processor(first: str) -> None:
    check_changed(build, call, foreign_processor, first)


@pytest.mark.slow
def test_a_patched_model_compiles_in_one_graph() -> None:
    check_compiled(build(), call)


@torch.no_grad()
def test_error_in_bfloat16() -> None:
    block = build(torch.bfloat16).transformer_blocks[0]
    x, text, temb = (torch.randn(1, *size, dtype=torch.bfloat16) for size in ((18, 24), (5, 24), (1, 144)))
    rotary = tuple(torch.randn(2, 1, 18, 1, 12))
    check_error_in_bfloat16(block, FusedSanaVideoTransformerBlock, (x, None, text, None, temb, 3, 2, 3, rotary))


def test_a_call_under_autocast_goes_the_original_way() -> None:
    model = build()
    with patch_module(model, only="gated_residual_norm") as report, torch.autocast("cpu", torch.bfloat16):
        call(model)
        assert fallback_reasons(report) == {"autocast is on"}
