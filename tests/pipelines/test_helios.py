"""Helios: tiny pipelines of the whole structure, patched against unpatched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import HeliosPyramidPipeline, HeliosScheduler
from family_checks import check_clip, check_compiled
from tiny_models import tiny_relative
from tiny_pipelines import HELIOS, helios
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

from vidaccel.blocks.dit.transformer_helios import FusedHeliosTransformerBlock

SECTIONS = {"history_sizes": [4, 2, 1], "num_latent_frames_per_chunk": 3, "num_frames": 18}
EVERYTHING_ALIKE = {"guidance_cross_attn": False, "zero_history_timestep": False}


def transformer(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return tiny_transformer("HeliosTransformer3DModel", HELIOS | options, dtype)


@torch.no_grad()
def call(model: Any, *, size: tuple[int, int, int] = (3, 4, 6), history: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator)

    frames, *sides = size
    inputs: dict[str, Any] = {"indices_hidden_states": torch.arange(8, 8 + frames).expand(2, -1)}
    if history:
        for name, first, count in (("long", 0, 4), ("mid", 4, 2), ("short", 6, 2)):
            inputs[f"latents_history_{name}"] = random(16, count, *sides)
            inputs[f"indices_latents_history_{name}"] = torch.arange(first, first + count).expand(2, -1)
    return model(random(16, *size), torch.full((2,), 500.0), random(7, 16), **inputs).sample


@pytest.mark.filterwarnings("ignore:__array_wrap__")  # of the scheduler
@pytest.mark.parametrize("options", [{}, EVERYTHING_ALIKE], ids=["guidance", "everything-alike"])
def test_same_clip_and_exact_restore(options: dict[str, Any]) -> None:
    pipe, arguments = helios(**options)
    report = check_clip(pipe, arguments, reorders_sums=False)
    assert {site.path for site in report.sites if site.path.startswith("transformer.")} == {
        "transformer.blocks.0",
        "transformer.blocks.1",
    }


@pytest.mark.filterwarnings("ignore:__array_wrap__")
def test_pyramid() -> None:
    scheduler = HeliosScheduler(stages=3, gamma=0.3)  # with 1/3 the noise has no Cholesky factor on some CPUs
    pipe, arguments = tiny_relative(
        "wan2.1-t2v-1.3b", HeliosPyramidPipeline, transformer=transformer(), scheduler=scheduler
    )
    del arguments["num_inference_steps"]
    steps = {"pyramid_num_inference_steps_list": [1, 1, 1], "height": 64, "width": 128}
    check_clip(pipe, arguments | SECTIONS | steps, reorders_sums=False)


@pytest.mark.parametrize("options", [{}, EVERYTHING_ALIKE, {"is_amplify_history": True}])
def test_each_op_off(options: dict[str, Any]) -> None:
    check_each_op_off(transformer(**options), call)


def test_amplified_history_goes_to_diffusers() -> None:
    report = check_same(transformer(is_amplify_history=True), call)
    assert fallback_reasons(report) == {"it amplifies the keys of its history"}


@pytest.mark.slow
def test_patched_model_compiles_in_one_graph() -> None:
    check_compiled(transformer(num_layers=1), call)


@pytest.mark.parametrize("history", [True, False])
@pytest.mark.parametrize("size", [(1, 2, 2), (5, 6, 10)])
def test_sizes(size: tuple[int, int, int], history: bool) -> None:
    assert not check_same(transformer(), lambda model: call(model, size=size, history=history)).fallbacks


def test_what_users_put_in() -> None:
    check_relative_of_wan(transformer, call)


@torch.no_grad()
def test_error_of_a_block() -> None:
    torch.manual_seed(0)
    model = transformer(torch.bfloat16)
    x, context, temb = (torch.randn(2, *rest, 24).bfloat16() for rest in ((30,), (7,), (30, 6)))
    rotary_emb = model.rope(torch.arange(5).expand(2, -1), 2, 3, x.device).flatten(2).transpose(1, 2)
    check_error_in_bfloat16(model.blocks[0], FusedHeliosTransformerBlock, (x, context, temb, rotary_emb, 18))


@pytest.mark.parametrize("clip_tokens", [6, 40, 30_000, 49_152])
@torch.no_grad()
def test_corner_of_a_long_call(clip_tokens: int) -> None:
    torch.manual_seed(0)
    model, tokens = transformer(), 3 * 128 * 128
    x, context, temb = (torch.randn(2, *rest, 24) for rest in ((tokens,), (7,), (tokens, 6)))
    rotary_emb = model.rope(torch.arange(3).expand(2, -1), 128, 128, x.device).flatten(2).transpose(1, 2)
    check_corner(model.blocks[0], FusedHeliosTransformerBlock, (x, context, temb, rotary_emb, clip_tokens))
