"""``AutoencoderKLHunyuanVideo15``: the same frames and latents, whole, in chunks and in tiles; or stock code runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from block_checks import relative_error
from diffusers import AutoencoderKLHunyuanVideo15
from kernel_checks import planted
from tiny_models import tiny_autoencoder_kl_hunyuanvideo15
from torch import Tensor
from vae_checks import (
    Lora,
    check_bad_input,
    check_changed_child,
    check_gradients,
    check_halves,
    decode,
    encode,
    out_of_memory_beyond,
    ran,
    reasons,
)

from vidaccel import patch_module
from vidaccel.blocks.vae import autoencoder_kl_hunyuanvideo15 as blocks
from vidaccel.blocks.vae import causal_clip
from vidaccel.kernels.norm.rms_norm_silu import RMS_NORM_SILU

EQUAL = 1e-5


@pytest.fixture
def vae() -> AutoencoderKLHunyuanVideo15:
    return tiny_autoencoder_kl_hunyuanvideo15()


def draw(frames: int = 3, height: int = 2, width: int = 1, batch: int = 1) -> Tensor:
    return torch.randn(batch, 4, frames, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 2, 3), (2, 3, 1), (4, 1, 1)], ids=["image", "odd-sides", "one-pixel"])
def test_same_frames_and_exact_restore(
    shape: tuple[int, int, int], dtype: torch.dtype, vae: AutoencoderKLHunyuanVideo15
) -> None:
    latents = draw(*shape).to(dtype)
    vae.to(dtype)
    expected = decode(vae, latents)
    traces = {name: (type(module), frozenset(vars(module))) for name, module in vae.named_modules()}
    with patch_module(vae, only="decoder") as report:
        for _ in range(2):  # the first is checked
            out = decode(vae, latents)
            assert relative_error(out, expected) <= (EQUAL if dtype == torch.float32 else 1e-13)
            assert out.stride() == expected.stride()
        assert not report.fallbacks or dtype == torch.float64, str(report)
        assert {site.state for site in report.sites} == {"active"} and ran(report) == {
            f"{shape[0]} of {shape[0]} frames"
        }
        assert all(site.implementations for site in report.sites)
    assert torch.equal(decode(vae, latents), expected)
    assert traces == {name: (type(module), frozenset(vars(module))) for name, module in vae.named_modules()}


@pytest.mark.parametrize(
    "options",
    [{"upsample_match_channel": False}, {"layers_per_block": 2, "block_out_channels": (8, 16, 16, 16, 32)}],
    ids=["shortcuts", "two-layers"],
)
def test_other_configurations(options: dict[str, Any]) -> None:
    vae, latents = tiny_autoencoder_kl_hunyuanvideo15(**options), draw()
    expected = decode(vae, latents)
    with patch_module(vae) as report:
        assert relative_error(decode(vae, latents), expected) <= EQUAL
        assert not report.fallbacks, str(report)


def test_a_batch_is_its_samples(vae: AutoencoderKLHunyuanVideo15) -> None:
    """Stock's mask takes one sample only."""
    latents = draw(batch=2)
    expected = torch.cat([decode(vae, sample) for sample in latents.split(1)])
    with patch_module(vae) as report:
        for _ in range(2):
            assert relative_error(decode(vae, latents), expected) <= EQUAL
        assert not report.fallbacks, str(report)


@pytest.mark.parametrize("fit", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_chunks_are_the_whole(
    fit: int, batch: int, vae: AutoencoderKLHunyuanVideo15, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = draw(5, batch=batch)
    expected = torch.cat([decode(vae, sample) for sample in latents.split(1)])
    monkeypatch.setattr(blocks, "decode_bytes", lambda decoder, latents, frames: frames)
    monkeypatch.setattr(causal_clip, "free_bytes", lambda _: fit)
    with patch_module(vae) as report:
        assert relative_error(decode(vae, latents), expected) <= EQUAL
        assert f"{fit} of 5 frames" in ran(report) and not report.fallbacks


def test_out_of_memory_halves_the_chunk_and_goes_on(
    vae: AutoencoderKLHunyuanVideo15, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = draw(6)
    expected = decode(vae, latents)
    with patch_module(vae, self_check=False) as report:
        out_of_memory_beyond(monkeypatch, 18)
        assert relative_error(decode(vae, latents), expected) <= EQUAL
        assert ran(report) == {"3 of 6 frames"}


def test_what_memory_cannot_hold_at_all_is_explained(
    vae: AutoencoderKLHunyuanVideo15, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_module(vae, self_check=False)
    out_of_memory_beyond(monkeypatch, 5)
    with pytest.raises(torch.OutOfMemoryError, match=r"one latent frame of 1 clips of 16 x 32 pixels.*enable_tiling"):
        decode(vae, draw())


@pytest.mark.parametrize("mode", ["slicing", "tiling", "both"])
def test_slicing_and_tiling_keep_their_meaning(mode: str, vae: AutoencoderKLHunyuanVideo15) -> None:
    latents = draw(2, 5, 3, batch=1 if mode == "tiling" else 2)
    if mode != "tiling":
        vae.enable_slicing()
    if mode != "slicing":
        vae.enable_tiling(32, 32, 2, 2, 0.5)
    expected, seen = decode(vae, latents), []
    with patch_module(vae, skip="tile_batch") as report:  # whose batches the hook would see
        vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
        assert relative_error(decode(vae, latents), expected) <= EQUAL
        assert not report.fallbacks and ran(report) == {"2 of 2 frames"}, str(report)
    assert {shape[0] for shape in seen} == {1} and len(seen) == {"slicing": 2, "tiling": 15, "both": 30}[mode]


@pytest.mark.parametrize("op", ["whole_clip", "rms_norm_silu", "depth_to_space", "pixel_conv", "spatial_attention"])
def test_every_site_can_be_off(op: str, vae: AutoencoderKLHunyuanVideo15) -> None:
    expected = decode(vae, draw())
    with patch_module(vae, only="decoder") as report:
        (site,) = (site for site in report.sites if site.op == op)
        site.on = False
        out = decode(vae, draw())
        assert relative_error(out, expected) <= EQUAL
        assert torch.equal(out, expected) == (op == "whole_clip")
        assert not report.fallbacks or op == "whole_clip"


def hook_a_child(vae: AutoencoderKLHunyuanVideo15) -> None:
    vae.decoder.up_blocks[1].resnets[0].register_forward_hook(lambda *_: _[2] * 1.5)


def swap_a_child(vae: AutoencoderKLHunyuanVideo15) -> None:
    upsampler = vae.decoder.up_blocks[0].upsamplers[0]
    upsampler.conv = Lora(upsampler.conv)


def pad_with_zeros(vae: AutoencoderKLHunyuanVideo15) -> None:
    vae.decoder.conv_out.pad_mode = "constant"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook_a_child, "forward hooks"),
        (swap_a_child, "replaced by Lora"),
        (pad_with_zeros, "not padded by what it repeats"),
    ],
    ids=["hook", "lora", "padding"],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_changed_child_runs_as_it_is(
    when: str, change: Callable[[AutoencoderKLHunyuanVideo15], None], reason: str, vae: AutoencoderKLHunyuanVideo15
) -> None:
    check_changed_child(vae, draw(), change, when, reason)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_halves_are_no_worse_than_stock(kind: torch.dtype, vae: AutoencoderKLHunyuanVideo15) -> None:
    check_halves(vae, draw(3, 2, 3), kind)


def test_the_other_ways_to_call(vae: AutoencoderKLHunyuanVideo15) -> None:
    latents, clip = draw(), torch.rand(1, 3, 5, 16, 16)
    with torch.no_grad():
        expected, of_clip = vae.decode(latents).sample, vae(clip).sample
    patch_module(vae)
    with torch.no_grad():
        assert relative_error(vae.decode(latents, return_dict=False)[0], expected) <= EQUAL
        assert relative_error(vae(clip).sample, of_clip) <= EQUAL
    with torch.inference_mode():
        assert relative_error(vae.decode(latents).sample, expected) <= EQUAL
    assert torch.equal(decode(copy.deepcopy(vae), latents), expected)


def test_gradients_go_through_the_original(vae: AutoencoderKLHunyuanVideo15) -> None:
    check_gradients(vae, draw(frames=2))


@pytest.mark.parametrize(
    "latents",
    [
        torch.zeros(4, 3, 4, 4),
        torch.zeros(1, 3, 2, 4, 4),
        torch.zeros(1, 4, 2, 4, 4).half(),
        torch.zeros(1, 4, 0, 4, 4),
    ],
    ids=["rank-4", "channels", "dtype", "no-frames"],
)
def test_bad_latents_raise_what_the_stock_vae_raises(latents: Tensor, vae: AutoencoderKLHunyuanVideo15) -> None:
    check_bad_input(vae, latents)


@pytest.mark.slow
def test_kernels_run_and_a_fault_in_one_is_found(
    vae: AutoencoderKLHunyuanVideo15, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VIDACCEL_IMPL")
    latents = draw(1, 1, 1)
    expected = decode(vae, latents)
    with patch_module(vae) as report:
        assert relative_error(decode(vae, latents), expected) <= EQUAL
        assert not report.fallbacks, str(report)
        kernels = {site.op for site in report.sites if site.implementations & {"triton", "taps"}}
        assert kernels == {"rms_norm_silu", "depth_to_space", "pixel_conv"}
    with planted(RMS_NORM_SILU, "triton", lambda out: out[-1].mul_(1.01)), patch_module(vae) as report:
        assert relative_error(decode(vae, latents), expected) <= EQUAL
        assert {site.op for site in report.sites if site.state == "failed"} == {"rms_norm_silu"}


def draw_clip(frames: int = 5, height: int = 32, width: int = 16, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape",
    [(1, 32, 48), (5, 48, 16), (9, 16, 16), (13, 16, 32)],
    ids=["image", "odd-sides", "one-pixel", "four-latent-frames"],
)
def test_same_latents_and_exact_restore(
    shape: tuple[int, int, int], dtype: torch.dtype, vae: AutoencoderKLHunyuanVideo15
) -> None:
    clip = draw_clip(*shape).to(dtype)
    vae.to(dtype)
    expected, given = encode(vae, clip), clip.clone()
    traces = {name: (type(module), frozenset(vars(module))) for name, module in vae.named_modules()}
    with patch_module(vae, only="encoder") as report:
        for _ in range(2):  # the first is checked
            out = encode(vae, clip)
            assert relative_error(out, expected) <= (EQUAL if dtype == torch.float32 else 1e-13)
            assert out.stride() == expected.stride()
        assert not report.fallbacks or dtype == torch.float64, str(report)
        latent_frames = 1 + shape[0] // 4
        assert ran(report) == {f"{latent_frames} of {latent_frames} frames"}
        assert {site.state for site in report.sites} == {"active"}
        assert all(site.implementations for site in report.sites)
    assert torch.equal(clip, given) and torch.equal(encode(vae, clip), expected)
    assert traces == {name: (type(module), frozenset(vars(module))) for name, module in vae.named_modules()}


@pytest.mark.parametrize(
    "options",
    [
        {"downsample_match_channel": False},
        {"layers_per_block": 2, "block_out_channels": (8, 16, 16, 32, 32)},
        {"latent_channels": 16, "block_out_channels": (8, 8, 16, 16, 32)},
    ],
    ids=["shortcuts", "two-layers", "groups-of-one"],
)
def test_encoders_of_other_configurations(options: dict[str, Any]) -> None:
    vae, clip = tiny_autoencoder_kl_hunyuanvideo15(**options), draw_clip()
    expected = encode(vae, clip)
    with patch_module(vae) as report:
        assert relative_error(encode(vae, clip), expected) <= EQUAL
        assert not report.fallbacks, str(report)


@pytest.mark.parametrize("fit", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_chunks_of_an_encode_are_the_whole(
    fit: int, batch: int, vae: AutoencoderKLHunyuanVideo15, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a batch is its samples, of which stock's mask takes one only."""
    clip = draw_clip(17, batch=batch)
    expected = torch.cat([encode(vae, sample) for sample in clip.split(1)])
    monkeypatch.setattr(blocks, "encode_bytes", lambda encoder, pixels, frames: frames)
    monkeypatch.setattr(causal_clip, "free_bytes", lambda _: fit)
    with patch_module(vae) as report:
        for _ in range(2):
            assert relative_error(encode(vae, clip), expected) <= EQUAL
        assert f"{fit} of 5 frames" in ran(report) and not report.fallbacks


def test_an_encode_out_of_memory_goes_on_in_halves_or_is_explained(
    vae: AutoencoderKLHunyuanVideo15, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = draw_clip(17)
    expected = encode(vae, clip)
    with patch_module(vae, self_check=False) as report:
        out_of_memory_beyond(monkeypatch, 12)
        assert relative_error(encode(vae, clip), expected) <= EQUAL
        assert ran(report) == {"3 of 5 frames"}
        out_of_memory_beyond(monkeypatch, 2)
        with pytest.raises(torch.OutOfMemoryError, match=r"encoding one latent frame of 1 clips of 16 x 32.*encodes"):
            encode(vae, clip)


@pytest.mark.parametrize("mode", ["slicing", "tiling", "both"])
def test_slicing_and_tiling_of_an_encode_keep_their_meaning(mode: str, vae: AutoencoderKLHunyuanVideo15) -> None:
    clip = draw_clip(5, 80, 48, batch=1 if mode == "tiling" else 2)
    if mode != "tiling":
        vae.enable_slicing()
    if mode != "slicing":
        vae.enable_tiling(32, 32, 2, 2, 0.5)
    expected, seen = encode(vae, clip), []
    with patch_module(vae) as report:
        vae.encoder.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
        assert relative_error(encode(vae, clip), expected) <= EQUAL
        assert not report.fallbacks and ran(report) == {"2 of 2 frames"}, str(report)
    assert {shape[0] for shape in seen} == {1} and len(seen) == {"slicing": 2, "tiling": 15, "both": 30}[mode]


@pytest.mark.parametrize("op", ["whole_clip", "rms_norm_silu", "spatial_attention"])
def test_every_site_of_an_encoder_can_be_off(op: str, vae: AutoencoderKLHunyuanVideo15) -> None:
    expected = encode(vae, draw_clip())
    with patch_module(vae, only="encoder") as report:
        (site,) = (site for site in report.sites if site.op == op)
        site.on = False
        out = encode(vae, draw_clip())
        assert relative_error(out, expected) <= EQUAL
        assert torch.equal(out, expected) == (op == "whole_clip")
        assert not report.fallbacks or op == "whole_clip"


def hook_a_child_of_the_encoder(vae: AutoencoderKLHunyuanVideo15) -> None:
    vae.encoder.down_blocks[1].resnets[0].register_forward_hook(lambda *_: _[2] * 1.5)


def swap_a_child_of_the_encoder(vae: AutoencoderKLHunyuanVideo15) -> None:
    downsampler = vae.encoder.down_blocks[0].downsamplers[0]
    downsampler.conv = Lora(downsampler.conv)


def pad_the_encoder_with_zeros(vae: AutoencoderKLHunyuanVideo15) -> None:
    vae.encoder.conv_out.pad_mode = "constant"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook_a_child_of_the_encoder, "forward hooks"),
        (swap_a_child_of_the_encoder, "replaced by Lora"),
        (pad_the_encoder_with_zeros, "not padded by what it repeats"),
    ],
    ids=["hook", "lora", "padding"],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_changed_child_of_an_encoder_runs_as_it_is(
    when: str, change: Callable[[AutoencoderKLHunyuanVideo15], None], reason: str, vae: AutoencoderKLHunyuanVideo15
) -> None:
    check_changed_child(vae, draw_clip(), change, when, reason, encode)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_latents_of_halves_are_no_worse_than_stock(kind: torch.dtype, vae: AutoencoderKLHunyuanVideo15) -> None:
    check_halves(vae, draw_clip(9, 32, 48), kind, encode)


def test_the_other_ways_to_encode(vae: AutoencoderKLHunyuanVideo15, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = draw_clip()
    expected = encode(vae, clip)
    report = patch_module(vae)
    with torch.inference_mode():
        (posterior,) = vae.encode(clip, return_dict=False)
        assert relative_error(posterior.parameters, expected) <= EQUAL
    assert not report.fallbacks, str(report)
    assert torch.equal(encode(copy.deepcopy(vae), clip), expected)
    with monkeypatch.context() as compiling:
        compiling.setattr(torch.compiler, "is_compiling", lambda: True)
        assert torch.equal(encode(vae, clip), expected)


def test_gradients_and_autocast_go_through_the_original_encoder(vae: AutoencoderKLHunyuanVideo15) -> None:
    outcomes, clip = [], draw_clip()
    for patched in (False, True):
        report = patch_module(vae) if patched else None
        leaf = clip.clone().requires_grad_()
        out = vae.encode(leaf).latent_dist.parameters
        out.square().sum().backward()
        with torch.autocast("cpu", torch.bfloat16):
            outcomes.append((out, leaf.grad, encode(vae, clip)))
    assert all(map(torch.equal, *outcomes))
    assert report is not None and "gradients" in reasons(report) and "autocast is on" in reasons(report)


@pytest.mark.parametrize(
    ("clip", "reason"),
    [
        (torch.zeros(3, 5, 16, 16), "are not [B, 3, F, H, W]"),
        (torch.zeros(1, 4, 5, 16, 16), "are not [B, 3, F, H, W]"),
        (torch.zeros(1, 3, 5, 16, 16).half(), "torch.float16"),
        (torch.zeros(1, 3, 0, 16, 16), "are not [B, 3, F, H, W]"),
        (torch.zeros(1, 3, 5, 24, 16), "multiples of 16"),
        (torch.zeros(1, 3, 3, 16, 16), "not 1 + 4 n frames"),
    ],
    ids=["rank-4", "channels", "dtype", "no-frames", "sides", "frames"],
)
def test_bad_clips_raise_what_the_stock_vae_raises(clip: Tensor, reason: str, vae: AutoencoderKLHunyuanVideo15) -> None:
    """Called as they are, for ``encode`` reads their size before the encoder gets them."""
    report = check_bad_input(vae, clip, lambda vae, clip: vae.encoder(clip))
    assert reason in reasons(report)


@pytest.mark.slow
def test_kernels_encode_and_a_fault_in_one_is_found(
    vae: AutoencoderKLHunyuanVideo15, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VIDACCEL_IMPL")
    clip = draw_clip(1, 16, 16)
    expected = encode(vae, clip)
    with patch_module(vae, only="encoder") as report:
        assert relative_error(encode(vae, clip), expected) <= EQUAL
        assert not report.fallbacks, str(report)
        assert {site.op for site in report.sites if "triton" in site.implementations} == {"rms_norm_silu"}
    with (
        planted(RMS_NORM_SILU, "triton", lambda out: out[-1].mul_(1.01)),
        patch_module(vae, only="encoder") as report,
    ):
        assert relative_error(encode(vae, clip), expected) <= EQUAL
        assert {site.op for site in report.sites if site.state == "failed"} == {"rms_norm_silu"}
