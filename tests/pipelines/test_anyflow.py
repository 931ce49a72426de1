"""AnyFlow and AnyFlow FAR: tiny pipelines of the whole structure, patched against unpatched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_checks import relative_error
from diffusers import AnyFlowFARPipeline, FlowMapEulerDiscreteScheduler
from family_checks import check_clip, check_compiled
from tiny_models import tiny_relative
from tiny_pipelines import ANYFLOW, anyflow
from torch import Tensor
from transformer_checks import (
    check_corner,
    check_each_op_off,
    check_error_in_bfloat16,
    check_relative_of_wan,
    check_same,
    fallback_reasons,
    tiny_transformer,
)

from vidaccel import patch_module
from vidaccel.blocks.dit.transformer_anyflow import FusedAnyFlowTransformerBlock

CHUNKS = {"chunk_partition": [1, 2, 2], "full_chunk_limit": 2}


def transformer(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return tiny_transformer("AnyFlowTransformer3DModel", ANYFLOW | options, dtype)


@torch.no_grad()
def call(model: Any, *, size: tuple[int, int, int] = (3, 4, 6), timestep: Tensor | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    frames, *sides = size
    timestep = torch.full((2, frames), 500.0) if timestep is None else timestep
    x, text = (torch.randn(2, *shape, generator=generator) for shape in ((frames, 16, *sides), (7, 16)))
    return model(x, timestep, timestep / 2, text).sample


def call_forcing(model: Any) -> Tensor:
    return call(model, timestep=torch.tensor([[0.0, 500.0, 500.0], [0.0, 300.0, 300.0]]))


def test_same_clip_and_exact_restore() -> None:
    pipe, arguments = anyflow()
    report = check_clip(pipe, arguments, reorders_sums=False)
    assert {site.path for site in report.sites if site.path.startswith("transformer.")} == {
        "transformer.blocks.0",
        "transformer.blocks.1",
    }


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_chunk_by_chunk(guidance_scale: float) -> None:
    model = tiny_transformer("AnyFlowFARTransformer3DModel", ANYFLOW | CHUNKS)
    pipe, arguments = tiny_relative(
        "wan2.1-t2v-1.3b", AnyFlowFARPipeline, transformer=model, scheduler=FlowMapEulerDiscreteScheduler()
    )
    if guidance_scale == 1.0:
        del arguments["negative_prompt_embeds"]
    size = {"height": 64, "width": 64, "num_frames": 17, "chunk_partition": CHUNKS["chunk_partition"]}
    report = check_clip(pipe, arguments | size | {"guidance_scale": guidance_scale}, reorders_sums=False)
    assert {site.op for site in report.sites if site.path.startswith("transformer.")} == {
        "gated_residual_norm",
        "spatial_attention",
        "linear_gelu",
    }


@pytest.mark.parametrize("call", [call, call_forcing])
def test_each_op_off(call: Any) -> None:
    check_each_op_off(transformer(), call)


@pytest.mark.slow
def test_patched_model_compiles_in_one_graph() -> None:
    check_compiled(transformer(num_layers=1), call_forcing)


@pytest.mark.parametrize("size", [(1, 2, 2), (5, 6, 10)])
def test_sizes(size: tuple[int, int, int]) -> None:
    assert not check_same(transformer(cross_attn_norm=False), lambda model: call(model, size=size)).fallbacks


def test_what_users_put_in() -> None:
    check_relative_of_wan(transformer, call)


def test_norms_with_a_bias() -> None:
    model = transformer()
    for block in model.blocks:
        block.attn1.norm_q.bias = torch.nn.Parameter(torch.linspace(-0.5, 0.5, 24), requires_grad=False)
    expected = call(model)
    with patch_module(model, self_check=False) as report:
        assert relative_error(call(model), expected) <= 1e-5
    assert fallback_reasons(report) == {"a norm of queries or keys has a bias"}


@torch.no_grad()
def test_error_of_a_block() -> None:
    torch.manual_seed(0)
    model = transformer(torch.bfloat16)
    x, context, temb = (torch.randn(2, *rest, 24).bfloat16() for rest in ((18,), (7,), (18, 6)))
    layout = {"total_frames": 3, "full_frame_shape": (2, 3)}
    arguments = x, context, temb, model.rope(layout, x.device), None
    check_error_in_bfloat16(model.blocks[0], FusedAnyFlowTransformerBlock, arguments)


@torch.no_grad()
def test_corner_of_a_long_call() -> None:
    torch.manual_seed(0)
    model, tokens = transformer(), 3 * 128 * 128
    x, context, temb = (torch.randn(2, *rest, 24) for rest in ((tokens,), (7,), (tokens, 6)))
    rotary_emb = model.rope({"total_frames": 3, "full_frame_shape": (128, 128)}, x.device)
    arguments = x, context, temb, rotary_emb, None, None, None
    check_corner(model.blocks[0], FusedAnyFlowTransformerBlock, arguments)
