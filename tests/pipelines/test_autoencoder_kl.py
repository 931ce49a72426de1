"""``AutoencoderKL`` by itself: whichever pipeline it comes in, its rules are the same."""

from __future__ import annotations

import copy

import pytest
import torch
from block_checks import relative_error
from diffusers import AutoencoderKL
from peft import LoraConfig
from tiny_models import tiny_autoencoder_kl
from torch import Tensor

from vidaccel import patch_module


@pytest.fixture
def vae() -> AutoencoderKL:
    return tiny_autoencoder_kl()


@torch.no_grad()
def decode(vae: AutoencoderKL, frames: int = 3, side: int = 4) -> Tensor:
    return vae.decode(torch.randn(frames, 4, side, side, generator=torch.Generator().manual_seed(0))).sample


@torch.no_grad()
def encode(vae: AutoencoderKL) -> Tensor:
    return vae.encode(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))).latent_dist.parameters


def test_same_frames_and_exact_restore(vae: AutoencoderKL) -> None:
    classes = {name: type(module) for name, module in vae.named_modules()}
    strides = {name: tensor.stride() for name, tensor in vae.state_dict().items()}
    frames, latents = decode(vae), encode(vae)
    report = patch_module(vae)
    assert relative_error(decode(vae), frames) <= 1e-5 and relative_error(encode(vae), latents) <= 1e-5
    assert not report.fallbacks and {site.state for site in report.sites} == {"active"}
    assert {"upsample_conv", "decode_memory", "group_norm_silu", "conv_epilogue"} <= {s.op for s in report.sites}
    assert all(site.implementations for site in report.sites if not site.op.startswith("tile_")), (
        "some site was not reached"
    )
    report.restore()
    assert torch.equal(decode(vae), frames) and torch.equal(encode(vae), latents)
    assert {name: type(module) for name, module in vae.named_modules()} == classes
    assert {name: tensor.stride() for name, tensor in vae.state_dict().items()} == strides
    assert not any("_vidaccel" in key for module in vae.modules() for key in vars(module))


@pytest.mark.parametrize("switch", ["enable_slicing", "enable_tiling"])
def test_slicing_and_tiling_keep_their_meaning(vae: AutoencoderKL, switch: str) -> None:
    getattr(vae, switch)()
    expected = decode(vae, side=12)
    seen = []
    vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    with patch_module(vae):
        assert relative_error(decode(vae, side=12), expected) <= 1e-5
    sliced, tiled = {(1, 4, 12, 12)}, {(3, 4, rows, columns) for rows in (8, 6) for columns in (8, 6)}
    assert set(seen) == (sliced if switch == "enable_slicing" else tiled)


@pytest.mark.parametrize("first", ["decode_memory", "group_norm_silu", "decoder.up_blocks.*"])
def test_a_second_call_adds_what_the_first_left_out(vae: AutoencoderKL, first: str) -> None:
    before = decode(vae)
    patch_module(vae, only=first)
    report = patch_module(vae)
    assert {site.state for site in report.sites} == {"active"}
    assert sorted((s.path, s.op) for s in report.sites) == sorted((s.path, s.op) for s in patch_module(vae).sites)
    assert "decoder.conv_norm_out" in {site.path for site in report.sites}
    report.restore()
    assert torch.equal(decode(vae), before)


def test_survives_copy_and_change_of_dtype(vae: AutoencoderKL) -> None:
    expected = decode(vae)
    patch_module(vae)
    decode(vae)
    twin = copy.deepcopy(vae)
    assert relative_error(decode(twin), expected) <= 1e-5
    vae.to(torch.float64).to(torch.float32)
    assert relative_error(decode(vae), expected) <= 1e-5


def test_weights_of_adapters_stay_as_they_lie(vae: AutoencoderKL) -> None:
    """PEFT's DoRA views those of a convolution as rows, which channels-last ones cannot be."""
    targets = [name for name, _ in vae.named_modules() if name.startswith("decoder.up") and name.endswith("conv1")]
    vae.add_adapter(LoraConfig(r=2, use_dora=True, init_lora_weights=False, target_modules=targets))
    expected = decode(vae)
    with patch_module(vae):
        assert relative_error(decode(vae), expected) <= 1e-5
    assert torch.equal(decode(vae), expected)


def test_weights_that_are_elsewhere(vae: AutoencoderKL) -> None:
    """DeepSpeed's ZeRO-3 leaves empty ones between calls."""
    full = [parameter.data for parameter in vae.parameters()]
    expected = decode(vae)
    for parameter in vae.parameters():
        parameter.data = torch.empty(0)
    with patch_module(vae):
        for parameter, data in zip(vae.parameters(), full, strict=True):
            parameter.data = data
        assert relative_error(decode(vae), expected) <= 1e-5
    assert torch.equal(decode(vae), expected)


def test_gradients_go_through_the_original(vae: AutoencoderKL) -> None:
    latents = torch.randn(1, 4, 4, 4)
    expected = vae.decode(latents).sample
    report = patch_module(vae, skip="channels_last")
    out = vae.decode(latents).sample
    assert torch.equal(out, expected)
    out.sum().backward()
    assert report.fallbacks and all("gradients" in reason for _, _, reason in report.fallbacks)


@pytest.mark.parametrize(
    "latents",
    [torch.zeros(4, 4, 4), torch.zeros(1, 4, 1, 4, 4), torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, 4).half()],
    ids=["rank-3", "rank-5", "channels", "dtype"],
)
@torch.no_grad()
def test_bad_latents_raise_what_the_stock_vae_raises(vae: AutoencoderKL, latents: Tensor) -> None:
    vae.post_quant_conv = None  # or it is the one that raises
    outcomes = []
    for patched in (False, True):
        if patched:
            patch_module(vae)
        try:
            outcomes.append(vae.decode(latents).sample.shape)
        except (RuntimeError, ValueError) as error:
            outcomes.append((type(error), str(error)))
    assert outcomes[0] == outcomes[1]


@pytest.mark.slow
def test_compiles_in_one_graph(vae: AutoencoderKL) -> None:
    patch_module(vae)
    expected = decode(vae)
    vae.decoder.compile(fullgraph=True, backend="aot_eager")
    assert relative_error(decode(vae), expected) <= 1e-5
