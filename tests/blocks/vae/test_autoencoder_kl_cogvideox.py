"""CogVideoX's decoder: the memory that it holds, and the released width."""

from __future__ import annotations

import pytest
import torch
from block_checks import relative_error
from copy_checks import Copies, Held, hollow_out
from diffusers import AutoencoderKLCogVideoX
from tiny_models import tiny_autoencoder_kl_cogvideox
from torch import Tensor
from vae_checks import assert_no_worse, decode

from vidaccel import patch_module
from vidaccel.blocks.vae import causal_clip
from vidaccel.blocks.vae.autoencoder_kl_cogvideox import decode_bytes


def draw(frames: int, side: int, channels: int = 4) -> Tensor:
    return torch.randn(1, channels, frames, side, side, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hollow_vae(monkeypatch: pytest.MonkeyPatch) -> AutoencoderKLCogVideoX:
    """No kernel and no causal convolution runs; as wide, beside its latents, as the kernels need it."""
    hollow_out(monkeypatch)
    return tiny_autoencoder_kl_cogvideox(block_out_channels=(32, 64, 64, 128))


@pytest.mark.parametrize("fit", [7, 5, 3], ids=["whole", "two-batches", "one-batch"])
def test_memory_held(fit: int, hollow_vae: AutoencoderKLCogVideoX, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted without the workspaces of convolutions, and the pixels."""
    z = draw(7, 4)
    needed = decode_bytes(hollow_vae.decoder, z, fit)
    monkeypatch.setattr(causal_clip, "free_bytes", lambda _: needed)
    with patch_module(hollow_vae, self_check=False) as report:
        pixels = decode(hollow_vae, z)
        with Held() as held:
            decode(hollow_vae, z)
    assert f"{fit} of 7 frames" in {way for site in report.sites for way in site.implementations}
    assert 0.6 * needed <= held.most - 3 * pixels.nbytes <= needed  # as decoded, as handed out, as joined


def test_no_large_tensor_is_copied(hollow_vae: AutoencoderKLCogVideoX) -> None:
    """But for the frames of which time makes two."""
    z = draw(5, 8)
    with patch_module(hollow_vae, self_check=False):
        pixels = decode(hollow_vae, z)
        with Copies(smallest=6 * pixels.numel()) as copies:
            decode(hollow_vae, z)
    assert not [found for found in copies.found if "of another memory order" not in found]


@pytest.mark.gpu
def test_with_the_kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one go, and batch by batch."""
    vae = tiny_autoencoder_kl_cogvideox(block_out_channels=(32, 32, 64, 64)).to(device)
    z = draw(7, 3).to(device)
    with torch.backends.cudnn.flags(allow_tf32=False):
        expected = decode(vae, z)
        with patch_module(vae, self_check=False) as report:
            assert relative_error(decode(vae, z), expected) <= 1e-5
            monkeypatch.setattr(causal_clip, "free_bytes", lambda _: 0)
            assert relative_error(decode(vae, z), expected) <= 1e-5
    assert not report.fallbacks, str(report)
    ways = {site.op: site.implementations for site in report.sites}
    assert "triton" in ways["spatial_norm_silu"] & ways["conv_epilogue"]
    assert ways["upsample_conv"] & {"whole", "halves"}
    assert ways["whole_clip"] == {"7 of 7 frames", "3 of 7 frames"}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mode", ["whole", "chunks", "tiles"])
def test_as_wide_as_released(
    mode: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """The error of every frame to float32 without TF32, seams between chunks and tiles among them, beside stock's."""
    with torch.device(device):
        torch.manual_seed(0)
        vae, z = AutoencoderKLCogVideoX().eval(), torch.randn(1, 16, 7, 16, 20)
    if mode == "tiles":
        vae.enable_tiling(96, 96)
    with torch.backends.cudnn.flags(allow_tf32=False):
        gold = decode(vae, z)
    vae, z = vae.to(dtype), z.to(dtype)
    stock = decode(vae, z)
    if mode == "chunks":
        needed = decode_bytes(vae.decoder, z, 5)
        monkeypatch.setattr(causal_clip, "free_bytes", lambda _: needed)
    with patch_module(vae) as report:
        out = decode(vae, z)
        assert not report.fallbacks and {site.state for site in report.sites} == {"active"}, str(report)
    ways = {site.op: site.implementations for site in report.sites}
    assert ways["whole_clip"] == {"5 of 7 frames" if mode == "chunks" else "7 of 7 frames"}
    assert_no_worse(out, stock, gold)
