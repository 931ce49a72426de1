"""The Triton kernels inside a whole tiny UNet and VAE; on a GPU, for the interpreter takes minutes for one."""

from __future__ import annotations

import pytest
import torch
from block_checks import relative_error
from peft import LoraConfig
from tiny_models import tiny_autoencoder_kl, tiny_motion_unet, tiny_svd_pipeline
from torch import Tensor, nn

from vidaccel import patch_module

FRAMES, SIDE = 2, 4


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    pipe = tiny_svd_pipeline()
    return {"unet": pipe.unet, "vae": pipe.vae, "image-vae": tiny_autoencoder_kl()}


def unet_call(unet: nn.Module, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn(1, FRAMES, 8, SIDE, SIDE, generator=generator),
        torch.tensor(0.5),
        torch.randn(1, 1, 32, generator=generator),
        torch.tensor([[6.0, 127.0, 0.02]]),
    )
    with torch.no_grad():
        return unet(*(x.to(device) for x in inputs)).sample


def decode_call(vae: nn.Module, device: torch.device) -> Tensor:
    latents = torch.randn(FRAMES, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return vae.decode(latents.to(device), num_frames=FRAMES).sample


def decode_images_call(vae: nn.Module, device: torch.device) -> Tensor:
    latents = torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return vae.decode(latents.to(device)).sample


PARTS = {"unet": unet_call, "vae": decode_call, "image-vae": decode_images_call}


@pytest.mark.gpu
@pytest.mark.parametrize("part", PARTS)
def test_with_the_kernels(
    models: dict[str, nn.Module], device: torch.device, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, call = models[part].to(device), PARTS[part]
    expected = call(model, device)
    with patch_module(model) as report:
        out = call(model, device)
    ran = {site.op for site in report.sites if site.implementations - {"torch"}}
    kernels = {"temporal_attention", "add_layer_norm", "geglu"} if part == "unet" else {"upsample_conv"}
    assert kernels | {"group_norm_silu", "conv_epilogue"} <= ran, str(report)
    assert not any(site.state == "failed" for site in report.sites), str(report)
    assert relative_error(out, expected) <= 1e-5


@torch.no_grad()
def test_a_fused_lora_is_seen(device: torch.device) -> None:
    """PEFT adds it to the weights behind PyTorch's back: same modules, same addresses, same versions."""
    unet = tiny_motion_unet().to(device)
    sample, text = torch.randn(1, 4, FRAMES, SIDE, SIDE, device=device), torch.randn(FRAMES, 7, 32, device=device)
    with patch_module(unet, only=["upsample_conv", "padded_channels"]) as report:
        before = unet(sample, 5, text).sample
        unet.add_adapter(LoraConfig(r=4, target_modules=r"conv_in|.*upsamplers\.0\.conv", init_lora_weights=False))
        unet.fuse_lora()
        unet.unload_lora()
        out = unet(sample, 5, text).sample
        assert any(site.implementations - {"torch"} for site in report.sites if site.op == "upsample_conv")
    expected = unet(sample, 5, text).sample
    assert relative_error(expected, before) > 0.1
    assert relative_error(out, expected) <= 1e-5
