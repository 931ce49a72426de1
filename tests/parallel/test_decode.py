"""A decode on several ranks: the pixels of a single one, each rank having made its share of them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo
from ranks import Team
from tiny_models import (
    tiny_autoencoder_kl,
    tiny_autoencoder_kl_cogvideox,
    tiny_autoencoder_kl_hunyuan_video,
    tiny_autoencoder_kl_hunyuanvideo15,
    tiny_autoencoder_kl_mochi,
    tiny_autoencoder_kl_wan,
    tiny_svd_pipeline,
    tiny_synthetic_pipeline,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker
from vae_checks import ran

from vidaccel import patch_pipeline
from vidaccel.blocks.vae import causal_clip, wan_layers, wan_structure
from vidaccel.blocks.vae.vae import FusedTemporalDecoder
from vidaccel.parallel.ranks import RankError

pytestmark = pytest.mark.slow


def tiny_ltx() -> AutoencoderKLLTXVideo:
    torch.manual_seed(0)
    levels = {"block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    layers = {"layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5}
    return AutoencoderKLLTXVideo(latent_channels=4, **levels, **layers).eval()


WAN_2_2 = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
MADE: dict[str, Callable[[], Any]] = {
    "wan": tiny_autoencoder_kl_wan,
    "wan2.2": lambda: tiny_autoencoder_kl_wan(**WAN_2_2),
    "cogvideox": tiny_autoencoder_kl_cogvideox,
    "hunyuan_video": tiny_autoencoder_kl_hunyuan_video,
    "hunyuanvideo15": tiny_autoencoder_kl_hunyuanvideo15,
    "mochi": tiny_autoencoder_kl_mochi,
    "ltx": tiny_ltx,
    "images": tiny_autoencoder_kl,
}  # fmt: skip
TILED = {
    "wan": ((1, 4, 3, 5, 6), (32, 32, 16, 24)),
    "wan2.2": ((1, 4, 3, 4, 4), (32, 32, 16, 32)),
    "cogvideox": ((1, 4, 3, 3, 5), (16, 24, 0.5, 0.5)),
    "hunyuan_video": ((1, 4, 3, 4, 5), (16, 16, 16, 8, 8)),
    "hunyuanvideo15": ((1, 4, 2, 4, 5), (32, 32, 2, 2, 0.5)),
    "mochi": ((1, 12, 2, 4, 5), (16, 16, 8, 8)),
    "ltx": ((1, 4, 2, 4, 5), (64, 64, None, 32, 64)),
    "images": ((2, 4, 12, 12), ()),
}


def latents(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def pipeline_of(vae: Any) -> Any:
    """Any pipeline that holds ``vae``."""
    pipe, _ = tiny_synthetic_pipeline("wan2.1-t2v-1.3b")
    pipe.vae = vae
    return pipe


class Unhooked(ModuleTracker):
    """Hangs no hook on all modules, for which a decode would be whole."""

    def __enter__(self) -> Unhooked:
        return self

    def __exit__(self, *args: Any) -> None:
        pass


def decoded(vae: Any, x: Tensor, **options: Any) -> tuple[Tensor, int]:
    """The pixels, and the FLOPs of making them."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = Unhooked()
    with torch.no_grad(), counter:
        pixels = vae.decode(x, return_dict=False, **options)[0]
    return pixels, counter.get_total_flops()


def two_decodes(
    vae: Any, shape: tuple[int, ...], *, skip: str | None = None, checks: bool = False, **options: Any
) -> dict[str, Any]:
    """A decode by a patched VAE, and the same by all ranks together."""
    pipe, x = pipeline_of(vae), latents(shape)
    with patch_pipeline(pipe, only="vae", skip=skip, self_check=False):
        expected, whole = decoded(vae, x, **options)
    report = patch_pipeline(pipe, parallel="auto", skip=skip, self_check=checks)
    found, own = decoded(vae, x, **options)
    site = next(site for site in report.sites if site.op == "decode")
    outcome = {
        "equal": bool(found.equal(expected)),
        "error": float((found - expected).abs().max() / expected.abs().max()),
        "sum": float(found.double().sum()),
        "share": own / whole,
        "site": (site.path, site.state, site.implementation),
        "reasons": dict(site.fallbacks),
        "chunks": ran(report),
        "failed": [site.path for site in report.sites if site.state == "failed"],
    }
    report.restore()
    outcome["restored"] = site.state == "restored" and "decode" not in vars(vae)
    return outcome


def together(team: Team, function: Callable[..., dict[str, Any]], *args: Any) -> tuple[dict[str, Any], list[float]]:
    """What all ranks say alike, and the share of the work of each."""
    outcomes = team.run(function, *args)
    parts = [outcome.pop("share") for outcome in outcomes]
    assert len({outcome["sum"] for outcome in outcomes}) == 1
    assert outcomes[0]["restored"] and outcomes[0]["error"] < 1e-5
    assert outcomes[0]["site"] == ("vae", "active", f"{len(outcomes)} ranks")
    return outcomes[0], parts


def by_frames(name: str, frames: int, batch: int) -> dict[str, Any]:
    return two_decodes(MADE[name](), (batch, 4, frames, 3, 2))


@pytest.mark.parametrize(
    ("name", "frames", "batch"),
    [("wan", 4, 1), ("wan", 7, 2), ("wan2.2", 5, 1), ("cogvideox", 5, 1), ("cogvideox", 6, 2)],
)
def test_frames(two_ranks: Team, name: str, frames: int, batch: int) -> None:
    found, parts = together(two_ranks, by_frames, name, frames, batch)
    assert not found["reasons"]
    assert max(parts) < 0.7


def by_rows(name: str, frames: int, height: int) -> dict[str, Any]:
    return two_decodes(MADE[name](), (1, 4, frames, height, 3))


@pytest.mark.parametrize(("name", "height"), [("wan", 4), ("wan2.2", 7), ("wan", 9)])
def test_rows_on_four_ranks(four_ranks: Team, name: str, height: int) -> None:
    """Each but the first and the last has a neighbour on both sides; of 7 and 9 rows not all have as many."""
    found, parts = together(four_ranks, by_rows, name, 2, height)
    assert not found["reasons"]
    assert max(parts) < 0.45


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_rows_of_few_frames(two_ranks: Team, frames: int) -> None:
    found, parts = together(two_ranks, by_rows, "wan", frames, 4)
    assert not found["reasons"]
    assert max(parts) < 0.6


def in_chunks(fit: int) -> dict[str, Any]:
    vae, kept = tiny_autoencoder_kl_wan(), (wan_layers.decode_bytes, causal_clip.free_bytes)
    try:
        wan_layers.decode_bytes = lambda decoder, latents, frames: frames
        # one rank has less memory than the others
        causal_clip.free_bytes = lambda _: fit + torch.distributed.get_rank()
        return two_decodes(vae, (1, 4, 9, 3, 2))
    finally:
        wan_layers.decode_bytes, causal_clip.free_bytes = kept


def in_pieces() -> dict[str, Any]:
    kept = wan_structure.MOST_NUMBERS, wan_structure.TILE_CHANNELS
    try:
        wan_structure.MOST_NUMBERS, wan_structure.TILE_CHANNELS = 6144 * 16, 1
        return two_decodes(tiny_autoencoder_kl_wan(), (1, 4, 9, 4, 3))
    finally:
        wan_structure.MOST_NUMBERS, wan_structure.TILE_CHANNELS = kept


def test_pieces(two_ranks: Team) -> None:
    found, parts = together(two_ranks, in_pieces)
    assert not found["reasons"]
    assert max(parts) < 0.7
    assert found["chunks"] == {"9 of 9 frames, 17 of 33 in the last up-blocks"}


@pytest.mark.parametrize("fit", [1, 2, 3])
def test_chunks_go_by_the_least_memory_that_a_rank_has(two_ranks: Team, fit: int) -> None:
    found, _ = together(two_ranks, in_chunks, fit)
    assert not found["reasons"]


@pytest.mark.parametrize(("name", "frames"), [("wan", 3), ("cogvideox", 2), ("mochi", 3)])
def test_what_cannot_be_split_is_whole_on_every_rank(two_ranks: Team, name: str, frames: int) -> None:
    found, parts = together(two_ranks, whole, name, frames)
    assert found["equal"] and parts == pytest.approx([1.0, 1.0], rel=1e-4)
    assert len(found["reasons"]) == 1


def whole(name: str, frames: int) -> dict[str, Any]:
    return two_decodes(MADE[name](), (1, TILED[name][0][1], frames, 1, 2))


def tiled(name: str, skip: str | None) -> dict[str, Any]:
    vae, (shape, tiling) = MADE[name](), TILED[name]
    vae.enable_tiling(*tiling)
    return two_decodes(vae, shape, skip=skip)


@pytest.mark.parametrize("skip", [None, "tile_batch"])
@pytest.mark.parametrize("name", TILED)
def test_tiles(two_ranks: Team, name: str, skip: str | None) -> None:
    """The same bits, unless one rank decodes several tiles at once."""
    found, parts = together(two_ranks, tiled, name, skip)
    assert not found["reasons"] and (skip is None or found["equal"])
    assert max(parts) < 0.75


def of_svd(frames: int, batch: int, height: int = 6, skip: str | None = None) -> dict[str, Any]:
    return two_decodes(tiny_svd_pipeline().vae, (batch * frames, 4, height, 5), skip=skip, num_frames=frames)


@pytest.mark.parametrize(("frames", "batch", "height"), [(4, 1, 6), (5, 2, 6), (3, 1, 7), (1, 2, 5)])
def test_svd(two_ranks: Team, frames: int, batch: int, height: int) -> None:
    found, parts = together(two_ranks, of_svd, frames, batch, height)
    assert not found["reasons"]
    assert max(parts) < 0.75  # 3 of 5 rows, and a lone frame's mid-block twice


def of_svd_with_other_parts() -> dict[str, Any]:
    vae = tiny_svd_pipeline().vae
    block = vae.decoder.up_blocks[0]
    block.resnets[0].spatial_res_block.nonlinearity = torch.nn.Mish()
    block.resnets[1].temporal_res_block.nonlinearity = torch.nn.Mish()
    return two_decodes(vae, (4, 4, 7, 5), num_frames=4)


def changed_when_patched() -> tuple[float, float]:
    """The error, and the share of the work, where an upsampler no longer serves its call."""
    vae, x = tiny_svd_pipeline().vae, latents((4, 4, 7, 5))
    with patch_pipeline(pipeline_of(vae), parallel="auto", self_check=False):
        vae.decoder.up_blocks[0].upsamplers[0].conv.padding_mode = "circular"
        found, own = decoded(vae, x, num_frames=4)
    expected, whole = decoded(vae, x, num_frames=4)
    return float((found - expected).abs().max() / expected.abs().max()), own / whole


def test_an_upsampler_that_goes_the_original_way_gets_whole_pictures(two_ranks: Team) -> None:
    for error, share in two_ranks.run(changed_when_patched):
        assert error < 1e-5 and 0.55 < share < 0.9


def test_a_block_that_goes_the_original_way_gets_whole_pictures(two_ranks: Team) -> None:
    found, parts = together(two_ranks, of_svd_with_other_parts)
    assert not found["reasons"]
    assert 0.6 < max(parts) < 0.9


class MixesPixels(torch.nn.Module):
    """In place of a layer that looks at one pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.mean((2, 3), keepdim=True)


def looked_at(how: str) -> dict[str, Any]:
    vae = tiny_svd_pipeline().vae
    if how == "layer":
        vae.decoder.conv_act = MixesPixels()
    elif how == "hook":
        mixes = MixesPixels()
        vae.decoder.up_blocks[0].resnets[0].register_forward_hook(lambda layer, args, out: mixes(out))
    else:
        mixer = vae.decoder.up_blocks[0].resnets[0].spatial_res_block.nonlinearity
        mixer.forward = lambda x: x * x.mean((2, 3), keepdim=True)
    return two_decodes(vae, (4, 4, 6, 5), num_frames=4)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("layer", "a MixesPixels of somebody's own, or hooked by somebody, may look at all pixels"),
        ("hook", "a hook, or a processor of somebody's own, may look at all pixels"),
        ("forward", "a SiLU of somebody's own, or hooked by somebody, may look at all pixels"),
    ],
)
def test_what_may_look_at_all_pixels_gets_them(two_ranks: Team, how: str, reason: str) -> None:
    outcomes = two_ranks.run(looked_at, how)
    for outcome in outcomes:
        assert outcome["equal"] and list(outcome["reasons"]) == [reason]


def test_svd_on_four_ranks(four_ranks: Team) -> None:
    found, parts = together(four_ranks, of_svd, 5, 1, 10)
    assert not found["reasons"]
    assert max(parts) < 0.5  # 3 of 10 rows, and all of the mid-block


@pytest.mark.parametrize(
    ("height", "skip", "reason"),
    [
        (1, None, "1 rows of latents are too few for 2 ranks"),
        (4, "decode_memory", "its decoder mixes the frames of a batch, and is not patched"),
        (4, "group_norm_silu", "its norms are not fused"),
        (4, "conv_epilogue", None),
        (4, "upsample_conv", "a block that mixes pixels is not patched"),
    ],
)
def test_svd_with_less_to_split_or_to_patch(two_ranks: Team, height: int, skip: str | None, reason: str | None) -> None:
    found, _ = together(two_ranks, of_svd, 4, 1, height, skip)
    assert list(found["reasons"]) == ([reason] if reason else [])


def checked(name: str) -> dict[str, Any]:
    if name == "svd":
        return two_decodes(tiny_svd_pipeline().vae, (3, 4, 4, 4), checks=True, num_frames=3)
    return two_decodes(MADE[name](), (1, 4, 5, 2, 2), checks=True)


def of_small_svd() -> list[dict[str, Any]]:
    least = FusedTemporalDecoder.least_pixels
    least["cpu"] = 4 * 6 * 5
    try:
        return [of_svd(frames, 1) for frames in (3, 4)]
    finally:
        del least["cpu"]


def test_few_pixels_are_decoded_by_each_rank(two_ranks: Team) -> None:
    for few, enough in two_ranks.run(of_small_svd):
        assert few["equal"] and list(few["reasons"]) == ["90 pixels of latents are decoded faster by each rank alone"]
        assert not enough["reasons"]


@pytest.mark.parametrize("name", ["wan", "svd"])
def test_a_decode_that_is_checked(two_ranks: Team, name: str) -> None:
    found, _ = together(two_ranks, checked, name)
    assert not found["reasons"] and not found["failed"]


def failed_on_one() -> list[Any]:
    pipe, x = pipeline_of(MADE["wan"]()), latents((1, 4, 4, 2, 2))
    report = patch_pipeline(pipe, parallel="auto", self_check=False)
    sites = {(site.path, site.op): site for site in report.sites}
    whole_clip, decode = sites["vae.decoder", "whole_clip"], sites["vae", "decode"]
    if torch.distributed.get_rank():
        whole_clip.fail("it is wrong here")
    pixels, _ = decoded(pipe.vae, x)
    report.restore()
    return [whole_clip.reason, list(decode.fallbacks), float(pixels.sum()) == float(decoded(pipe.vae, x)[0].sum())]


def test_what_failed_on_one_rank_fails_on_all(two_ranks: Team) -> None:
    first, second = two_ranks.run(failed_on_one)
    assert first[0] == "it failed on rank 1: it is wrong here" and second[0] == "it is wrong here"
    assert first[1:] == second[1:] == [["whole_clip is off, or failed"], True]


def images(count: int) -> dict[str, Any]:
    return two_decodes(MADE["images"](), (count, 4, 6, 5))


def test_images_of_a_batch(two_ranks: Team) -> None:
    found, parts = together(two_ranks, images, 5)
    assert not found["reasons"]
    assert max(parts) < 0.7


def other_latents() -> None:
    pipe = pipeline_of(MADE["wan"]())
    with torch.no_grad(), patch_pipeline(pipe, parallel="guidance"):
        pipe.vae.decode(torch.full((1, 4, 4, 2, 2), float(torch.distributed.get_rank())))


def test_other_latents_on_a_rank(two_ranks: Team) -> None:
    for error, _ in two_ranks.outcomes(other_latents):
        assert isinstance(error, RankError) and "AutoencoderKLWan with different values" in str(error)


def unlike(how: str) -> tuple[float, list[str]]:
    """The error beside a decode by this rank alone, and the reasons, where the last rank would split it otherwise."""
    vae = MADE["cogvideox" if how == "storage" else "wan"]()
    x, last = latents((2, 4, 5, 4, 4)), torch.distributed.get_rank() == 1
    report = patch_pipeline(pipeline_of(vae), parallel="auto", self_check=False)
    decoded(vae, x)
    if last and how == "slicing":
        vae.enable_slicing()
    if last and how == "layer":
        vae.decoder.conv_in.padding_mode = "circular"
    if last and how == "storage":
        x = torch.cat([x, x], dim=2)[:, :, :5]
    if last and how in ("whole_clip", "rms_norm_silu"):
        off = [site for site in report.sites if site.op == how and site.path.startswith("vae.decoder")]
        off[0].on = False
    found, _ = decoded(vae, x)
    reasons = [reason for site in report.sites if site.op == "decode" for reason in site.fallbacks]
    report.restore()
    expected, _ = decoded(vae, x)
    return float((found - expected).abs().max() / expected.abs().max()), reasons


@pytest.mark.parametrize("how", ["slicing", "layer", "storage", "whole_clip", "rms_norm_silu"])
def test_what_ranks_would_split_in_different_ways_each_decodes_whole(two_ranks: Team, how: str) -> None:
    for error, reasons in two_ranks.run(unlike, how):
        assert error < 1e-5
        assert reasons == [
            "the ranks would split it in different ways: their latents, tiling, slicing or layers differ"
        ]


def copies() -> bool:
    pipe, x = pipeline_of(MADE["wan"]()), latents((1, 4, 4, 2, 2))
    expected = pipe.vae.decode(x).sample
    with patch_pipeline(pipe, parallel="guidance"):
        twins = [copy.deepcopy(pipe.vae), pickle.loads(pickle.dumps(pipe.vae))]
    if torch.distributed.get_rank():
        return True  # the other rank waits for nobody
    return all(bool(twin.decode(x).sample.equal(expected)) for twin in twins)


def test_a_copy_decodes_by_itself(two_ranks: Team) -> None:
    assert two_ranks.run(copies) == [True, True]


def recorded() -> tuple[list[str], bool]:
    pipe, x = pipeline_of(MADE["wan"]()), latents((1, 4, 4, 2, 2))
    with patch_pipeline(pipe, parallel="guidance") as report:
        pixels = pipe.vae.decode(x).sample
    return [reason for site in report.sites if site.op == "decode" for reason in site.fallbacks], pixels.requires_grad


def test_gradients(two_ranks: Team) -> None:
    for reasons, requires_grad in two_ranks.run(recorded):
        assert reasons == ["gradients are enabled (call it under torch.no_grad)"] and requires_grad
