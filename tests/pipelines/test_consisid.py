"""ConsisID: a tiny pipeline of the whole structure, patched against unpatched. Its block is CogVideoX's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import ConsisIDTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline  # the top level has it with OpenCV only
from family_checks import check_clip
from tiny_models import tiny_synthetic_pipeline
from torch import Tensor
from transformer_checks import (
    ORDERS,
    Shifted,
    add_lora,
    check_changed,
    check_half_precision,
    check_ops_off,
    check_same_output,
    seeded,
)

from vidaccel import patch_pipeline
from vidaccel.blocks.dit.cogvideox_transformer_3d import COGVIDEOX_OPS

SIZES = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 4, "in_channels": 8, "out_channels": 4,
         "time_embed_dim": 8, "text_embed_dim": 12, "max_text_seq_length": 6, "sample_width": 6, "sample_height": 4,
         "sample_frames": 9, "use_rotary_positional_embeddings": True, "attention_bias": True}  # fmt: skip
FACE = {"is_train_face": True, "cross_attn_dim_head": 8, "cross_attn_num_heads": 2, "LFE_id_dim": 7, "LFE_vit_dim": 8,
        "LFE_depth": 2, "LFE_dim_head": 4, "LFE_num_heads": 2, "LFE_num_id_token": 2, "LFE_num_querie": 3,
        "LFE_output_dim": 21, "LFE_num_scale": 2}  # fmt: skip


@pytest.fixture(autouse=True)
def plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")


def build() -> Any:
    return seeded(ConsisIDTransformer3DModel, **SIZES | FACE)


def face(batch: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    hidden = [torch.randn(batch, 4, 8, generator=generator) for _ in range(2)]
    return {"id_cond": torch.randn(batch, 7, generator=generator), "id_vit_hidden": hidden}


def arguments() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 3, 8, 4, 6, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 12, generator=generator),
        "timestep": torch.full((2,), 500),
        "image_rotary_emb": get_3d_rotary_pos_embed(16, ((0, 0), (2, 3)), (2, 3), 3),
        **face(2),
    }


@torch.no_grad()
def run(model: Any) -> Tensor:
    return model(**arguments(), return_dict=False)[0]


def test_same_clip_and_exact_restore() -> None:
    pipe, call = tiny_synthetic_pipeline("cogvideox-5b-i2v")
    pipe = ConsisIDPipeline(**pipe.components | {"transformer": build()})
    pipe.set_progress_bar_config(disable=True)
    check_clip(pipe, call | face(1), reorders_sums=False)
    with patch_pipeline(pipe, strict=True) as report:
        assert {site.op for site in report.sites} == {*COGVIDEOX_OPS}


def test_same_output() -> None:
    check_same_output(build, run)


def test_every_op_can_be_off() -> None:
    check_ops_off(build, run, COGVIDEOX_OPS)


def with_lora(model: Any) -> None:
    add_lora(model, "to_q", "norm2.linear")


def foreign_processor(model: Any) -> None:
    attn = model.transformer_blocks[1].attn1
    attn.processor = Shifted(attn.processor)


@pytest.mark.parametrize("change", [with_lora, foreign_processor])
@pytest.mark.parametrize("first", ORDERS)
def test_a_changed_model(change: Callable[[Any], None], first: str) -> None:
    check_changed(build, run, change, first)


def test_half_precision_is_as_exact_as_stock() -> None:
    check_half_precision(build(), arguments())
