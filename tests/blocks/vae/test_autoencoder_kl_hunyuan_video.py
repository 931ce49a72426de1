"""The decoders of HunyuanVideo and Mochi: memory that they hold, what a check finds, and the released widths."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from block_checks import relative_error
from copy_checks import Held, hollow_out
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLMochi
from tiny_models import tiny_autoencoder_kl_hunyuan_video, tiny_autoencoder_kl_mochi
from torch import Tensor
from vae_checks import PIXEL_FAULTS, assert_no_worse, check_fault_found, decode

from vidaccel import patch_module
from vidaccel.blocks.vae import autoencoder_kl_hunyuan_video, autoencoder_kl_mochi, causal_clip
from vidaccel.blocks.vae.autoencoder_kl_hunyuan_video import FusedHunyuanVideoDecoder3D


def draw(vae: Any, frames: int, side: int) -> Tensor:
    shape = 1, vae.config.latent_channels, frames, side, side
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_memory_that_hunyuanvideo_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted without the workspaces of convolutions, and the pixels."""
    hollow_out(monkeypatch)
    vae = tiny_autoencoder_kl_hunyuan_video(block_out_channels=(32, 64, 64, 64))
    z = draw(vae, 4, 6)
    needed = autoencoder_kl_hunyuan_video.decode_bytes(vae.decoder, z)
    patch_module(vae, self_check=False)
    pixels = decode(vae, z)
    with Held() as held:
        decode(vae, z)
    assert 0.6 * needed <= held.most - pixels.nbytes <= needed


@pytest.mark.parametrize("fit", [5, 2], ids=["whole", "pieces"])
def test_memory_that_mochi_holds(fit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hollow_out(monkeypatch)
    vae = tiny_autoencoder_kl_mochi(decoder_block_out_channels=(32, 64, 64, 64))
    z = draw(vae, 5, 8)
    needed = autoencoder_kl_mochi.decode_bytes(vae.decoder, z, fit)
    monkeypatch.setattr(causal_clip, "free_bytes", lambda _: needed)
    with patch_module(vae, self_check=False) as report:
        pixels = decode(vae, z)
        with Held() as held:
            decode(vae, z)
    assert f"{fit} of 5 frames" in {way for site in report.sites for way in site.implementations}
    assert 0.6 * needed <= held.most - pixels.untyped_storage().nbytes() <= needed


@pytest.mark.parametrize("fault", PIXEL_FAULTS)
def test_what_the_decoder_does_wrong_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")
    vae = tiny_autoencoder_kl_hunyuan_video()
    check_fault_found(vae, draw(vae, 3, 2), FusedHunyuanVideoDecoder3D, fault, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("kind", "fit"),
    [(AutoencoderKLHunyuanVideo, 5), (AutoencoderKLMochi, 5), (AutoencoderKLMochi, 2)],
    ids=["hunyuanvideo", "mochi", "mochi-chunks"],
)
def test_as_wide_as_released(
    kind: type[Any], fit: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of every frame to float32 without TF32, seams between chunks among them, beside stock's."""
    torch.manual_seed(0)
    with torch.device(device):
        vae = kind().eval()
    z = draw(vae, 5, 14).to(device)
    with torch.backends.cudnn.flags(allow_tf32=False):
        gold = decode(vae, z)
    vae, z = vae.to(dtype), z.to(dtype)
    stock = decode(vae, z)
    if kind is AutoencoderKLMochi:
        needed = autoencoder_kl_mochi.decode_bytes(vae.decoder, z, fit)
        monkeypatch.setattr(causal_clip, "free_bytes", lambda _: needed)
    with patch_module(vae) as report:
        out = decode(vae, z)
        assert not report.fallbacks and {site.state for site in report.sites} == {"active"}, str(report)
        ways = {site.op: site.implementations for site in report.sites}
        assert f"{fit} of 5 frames" in ways["whole_clip"] and "triton" in ways["group_norm_silu"]
    assert_no_worse(out, stock, gold)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "make",
    [partial(tiny_autoencoder_kl_hunyuan_video, block_out_channels=(32,) * 4), tiny_autoencoder_kl_mochi],
    ids=["hunyuanvideo", "mochi"],
)
def test_with_the_kernels(make: Any, device: torch.device) -> None:
    vae = make().to(device)
    z = draw(vae, 3, 6).to(device)
    with torch.backends.cudnn.flags(allow_tf32=False):
        expected = decode(vae, z)
        with patch_module(vae) as report:
            assert relative_error(decode(vae, z), expected) <= 1e-4
    assert not report.fallbacks, str(report)
    ways = {site.op: site.implementations for site in report.sites}
    assert all("triton" in ways[op] for op in ("group_norm_silu", "conv_epilogue", "pixel_shuffle", "rms_norm_silu"))
