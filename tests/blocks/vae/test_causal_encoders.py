"""The encoders of HunyuanVideo and CogVideoX: the memory that they hold, and the released widths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from copy_checks import Held, hollow_out
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLHunyuanVideo
from tiny_models import tiny_autoencoder_kl_hunyuan_video
from torch import Tensor
from vae_checks import assert_no_worse, encode, peak_of_encode

from vidaccel import patch_module
from vidaccel.blocks.vae.autoencoder_kl_hunyuan_video import encode_bytes

RELEASED = {"hunyuanvideo": AutoencoderKLHunyuanVideo, "cogvideox": AutoencoderKLCogVideoX}


def draw(frames: int, height: int, width: int) -> Tensor:
    return torch.rand(1, 3, frames, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_memory_that_hunyuanvideo_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted without the workspaces of convolutions."""
    hollow_out(monkeypatch)
    vae = tiny_autoencoder_kl_hunyuan_video(block_out_channels=(32, 64, 64, 64))
    clip = draw(13, 48, 48)
    needed = encode_bytes(vae.encoder, clip)
    patch_module(vae, self_check=False)
    encode(vae, clip)
    with Held() as held:
        encode(vae, clip)
    assert 0.6 * needed <= held.most <= needed


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", RELEASED)
def test_as_wide_as_released(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    """The error of every frame to float32 without TF32, beside stock's; and the memory, with all checks made."""
    torch.manual_seed(0)
    with torch.device(device):
        vae: Any = RELEASED[kind]().eval()
    clip = draw(17, 96, 128).to(device)
    with torch.backends.cudnn.flags(allow_tf32=False):
        gold = encode(vae, clip)
    vae, clip = vae.to(dtype), clip.to(dtype)
    stock, of_stock = encode(vae, clip), peak_of_encode(vae, clip)
    with patch_module(vae, only="encoder") as report:
        out = encode(vae, clip)
        assert not report.fallbacks and {site.state for site in report.sites} == {"active"}, str(report)
        ways = {site.op: site.implementations for site in report.sites}
        assert "triton" in ways["group_norm_silu"] & ways["conv_epilogue"]
        encode(vae, clip)  # the weights are in their order for good
        assert peak_of_encode(vae, clip) <= of_stock
    assert_no_worse(out, stock, gold)
