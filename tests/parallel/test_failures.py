"""Ranks that do not do the same, or are gone: all end with one line, and none waits for ever."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Team
from tiny_models import tiny_svd_unet, tiny_synthetic_pipeline

from vidaccel import patch_pipeline
from vidaccel.parallel.ranks import Agreement, RankError

pytestmark = pytest.mark.slow


def unet_call() -> tuple[Any, list[Any]]:
    """A UNet, and arguments for it."""
    generator = torch.Generator().manual_seed(1)
    sample, text, ids = (torch.randn(2, *shape, generator=generator) for shape in ((3, 8, 4, 4), (1, 32), (3,)))
    return tiny_svd_unet(), [sample, 0.5, text, ids]


def raised(call: Callable[[], Any]) -> str:
    try:
        call()
    except RankError as error:
        return str(error)
    return ""


def call_with_other(what: str) -> str:
    """What a call of a UNet raises that is another one on the last rank."""
    unet, (sample, *given) = unet_call()
    last = dist.get_rank() == dist.get_world_size() - 1
    pipe = SimpleNamespace(components={"unet": unet}, unet=unet)
    with torch.no_grad(), patch_pipeline(pipe, parallel="guidance"):
        if what == "shapes":
            unet(sample, *given)
        if last and what == "shapes":
            sample = sample[:, :2]
        if last and what == "values":
            sample = sample + 1
        return raised(lambda: unet(sample, *given))


@pytest.mark.parametrize(
    ("what", "says"), [("shapes", "different shapes or settings"), ("values", "give all the same seed")]
)
def test_unequal_arguments_raise_on_all_ranks(two_ranks: Team, what: str, says: str) -> None:
    for line in two_ranks.run(call_with_other, what):
        assert says in line and "\n" not in line


def patched_otherwise(options: list[dict[str, Any]]) -> tuple[str, bool]:
    """What patching raises where each rank has ``options`` of its own, and whether it left the pipeline as it was."""
    pipe, _ = tiny_synthetic_pipeline("wan2.1-t2v-1.3b")
    classes = [type(module) for module in pipe.transformer.modules()]
    try:
        patch_pipeline(pipe, **options[dist.get_rank()])
    except RankError as error:
        return str(error), [type(module) for module in pipe.transformer.modules()] == classes
    return "", False


@pytest.mark.parametrize(
    "other",
    [
        {"parallel": "guidance"},
        {"parallel": "sequence", "only": "vae"},
        {"parallel": "sequence", "skip": "qk_norm_rope"},
        {"parallel": "sequence", "allow": "bit-exact"},
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_other_options_on_one_rank_raise_on_all(two_ranks: Team, other: dict[str, Any]) -> None:
    for line, as_before in two_ranks.run(patched_otherwise, [{"parallel": "sequence"}, other]):
        assert "patch with other options" in line and "\n" not in line and as_before


def call_switched_otherwise() -> list[str]:
    """What calls raise while a site is off on the last rank alone, and when it is on again."""
    unet, given = unet_call()
    pipe, lines = SimpleNamespace(components={"unet": unet}, unet=unet), []
    with torch.no_grad(), patch_pipeline(pipe, parallel="guidance") as report:
        for on in (False, True):
            report.sites[0].on = on or dist.get_rank() == 0
            lines.append(raised(lambda: unet(*given)))
    return lines


def test_a_site_that_is_off_on_one_rank_raises_on_all(two_ranks: Team) -> None:
    for while_off, again in two_ranks.run(call_switched_otherwise):
        assert "other sites switched on" in while_off and again == ""


def call_again_with_others() -> list[str]:
    """What is raised by calls of one kind: twice with other values on the last rank, then with the same on all."""
    unet, (sample, *given) = unet_call()
    pipe, lines = SimpleNamespace(components={"unet": unet}, unet=unet), []
    with torch.no_grad(), patch_pipeline(pipe, parallel="guidance"):
        for other in (1, 1, 0):
            lines.append(raised(lambda other=other: unet(sample + other * dist.get_rank(), *given)))
        cut = sample[:, : 3 - dist.get_rank()]
        lines += [raised(lambda x=x: unet(x, *given)) for x in (cut, sample[:, :2])]
    return lines


def test_what_was_not_the_same_is_compared_again(two_ranks: Team) -> None:
    for *others, same, cut, same_again in two_ranks.run(call_again_with_others):
        assert all("different values" in line for line in others) and same == ""
        assert "different shapes" in cut and same_again == ""


def gone_at_the_second_time() -> Any:
    """An agreement of three, of whom the last one is gone at the second time."""
    agreement = Agreement()
    agreement.all([1])
    if agreement.rank == agreement.size - 1:
        os._exit(1)
    started = time.monotonic()
    try:
        agreement.all([2])
    except RankError as error:
        return str(error), time.monotonic() - started
    return "", 0.0


def test_a_rank_that_dies_ends_the_others(tmp_path: Path) -> None:
    team = Team(3, tmp_path)
    try:
        *others, (gone, _) = team.outcomes(gone_at_the_second_time)
    finally:
        team.close()
    assert isinstance(gone, EOFError)
    for (line, seconds), _ in others:
        assert line.startswith("parallel: another rank is gone") and "\n" not in line and seconds < 60
