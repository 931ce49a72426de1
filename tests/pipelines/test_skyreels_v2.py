"""SkyReels-V2: tiny pipelines, with and without diffusion forcing, patched against unpatched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_checks import fused, relative_error
from diffusers import (
    PyramidAttentionBroadcastConfig,
    SkyReelsV2DiffusionForcingImageToVideoPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2DiffusionForcingVideoToVideoPipeline,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Pipeline,
)
from family_checks import check_clip, check_compiled
from tiny_models import tiny_relative, tiny_video
from tiny_pipelines import SKYREELS
from torch import Tensor
from transformer_checks import (
    check_attention_backend,
    check_corner,
    check_each_op_off,
    check_error_in_bfloat16,
    check_foreign_processors,
    check_hooks,
    check_lora,
    check_same,
    tiny_transformer,
)

from vidaccel import patch_module
from vidaccel.blocks.dit.transformer_skyreels_v2 import FusedSkyReelsV2TransformerBlock

IMAGE = {"in_channels": 36, "image_dim": 32, "added_kv_proj_dim": 24}
FORCING = {"prompt": None, "base_num_frames": 17}


def transformer(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return tiny_transformer("SkyReelsV2Transformer3DModel", SKYREELS | options, dtype)


@torch.no_grad()
def call(model: Any, *, size: tuple[int, int, int] = (4, 4, 6), timestep: Tensor | None = None) -> Tensor:
    """``timestep``: one for each sample, or for each of its frames."""
    generator = torch.Generator().manual_seed(0)
    timestep = torch.full((2,), 500.0) if timestep is None else timestep
    batch = len(timestep)
    images = (
        {"encoder_hidden_states_image": torch.randn(batch, 17, 32, generator=generator)}
        if model.config.image_dim
        else {}
    )
    return model(
        torch.randn(batch, model.config.in_channels, *size, generator=generator),
        timestep,
        torch.randn(batch, 512 if images else 7, 16, generator=generator),
        enable_diffusion_forcing=timestep.ndim == 2,
        **images,
    ).sample


def call_forcing(model: Any) -> Tensor:
    return call(model, timestep=torch.tensor([[0.0, 100.0, 500.0, 500.0], [0.0, 0.0, 300.0, 900.0]]))


@pytest.mark.parametrize(
    ("name", "pipeline_class", "options", "arguments"),
    [
        ("t2v", SkyReelsV2Pipeline, {}, {}),
        ("i2v", SkyReelsV2ImageToVideoPipeline, IMAGE, {"image": tiny_video(1, 32, 48)[0]}),
        ("t2v", SkyReelsV2DiffusionForcingPipeline, {}, FORCING),
        ("t2v", SkyReelsV2DiffusionForcingPipeline, {"inject_sample_info": True}, FORCING),
        (
            "t2v",
            SkyReelsV2DiffusionForcingPipeline,
            {},
            FORCING | {"num_frames": 25, "overlap_history": 5, "addnoise_condition": 20},
        ),
        (
            "t2v",
            SkyReelsV2DiffusionForcingPipeline,
            {},
            FORCING | {"num_frames": 13, "ar_step": 1, "causal_block_size": 2},
        ),
        ("t2v", SkyReelsV2DiffusionForcingImageToVideoPipeline, {}, FORCING | {"image": tiny_video(1, 32, 48)[0]}),
        (
            "t2v",
            SkyReelsV2DiffusionForcingVideoToVideoPipeline,
            {},
            FORCING | {"video": tiny_video(9, 32, 48), "num_frames": 17, "overlap_history": 5},
        ),
    ],
    ids=["t2v", "i2v", "forcing", "frame-rate", "long", "causal", "forcing-i2v", "forcing-v2v"],
)
def test_same_clip_and_exact_restore(
    name: str, pipeline_class: Any, options: dict[str, Any], arguments: dict[str, Any]
) -> None:
    synthetic = {"t2v": "wan2.1-t2v-1.3b", "i2v": "wan2.1-i2v-14b"}[name]
    pipe, defaults = tiny_relative(synthetic, pipeline_class, transformer=transformer(**options))
    report = check_clip(pipe, defaults | arguments, reorders_sums=False)
    assert {site.path for site in report.sites if site.path.startswith("transformer.")} == {
        "transformer.blocks.0",
        "transformer.blocks.1",
    }


@pytest.mark.parametrize("call", [call, call_forcing])
def test_each_op_off(call: Any) -> None:
    check_each_op_off(transformer(), call)


@pytest.mark.parametrize("call", [call, call_forcing])
@pytest.mark.slow
def test_patched_model_compiles_in_one_graph(call: Any) -> None:
    check_compiled(transformer(num_layers=1), call)


def test_blocks_of_frames_attend_to_earlier_ones_without_a_mask() -> None:
    model = transformer(num_frame_per_block=2)
    report = check_same(model, call_forcing)
    assert not report.fallbacks
    assert all(site.implementations == {"torch"} for site in report.sites)
    check_each_op_off(model, call_forcing)
    check_attention_backend(model, call_forcing)
    check_compiled(transformer(num_layers=1, num_frame_per_block=2), call_forcing)


@torch.no_grad()
def test_another_mask_goes_to_diffusers() -> None:
    torch.manual_seed(0)
    model = transformer()
    x, context, temb, tables = (
        *(torch.randn(2, rows, 24) for rows in (24, 7, 6)),
        model.rope(torch.empty(2, 16, 4, 4, 6)),
    )
    mask = torch.rand(1, 1, 24, 24) > 0.3
    mask[..., 0] = True
    block = model.blocks[0]
    expected = block(x, context, temb, tables, mask)
    with fused(block, FusedSkyReelsV2TransformerBlock) as sites:
        assert relative_error(block(x, context, temb, tables, mask), expected) <= 1e-5
    assert sites["spatial_attention"].implementations == {"native", "torch"}


@pytest.mark.parametrize("size", [(1, 2, 2), (5, 6, 10)])
def test_sizes(size: tuple[int, int, int]) -> None:
    assert not check_same(transformer(), lambda model: call(model, size=size)).fallbacks
    of_frames = torch.arange(2.0 * size[0]).view(2, -1)
    assert not check_same(transformer(), lambda model: call(model, size=size, timestep=of_frames)).fallbacks


def test_attention_backend() -> None:
    check_attention_backend(transformer(), call)


def test_lora() -> None:
    assert not check_lora(transformer(), call_forcing, "to_q", "to_out.0").fallbacks


def test_foreign_processors() -> None:
    check_foreign_processors(transformer(**IMAGE), call, "attn1", "attn2")


@pytest.mark.parametrize("names", [("attn1",), ("attn2", "net.0"), ("norm2",)])
def test_hooks(names: tuple[str, ...]) -> None:
    check_hooks(transformer(), call_forcing, *names)


@pytest.mark.parametrize("first", ["cache", "patch"])
def test_pyramid_attention_broadcast(first: str) -> None:
    def calls(model: Any) -> Tensor:
        return torch.stack([call_forcing(model) * k for k in range(1, 5)])

    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    )
    model = transformer()
    model.enable_cache(config)
    expected = calls(model)
    model.disable_cache()
    if first == "cache":
        model.enable_cache(config)
    with patch_module(model):
        if first == "patch":
            model.enable_cache(config)
        assert relative_error(calls(model), expected) <= 1e-5
        model.disable_cache()


@pytest.mark.parametrize("shape", [(6,), (6, 24)])
@torch.no_grad()
def test_error_of_a_block(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = transformer(torch.bfloat16)
    x, context, temb = (torch.randn(2, *rest, 24).bfloat16() for rest in ((24,), (7,), shape))
    arguments = x, context, temb, model.rope(torch.empty(2, 16, 4, 4, 6)), None
    check_error_in_bfloat16(model.blocks[0], FusedSkyReelsV2TransformerBlock, arguments)


@torch.no_grad()
def test_corner_of_a_long_call() -> None:
    torch.manual_seed(0)
    model, tokens = transformer(), 3 * 128 * 128
    x, context, temb = (torch.randn(2, *rest, 24) for rest in ((tokens,), (7,), (6, tokens)))
    mask = torch.ones(1, 1, 1, tokens, dtype=torch.bool).expand(-1, -1, tokens, -1)
    tables = model.rope(torch.empty(2, 16, 3, 256, 256))
    for arguments in ((x, context, temb, tables, mask), (x, context, temb[:, :, 0], tables, None)):
        check_corner(model.blocks[0], FusedSkyReelsV2TransformerBlock, arguments)
