"""``AutoencoderKLCogVideoX``: the same frames, whole, in chunks and in tiles; what is not served runs as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from block_checks import relative_error
from diffusers import AutoencoderKLCogVideoX
from kernel_checks import planted
from tiny_models import tiny_autoencoder_kl_cogvideox
from torch import Tensor
from vae_checks import (
    PIXEL_FAULTS,
    Lora,
    check_bad_input,
    check_changed_child,
    check_fault_found,
    check_gradients,
    check_gradients_of_the_last,
    check_halves,
    decode,
    out_of_memory_beyond,
    ran,
)

from vidaccel import patch_module
from vidaccel.blocks.vae import autoencoder_kl_cogvideox as blocks
from vidaccel.blocks.vae import causal_clip
from vidaccel.kernels.norm.spatial_norm_silu import SPATIAL_NORM_SILU

EQUAL = 1e-5


@pytest.fixture
def vae() -> AutoencoderKLCogVideoX:
    return tiny_autoencoder_kl_cogvideox()


def draw(frames: int = 5, height: int = 2, width: int = 1, batch: int = 1) -> Tensor:
    return torch.randn(batch, 4, frames, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape", [(1, 2, 3), (2, 1, 3), (3, 3, 1), (6, 1, 1), (7, 2, 1)], ids=lambda shape: f"{shape[0]}-frames"
)
def test_same_frames_and_exact_restore(
    shape: tuple[int, int, int], dtype: torch.dtype, vae: AutoencoderKLCogVideoX
) -> None:
    latents = draw(*shape, batch=2).to(dtype)
    vae.to(dtype)
    expected = decode(vae, latents)
    traces = {name: (type(module), frozenset(vars(module))) for name, module in vae.named_modules()}
    with patch_module(vae, skip="encoder") as report:
        for _ in range(2):  # the first is checked
            out = decode(vae, latents)
            assert relative_error(out, expected) <= (EQUAL if dtype == torch.float32 else 1e-13)
            assert out.stride() == expected.stride()
        assert not report.fallbacks or dtype == torch.float64, str(report)
        assert {site.state for site in report.sites} == {"active"}
        assert ran(report) == {f"{shape[0]} of {shape[0]} frames"}
        assert all(site.implementations for site in report.sites if not site.op.startswith("tile_"))
    assert torch.equal(decode(vae, latents), expected)
    assert traces == {name: (type(module), frozenset(vars(module))) for name, module in vae.named_modules()}


def test_the_order_in_memory_that_the_pipeline_has_them_in(vae: AutoencoderKLCogVideoX) -> None:
    latents = (draw(7, 2, 3).transpose(1, 2).contiguous().transpose(1, 2)) * 0.7
    expected = decode(vae, latents)
    with patch_module(vae) as report:
        assert relative_error(decode(vae, latents), expected) <= EQUAL
        assert ran(report) == {"7 of 7 frames"}


@pytest.mark.parametrize(
    ("options", "latents"),
    [
        ({"block_out_channels": (8, 16, 16), "down_block_types": ("CogVideoXDownBlock3D",) * 3,
          "up_block_types": ("CogVideoXUpBlock3D",) * 3}, draw()),
        ({"layers_per_block": 2, "temporal_compression_ratio": 2}, draw()),
        ({"temporal_compression_ratio": 8}, draw(3)),
        ({"use_post_quant_conv": True, "out_channels": 4}, draw()),
    ],
    ids=["three-levels", "two-layers-time-by-two", "time-by-eight", "post-quant-conv"],
)  # fmt: skip
def test_other_configurations(options: dict[str, Any], latents: Tensor) -> None:
    vae = tiny_autoencoder_kl_cogvideox(**options)
    expected = decode(vae, latents)
    with patch_module(vae) as report:
        assert relative_error(decode(vae, latents), expected) <= EQUAL
        assert not report.fallbacks, str(report)


@pytest.mark.parametrize("fit", [1, 3, 5])
@pytest.mark.parametrize("frames", [8, 9])
def test_chunks_are_the_whole(
    fit: int, frames: int, vae: AutoencoderKLCogVideoX, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = draw(frames, batch=2)
    expected = decode(vae, latents)
    monkeypatch.setattr(blocks, "decode_bytes", lambda decoder, latents, frames: frames)
    monkeypatch.setattr(causal_clip, "free_bytes", lambda _: fit)
    with patch_module(vae) as report:
        assert relative_error(decode(vae, latents), expected) <= EQUAL
        first = 2 + frames % 2
        held = first + max(fit - first, 0) // 2 * 2  # stock's batches stay whole
        assert f"{held} of {frames} frames" in ran(report) and not report.fallbacks


def test_out_of_memory_halves_the_chunk_and_goes_on(
    vae: AutoencoderKLCogVideoX, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = draw(8)
    expected = decode(vae, latents)
    with patch_module(vae, self_check=False) as report:
        out_of_memory_beyond(monkeypatch, 18)
        assert relative_error(decode(vae, latents), expected) <= EQUAL
        assert ran(report) == {"4 of 8 frames"}


def test_what_memory_cannot_hold_at_all_is_explained(
    vae: AutoencoderKLCogVideoX, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_module(vae, self_check=False)
    out_of_memory_beyond(monkeypatch, 6)
    with pytest.raises(torch.OutOfMemoryError, match=r"3 latent frames of 1 clips of 8 x 16 pixels.*enable_tiling"):
        decode(vae, draw())


@pytest.mark.parametrize("mode", ["slicing", "tiling", "both"])
def test_slicing_and_tiling_keep_their_meaning(mode: str, vae: AutoencoderKLCogVideoX) -> None:
    latents = draw(5, 3, 5, batch=1 if mode == "tiling" else 2)
    if mode != "tiling":
        vae.enable_slicing()
    if mode != "slicing":
        vae.enable_tiling(16, 24, 0.5, 0.5)
    expected, seen = decode(vae, latents), []
    with patch_module(vae, skip="tile_batch") as report:  # whose batches the hook would see
        vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
        assert relative_error(decode(vae, latents), expected) <= EQUAL
        assert not report.fallbacks and ran(report) == {"5 of 5 frames"}, str(report)
    assert {shape[0] for shape in seen} == {1} and len(seen) == 2 * {"slicing": 2, "tiling": 15, "both": 30}[mode]


@pytest.mark.parametrize(("size", "frames"), [(1, 4), (3, 9), (4, 9), (3, 7), (6, 18)])
def test_other_sizes_of_batches(size: int, frames: int, vae: AutoencoderKLCogVideoX) -> None:
    """Those that another size would explain too are decoded ahead in vain."""
    vae.num_latent_frames_batch_size = size
    latents = draw(frames, 1, 1)
    expected = decode(vae, latents)
    with patch_module(vae) as report:
        assert relative_error(decode(vae, latents), expected) <= EQUAL
        assert not report.fallbacks, str(report)


def batches(latents: Tensor) -> list[Tensor]:
    return [latents[:, :, :3], latents[:, :, 3:5], latents[:, :, 5:7]]


@pytest.mark.parametrize(
    "change",
    ["other-frames", "written-to", "written-by-numpy", "copied", "cache-rebuilt", "begun-anew", "cpu", "cpu:0"],
)
@torch.no_grad()
def test_calls_that_were_not_foreseen(change: str, vae: AutoencoderKLCogVideoX) -> None:
    outcomes, names = [], []
    for patched in (False, True):
        latents, cache, pixels = draw(7), None, []
        if patched:
            patch_module(vae)
        for at, batch in enumerate(batches(latents)):
            if at == 1 and change == "other-frames":
                batch = latents[:, :, 5:7]
            if at == 2 and change == "written-to":
                batch.mul_(2)
            if at == 2 and change == "written-by-numpy":
                batch.numpy()[:] *= 2
            if change == "copied":
                batch = batch.clone()
            if at == 2 and change == "begun-anew":
                cache = None
            if at == 2 and change == "cache-rebuilt":
                assert cache is not None
                names.append(list(cache))
                cache = dict(cache)
            if at == 2 and change.startswith("cpu"):
                cache = send_to_device(cache, torch.device(change))
            made, cache = vae.decoder(batch, conv_cache=cache)
            pixels.append(made)
        outcomes.append(torch.cat(pixels, dim=2))
    assert relative_error(outcomes[1], outcomes[0]) <= EQUAL
    assert names[:1] == names[1:]


@pytest.mark.parametrize("event", ["restored", "failed", "patched"])
@torch.no_grad()
def test_a_clip_goes_on_whatever_happens_on_the_way(event: str, vae: AutoencoderKLCogVideoX) -> None:
    latents, cache, pixels = draw(7), None, []
    expected = decode(vae, latents)
    report = None if event == "patched" else patch_module(vae)
    for at, batch in enumerate(batches(latents)):
        if at == 1 and event == "patched":
            report = patch_module(vae)
        elif at == 1 and event == "restored" and report is not None:
            report.restore()
        elif at == 1 and report is not None:
            report.sites[0].fail("a test")
        made, cache = vae.decoder(batch, conv_cache=cache)
        pixels.append(made)
    assert relative_error(torch.cat(pixels, dim=2), expected) <= EQUAL


def test_a_forward_that_a_hook_has_kept_is_stocks_once_restored(vae: AutoencoderKLCogVideoX) -> None:
    expected = decode(vae, draw())
    with patch_module(vae):
        kept = vae.decoder.forward
    vae.decoder.forward = kept
    assert torch.equal(decode(vae, draw()), expected)


@pytest.mark.parametrize("op", ["whole_clip", "spatial_norm_silu", "conv_epilogue", "upsample_conv", "pixel_conv"])
def test_every_site_can_be_off(op: str, vae: AutoencoderKLCogVideoX) -> None:
    expected, seen = decode(vae, draw()), []
    with patch_module(vae, skip="encoder") as report:
        (site,) = (site for site in report.sites if site.op == op)
        site.on = False
        out = decode(vae, draw())
        assert relative_error(out, expected) <= EQUAL and not torch.equal(out, expected)
        assert not report.fallbacks
        seen = ran(report)
    assert seen == ({"3 of 3 frames", "2 of 2 frames"} if op == "whole_clip" else {"5 of 5 frames"})


def hook_a_child(vae: AutoencoderKLCogVideoX) -> None:
    vae.decoder.up_blocks[1].resnets[0].norm1.register_forward_hook(lambda *_: (_[2][0] * 1.5, _[2][1]))


def swap_a_child(vae: AutoencoderKLCogVideoX) -> None:
    upsampler = vae.decoder.up_blocks[0].upsamplers[0]
    upsampler.conv = Lora(upsampler.conv)


def pad_by_replication(vae: AutoencoderKLCogVideoX) -> None:
    conv = vae.decoder.conv_out
    conv.pad_mode, conv.conv.padding = "replicate", (0, 0, 0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook_a_child, "forward hooks"),
        (swap_a_child, "replaced by Lora"),
        (pad_by_replication, "does not look back at two frames"),
    ],
    ids=["hook", "lora", "padding"],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_changed_child_runs_as_it_is(
    when: str, change: Callable[[AutoencoderKLCogVideoX], None], reason: str, vae: AutoencoderKLCogVideoX
) -> None:
    check_changed_child(vae, draw(), change, when, reason)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_halves_are_no_worse_than_stock(kind: torch.dtype, vae: AutoencoderKLCogVideoX) -> None:
    check_halves(vae, draw(5, 2, 3), kind)


def test_the_other_ways_to_call(vae: AutoencoderKLCogVideoX) -> None:
    latents, clip = draw(), torch.rand(1, 3, 9, 16, 16)
    with torch.no_grad():
        expected, of_clip = vae.decode(latents).sample, vae(clip).sample
    patch_module(vae)
    with torch.no_grad():
        assert relative_error(vae.decode(latents, return_dict=False)[0], expected) <= EQUAL
        assert relative_error(vae(clip).sample, of_clip) <= EQUAL
    with torch.inference_mode():
        assert relative_error(vae.decode(latents.clone()).sample, expected) <= EQUAL
    assert torch.equal(decode(copy.deepcopy(vae), latents), expected)


def test_gradients_go_through_the_original(vae: AutoencoderKLCogVideoX) -> None:
    check_gradients(vae, draw())


def test_gradients_of_the_last_batch_alone(vae: AutoencoderKLCogVideoX) -> None:
    check_gradients_of_the_last(lambda x, cache: vae.decoder(x, None, cache), vae, draw(6), [2, 2, 2], None)


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
def test_bad_latents_raise_what_the_stock_vae_raises(latents: Tensor, vae: AutoencoderKLCogVideoX) -> None:
    check_bad_input(vae, latents)


@pytest.mark.parametrize("fault", PIXEL_FAULTS)
def test_what_the_decoder_does_wrong_is_found(
    fault: str, vae: AutoencoderKLCogVideoX, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_fault_found(vae, draw(), blocks.FusedCogVideoXDecoder3D, fault, monkeypatch)


def test_kernels_run_and_a_fault_in_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIDACCEL_IMPL")
    vae = tiny_autoencoder_kl_cogvideox(
        block_out_channels=(32, 32), down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2, temporal_compression_ratio=2,
    )  # fmt: skip
    latents = draw(3, 1, 1)
    expected = decode(vae, latents)
    with patch_module(vae) as report:
        assert relative_error(decode(vae, latents), expected) <= EQUAL
        assert not report.fallbacks, str(report)
        kernels = {site.op for site in report.sites if site.implementations & {"triton", "taps", "whole", "halves"}}
        assert kernels == {"spatial_norm_silu", "conv_epilogue", "upsample_conv", "pixel_conv"}
    with planted(SPATIAL_NORM_SILU, "triton", lambda y: y.mul_(1.01)), patch_module(vae) as report:
        assert relative_error(decode(vae, latents), expected) <= EQUAL
        assert {site.op for site in report.sites if site.state == "failed"} == {"spatial_norm_silu"}
