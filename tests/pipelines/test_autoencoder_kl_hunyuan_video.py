"""``AutoencoderKLHunyuanVideo`` and ``AutoencoderKLMochi``: the same frames, whole and in tiles."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from block_checks import relative_error
from diffusers.models.attention_processor import AttnProcessor
from kernel_checks import planted
from tiny_models import tiny_autoencoder_kl_hunyuan_video, tiny_autoencoder_kl_mochi
from torch import Tensor, nn
from vae_checks import (
    Lora,
    check_bad_input,
    check_changed_child,
    check_gradients,
    check_halves,
    decode,
    out_of_memory_beyond,
    ran,
    reasons,
)

from vidaccel import patch_module
from vidaccel.blocks.vae import autoencoder_kl_mochi, causal_clip
from vidaccel.kernels.norm.padded_group_norm import PADDED_GROUP_NORM

EQUAL = 1e-4  # a norm of few numbers, which tiny pictures have, enlarges roundings; float64 tells what is wrong
VAES = {"hunyuanvideo": tiny_autoencoder_kl_hunyuan_video, "mochi": tiny_autoencoder_kl_mochi}
OPS = {
    "hunyuanvideo": {"spatial_attention", "upsample_clip"},
    "mochi": set(),
    "both": {"whole_clip", "group_norm_silu", "conv_epilogue", "rms_norm_silu", "pixel_shuffle", "pixel_conv"},
}


DECODER = "decoder", "tile_batch", "tile_blend"


@pytest.fixture(params=VAES)
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def vae(model: str) -> Any:
    return VAES[model]()


def draw(vae: Any, frames: int = 3, height: int = 2, width: int = 1, batch: int = 1) -> Tensor:
    channels = vae.config.latent_channels
    return torch.randn(batch, channels, frames, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape", [(1, 2, 3, 1), (2, 3, 1, 2), (4, 1, 2, 1)], ids=["image", "odd-sides-batch", "one-line"]
)
def test_same_frames_and_exact_restore(shape: tuple[int, int, int, int], dtype: torch.dtype, vae: Any) -> None:
    latents = draw(vae, *shape).to(dtype)
    vae.to(dtype)
    expected = decode(vae, latents)
    traces = {name: (type(module), frozenset(vars(module))) for name, module in vae.named_modules()}
    with patch_module(vae, only=DECODER) as report:
        for _ in range(2):  # the first is checked
            assert relative_error(decode(vae, latents), expected) <= (EQUAL if dtype == torch.float32 else 1e-12)
        assert not report.fallbacks or dtype == torch.float64, str(report)
        assert {site.state for site in report.sites} == {"active"}, str(report)
        assert ran(report) == {f"{shape[0]} of {shape[0]} frames"}
        assert all(site.implementations for site in report.sites if not site.op.startswith("tile_"))
    assert torch.equal(decode(vae, latents), expected)
    assert traces == {name: (type(module), frozenset(vars(module))) for name, module in vae.named_modules()}


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("hunyuanvideo", {"mid_block_add_attention": False, "block_out_channels": (8, 8, 16, 16)}),
        ("mochi", {"temporal_expansions": (2, 1, 1), "spatial_expansions": (1, 2, 3)}),
    ],
    ids=["hunyuanvideo-without-attention", "mochi-expansions"],
)
def test_other_configurations(model: str, options: dict[str, Any]) -> None:
    vae = VAES[model](**options)
    latents = draw(vae)
    expected = decode(vae, latents)
    with patch_module(vae) as report:
        assert relative_error(decode(vae, latents), expected) <= EQUAL
        assert not report.fallbacks, str(report)


@pytest.mark.parametrize("mode", ["slicing", "tiling", "both"])
def test_slicing_and_tiling_keep_their_meaning(mode: str, vae: Any) -> None:
    latents = draw(vae, 3, 5, 3, batch=2)
    if mode != "tiling":
        vae.enable_slicing()
    if mode != "slicing":
        vae.enable_tiling(16, 16, tile_sample_stride_height=8, tile_sample_stride_width=8)
    expected, seen = decode(vae, latents), []
    with patch_module(vae, skip="tile_batch") as report:  # whose batches the hook would see
        vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
        assert relative_error(decode(vae, latents), expected) <= EQUAL
        assert not report.fallbacks, str(report)
    assert {shape[0] for shape in seen} == ({2} if mode == "tiling" else {1})
    assert len(seen) == {"slicing": 2, "tiling": 15, "both": 30}[mode]


@pytest.mark.parametrize("framewise", [True, False])
def test_temporal_tiles_of_hunyuanvideo(framewise: bool) -> None:
    """The statistics of a norm are those of a tile: another number of frames gives other pictures."""
    vae = tiny_autoencoder_kl_hunyuan_video()
    vae.use_framewise_decoding = framewise
    latents = draw(vae, 8, 1, 2)
    expected = decode(vae, latents)
    with patch_module(vae) as report:
        assert relative_error(decode(vae, latents), expected) <= EQUAL
        assert not report.fallbacks and ran(report) == (
            {f"{frames} of {frames} frames" for frames in (5, 2)} if framewise else {"8 of 8 frames"}
        )


def test_mochi_framewise_runs_as_it_is() -> None:
    """diffusers has the switch, but its decoder cannot run that way: convolutions get no padding at all."""
    vae = tiny_autoencoder_kl_mochi()
    report = patch_module(vae)
    vae._enable_framewise_decoding()
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        decode(vae, draw(vae))
    assert "framewise decoding" in reasons(report)


@torch.no_grad()
def test_mochi_returns_the_cache_that_stock_returns() -> None:
    vae = tiny_autoencoder_kl_mochi()
    _, expected = vae.decoder(draw(vae))
    with patch_module(vae):
        assert vae.decoder(draw(vae))[1] == expected


@pytest.mark.parametrize("fit", [1, 2, 3])
def test_chunks_of_mochi_are_the_whole(fit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = tiny_autoencoder_kl_mochi()
    latents = draw(vae, 5, batch=2)
    expected = decode(vae, latents)
    monkeypatch.setattr(autoencoder_kl_mochi, "decode_bytes", lambda decoder, latents, frames: frames)
    monkeypatch.setattr(causal_clip, "free_bytes", lambda _: fit)
    with patch_module(vae) as report:
        assert relative_error(decode(vae, latents), expected) <= EQUAL
        assert f"{fit} of 5 frames" in ran(report) and not report.fallbacks


def test_out_of_memory_halves_mochis_chunk_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = tiny_autoencoder_kl_mochi()
    expected = decode(vae, draw(vae, 6))
    with patch_module(vae, self_check=False) as report:
        out_of_memory_beyond(monkeypatch, 20)
        assert relative_error(decode(vae, draw(vae, 6)), expected) <= EQUAL
        assert ran(report) == {"3 of 6 frames"}


def test_what_memory_cannot_hold_is_explained(model: str, vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """HunyuanVideo's norms need all frames at once."""
    patch_module(vae, self_check=False)
    out_of_memory_beyond(monkeypatch, 3)
    least = {"hunyuanvideo": "3 latent frames", "mochi": "one latent frame"}[model]
    with pytest.raises(torch.OutOfMemoryError, match=f"{least} of 1 clips of 8 x 16 pixels.*enable_tiling"):
        decode(vae, draw(vae))


def test_every_site_can_be_off(model: str, vae: Any) -> None:
    expected = decode(vae, draw(vae))
    with patch_module(vae, only=DECODER) as report:
        assert {site.op for site in report.sites} == {*OPS["both"], *OPS[model], "tile_batch", "tile_blend"}
        for site in report.sites:
            site.on = False
            out = decode(vae, draw(vae))
            assert relative_error(out, expected) <= EQUAL
            assert torch.equal(out, expected) == (site.op == "whole_clip")
            site.on = True
        assert not any(site.state == "failed" for site in report.sites), str(report)


def hook_a_child(vae: Any) -> None:
    def larger(module: nn.Module, args: Any, out: Any) -> Any:
        return (1.5 * out[0], out[1]) if isinstance(out, tuple) else 1.5 * out

    vae.decoder.up_blocks[1].resnets[0].register_forward_hook(larger)


def swap_a_child(vae: Any) -> None:
    resnet = vae.decoder.up_blocks[0].resnets[0]
    resnet.conv1 = Lora(resnet.conv1)


def swap_a_norm(vae: Any) -> None:
    resnet = vae.decoder.up_blocks[0].resnets[0]
    resnet.norm2 = nn.Identity()


@pytest.mark.parametrize(
    ("change", "reason"),
    [(hook_a_child, "forward hooks"), (swap_a_child, "replaced by Lora"), (swap_a_norm, "replaced by Identity")],
    ids=["hook", "lora", "norm"],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_changed_child_runs_as_it_is(when: str, change: Callable[[Any], None], reason: str, vae: Any) -> None:
    check_changed_child(vae, draw(vae), change, when, reason)


@pytest.mark.parametrize("when", ["before", "after"])
def test_lists_of_other_lengths_run_as_they_are(when: str) -> None:
    """Mochi's blocks go by the shortest of theirs."""
    vae = tiny_autoencoder_kl_mochi()

    def change(vae: Any) -> None:
        vae.decoder.block_out.resnets.append(copy.deepcopy(vae.decoder.block_out.resnets[0]))

    check_changed_child(vae, draw(vae), change, when, "not as many resnets")


def take_a_bias(vae: Any) -> None:
    vae.decoder.mid_block.attentions[0].to_out[0].bias = None


def hook_a_dropout(vae: Any) -> None:
    vae.decoder.mid_block.attentions[0].to_out[1].register_forward_hook(lambda _, __, out: 1.5 * out)


def train_a_dropout(vae: Any) -> None:
    vae.decoder.mid_block.attentions[0].to_out[1] = nn.Dropout(0.5).train()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (take_a_bias, "a projection has no bias"),
        (hook_a_dropout, "forward hooks"),
        (train_a_dropout, "dropout is on"),
    ],
    ids=["bias", "hook", "dropout"],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_changed_child_of_the_attention_runs_as_it_is(when: str, change: Callable[[Any], None], reason: str) -> None:
    vae = tiny_autoencoder_kl_hunyuan_video()
    check_changed_child(vae, draw(vae), change, when, reason)


def test_another_processor_of_the_attention_runs() -> None:
    vae = tiny_autoencoder_kl_hunyuan_video()
    report = patch_module(vae)
    vae.decoder.mid_block.attentions[0].set_processor(AttnProcessor())
    out = decode(vae, draw(vae))
    assert "a processor of its own" in reasons(report)
    report.restore()
    assert torch.equal(out, decode(vae, draw(vae)))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_halves_are_no_worse_than_stock(kind: torch.dtype, vae: Any) -> None:
    check_halves(vae, draw(vae, 3, 2, 3), kind)


def test_the_other_ways_to_call(vae: Any) -> None:
    latents = draw(vae)
    expected = decode(vae, latents)
    patch_module(vae)
    with torch.no_grad():
        assert relative_error(vae.decode(latents, return_dict=False)[0], expected) <= EQUAL
    with torch.inference_mode():
        assert relative_error(vae.decode(latents).sample, expected) <= EQUAL
    assert torch.equal(decode(copy.deepcopy(vae), latents), expected)


def test_gradients_go_through_the_original(vae: Any) -> None:
    check_gradients(vae, draw(vae, frames=2))


@pytest.mark.parametrize("case", ["rank-4", "channels", "dtype", "no-frames"])
def test_bad_latents_raise_what_the_stock_vae_raises(case: str, vae: Any) -> None:
    latents = {
        "rank-4": draw(vae)[0],
        "channels": draw(vae)[:, :3],
        "dtype": draw(vae).half(),
        "no-frames": draw(vae)[:, :, :0],
    }[case]
    check_bad_input(vae, latents)


def test_kernels_run_and_a_fault_in_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIDACCEL_IMPL")
    vae = tiny_autoencoder_kl_hunyuan_video(block_out_channels=(32,) * 4)
    latents = draw(vae, 1, 1, 1)
    expected = decode(vae, latents)
    with planted(PADDED_GROUP_NORM, "triton", lambda y: y.mul_(1.01)), patch_module(vae) as report:
        assert relative_error(decode(vae, latents), expected) <= EQUAL
        assert not report.fallbacks, str(report)
        kernels = {site.op for site in report.sites if site.implementations & {"triton", "taps"}}
        assert kernels == (OPS["both"] | {"upsample_clip"}) - {"whole_clip"}
        assert {site.op for site in report.sites if site.state == "failed"} == {"group_norm_silu"}
