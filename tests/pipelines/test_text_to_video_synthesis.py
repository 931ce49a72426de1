"""ModelScope and Zeroscope: a tiny pipeline of the whole structure, patched against unpatched."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet3DConditionModel, VideoToVideoSDPipeline
from family_checks import check_clip, check_compiled, check_kernels
from tiny_models import tiny_synthetic_pipeline
from torch import Tensor, nn

from vidaccel.bench.synthetic import specification


@torch.no_grad()
def unet_call(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sample, context = (torch.randn(shape, generator=generator) for shape in ((1, 4, 2, 4, 4), (1, 5, 32)))
    device = next(unet.parameters()).device
    return unet(sample.to(device), torch.tensor(5), context.to(device)).sample


def test_same_clip_and_exact_restore() -> None:
    report = check_clip(*tiny_synthetic_pipeline("modelscope"))
    sites = {(site.path, site.op) for site in report.sites}
    assert ("unet.transformer_in", "temporal_attention") in sites
    assert ("unet.mid_block.temp_attentions.0", "add_layer_norm") in sites
    assert ("unet.down_blocks.1.temp_convs.0", "conv_epilogue") in sites


def test_video_to_video_has_the_same_unet() -> None:
    text_to_video, arguments = tiny_synthetic_pipeline("modelscope")
    pipe = VideoToVideoSDPipeline(**text_to_video.components)
    pipe.set_progress_bar_config(disable=True)
    taken = {name: arguments[name] for name in ("prompt_embeds", "negative_prompt_embeds", "num_inference_steps")}
    check_clip(pipe, taken | {"video": torch.rand(3, 3, 32, 32), "strength": 1.0})


ONE_LEVEL = {  # with attention in the middle
    "block_out_channels": (32,),
    "down_block_types": ("DownBlock3D",),
    "up_block_types": ("UpBlock3D",),
    "norm_num_groups": 2,  # the interpreter takes one after the other
}


@pytest.fixture
def unet(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    _, tiny = specification("modelscope", "tiny")["components"]["unet"]
    unet = UNet3DConditionModel(**tiny | ONE_LEVEL).to(device)
    for parameter in unet.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return unet.eval()


def test_with_the_kernels(unet: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIDACCEL_IMPL")
    ops = {"group_norm_silu", "conv_epilogue", "temporal_attention", "add_layer_norm", "geglu"}
    check_kernels(unet, unet_call, ops)


@pytest.mark.slow
def test_patched_unet_compiles_in_one_graph(unet: nn.Module) -> None:
    check_compiled(unet, unet_call)
