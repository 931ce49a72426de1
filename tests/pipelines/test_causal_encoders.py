"""The encoders of ``AutoencoderKLHunyuanVideo`` and ``AutoencoderKLCogVideoX``: the same latents, or stock's code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from block_checks import relative_error
from kernel_checks import planted
from tiny_models import tiny_autoencoder_kl_cogvideox, tiny_autoencoder_kl_hunyuan_video
from torch import Tensor, nn
from vae_checks import (
    PIXEL_FAULTS,
    Lora,
    check_bad_input,
    check_changed_child,
    check_fault_found,
    check_gradients,
    check_gradients_of_the_last,
    check_halves,
    encode,
    out_of_memory_beyond,
    ran,
    reasons,
)

from vidaccel import patch_module
from vidaccel.blocks.vae.autoencoder_kl_cogvideox_encoder import FusedCogVideoXEncoder3D
from vidaccel.blocks.vae.autoencoder_kl_hunyuan_video import FusedHunyuanVideoEncoder3D
from vidaccel.kernels.norm.padded_group_norm import PADDED_GROUP_NORM

EQUAL = 1e-4  # a norm of few numbers, which tiny pictures have, enlarges roundings; float64 tells what is wrong
VAES = {"hunyuanvideo": tiny_autoencoder_kl_hunyuan_video, "cogvideox": tiny_autoencoder_kl_cogvideox}
FUSED: dict[str, Any] = {"hunyuanvideo": FusedHunyuanVideoEncoder3D, "cogvideox": FusedCogVideoXEncoder3D}
OPS = {
    "hunyuanvideo": {"whole_clip", "group_norm_silu", "conv_epilogue", "rms_norm_silu", "spatial_attention"},
    "cogvideox": {"group_norm_silu", "conv_epilogue"},
}


@pytest.fixture(params=VAES)
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def vae(model: str) -> Any:
    return VAES[model]()


def draw(frames: int = 9, height: int = 16, width: int = 24, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape",
    [(1, 16, 24), (9, 24, 16), (8, 16, 16), (17, 20, 23, 2), (27, 16, 8)],
    ids=["image", "odd-sides", "even", "odd-pixels-batch", "three-calls"],
)
def test_same_latents_and_exact_restore(shape: tuple[int, ...], dtype: torch.dtype, vae: Any) -> None:
    clip = draw(*shape).to(dtype)
    vae.to(dtype)
    expected, given = encode(vae, clip), clip.clone()
    traces = {name: (type(module), frozenset(vars(module))) for name, module in vae.named_modules()}
    with patch_module(vae, only="encoder") as report:
        for _ in range(2):  # the first is checked
            out = encode(vae, clip)
            assert relative_error(out, expected) <= (EQUAL if dtype == torch.float32 else 1e-12)
            assert out.stride() == expected.stride()
        assert not report.fallbacks or dtype == torch.float64, str(report)
        assert {site.state for site in report.sites} == {"active"}, str(report)
        assert all(site.implementations for site in report.sites)
    assert torch.equal(clip, given) and torch.equal(encode(vae, clip), expected)
    assert traces == {name: (type(module), frozenset(vars(module))) for name, module in vae.named_modules()}


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("hunyuanvideo", {"mid_block_add_attention": False, "block_out_channels": (8, 8, 16, 16)}),
        ("cogvideox", {"layers_per_block": 2, "temporal_compression_ratio": 2}),
        ("cogvideox", {"temporal_compression_ratio": 8}),
    ],
    ids=["hunyuanvideo-without-attention", "cogvideox-by-two", "cogvideox-by-eight"],
)
def test_other_configurations(model: str, options: dict[str, Any]) -> None:
    vae = VAES[model](**options)
    expected = encode(vae, draw())
    with patch_module(vae) as report:
        assert relative_error(encode(vae, draw()), expected) <= EQUAL
        assert not report.fallbacks, str(report)


@pytest.mark.parametrize("mode", ["slicing", "tiling", "both"])
def test_slicing_and_tiling_keep_their_meaning(mode: str, model: str, vae: Any) -> None:
    clip = draw(9, 32, 24, batch=2)
    if mode != "tiling":
        vae.enable_slicing()
    if mode != "slicing" and model == "cogvideox":
        vae.enable_tiling(16, 16, 0.5, 0.5)
    elif mode != "slicing":
        vae.enable_tiling(16, 16, tile_sample_stride_height=8, tile_sample_stride_width=8)
    expected, seen = encode(vae, clip), []
    with patch_module(vae) as report:
        vae.encoder.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
        assert relative_error(encode(vae, clip), expected) <= EQUAL
        assert not report.fallbacks, str(report)
    assert {shape[0] for shape in seen} == ({2} if mode == "tiling" else {1})
    assert len(seen) == {"slicing": 2, "tiling": 12, "both": 24}[mode]


@pytest.mark.parametrize("framewise", [True, False])
def test_temporal_tiles_of_hunyuanvideo(framewise: bool) -> None:
    """The statistics of a norm are those of a tile: another number of frames gives other latents."""
    vae = tiny_autoencoder_kl_hunyuan_video()
    vae.use_framewise_encoding = framewise
    clip = draw(29)
    expected = encode(vae, clip)
    with patch_module(vae) as report:
        assert relative_error(encode(vae, clip), expected) <= EQUAL
        assert not report.fallbacks and ("29 of 29 frames" in ran(report)) != framewise


@torch.no_grad()
@pytest.mark.parametrize("stock_at", [0, 1, 2])
def test_either_runs_the_next_call_of_cogvideox(stock_at: int) -> None:
    """The cache that goes is stock's, names and order as well, and so is the one that comes."""
    vae = tiny_autoencoder_kl_cogvideox()
    calls = draw(25).split([9, 8, 8], dim=2)

    def run(patched: bool) -> tuple[Tensor, Any]:
        cache, made = None, []
        for at, part in enumerate(calls):
            report = patch_module(vae) if patched and at != stock_at else None
            out, cache = vae.encoder(part, conv_cache=cache)
            made.append(out)
            if report is not None:
                assert not report.fallbacks, str(report)
                report.restore()
        return torch.cat(made, dim=2), cache

    (expected, stock), (out, ours) = run(False), run(True)
    assert relative_error(out, expected) <= EQUAL
    for (path, theirs), (own_path, own) in zip(paths_of(stock), paths_of(ours), strict=True):
        assert path == own_path and relative_error(own, theirs) <= EQUAL and own.shape == theirs.shape


def paths_of(cache: dict[str, Any], path: str = "") -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []
    for name, value in cache.items():
        found += [(path + name, value)] if isinstance(value, Tensor) else paths_of(value, f"{path}{name}.")
    return found


def test_what_memory_cannot_hold_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """HunyuanVideo's norms need all frames at once."""
    vae = tiny_autoencoder_kl_hunyuan_video()
    patch_module(vae, self_check=False)
    out_of_memory_beyond(monkeypatch, 3)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"encoding .* 1 clips of 24 x 16 pixels.*enable_tiling\(\) encodes"
    ):
        encode(vae, draw())


def test_every_site_can_be_off(model: str, vae: Any) -> None:
    expected = encode(vae, draw())
    with patch_module(vae, only="encoder") as report:
        assert {site.op for site in report.sites} == OPS[model]
        for site in report.sites:
            site.on = False
            out = encode(vae, draw())
            assert relative_error(out, expected) <= EQUAL
            assert torch.equal(out, expected) == (site.op == "whole_clip")
            site.on = True
        assert not any(site.state == "failed" for site in report.sites), str(report)


def hook_a_child(vae: Any) -> None:
    def larger(module: nn.Module, args: Any, out: Any) -> Any:
        return (1.5 * out[0], out[1]) if isinstance(out, tuple) else 1.5 * out

    vae.encoder.down_blocks[1].resnets[0].register_forward_hook(larger)


def swap_a_child(vae: Any) -> None:
    downsampler = vae.encoder.down_blocks[0].downsamplers[0]
    downsampler.conv = Lora(downsampler.conv)


def swap_a_norm(vae: Any) -> None:
    vae.encoder.mid_block.resnets[0].norm2 = nn.Identity()


def train_a_dropout(vae: Any) -> None:
    vae.encoder.down_blocks[0].resnets[0].dropout = nn.Dropout(0.5).train()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook_a_child, "forward hooks"),
        (swap_a_child, "replaced by Lora"),
        (swap_a_norm, "replaced by Identity"),
        (train_a_dropout, "dropout is on"),
    ],
    ids=["hook", "lora", "norm", "dropout"],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_changed_child_runs_as_it_is(when: str, change: Callable[[Any], None], reason: str, vae: Any) -> None:
    check_changed_child(vae, draw(), change, when, reason, encode)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_halves_are_no_worse_than_stock(kind: torch.dtype, vae: Any) -> None:
    check_halves(vae, draw(9, 32, 24), kind, encode)


def test_the_other_ways_to_call(vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = draw()
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
    with torch.autocast("cpu", torch.bfloat16):
        encode(vae, clip)
    assert "autocast is on" in reasons(report)


def test_gradients_go_through_the_original(vae: Any) -> None:
    check_gradients(vae, draw(), lambda vae, x: vae.encode(x).latent_dist.parameters)


def test_gradients_of_the_last_call_of_cogvideox_alone() -> None:
    vae = tiny_autoencoder_kl_cogvideox()
    check_gradients_of_the_last(lambda x, cache: vae.encoder(x, None, cache), vae, draw(17), [9, 8], None)


def test_a_forward_that_a_hook_has_kept_is_stocks_once_restored(vae: Any) -> None:
    expected = encode(vae, draw())
    with patch_module(vae):
        kept = vae.encoder.forward
    vae.encoder.forward = kept
    assert torch.equal(encode(vae, draw()), expected)


@pytest.mark.parametrize("case", ["rank-4", "channels", "dtype", "no-frames"])
def test_bad_clips_raise_what_the_stock_vae_raises(case: str, vae: Any) -> None:
    """Called as they are, for ``encode`` reads their size before the encoder gets them."""
    clip = {
        "rank-4": draw()[0],
        "channels": draw()[:, :2],
        "dtype": draw().half(),
        "no-frames": draw()[:, :, :0],
    }[case]
    check_bad_input(vae, clip, lambda vae, clip: vae.encoder(clip))


@pytest.mark.parametrize("fault", PIXEL_FAULTS)
def test_what_an_encoder_does_wrong_is_found(
    fault: str, model: str, vae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    plant = PIXEL_FAULTS[fault]
    if model == "cogvideox":  # which returns its cache beside the latents
        monkeypatch.setitem(PIXEL_FAULTS, fault, lambda made: (plant(made[0]), made[1]))
    check_fault_found(vae, draw(), FUSED[model], fault, monkeypatch, encode)


def test_a_wrong_cache_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, right = tiny_autoencoder_kl_cogvideox(), FusedCogVideoXEncoder3D.fused_forward

    def wrong(*args: Any) -> Any:
        latents, cache = right(*args)
        return latents, cache | {"conv_out": cache["conv_out"].flip(2)}

    expected = encode(vae, draw(17))
    monkeypatch.setattr(FusedCogVideoXEncoder3D, "fused_forward", wrong)
    with patch_module(vae, only="encoder") as report:
        assert torch.equal(encode(vae, draw(17)), expected)
        assert {site.state for site in report.sites} == {"failed"}


def test_kernels_run_and_a_fault_in_one_is_found(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIDACCEL_IMPL")
    options: dict[str, Any] = {
        "hunyuanvideo": {"block_out_channels": (32,) * 4},
        "cogvideox": {
            "block_out_channels": (32, 32), "down_block_types": ("CogVideoXDownBlock3D",) * 2,
            "up_block_types": ("CogVideoXUpBlock3D",) * 2, "temporal_compression_ratio": 2,
        },
    }  # fmt: skip
    vae, clip = VAES[model](**options[model]), draw(1, 8, 8)
    expected = encode(vae, clip)
    with patch_module(vae, only="encoder") as report:
        assert relative_error(encode(vae, clip), expected) <= EQUAL
        assert not report.fallbacks, str(report)
        kernels = {site.op for site in report.sites if "triton" in site.implementations}
        assert kernels == OPS[model] - {"whole_clip", "spatial_attention"}
    with planted(PADDED_GROUP_NORM, "triton", lambda y: y.mul_(1.01)), patch_module(vae, only="encoder") as report:
        assert relative_error(encode(vae, clip), expected) <= EQUAL
        assert {site.op for site in report.sites if site.state == "failed"} == {"group_norm_silu"}
