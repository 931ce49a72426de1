"""A UNet's frames on several ranks: the clip of one process, and every mixer of frames told of the others' frames."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ranks import Team
from tiny_models import tiny_synthetic_pipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from vidaccel import patch_pipeline
from vidaccel.patching.report import PatchReport

FAMILIES = ["svd"]


class Reached(Exception):
    """The UNet's first call."""


def first_call(name: str, frames: int) -> tuple[Any, dict[str, Any]]:
    """A pipeline, and what it gives its UNet first."""
    pipe, call = tiny_synthetic_pipeline(name)
    found: dict[str, Any] = {}

    def keep(unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.update(zip(("sample", "timestep"), args, strict=False), **kwargs)
        raise Reached

    hook = pipe.unet.register_forward_pre_hook(keep, with_kwargs=True)
    torch.manual_seed(0)  # I2VGenXL's VAE draws from the default generator
    try:
        pipe(**call | {"num_frames": frames}, generator=torch.Generator().manual_seed(3), output_type="latent")
    except Reached:
        hook.remove()
    return pipe, found


def denoised(pipe: Any, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return pipe.unet(**given)[0]


def in_double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def frames_site(report: PatchReport) -> tuple[str, str, dict[str, int]]:
    found = next(site for site in report.sites if site.op == "frames")
    return found.state, found.implementation, dict(found.fallbacks)


def reasons(report: PatchReport) -> set[str]:
    return {reason for site in report.sites for reason in site.fallbacks}


def compared(name: str, frames: int, **options: Any) -> dict[str, Any]:
    """One call on all ranks beside one of one process, both held against stock in float64."""
    pipe, given = first_call(name, frames)
    gold = copy.deepcopy(pipe.unet).double()
    with torch.no_grad():
        expected = gold(**tree_map_only(Tensor, in_double, given))[0]
    stock = denoised(pipe, given)
    with patch_pipeline(pipe, only="unet") as report:
        alone, of_one = denoised(pipe, given), reasons(report)
    report = patch_pipeline(pipe, **{"only": "unet", "parallel": "frames"} | options)
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
    assert first["restored"]
    return first


@pytest.mark.parametrize("frames", [4, 5])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_result_is_that_of_one_process(two_ranks: Team, name: str, frames: int) -> None:
    found = assert_same(two_ranks.run(compared, name, frames))
    assert found["site"] == ("active", "2 ranks", {})
    assert found["reasons"] == set(), "every block works on its own frames"
