"""A UNet's frames on several ranks: the result is that of one process, whatever of the UNet mixes frames."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from block_checks import all_fused, frozen, fused, relative_error
from denoiser_calls import denoised, first_call
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.resnet import SpatioTemporalResBlock, TemporalConvLayer
from ranks import Team
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from vidaccel import patch_pipeline
from vidaccel.blocks.unet.resnet import (
    FusedAlphaBlender,
    FusedResnetBlock2D,
    FusedSpatioTemporalResBlock,
    FusedTemporalConvLayer,
    FusedTemporalResnetBlock,
)
from vidaccel.kernels.check import in_float64
from vidaccel.parallel.layout import Frames as FramesOverRanks
from vidaccel.parallel.layout import spread
from vidaccel.parallel.ranks import axes_of
from vidaccel.patching.report import PatchReport

pytestmark = pytest.mark.slow

RESNETS = FusedResnetBlock2D, FusedTemporalResnetBlock, FusedAlphaBlender, FusedSpatioTemporalResBlock
FAMILIES = ["svd", "i2vgen-xl", "animatediff", "modelscope"]


def frames_site(report: PatchReport) -> tuple[str, str, dict[str, int]]:
    found = next(site for site in report.sites if site.op == "frames")
    return found.state, found.implementation, dict(found.fallbacks)


def reasons(report: PatchReport) -> set[str]:
    return {reason for site in report.sites for reason in site.fallbacks}


def as_patched(report: PatchReport) -> None:
    """Every block serves its own frames."""


def all_off(report: PatchReport) -> None:
    """Blocks of ours that run the original code."""
    for site in report.sites:
        site.on = site.op == "frames"


def norms_off(report: PatchReport) -> None:
    for site in report.sites:
        site.on = site.op != "group_norm_silu"


def one_fails(report: PatchReport) -> None:
    """A check on the second rank alone finds something."""
    if dist.get_rank() == 1:
        site = next(site for site in report.sites if site.op == "temporal_attention")
        site.fail("it is wrong")


def compared(
    name: str, frames: int, change: Callable[[PatchReport], None] = as_patched, **options: Any
) -> dict[str, Any]:
    """One call on all ranks beside one of one process, both held against stock in float64."""
    pipe, given = first_call(name, frames)
    gold = copy.deepcopy(pipe.unet).double()
    with torch.no_grad():
        expected = gold(**tree_map(in_float64, given))[0]
    stock = denoised(pipe, given)
    with patch_pipeline(pipe, only="unet") as report:
        alone, of_one = denoised(pipe, given), reasons(report)
    report = patch_pipeline(pipe, **{"only": "unet", "parallel": "frames"} | options)
    change(report)
    found = denoised(pipe, given)
    outcome = {
        "error": float((found - expected).abs().max()),
        "error of one": float((alone - expected).abs().max()),
        "scale": float(expected.abs().max()),
        "site": frames_site(report),
        "reasons": reasons(report) - of_one,
        "sum": float(found.double().sum()),
    }
    report.restore()
    outcome["restored"] = bool(denoised(pipe, given).equal(stock))
    return outcome


def assert_same(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    first = outcomes[0]
    assert all(outcome["sum"] == first["sum"] for outcome in outcomes), "all ranks have the same result"
    assert first["error"] <= 2 * first["error of one"] + 1e-6 * first["scale"], first
    assert all(outcome["restored"] for outcome in outcomes)
    return first


def all_served(name: str, frames: int) -> dict[str, Any]:
    return compared(name, frames)


@pytest.mark.parametrize(("name", "frames"), [("svd", 4), *((name, 5) for name in FAMILIES)])
def test_the_result_is_that_of_one_process(two_ranks: Team, name: str, frames: int) -> None:
    found = assert_same(two_ranks.run(all_served, name, frames))
    assert found["site"] == ("active", "2 ranks", {})
    assert found["reasons"] == set(), "every block works on its own frames"


def originals(name: str) -> dict[str, Any]:
    return compared(name, 5, all_off)


def hardly_patched(name: str) -> dict[str, Any]:
    return compared(name, 5, only="unet.conv_norm_out")


def norms_of_stock(name: str) -> dict[str, Any]:
    return compared(name, 5, norms_off)


@pytest.mark.parametrize(
    ("how", "name"),
    [*product((originals, hardly_patched), FAMILIES), (norms_of_stock, "svd"), (norms_of_stock, "modelscope")],
)
def test_blocks_that_are_not_served_run_on_the_whole_clip(
    two_ranks: Team, how: Callable[[str], dict[str, Any]], name: str
) -> None:
    found = assert_same(two_ranks.run(how, name))
    assert found["site"] == ("active", "2 ranks", {})
    if how is originals:
        assert found["reasons"] == {"it is off, or failed"}
    if how is norms_of_stock:
        assert any("all frames of the clip" in reason or "off" in reason for reason in found["reasons"])


def one_frame() -> dict[str, Any]:
    return compared("animatediff", 1)


def test_what_cannot_be_split_runs_whole_and_is_counted(two_ranks: Team) -> None:
    found = assert_same(two_ranks.run(one_frame))
    assert found["site"][2] == {"the clip has fewer frames (1) than there are ranks (2)": 1}


def by_kernels() -> tuple[float, list[str]]:
    """Two blocks of SVD in Triton's interpreter, where biases and blends are in kernels of ours."""
    (ranks,) = axes_of([dist.get_world_size()])
    torch.manual_seed(0)
    resnet = frozen(SpatioTemporalResBlock(32, 32, temb_channels=16, merge_factor=0.7))
    convolutions = frozen(TemporalConvLayer(32, norm_num_groups=4))
    frames, batch = 5, 2
    x, temb = torch.randn(batch, frames, 32, 4, 3), torch.randn(batch, frames, 16)
    still = torch.zeros(batch, frames)

    def run(x: Tensor, temb: Tensor, still: Tensor) -> Tensor:
        images = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        images = resnet(images, temb.flatten(0, 1), still)
        return convolutions(images, num_frames=x.shape[1]).unflatten(0, x.shape[:2])

    expected = run(x, temb, still)
    wished = os.environ.pop("VIDACCEL_IMPL")
    try:
        with all_fused(resnet, *RESNETS), fused(convolutions, FusedTemporalConvLayer) as sites:
            with spread(FramesOverRanks(ranks, frames)):
                found = run(*(ranks.part(given, 1) for given in (x, temb, still)))
            ran = sorted(f"{op} {site.state} {site.implementation}" for op, site in sites.items())
    finally:
        os.environ["VIDACCEL_IMPL"] = wished
    return relative_error(ranks.gather(found, 1, frames), expected), ran


def test_kernels_on_a_part_of_the_clip(two_ranks: Team) -> None:
    for error, ran in two_ranks.run(by_kernels):
        assert error < 1e-6
        assert {"group_norm_silu active triton", "conv_epilogue active triton"} <= set(ran)


def several_texts() -> None:
    pipe, given = first_call("animatediff", 4)
    text = given["encoder_hidden_states"].clone()
    other = 2 * text
    changed = text.clone()
    calls = [text, text, other, text, changed, changed]
    stock = copy.deepcopy(pipe.unet)
    with patch_pipeline(pipe, only="unet", parallel="frames"), torch.no_grad():
        for number, of_this in enumerate(calls):
            if number == len(calls) - 1:
                changed.mul_(3)
            arguments = given | {"encoder_hidden_states": of_this}
            expected = stock(**arguments)[0]
            assert torch.allclose(pipe.unet(**arguments)[0], expected, atol=1e-4), number


def test_each_call_sees_its_own_text(two_ranks: Team) -> None:
    two_ranks.run(several_texts)


def replaced() -> dict[str, int]:
    pipe, given = first_call("svd", 4)
    expected = denoised(pipe, given)
    report = patch_pipeline(pipe, only="unet", parallel="frames")
    block = pipe.unet.mid_block.resnets[0].temporal_res_block
    block.forward = partial(block.forward)
    assert torch.allclose(denoised(pipe, given), expected, atol=1e-4)
    del block.forward
    pipe.unet.mid_block.resnets[0].compile(backend="eager")
    assert torch.allclose(denoised(pipe, given), expected, atol=1e-4)
    return frames_site(report)[2]


def test_what_somebody_put_there_sees_the_whole_clip(two_ranks: Team) -> None:
    reasons = (
        "a hook replaced the forward of a TemporalResnetBlock, which mixes frames",
        "a SpatioTemporalResBlock is compiled, and would not see the frames of other ranks",
    )
    assert two_ranks.run(replaced) == [dict.fromkeys(reasons, 1)] * 2


class MixesFrames(nn.Module):
    """A processor that is a module, and gives every frame the first one's output."""

    def forward(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = AttnProcessor2_0()(attn, hidden_states, *args, **kwargs)
        return out[:1].expand_as(out)


def with_processor_of_ones_own() -> tuple[dict[str, int], bool]:
    pipe, given = first_call("animatediff", 4)
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    del attention.processor  # a module cannot stand where an object stood
    attention.processor = MixesFrames()
    expected = denoised(pipe, given)
    with patch_pipeline(pipe, only="unet", parallel="frames") as report:
        found = denoised(pipe, given)
    return frames_site(report)[2], torch.allclose(found, expected, atol=1e-4)


def test_a_processor_of_ones_own_sees_the_whole_clip(two_ranks: Team) -> None:
    reason = "a hook, or a processor of somebody's own, may look at all frames"
    assert two_ranks.run(with_processor_of_ones_own) == [({reason: 1}, True)] * 2


def fails_on_one() -> tuple[dict[str, Any], list[str]]:
    return compared("svd", 5, one_fails)


def test_what_fails_on_one_rank_runs_the_original_on_both(two_ranks: Team) -> None:
    found = assert_same(two_ranks.run(fails_on_one))
    assert found["reasons"] == set() and found["site"][2] == {}, "the block runs without the op that failed"


def with_guidance() -> dict[str, Any]:
    return compared("svd", 5, parallel="auto")


def test_frames_within_halves_of_guidance(four_ranks: Team) -> None:
    found = assert_same(four_ranks.run(with_guidance))
    assert found["site"] == ("active", "2 ranks", {}) and found["reasons"] == set()
