"""``AutoencoderKLWan``: the decoder works on whole clips; its caller asks for frame after frame, and sees nothing."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from block_checks import relative_error
from diffusers import AutoencoderKLWan
from kernel_checks import planted
from quick_and_slow import first_is_quick
from tiny_models import tiny_autoencoder_kl_wan
from torch import Tensor, nn
from vae_checks import (
    Lora,
    check_bad_input,
    check_changed_child,
    check_gradients,
    check_gradients_of_the_last,
    check_halves,
    count_convolutions,
    decode,
    host_is_full,
    out_of_memory_beyond,
    ran,
    reasons,
)

from vidaccel import patch_module
from vidaccel.blocks.vae import autoencoder_kl_wan as blocks
from vidaccel.blocks.vae import causal_clip, wan_layers, wan_structure
from vidaccel.kernels.norm.rms_norm_silu import RMS_NORM_SILU

EQUAL = 1e-5


def tiny_wan_22() -> AutoencoderKLWan:
    """Residual up-blocks, and pixels in patches of 2 x 2; widths as in the released model, 32 times as narrow."""
    return tiny_autoencoder_kl_wan(
        is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16
    )


@pytest.fixture
def vae() -> AutoencoderKLWan:
    return tiny_autoencoder_kl_wan()


@pytest.fixture(params=[tiny_autoencoder_kl_wan, tiny_wan_22], ids=["wan2.1", "wan2.2"])
def either_vae(request: pytest.FixtureRequest) -> AutoencoderKLWan:
    return request.param()


def draw(frames: int = 3, height: int = 3, width: int = 2, batch: int = 1) -> Tensor:
    return torch.randn(batch, 4, frames, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "shape",
    [(1, 3, 2, 1), (2, 3, 5, 1), (5, 2, 3, 2), (3, 1, 1, 1)],
    ids=["image", "two-frames", "batch", "one-pixel"],
)
def test_same_frames_and_exact_restore(shape: tuple[int, int, int, int], either_vae: AutoencoderKLWan) -> None:
    vae = either_vae
    latents = draw(*shape)
    expected = decode(vae, latents)
    traces = {name: (type(module), frozenset(vars(module))) for name, module in vae.named_modules()}
    with patch_module(vae) as report:
        for _ in range(2):  # the first is checked
            out = decode(vae, latents)
            assert relative_error(out, expected) <= EQUAL and out.stride() == expected.stride()
        assert not report.fallbacks and {site.state for site in report.sites} == {"active"}, str(report)
        assert ran(report) == {f"{shape[0]} of {shape[0]} frames"}
        assert all(
            site.implementations for site in report.sites if site.path != "encoder" and not site.op.startswith("tile_")
        )
    assert torch.equal(decode(vae, latents), expected)
    assert traces == {name: (type(module), frozenset(vars(module))) for name, module in vae.named_modules()}


def test_the_decoder_runs_once(vae: AutoencoderKLWan, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_module(vae, self_check=False)
    calls = count_convolutions(monkeypatch)
    decode(vae, draw(frames=5))
    whole = len(calls)
    calls.clear()
    decode(vae, draw(frames=9))
    # one for each causal convolution of the decoder, and the 1 x 1 x 1 one before it
    assert len(calls) == whole == 1 + vae._cached_conv_counts["decoder"]


@pytest.mark.parametrize("fit", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(5, 2, 3, 1), (6, 1, 2, 2)], ids=["5-frames", "6-frames-batch"])
def test_chunks_are_the_whole(
    fit: int, shape: tuple[int, int, int, int], either_vae: AutoencoderKLWan, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae, latents = either_vae, draw(*shape)
    expected = decode(vae, latents)
    monkeypatch.setattr(wan_layers, "decode_bytes", lambda decoder, latents, frames: frames)
    monkeypatch.setattr(causal_clip, "free_bytes", lambda _: fit)
    with patch_module(vae) as report:
        assert relative_error(decode(vae, latents), expected) <= EQUAL
        assert f"{min(fit, 3)} of {shape[0]} frames" in ran(report)  # equal parts: 3 and 2 rather than 4 and 1
        assert not report.fallbacks


@pytest.mark.parametrize(("most", "step"), [(18, 4), (12, 2)], ids=["halved", "halved-twice"])
def test_out_of_memory_halves_the_chunk_and_goes_on(
    most: int, step: int, vae: AutoencoderKLWan, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = decode(vae, draw(frames=7))
    with patch_module(vae, self_check=False) as report:
        out_of_memory_beyond(monkeypatch, most)
        assert relative_error(decode(vae, draw(frames=7)), expected) <= EQUAL
        assert ran(report) == {f"{step} of 7 frames"}


def test_a_host_out_of_memory_halves_the_chunk_too(vae: AutoencoderKLWan, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = decode(vae, draw(frames=7))
    with patch_module(vae, self_check=False) as report:
        out_of_memory_beyond(monkeypatch, 18, host_is_full)
        for _ in range(2):
            assert relative_error(decode(vae, draw(frames=7)), expected) <= EQUAL
        assert ran(report) == {"4 of 7 frames"} and not report.fallbacks


def test_what_memory_cannot_hold_at_all_is_explained(vae: AutoencoderKLWan, monkeypatch: pytest.MonkeyPatch) -> None:
    report = patch_module(vae, self_check=False)
    with monkeypatch.context() as context:
        out_of_memory_beyond(context, 4)
        with pytest.raises(torch.OutOfMemoryError, match=r"one latent frame of 2 clips of 16 x 24 pixels.*enable_sl"):
            decode(vae, draw(frames=4, batch=2))
    out = decode(vae, draw(frames=4))
    report.restore()
    assert relative_error(out, decode(vae, draw(frames=4))) <= EQUAL


def test_memory_decides_how_many_frames(vae: AutoencoderKLWan, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = draw(frames=15)
    expected = decode(vae, latents)
    with patch_module(vae) as report:
        for free, step in ((0, 1), (wan_structure.decode_bytes(vae.decoder, latents, 3), 3), (2**40, 15)):
            monkeypatch.setattr(causal_clip, "free_bytes", lambda _, free=free: free)
            assert relative_error(decode(vae, latents), expected) <= EQUAL
            assert f"{step} of 15 frames" in ran(report)


@pytest.mark.parametrize("mode", first_is_quick(["both", "slicing", "tiling"]))
def test_slicing_and_tiling_keep_their_meaning(mode: str, either_vae: AutoencoderKLWan) -> None:
    vae = either_vae
    if mode != "tiling":
        vae.enable_slicing()
    if mode != "slicing":
        vae.enable_tiling(32, 32, 16, 24)
    latents = draw(3, 6, 5, 2)
    expected = decode(vae, latents)
    with patch_module(vae) as report:
        assert relative_error(decode(vae, latents), expected) <= EQUAL
        assert not report.fallbacks and ran(report) == {"3 of 3 frames"}, str(report)
    if mode == "slicing":
        return
    seen = []
    with patch_module(vae, skip="tile_batch") as report:  # whose batches the hook would see
        vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
        assert relative_error(decode(vae, latents), expected) <= EQUAL
        assert not report.fallbacks and ran(report) == {"1 of 1 frames"}, str(report)
    assert {shape[0] for shape in seen} == ({2} if mode == "tiling" else {1})


@pytest.mark.parametrize("case", ["slice-of-a-longer-clip", "inference-mode", "site-off", "one-frame", "channels-last"])
def test_tiles_of_any_clip(case: str, vae: AutoencoderKLWan) -> None:
    vae.enable_tiling(32, 32, 16, 24)
    longer = draw(4, 6, 5)
    latents = longer[:, :, 1:3] if case == "slice-of-a-longer-clip" else longer
    if case == "one-frame":
        latents = longer[:, :, :1].clone()
    if case == "channels-last":
        latents = latents.contiguous(memory_format=torch.channels_last_3d)
    expected = decode(vae, latents)
    with patch_module(vae) as report, torch.inference_mode(case == "inference-mode"):
        for site in report.sites:
            site.on = not (case == "site-off" and site.op == "tile_batch")
        if case == "inference-mode":
            latents = latents.clone()
        assert (
            relative_error(vae.decode(latents).sample if case == "inference-mode" else decode(vae, latents), expected)
            <= EQUAL
        )
        assert not report.fallbacks, str(report)


def test_nothing_is_decoded_but_what_was_asked_for(vae: AutoencoderKLWan) -> None:
    """One frame of a longer clip, say to look at it."""
    latents = draw(4)
    expected = decode(vae, latents[:, :, :1])
    with patch_module(vae) as report:
        assert relative_error(decode(vae, latents[:, :, :1]), expected) <= EQUAL
        assert ran(report) == {"1 of 1 frames"}


def test_the_other_ways_to_call(vae: AutoencoderKLWan) -> None:
    latents = draw()
    expected = decode(vae, latents)
    patch_module(vae)
    with torch.no_grad():
        (out,) = vae.decode(latents, return_dict=False)
    assert relative_error(out, expected) <= EQUAL
    with torch.inference_mode():
        assert relative_error(vae.decode(latents).sample, expected) <= EQUAL
    clip = torch.rand(1, 3, 5, 16, 16)
    with torch.no_grad():
        out = vae(clip).sample
    assert out.shape == clip.shape


@pytest.mark.parametrize(
    "op", ["whole_clip", "rms_norm_silu", "conv_epilogue", "pixel_shuffle", "upsample_conv", "spatial_attention"]
)
def test_every_site_can_be_off(op: str, vae: AutoencoderKLWan) -> None:
    expected = decode(vae, draw())
    with patch_module(vae) as report:
        (site,) = (site for site in report.sites if site.op == op and site.path != "encoder")
        site.on = False
        out = decode(vae, draw())
        assert relative_error(out, expected) <= EQUAL
        assert torch.equal(out, expected) == (op == "whole_clip")
        site.on = True
        assert not torch.equal(decode(vae, draw()), expected)
    with patch_module(vae, skip=op):
        assert relative_error(decode(vae, draw()), expected) <= EQUAL


def hook_a_child(vae: AutoencoderKLWan) -> None:
    vae.decoder.up_blocks[1].resnets[0].register_forward_hook(lambda *_: _[2] * 1.5)


def swap_a_child(vae: AutoencoderKLWan) -> None:
    resnet = vae.decoder.mid_block.resnets[1]
    resnet.conv2 = Lora(resnet.conv2)


def train(vae: AutoencoderKLWan) -> None:
    vae.decoder.up_blocks[0].resnets[0].dropout.p = 0.5
    vae.train()


def one_module_more(vae: AutoencoderKLWan) -> None:
    vae.decoder.up_blocks[0].upsamplers[0].resample.append(nn.Tanh())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook_a_child, "forward hooks"),
        (one_module_more, "it is not built as expected"),
        (swap_a_child, "replaced by Lora"),
        (train, "dropout is on"),
    ],
    ids=["hook", "more", "lora", "dropout"],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_changed_child_runs_as_it_is(
    when: str, change: Callable[[AutoencoderKLWan], None], reason: str, vae: AutoencoderKLWan
) -> None:
    check_changed_child(vae, draw(), change, when, reason)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_halves_are_no_worse_than_stock(kind: torch.dtype, either_vae: AutoencoderKLWan) -> None:
    check_halves(either_vae, draw(frames=4, height=4, width=5), kind)


def by_hand(vae: AutoencoderKLWan, clips: list[Tensor], steps: list[int]) -> Tensor:
    """Latents decoded with one cache, from tensors of their own, so many frames at a call."""
    cache: list[Any] = [None] * vae._cached_conv_counts["decoder"]
    parts, first = [], True
    with torch.no_grad():
        for clip in clips:
            at = 0
            for step in steps:
                if at < clip.shape[2]:
                    part = clip[:, :, at : at + step]
                    parts.append(vae.decoder(part, feat_cache=cache, feat_idx=[0], first_chunk=first))
                    first, at = False, at + step
    return torch.cat(parts, dim=2)


@pytest.mark.parametrize(
    ("frames", "steps"),
    [([4], [1, 2, 1]), ([3, 2], [1, 1, 1]), ([1, 1, 1, 2], [1, 1]), ([3, 4], [1, 1, 3])],
    ids=["several-at-once", "goes-on-with-another-tensor", "frame-by-frame", "mixed"],
)
@pytest.mark.parametrize("off_at", [None, "whole_clip"], ids=["on", "switched-off-midway"])
def test_a_cache_may_outlive_its_clip(
    frames: list[int], steps: list[int], off_at: str | None, either_vae: AutoencoderKLWan
) -> None:
    vae = either_vae
    clips = [draw(count) + index for index, count in enumerate(frames)]
    expected = by_hand(vae, clips, steps)
    with patch_module(vae) as report:
        if off_at:
            (site,) = (site for site in report.sites if site.op == off_at and site.path == "decoder")
            calls = [0]

            def switch(*_: Any) -> None:
                calls[0] += 1
                site.on = calls[0] % 3 != 2  # on, off, on

            vae.decoder.register_forward_pre_hook(switch)
        assert relative_error(by_hand(vae, clips, steps), expected) <= EQUAL


@pytest.mark.parametrize("copied", [list, copy.deepcopy], ids=["list", "deep"])
@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "frame-by-frame"])
def test_two_clips_go_on_from_copies_of_a_cache(
    ahead: bool, copied: Callable[[list[Any]], list[Any]], either_vae: AutoencoderKLWan
) -> None:
    """Their beginnings are the same. Stock replaces the tensors of a cache, and never writes into them."""
    first = draw(frames=5)
    clips = [first.split(1, dim=2), torch.cat([first[:, :, :2], first[:, :, 2:] + 1], dim=2).split(1, dim=2)]
    if not ahead:
        clips = [[frame.clone() for frame in frames] for frames in clips]

    @torch.no_grad()
    def forked(vae: AutoencoderKLWan) -> Tensor:
        cache = [None] * vae._cached_conv_counts["decoder"]
        parts = [vae.decoder(clips[0][at], cache, [0], at == 0) for at in range(2)]
        caches = cache, copied(cache)
        for at in range(2, 5):
            parts += [vae.decoder(frames[at], kept, [0]) for frames, kept in zip(clips, caches, strict=True)]
        return torch.cat(parts, dim=2)

    expected = forked(either_vae)
    with patch_module(either_vae):
        assert relative_error(forked(either_vae), expected) <= EQUAL


@pytest.mark.parametrize("frames", [1, 2])
def test_a_restored_decoder_says_that_the_cache_is_not_its_own(frames: int, vae: AutoencoderKLWan) -> None:
    cache, latents = [None] * vae._cached_conv_counts["decoder"], draw(frames=1 + frames)
    with torch.no_grad():
        with patch_module(vae):
            vae.decoder(latents[:, :, :1], cache, [0], True)
        with pytest.raises(RuntimeError, match="begin the clip anew, with an empty cache"):
            vae.decoder(latents[:, :, 1:], cache, [0])


def test_latents_that_are_no_numbers_are_decoded_at_once_like_others(vae: AutoencoderKLWan) -> None:
    latents = draw(frames=4)
    latents[0, 0, 3] = torch.nan
    expected = decode(vae, latents)
    with patch_module(vae, self_check=False) as report:
        found = decode(vae, latents)
        assert ran(report) == {"4 of 4 frames"}
    assert torch.equal(found.isnan(), expected.isnan()) and not found[:, :, :9].isnan().any()


@pytest.mark.parametrize("seen_as", [Tensor.detach, Tensor.numpy], ids=["torch", "numpy"])
def test_latents_written_in_between_are_seen(seen_as: Callable[[Tensor], Any], vae: AutoencoderKLWan) -> None:
    """A buffer of latents that is filled while its first frames are decoded."""
    latents = draw(frames=4)

    @torch.no_grad()
    def fill_and_decode() -> Tensor:
        buffer, cache, parts = torch.zeros_like(latents), [None] * vae._cached_conv_counts["decoder"], []
        for at in range(4):
            seen_as(buffer)[:, :, at] = latents[:, :, at]
            part = buffer[:, :, at : at + 1]
            parts.append(vae.decoder(part, feat_cache=cache, feat_idx=[0], first_chunk=at == 0))
        return torch.cat(parts, dim=2)

    expected = fill_and_decode()
    patch_module(vae)
    assert relative_error(fill_and_decode(), expected) <= EQUAL
    with torch.inference_mode():
        assert relative_error(fill_and_decode(), expected) <= EQUAL


def test_calls_that_stock_takes_another_way(vae: AutoencoderKLWan) -> None:
    latents = draw(frames=2)
    with torch.no_grad():
        uncached = vae.decoder(latents)
    report = patch_module(vae)
    with torch.no_grad():
        assert torch.equal(vae.decoder(latents), uncached)
    assert "no cache of features" in reasons(report)


def test_nothing_outlives_a_decode(vae: AutoencoderKLWan, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_module(vae)
    made: list[Any] = []

    class Seen(blocks._Progress):
        def take(self, *args: Any) -> Tensor:
            made.append(weakref.ref(self))
            return super().take(*args)

    monkeypatch.setattr(blocks, "_Progress", Seen)
    decode(vae, draw())
    gc.collect()
    assert made and all(ref() is None for ref in made)


def test_survives_copy_and_change_of_dtype(vae: AutoencoderKLWan) -> None:
    expected = decode(vae, draw())
    patch_module(vae)
    decode(vae, draw())
    assert torch.equal(decode(copy.deepcopy(vae), draw()), expected)
    vae.to(torch.float64).to(torch.float32)
    assert relative_error(decode(vae, draw()), expected) <= EQUAL


def test_gradients_go_through_the_original(vae: AutoencoderKLWan) -> None:
    check_gradients(vae, draw(frames=3))


def test_gradients_of_the_last_frame_alone(vae: AutoencoderKLWan) -> None:
    def call(x: Tensor, cache: Any) -> tuple[Tensor, Any]:
        return vae.decoder(x, cache, [0], cache[0] is None), cache

    check_gradients_of_the_last(call, vae, draw(), [1, 1, 1], [None] * vae._cached_conv_counts["decoder"])


def test_weights_without_gradients_need_no_context(vae: AutoencoderKLWan) -> None:
    expected = decode(vae, draw())
    with patch_module(vae.requires_grad_(False)) as report:
        assert relative_error(vae.decode(draw()).sample, expected) <= EQUAL
        assert not report.fallbacks and ran(report) == {"3 of 3 frames"}


def test_torch_compile_traces_the_original(vae: AutoencoderKLWan) -> None:
    latents = draw(frames=1)
    with torch.no_grad():
        expected = vae.decoder(latents)
        patch_module(vae)
        compiled = torch.compile(vae.decoder, backend="eager", fullgraph=True)
        assert relative_error(compiled(latents), expected) <= EQUAL


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
def test_bad_latents_raise_what_the_stock_vae_raises(latents: Tensor, vae: AutoencoderKLWan) -> None:
    check_bad_input(vae, latents)


@pytest.mark.slow
def test_kernels_run_and_a_fault_in_one_is_found(vae: AutoencoderKLWan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIDACCEL_IMPL")
    latents = draw(frames=2, height=2)
    expected = decode(vae, latents)
    with patch_module(vae) as report:
        assert relative_error(decode(vae, latents), expected) <= EQUAL
        assert not report.fallbacks, str(report)
        kernels = {site.op for site in report.sites if site.implementations & {"triton", "whole"}}
        assert kernels == {"rms_norm_silu", "conv_epilogue", "pixel_shuffle", "upsample_conv"}
    with planted(RMS_NORM_SILU, "triton", lambda out: out[-1].mul_(1.01)), patch_module(vae) as report:
        assert relative_error(decode(vae, latents), expected) <= EQUAL
        assert {site.op for site in report.sites if site.state == "failed"} == {"rms_norm_silu"}
