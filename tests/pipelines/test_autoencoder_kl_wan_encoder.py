"""``AutoencoderKLWan``: the encoder works on whole clips; its caller asks for four frames at a time, sees nothing."""

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
from torch import Tensor
from vae_checks import (
    Lora,
    check_bad_input,
    check_changed_child,
    check_gradients,
    check_gradients_of_the_last,
    check_halves,
    count_convolutions,
    encode,
    out_of_memory_beyond,
    ran,
    reasons,
)

from vidaccel import patch_module
from vidaccel.blocks.vae import autoencoder_kl_wan as blocks
from vidaccel.blocks.vae import causal_clip, wan_layers, wan_structure
from vidaccel.kernels.norm.rms_norm_silu import RMS_NORM_SILU
from vidaccel.patching.report import PatchReport

EQUAL = 1e-5


def tiny_wan_22() -> AutoencoderKLWan:
    """Shortcuts of which each kind is there: over pixels, over pixels and frames, and over nothing."""
    return tiny_autoencoder_kl_wan(
        is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16, num_res_blocks=2
    )


@pytest.fixture
def vae() -> AutoencoderKLWan:
    return tiny_autoencoder_kl_wan()


@pytest.fixture(params=[tiny_autoencoder_kl_wan, tiny_wan_22], ids=["wan2.1", "wan2.2"])
def either_vae(request: pytest.FixtureRequest) -> AutoencoderKLWan:
    return request.param()


def draw(frames: int = 9, height: int = 16, width: int = 16, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def encoder_sites(report: PatchReport) -> dict[str, Any]:
    return {site.op: site for site in report.sites if site.path == "encoder"}


@pytest.mark.parametrize(
    "shape",
    [(1, 16, 32, 1), (5, 32, 48, 1), (9, 16, 16, 2), (13, 16, 32, 1), (7, 16, 16, 1)],
    ids=["image", "5-frames", "batch", "13-frames", "frames-left-over"],
)
@pytest.mark.parametrize(("dtype", "equal"), [(torch.float32, EQUAL), (torch.float64, 1e-13)], ids=["fp32", "fp64"])
def test_same_latents_and_exact_restore(
    shape: tuple[int, int, int, int], dtype: torch.dtype, equal: float, either_vae: AutoencoderKLWan
) -> None:
    vae, clip = either_vae.to(dtype), draw(*shape).to(dtype)
    expected = encode(vae, clip)
    traces = {name: (type(module), frozenset(vars(module))) for name, module in vae.named_modules()}
    with patch_module(vae) as report:
        for _ in range(2):  # the first is checked
            out = encode(vae, clip)
            assert relative_error(out, expected) <= equal and out.stride() == expected.stride()
        sites = encoder_sites(report)
        assert not report.fallbacks and {site.state for site in sites.values()} == {"active"}, str(report)
        behind = (shape[0] - 1) // 4 * 4
        also = {f"{behind} of {behind} frames behind the first"} if behind else set()
        assert ran(report) == {"1 of 1 frames"} | also
        assert all(site.implementations for site in sites.values())
    assert torch.equal(encode(vae, clip), expected)
    assert traces == {name: (type(module), frozenset(vars(module))) for name, module in vae.named_modules()}


@pytest.mark.parametrize(("height", "width"), [(27, 34), (9, 23), (8, 15)])
def test_odd_sizes(height: int, width: int, vae: AutoencoderKLWan) -> None:
    clip = draw(5, height, width)
    expected = encode(vae, clip)
    with patch_module(vae) as report:
        assert relative_error(encode(vae, clip), expected) <= EQUAL
        assert not report.fallbacks, str(report)


def test_the_encoder_runs_twice(vae: AutoencoderKLWan, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_module(vae, self_check=False)
    calls = count_convolutions(monkeypatch)
    encode(vae, draw(frames=9))
    few = len(calls)
    calls.clear()
    encode(vae, draw(frames=33))
    # each causal convolution for the first frame, but for those over time, and for the others; and that behind it
    over_time = sum(vae.temperal_downsample)
    assert len(calls) == few == 2 * vae._cached_conv_counts["encoder"] - over_time + 1


@pytest.mark.parametrize("fit", [1, 2, 3, 4])
def test_chunks_are_the_whole(fit: int, either_vae: AutoencoderKLWan, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, clip = either_vae, draw(17, batch=2)
    expected = encode(vae, clip)
    monkeypatch.setattr(wan_layers, "encode_bytes", lambda encoder, clip, frames: frames)
    monkeypatch.setattr(causal_clip, "free_bytes", lambda _: 4 * fit)
    with patch_module(vae) as report:
        assert relative_error(encode(vae, clip), expected) <= EQUAL
        assert f"{4 * {3: 2}.get(fit, fit)} of 16 frames behind the first" in ran(report)
        assert not report.fallbacks


@pytest.mark.parametrize(("most", "step"), [(20, 16), (12, 8)], ids=["halved", "halved-twice"])
def test_out_of_memory_halves_the_chunk_and_goes_on(
    most: int, step: int, vae: AutoencoderKLWan, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = draw(frames=33)
    expected = encode(vae, clip)
    with patch_module(vae, self_check=False) as report:
        out_of_memory_beyond(monkeypatch, most)
        assert relative_error(encode(vae, clip), expected) <= EQUAL
        assert ran(report) == {"1 of 1 frames", f"{step} of 32 frames behind the first"}


def test_what_memory_cannot_hold_at_all_is_explained(vae: AutoencoderKLWan, monkeypatch: pytest.MonkeyPatch) -> None:
    report = patch_module(vae, self_check=False)
    with monkeypatch.context() as context:
        out_of_memory_beyond(context, 4)
        with pytest.raises(torch.OutOfMemoryError, match=r"encoding one latent frame of 2 clips of 16 x 24 pixels"):
            encode(vae, draw(9, 24, 16, batch=2))
    out = encode(vae, draw())
    report.restore()
    assert relative_error(out, encode(vae, draw())) <= EQUAL


def test_memory_decides_how_many_frames(vae: AutoencoderKLWan, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = draw(frames=25)
    expected = encode(vae, clip)
    with patch_module(vae) as report:
        for free, step in ((0, 4), (wan_structure.encode_bytes(vae.encoder, clip, 8), 8), (2**40, 24)):
            monkeypatch.setattr(causal_clip, "free_bytes", lambda _, free=free: free)
            assert relative_error(encode(vae, clip), expected) <= EQUAL
            assert f"{step} of 24 frames behind the first" in ran(report)


@pytest.mark.parametrize("inference", [False, True], ids=["no-grad", "inference-mode"])
@pytest.mark.parametrize("mode", first_is_quick(["both", "slicing", "tiling"]))
def test_slicing_and_tiling_keep_their_meaning(mode: str, inference: bool, either_vae: AutoencoderKLWan) -> None:
    vae = either_vae
    if mode != "tiling":
        vae.enable_slicing()
    if mode != "slicing":
        vae.enable_tiling(16, 16, 8, 8)
    clip = draw(9, 48, 32, 2)
    expected = encode(vae, clip)
    seen = []
    with patch_module(vae) as report, torch.inference_mode(inference):
        vae.encoder.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
        with torch.no_grad():
            out = vae.encode(clip.clone()).latent_dist.parameters
        assert relative_error(out, expected) <= EQUAL
        assert not report.fallbacks and ran(report) == {"1 of 1 frames", "8 of 8 frames behind the first"}, str(report)
    assert {shape[0] for shape in seen} == ({2} if mode == "tiling" else {1})


def laid_out(case: str) -> Tensor:
    """Nine frames, in one of the ways in which a caller may have them."""
    clip = draw()
    if case == "frames-outermost":  # as a video processor leaves them
        return clip.transpose(1, 2).contiguous().transpose(1, 2)
    if case == "frames-outermost-of-a-list":
        return clip[0].transpose(0, 1).contiguous().transpose(0, 1).unsqueeze(0)
    if case == "channels-last":
        return clip.contiguous(memory_format=torch.channels_last_3d)
    if case == "frames-innermost":
        return clip.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    if case == "one-frame-repeated":
        return clip[:, :, :1].expand(-1, -1, 9, -1, -1)
    if case == "sample-of-a-batch":
        return draw(batch=3)[1:2]
    if case == "channels-of-more":
        return draw(batch=2).flatten(0, 1).unsqueeze(0)[:, 2:5]
    if case == "cropped":
        return draw(9, 24, 24)[..., 4:20, 3:19]
    if case == "every-other-frame":
        return draw(17)[:, :, ::2]
    return draw(40)[:, :, 3:12]


# no frame lies behind the one that is given, or not so that strides tell
CALL_BY_CALL = ("frames-innermost", "one-frame-repeated", "every-other-frame")


@pytest.mark.parametrize("inference", [False, True], ids=["no-grad", "inference-mode"])
@pytest.mark.parametrize(
    "case",
    [
        "frames-outermost",
        "frames-outermost-of-a-list",
        "channels-last",
        "sample-of-a-batch",
        "channels-of-more",
        "cropped",
        "slice-of-a-longer-clip",
        *CALL_BY_CALL,
    ],
)
def test_however_a_clip_lies_in_memory(case: str, inference: bool, vae: AutoencoderKLWan) -> None:
    expected = encode(vae, laid_out(case))
    with patch_module(vae) as report, torch.inference_mode(inference):
        assert relative_error(encode(vae, laid_out(case)), expected) <= EQUAL
        assert not report.fallbacks, str(report)
    step = 4 if case in CALL_BY_CALL else 32 if case == "slice-of-a-longer-clip" else 8
    assert f"{step} of {step} frames behind the first" in ran(report)


@pytest.mark.parametrize(
    ("start", "stop", "most"), [(0, 1, 1), (2, 3, 1), (2, 27, 33), (0, 5, 33), (0, 41, 41), (30, 35, 9)]
)
def test_little_is_encoded_but_what_was_asked_for(
    start: int, stop: int, most: int, vae: AutoencoderKLWan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a longer clip: its first frame, its beginning, and frames from its midst."""
    clip = draw(41)[:, :, start:stop]
    expected = encode(vae, clip)
    read = []
    right = wan_layers.Encode.run
    monkeypatch.setattr(wan_layers.Encode, "run", lambda *args: read.append(args[1].shape[2]) or right(*args))
    with patch_module(vae, self_check=False):
        assert relative_error(encode(vae, clip), expected) <= EQUAL
    assert sum(read) <= most


def test_the_beginning_of_a_longer_clip(vae: AutoencoderKLWan) -> None:
    """Of the rest, some is encoded for nothing, for nothing tells."""
    clip = draw(17)[:, :, :9]
    expected = encode(vae, clip)
    with patch_module(vae) as report:
        assert relative_error(encode(vae, clip), expected) <= EQUAL
        assert "16 of 16 frames behind the first" in ran(report)


def test_the_other_ways_to_call(vae: AutoencoderKLWan) -> None:
    clip = draw()
    expected = encode(vae, clip)
    patch_module(vae)
    with torch.no_grad():
        (out,) = vae.encode(clip, return_dict=False)
        assert relative_error(out.parameters, expected) <= EQUAL
        vae.clear_cache()
        assert vae._enc_feat_map == [None] * vae._cached_conv_counts["encoder"]
        assert vae(clip).sample.shape == clip.shape


@pytest.mark.parametrize("op", ["whole_clip", "rms_norm_silu", "conv_epilogue", "spatial_attention"])
def test_every_site_can_be_off(op: str, vae: AutoencoderKLWan) -> None:
    expected = encode(vae, draw())
    with patch_module(vae) as report:
        site = encoder_sites(report)[op]
        site.on = False
        out = encode(vae, draw())
        assert relative_error(out, expected) <= EQUAL
        assert torch.equal(out, expected) == (op == "whole_clip")
        site.on = True
        assert not torch.equal(encode(vae, draw()), expected)
    with patch_module(vae, skip=op):
        assert relative_error(encode(vae, draw()), expected) <= EQUAL


def hook_a_child(vae: AutoencoderKLWan) -> None:
    vae.encoder.down_blocks[2].register_forward_hook(lambda *_: _[2] * 1.5)


def swap_a_child(vae: AutoencoderKLWan) -> None:
    resnet = vae.encoder.mid_block.resnets[1]
    resnet.conv2 = Lora(resnet.conv2)


def swap_a_downsampler(vae: AutoencoderKLWan) -> None:
    resample = next(block for block in vae.encoder.down_blocks if hasattr(block, "resample"))
    resample.resample[1] = Lora(resample.resample[1])


def pad_in_front(vae: AutoencoderKLWan) -> None:
    resample = next(block for block in vae.encoder.down_blocks if hasattr(block, "resample"))
    resample.resample[0].padding = (1, 0, 1, 0)


def pad_with_ones(vae: AutoencoderKLWan) -> None:
    resample = next(block for block in vae.encoder.down_blocks if hasattr(block, "resample"))
    resample.resample[0].value = 1.0


def train(vae: AutoencoderKLWan) -> None:
    vae.encoder.down_blocks[0].dropout.p = 0.5
    vae.train()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook_a_child, "forward hooks"),
        (swap_a_child, "replaced by Lora"),
        (swap_a_downsampler, "replaced by Lora"),
        (pad_in_front, "does not pad"),
        (pad_with_ones, "does not pad"),
        (train, "dropout is on"),
    ],
    ids=["hook", "lora", "downsampler", "other-pad", "ones", "dropout"],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_changed_child_runs_as_it_is(
    when: str, change: Callable[[AutoencoderKLWan], None], reason: str, vae: AutoencoderKLWan
) -> None:
    check_changed_child(vae, draw(), change, when, reason, encode)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_halves_are_no_worse_than_stock(kind: torch.dtype, either_vae: AutoencoderKLWan) -> None:
    check_halves(either_vae, draw(height=32, width=48), kind, encode)


def by_hand(vae: AutoencoderKLWan, clips: list[Tensor], steps: list[int]) -> Tensor:
    """Clips encoded with one cache, so many frames at a call."""
    cache: list[Any] = [None] * vae._cached_conv_counts["encoder"]
    parts = []
    with torch.no_grad():
        for clip, step in zip(clips, steps, strict=True):
            for part in clip.split(step, dim=2):
                parts.append(vae.encoder(part, feat_cache=cache, feat_idx=[0]))
    return torch.cat(parts, dim=2)


@pytest.mark.parametrize(
    ("frames", "steps"),
    [([1, 8], [1, 4]), ([1, 8, 4, 12], [1, 8, 4, 4]), ([1, 4, 4], [1, 4, 4])],
    ids=["goes-on-with-another-tensor", "mixed", "one-by-one"],
)
@pytest.mark.parametrize("off_at", [None, "whole_clip"], ids=["on", "switched-off-midway"])
def test_a_cache_may_outlive_its_clip(
    frames: list[int], steps: list[int], off_at: str | None, vae: AutoencoderKLWan
) -> None:
    clips = [draw(count) / (1 + index) for index, count in enumerate(frames)]
    expected = by_hand(vae, clips, steps)
    with patch_module(vae) as report:
        if off_at:
            site, calls = encoder_sites(report)[off_at], [0]

            def switch(*_: Any) -> None:
                calls[0] += 1
                site.on = calls[0] % 3 != 2  # on, off, on

            vae.encoder.register_forward_pre_hook(switch)
        assert relative_error(by_hand(vae, clips, steps), expected) <= EQUAL


@pytest.mark.parametrize("steps", [[1, 4, 3, 4], [1, 3, 3, 4]], ids=["ahead", "at-once"])
def test_a_part_of_a_latent_frame_is_left_to_stock(steps: list[int]) -> None:
    """Which drops what is over: how the frames come decides what becomes of those behind."""
    vae = tiny_autoencoder_kl_wan(temperal_downsample=[False, True, False], scale_factor_temporal=2)

    @torch.no_grad()
    def parts() -> list[Tensor]:
        cache = [None] * vae._cached_conv_counts["encoder"]
        return [vae.encoder(part, feat_cache=cache, feat_idx=[0]) for part in draw(sum(steps)).split(steps, dim=2)]

    expected = parts()
    with patch_module(vae) as report:
        for out, stock in zip(parts(), expected, strict=True):
            assert out.shape == stock.shape and relative_error(out, stock) <= EQUAL
        assert "do not make whole latent frames" in reasons(report)


@pytest.mark.parametrize("inference", [False, True], ids=["no-grad", "inference-mode"])
@pytest.mark.parametrize("by_numpy", [False, True], ids=["torch", "numpy"])
def test_frames_written_in_between_are_seen(by_numpy: bool, inference: bool, vae: AutoencoderKLWan) -> None:
    """A buffer that is filled while its first frames are encoded."""
    clip = draw(13)

    def fill_and_encode() -> Tensor:
        buffer, cache, parts = torch.zeros_like(clip), [None] * vae._cached_conv_counts["encoder"], []
        for some in (slice(0, 1), slice(1, 5), slice(5, 9), slice(9, 13)):
            (buffer.numpy() if by_numpy else buffer)[:, :, some] = clip[:, :, some]
            parts.append(vae.encoder(buffer[:, :, some], feat_cache=cache, feat_idx=[0]))
        return torch.cat(parts, dim=2).clone()

    with torch.no_grad():
        expected = fill_and_encode()
    patch_module(vae)
    with torch.inference_mode(inference), torch.no_grad():
        assert relative_error(fill_and_encode(), expected) <= EQUAL


@pytest.mark.parametrize("copied", [list, copy.deepcopy], ids=["list", "deep"])
@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "part-by-part"])
def test_two_clips_go_on_from_copies_of_a_cache(
    ahead: bool, copied: Callable[[list[Any]], list[Any]], either_vae: AutoencoderKLWan
) -> None:
    """Their beginnings are the same."""
    first = draw(17)[:, :1].repeat(1, either_vae.encoder.conv_in.in_channels, 1, 1, 1)
    sizes = [1, 4, 4, 4, 4]
    clips = [first.split(sizes, dim=2), torch.cat([first[:, :, :5], first[:, :, 5:] + 1], dim=2).split(sizes, dim=2)]
    if not ahead:
        clips = [[part.clone() for part in parts] for parts in clips]

    @torch.no_grad()
    def forked(vae: AutoencoderKLWan) -> Tensor:
        cache = [None] * vae._cached_conv_counts["encoder"]
        made = [vae.encoder(clips[0][at], cache, [0]) for at in range(2)]
        caches = cache, copied(cache)
        for at in range(2, 5):
            made += [vae.encoder(parts[at], kept, [0]) for parts, kept in zip(clips, caches, strict=True)]
        return torch.cat(made, dim=2)

    expected = forked(either_vae)
    with patch_module(either_vae):
        assert relative_error(forked(either_vae), expected) <= EQUAL


def test_calls_that_stock_takes_another_way(vae: AutoencoderKLWan) -> None:
    clip, cache = draw(), [None] * vae._cached_conv_counts["encoder"]
    with torch.no_grad():
        uncached, at_once = vae.encoder(clip), vae.encoder(clip, feat_cache=list(cache), feat_idx=[0])
    report = patch_module(vae)
    with torch.no_grad():
        assert torch.equal(vae.encoder(clip), uncached)
        assert torch.equal(vae.encoder(clip, feat_cache=list(cache), feat_idx=[0]), at_once)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            vae.encode(clip)
    assert "no cache of features" in reasons(report) and "not for one frame" in reasons(report)
    assert "autocast is on" in reasons(report)


def test_nothing_outlives_an_encode(vae: AutoencoderKLWan, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_module(vae)
    made: list[Any] = []

    class Seen(blocks._Progress):
        def take(self, *args: Any) -> Tensor:
            made.append(weakref.ref(self))
            return super().take(*args)

    monkeypatch.setattr(blocks, "_Progress", Seen)
    encode(vae, draw())
    gc.collect()
    assert made and all(ref() is None for ref in made)


def test_survives_copy_and_change_of_dtype(vae: AutoencoderKLWan) -> None:
    expected = encode(vae, draw())
    patch_module(vae)
    encode(vae, draw())
    assert torch.equal(encode(copy.deepcopy(vae), draw()), expected)
    vae.to(torch.float64).to(torch.float32)
    assert relative_error(encode(vae, draw()), expected) <= EQUAL


def test_gradients_go_through_the_original(vae: AutoencoderKLWan) -> None:
    check_gradients(vae, draw(), lambda vae, clip: vae.encode(clip).latent_dist.parameters)


def test_gradients_of_the_last_frames_alone(vae: AutoencoderKLWan) -> None:
    empty = [None] * vae._cached_conv_counts["encoder"]
    check_gradients_of_the_last(lambda x, cache: (vae.encoder(x, cache, [0]), cache), vae, draw(9), [1, 4, 4], empty)


def test_torch_compile_traces_the_original(vae: AutoencoderKLWan) -> None:
    clip = draw(frames=1)
    with torch.no_grad():
        expected = vae.encoder(clip)
        patch_module(vae)
        compiled = torch.compile(vae.encoder, backend="eager", fullgraph=True)
        assert relative_error(compiled(clip), expected) <= EQUAL


@pytest.mark.parametrize(
    "clip",
    [torch.zeros(1, 2, 5, 16, 16), torch.zeros(1, 3, 5, 16, 16).half(), torch.zeros(1, 3, 5, 7, 16)],
    ids=["channels", "dtype", "too-small"],
)
@pytest.mark.parametrize("make", [tiny_autoencoder_kl_wan, tiny_wan_22], ids=["wan2.1", "wan2.2"])
def test_bad_clips_raise_what_the_stock_vae_raises(make: Callable[[], AutoencoderKLWan], clip: Tensor) -> None:
    check_bad_input(make(), clip, encode)


def test_pictures_that_a_shortcut_does_not_divide() -> None:
    check_bad_input(tiny_wan_22(), draw(5, 24, 16), encode)


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_autoencoder_kl_wan, tiny_wan_22], ids=["wan2.1", "wan2.2"])
def test_kernels_run_and_a_fault_in_one_is_found(
    make: Callable[[], AutoencoderKLWan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VIDACCEL_IMPL")
    vae, clip = make(), draw(5, 16, 16)
    expected = encode(vae, clip)
    with patch_module(vae) as report:
        assert relative_error(encode(vae, clip), expected) <= EQUAL
        assert not report.fallbacks, str(report)
        kernels = {op for op, site in encoder_sites(report).items() if site.implementations & {"triton", "whole"}}
        assert kernels == {"rms_norm_silu", "conv_epilogue"}
    with planted(RMS_NORM_SILU, "triton", lambda out: out[-1].mul_(1.01)), patch_module(vae) as report:
        assert relative_error(encode(vae, clip), expected) <= EQUAL
        failed = {site.op for site in encoder_sites(report).values() if site.state == "failed"}
        assert failed == {"rms_norm_silu"}
