"""ConsisID: a tiny pipeline of the whole structure, patched against unpatched. Its block is CogVideoX's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from family_checks import check_clip
from tiny_pipelines import CONSISID, consisid, consisid_face
from torch import Tensor
from transformer_checks import (
    ORDERS,
    Shifted,
    check_changed,
    check_each_op_off,
    check_error_in_bfloat16,
    check_lora,
    check_same,
    tiny_transformer,
)

from vidaccel import patch_pipeline
from vidaccel.blocks.dit.cogvideox_transformer_3d import COGVIDEOX_OPS
from vidaccel.blocks.dit.consisid_transformer_3d import FusedConsisIDBlock

ROTARY = get_3d_rotary_pos_embed(16, ((0, 0), (2, 3)), (2, 3), 3)


def build(dtype: torch.dtype = torch.float32) -> Any:
    return tiny_transformer("ConsisIDTransformer3DModel", CONSISID, dtype)


@torch.no_grad()
def call(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents, text = (torch.randn(2, *size, generator=generator) for size in ((3, 8, 4, 6), (5, 12)))
    return model(latents, text, torch.full((2,), 500), image_rotary_emb=ROTARY, **consisid_face(2)).sample


def test_same_clip_and_exact_restore() -> None:
    pipe, arguments = consisid()
    check_clip(pipe, arguments, reorders_sums=False)
    with patch_pipeline(pipe, strict=True) as report:
        assert {site.op for site in report.sites if site.path.startswith("transformer.")} == {*COGVIDEOX_OPS}


def test_same_output() -> None:
    assert not check_same(build(), call).fallbacks


def test_each_op_off() -> None:
    check_each_op_off(build(), call)


def test_lora() -> None:
    assert not check_lora(build(), call, "attn1.to_q", "norm2.linear").fallbacks


def foreign_processor(model: Any) -> None:
    attn = model.transformer_blocks[1].attn1
    attn.processor = Shifted(attn.processor)


@pytest.mark.parametrize("first", ORDERS)
def test_a_foreign_processor(first: str) -> None:
    check_changed(build, call, foreign_processor, first)


@torch.no_grad()
def test_error_in_bfloat16() -> None:
    block = build(torch.bfloat16).transformer_blocks[0]
    x, text, temb = (torch.randn(2, *size, dtype=torch.bfloat16) for size in ((18, 32), (5, 32), (8,)))
    check_error_in_bfloat16(block, FusedConsisIDBlock, (x, text, temb, ROTARY))
