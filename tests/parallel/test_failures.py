"""Ranks that do not do the same, or are gone: all end with one line, and none waits for ever."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Team
from tiny_models import tiny_svd_unet

from vidaccel import patch_pipeline
from vidaccel.parallel.ranks import Agreement, RankError

pytestmark = pytest.mark.slow


def call_with_other(what: str) -> str:
    """What a call of a UNet raises that is another one on the last rank."""
    unet = tiny_svd_unet()
    generator = torch.Generator().manual_seed(1)
    sample, text, ids = (torch.randn(2, *shape, generator=generator) for shape in ((3, 8, 4, 4), (1, 32), (3,)))
    last = dist.get_rank() == dist.get_world_size() - 1
    pipe = SimpleNamespace(components={"unet": unet}, unet=unet)
    with torch.no_grad(), patch_pipeline(pipe, parallel="guidance"):
        if what == "shapes":
            unet(sample, 0.5, text, ids)
        if last and what == "shapes":
            sample = sample[:, :2]
        if last and what == "values":
            sample = sample + 1
        try:
            unet(sample, 0.5, text, ids)
        except RankError as error:
            return str(error)
        return ""


@pytest.mark.parametrize(
    ("what", "says"), [("shapes", "different shapes or settings"), ("values", "give all the same seed")]
)
def test_unequal_arguments_raise_on_all_ranks(two_ranks: Team, what: str, says: str) -> None:
    for line in two_ranks.run(call_with_other, what):
        assert says in line and "\n" not in line


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
