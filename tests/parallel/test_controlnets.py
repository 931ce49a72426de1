"""AnimateDiff's ControlNets on several ranks: the clip is that of one process, and a rank does its share of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, MultiControlNetModel
from PIL import Image
from ranks import Team
from tiny_models import tiny_animatediff_pipeline, tiny_controlnet, tiny_sparse_controlnet
from torch import Tensor

from vidaccel import patch_pipeline
from vidaccel.parallel.ranks import shares
from vidaccel.patching.report import PatchReport

pytestmark = pytest.mark.slow

PIPELINES = ["controlnet", "two-controlnets", "video-to-video", "sparse"]
PARTS = ("unet", "controlnet")
STEPS = 2


class MixesPictures(ControlNetModel):
    """Somebody's own, in which every picture sees the one before."""

    def forward(self, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(sample + sample.roll(1, 0), *args, **kwargs)


def made(name: str, frames: int) -> tuple[Any, dict[str, Any]]:
    """A pipeline with a ControlNet, and what it is called with."""
    noise = np.random.default_rng(0).integers(0, 256, (frames, 16, 16, 3), np.uint8)
    images = [Image.fromarray(frame) for frame in noise]
    call: dict[str, Any] = {"conditioning_frames": images, "num_frames": frames}
    kind, controlnet = "ControlNet", tiny_controlnet()
    if name in ("two-controlnets", "one-of-two-of-ones-own"):
        controlnet = MultiControlNetModel([tiny_controlnet(1), tiny_controlnet(2)])
        if name == "one-of-two-of-ones-own":
            controlnet.nets[1].__class__ = MixesPictures
        call |= {"conditioning_frames": [images, images[::-1]], "controlnet_conditioning_scale": [1.0, 0.5]}
    elif name == "video-to-video":
        kind, call = "VideoToVideoControlNet", {"conditioning_frames": images, "video": images, "strength": 1.0}
    elif name == "of-ones-own":
        controlnet.__class__ = MixesPictures
    elif name == "sparse":
        kind, controlnet = "SparseControlNet", tiny_sparse_controlnet()
        call |= {"conditioning_frames": images[:2], "controlnet_frame_indices": [0, frames - 1]}
    pipe = tiny_animatediff_pipeline(getattr(diffusers, f"AnimateDiff{kind}Pipeline"), controlnet=controlnet)
    texts = torch.randn(2, 1, 77, 32, generator=torch.Generator().manual_seed(1))
    call |= {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1], "height": 16, "width": 16}
    return pipe, call | {"num_inference_steps": STEPS, "output_type": "latent"}


def clip(pipe: Any, call: dict[str, Any]) -> Tensor:
    torch.manual_seed(0)
    found: Tensor = pipe(**call, generator=torch.Generator().manual_seed(3)).frames
    return found


@contextmanager
def counting(pipe: Any) -> Iterator[Counter[str]]:
    """How many frames of a sample the UNet and the ControlNet themselves run."""
    count: Counter[str] = Counter()
    models = {name: getattr(pipe, name) for name in PARTS}

    def counted(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            count[name] += len(out[1]) if name == "controlnet" else len(out[0]) * out[0].shape[2]
            return out

        return run

    for name, model in models.items():
        model.forward = counted(name, model.forward)
    try:
        yield count
    finally:
        for model in models.values():
            del model.forward


def axes(report: PatchReport) -> dict[str, dict[str, int]]:
    """What is split, and what of it ran whole."""
    sites = [site for site in report.sites if site.op in ("frames", "guidance")]
    return {f"{site.path} {site.op}": dict(site.fallbacks) for site in sites}


def compared(name: str, frames: int, parallel: Any, only: Any = PARTS, **more: Any) -> dict[str, Any]:
    """A clip of all ranks beside one of one process, by how much the ControlNet has changed it."""
    pipe, call = made(name, frames)
    call |= more
    stock = clip(pipe, call)
    with patch_pipeline(pipe, only=only):
        expected = clip(pipe, call)
    scale = call.get("controlnet_conditioning_scale", 1.0)
    uncontrolled = clip(pipe, call | {"controlnet_conditioning_scale": [0.0] * 2 if isinstance(scale, list) else 0.0})
    report = patch_pipeline(pipe, only=only, parallel=parallel)
    with counting(pipe) as count:
        found = clip(pipe, call)
    outcome = {
        "error": float((found - expected).abs().max() / expected.abs().max()),
        "controlled": float((uncontrolled - expected).abs().max() / expected.abs().max()),
        "ran": {model: number / STEPS for model, number in count.items()},
        "whole": axes(report),
        "sum": float(found.double().sum()),
    }
    report.restore()
    outcome["restored"] = clip(pipe, call).equal(stock)
    return outcome


def split(*axes: str) -> dict[str, dict[str, int]]:
    """All calls, along these axes."""
    return {f"{model} {axis}": {} for model in PARTS for axis in axes}


def assert_same(outcomes: list[dict[str, Any]], whole: dict[str, dict[str, int]]) -> list[tuple[float, float]]:
    """How many frames of a sample each rank ran, of the UNet and of the ControlNet."""
    first = outcomes[0]
    for outcome in outcomes:
        assert outcome["sum"] == first["sum"], "all ranks have the same clip"
        assert outcome["whole"] == whole
        assert outcome["restored"]
    assert first["error"] < 1e-4 < 1e-2 < first["controlled"], first
    return [(outcome["ran"]["unet"], outcome["ran"]["controlnet"]) for outcome in outcomes]


def by_frames(name: str, frames: int) -> dict[str, Any]:
    return compared(name, frames, "frames")


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("frames", [4, 5])
def test_the_clip_is_the_same_for_half_of_the_work(two_ranks: Team, name: str, frames: int) -> None:
    ran = assert_same(two_ranks.run(by_frames, name, frames), split("frames"))
    own = [2 * share for share in shares(frames, 2)]
    pictures = shares(2 * frames, 2)  # of both halves of guidance; SparseCtrl mixes the frames of each
    assert ran == list(zip(own, own if name == "sparse" else pictures, strict=True))


def by_guidance(name: str) -> dict[str, Any]:
    return compared(name, 5, "auto")


@pytest.mark.parametrize("name", PIPELINES)
def test_halves_of_guidance(two_ranks: Team, name: str) -> None:
    assert assert_same(two_ranks.run(by_guidance, name), split("guidance")) == [(5, 5)] * 2


@pytest.mark.parametrize("name", PIPELINES)
def test_frames_within_halves_of_guidance(four_ranks: Team, name: str) -> None:
    assert assert_same(four_ranks.run(by_guidance, name), split("guidance", "frames")) == [(3, 3), (2, 2)] * 2


def without_guidance(name: str, parallel: str) -> dict[str, Any]:
    return compared(name, 5, parallel, guess_mode=True, guidance_scale=1.0)


@pytest.mark.parametrize("name", PIPELINES)
def test_guess_mode(two_ranks: Team, name: str) -> None:
    assert assert_same(two_ranks.run(without_guidance, name, "frames"), split("frames")) == [(3, 3), (2, 2)]
    assert assert_same(two_ranks.run(without_guidance, name, "auto"), split("guidance")) == [(5, 5)] * 2


def guessed_for_one_half(frames: int) -> tuple[str, str, dict[str, dict[str, int]]]:
    """diffusers gives its UNet residuals for one half of guidance alone, which it cannot add to both."""
    pipe, call = made("controlnet", frames)
    call |= {"guess_mode": True}
    with pytest.raises(RuntimeError) as of_one:
        clip(pipe, call)
    report = patch_pipeline(pipe, only=PARTS, parallel="frames")
    with pytest.raises(RuntimeError) as of_all:
        clip(pipe, call)
    return str(of_one.value), str(of_all.value), axes(report)


@pytest.mark.parametrize("frames", [2, 4])  # as many as a rank has frames of both halves
def test_what_does_not_fit_in_one_process_does_not_on_two(two_ranks: Team, frames: int) -> None:
    for of_one, of_all, whole in two_ranks.run(guessed_for_one_half, frames):
        assert of_one == of_all
        reason = f"down_block_additional_residuals has {frames} frames, where the clip has {2 * frames}"
        assert whole == {"unet frames": {reason: 1}, "controlnet frames": {}}


def of_ones_own(name: str) -> dict[str, Any]:
    return compared(name, 5, "frames")


def only_the_unet() -> dict[str, Any]:
    return compared("controlnet", 5, "frames", only="unet")


def test_a_unet_takes_its_part_of_a_controlnet_that_runs_whole(two_ranks: Team) -> None:
    reason = "MixesPictures has a forward of its own, which may mix frames"
    for name in ("of-ones-own", "one-of-two-of-ones-own"):
        ran = assert_same(two_ranks.run(of_ones_own, name), {"unet frames": {}, "controlnet frames": {reason: STEPS}})
        assert ran == [(6, 10), (4, 10)]
    assert assert_same(two_ranks.run(only_the_unet), {"unet frames": {}}) == [(6, 10), (4, 10)]


def rows_of_all_kinds() -> bool:
    """A ControlNet by itself: a timestep for each picture, or for all; what has another number of rows raises."""
    pipe, _ = made("controlnet", 3)
    net = pipe.controlnet
    generator = torch.Generator().manual_seed(0)
    given = {
        "sample": torch.randn(5, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(5, 7, 32, generator=generator),
        "controlnet_cond": torch.rand(5, 3, 16, 16, generator=generator),
    }
    timesteps = [torch.tensor(7), torch.tensor([7]), torch.arange(5), 7]
    with torch.no_grad():
        expected = [net(**given, timestep=timestep).mid_block_res_sample for timestep in timesteps]
        with patch_pipeline(pipe, only=PARTS, parallel="frames"):
            found = [net(**given, timestep=timestep).mid_block_res_sample for timestep in timesteps]
            with pytest.raises(RuntimeError, match="must match"):
                net(**given | {"controlnet_cond": given["controlnet_cond"][:3]}, timestep=7)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in found), "as those of one process"
    return all(torch.allclose(*pair, atol=1e-5) for pair in zip(found, expected, strict=True))


def test_each_picture_has_its_own_arguments(two_ranks: Team) -> None:
    assert two_ranks.run(rows_of_all_kinds) == [True] * 2
