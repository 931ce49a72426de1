"""HunyuanVideo 1.5's decoder and encoder: the memory that they hold, what a check finds, and the released width."""

from __future__ import annotations

import pytest
import torch
from block_checks import relative_error
from copy_checks import Held, hollow_out
from diffusers import AutoencoderKLHunyuanVideo15
from tiny_models import tiny_autoencoder_kl_hunyuanvideo15
from torch import Tensor
from vae_checks import PIXEL_FAULTS, assert_no_worse, check_fault_found, decode, encode, peak_of_encode

from vidaccel import patch_module
from vidaccel.blocks.vae import causal_clip
from vidaccel.blocks.vae.autoencoder_kl_hunyuanvideo15 import (
    FusedHunyuanVideo15Decoder3D,
    FusedHunyuanVideo15Encoder3D,
    decode_bytes,
    encode_bytes,
)


def draw(frames: int, side: int, channels: int = 4) -> Tensor:
    return torch.randn(1, channels, frames, side, side, generator=torch.Generator().manual_seed(0))


def draw_clip(frames: int, side: int) -> Tensor:
    return draw(frames, side, channels=3)


@pytest.mark.parametrize("fit", [7, 4, 2], ids=["whole", "halves", "pieces"])
def test_memory_held(fit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted without the workspaces of convolutions, and the pixels."""
    hollow_out(monkeypatch)
    vae, z = tiny_autoencoder_kl_hunyuanvideo15(block_out_channels=(16, 16, 32, 32, 32)), draw(7, 6)
    needed = decode_bytes(vae.decoder, z, fit)
    monkeypatch.setattr(causal_clip, "free_bytes", lambda _: needed)
    with patch_module(vae, self_check=False) as report:
        pixels = decode(vae, z)
        with Held() as held:
            decode(vae, z)
    assert f"{fit} of 7 frames" in {way for site in report.sites for way in site.implementations}
    assert 0.6 * needed <= held.most - pixels.nbytes <= needed


@pytest.mark.parametrize(
    ("frames", "fit"), [(7, 7), (7, 4), (7, 2), (1, 1)], ids=["whole", "halves", "pieces", "image"]
)
def test_memory_held_by_an_encode(frames: int, fit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted without the workspaces of convolutions; no more than stock holds."""
    options = {"block_out_channels": (16, 16, 32, 32, 32), "layers_per_block": 2}
    vae, clip = tiny_autoencoder_kl_hunyuanvideo15(**options), draw_clip(4 * frames - 3, 64)
    with Held() as stock:
        encode(vae, clip)
    hollow_out(monkeypatch)
    needed = encode_bytes(vae.encoder, clip, fit)
    monkeypatch.setattr(causal_clip, "free_bytes", lambda _: needed)
    with patch_module(vae, self_check=False) as report:
        encode(vae, clip)
        with Held() as held:
            encode(vae, clip)
    assert f"{fit} of {frames} frames" in {way for site in report.sites for way in site.implementations}
    assert 0.6 * needed <= held.most <= needed
    assert held.most <= stock.most


@pytest.mark.parametrize("fault", PIXEL_FAULTS)
def test_what_the_encoder_does_wrong_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")
    vae, clip = tiny_autoencoder_kl_hunyuanvideo15(), draw_clip(9, 32)
    check_fault_found(vae, clip, FusedHunyuanVideo15Encoder3D, fault, monkeypatch, encode)


@pytest.mark.parametrize("fault", PIXEL_FAULTS)
def test_what_the_decoder_does_wrong_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")
    check_fault_found(
        tiny_autoencoder_kl_hunyuanvideo15(), draw(3, 2), FusedHunyuanVideo15Decoder3D, fault, monkeypatch
    )  # fmt: skip


@pytest.mark.gpu
def test_with_the_kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one go, and in chunks."""
    vae, z = tiny_autoencoder_kl_hunyuanvideo15().to(device), draw(3, 2).to(device)
    with torch.backends.cudnn.flags(allow_tf32=False):
        expected = decode(vae, z)
        with patch_module(vae, only="decoder", self_check=False) as report:
            assert relative_error(decode(vae, z), expected) <= 1e-5
            monkeypatch.setattr(causal_clip, "free_bytes", lambda _: 0)
            assert relative_error(decode(vae, z), expected) <= 1e-5
    assert not report.fallbacks, str(report)
    ways = {site.op: site.implementations for site in report.sites}
    assert "triton" in ways["rms_norm_silu"] & ways["depth_to_space"]
    assert ways["whole_clip"] == {"3 of 3 frames", "1 of 3 frames"}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fit", [5, 2], ids=["whole", "chunks"])
def test_as_wide_as_released(
    fit: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of every frame to float32 without TF32, seams between chunks among them, beside stock's."""
    with torch.device(device):
        torch.manual_seed(0)
        vae, z = AutoencoderKLHunyuanVideo15().eval(), torch.randn(1, 32, 5, 12, 16)
    with torch.backends.cudnn.flags(allow_tf32=False):
        gold = decode(vae, z)
    vae, z = vae.to(dtype), z.to(dtype)
    stock = decode(vae, z)
    needed = decode_bytes(vae.decoder, z, fit)
    monkeypatch.setattr(causal_clip, "free_bytes", lambda _: needed)
    with patch_module(vae, only="decoder") as report:
        out = decode(vae, z)
        assert not report.fallbacks and {site.state for site in report.sites} == {"active"}, str(report)
    assert_no_worse(out, stock, gold)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fit", [9, 2], ids=["whole", "chunks"])
def test_encoder_as_wide_as_released(
    fit: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of every frame of the latents to float64, beside stock's, and the memory that it takes."""
    with torch.device(device):
        torch.manual_seed(0)
        vae, clip = AutoencoderKLHunyuanVideo15().eval(), torch.rand(1, 3, 33, 96, 128) * 2 - 1
    gold = encode(vae.double(), clip.double())
    vae, clip = vae.to(dtype), clip.to(dtype)
    stock, of_stock = encode(vae, clip), peak_of_encode(vae, clip)
    needed = encode_bytes(vae.encoder, clip, fit)
    monkeypatch.setattr(causal_clip, "free_bytes", lambda _: needed)
    with patch_module(vae, only="encoder") as report:
        out = encode(vae, clip)
        assert not report.fallbacks and {site.state for site in report.sites} == {"active"}, str(report)
        assert f"{fit} of 9 frames" in {way for site in report.sites for way in site.implementations}
        assert "triton" in {way for site in report.sites for way in site.implementations}
        encode(vae, clip)  # the weights are in their order for good
        assert peak_of_encode(vae, clip) <= of_stock
    assert_no_worse(out, stock, gold)
