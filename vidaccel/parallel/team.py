"""The processes that ``torchrun`` has started to do one thing together: one of them speaks, and decides.

Commands ask :func:`team`; in a process of its own there is nobody to ask, and it decides for itself.
"""

from __future__ import annotations

import argparse
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch

from vidaccel.config import count_of
from vidaccel.environment import device_of
from vidaccel.errors import UsageError
from vidaccel.parallel.ranks import PATIENCE, Agreement, RankError, join

__all__ = ["Team", "check_parallel", "parallel_of", "team"]

AFTER_A_FAILURE = timedelta(minutes=1)  # what failed alike on all ranks does so at about the same time
Answer = TypeVar("Answer")


class Team:
    """This process and those beside it.

    Attributes:
        size: How many they are.
        leads: Whether this one prints, writes and decides.
    """

    size = 1
    leads = True

    def tell(self, answer: Answer) -> Answer:
        """What the leading process has given, on all of them; each comes here as often as the others."""
        return answer

    def meet(self, failed: bool) -> None:
        """Wait for the others behind a job, which ``failed`` here or not.

        Raises:
            RankError: Others are gone; or it failed here, and they are still in the midst of it.
        """


class _Ranks(Team):
    def __init__(self) -> None:
        self._agreement = Agreement()
        self.size = self._agreement.size
        self.leads = self._agreement.rank == 0

    def tell(self, answer: Answer) -> Answer:
        first: Answer = self._agreement.objects(answer if self.leads else None)[0]
        return first

    def meet(self, failed: bool) -> None:
        # Those who wait for this rank in a call would take its next clip for the one that has failed here.
        try:
            self._agreement.all([failed], AFTER_A_FAILURE if failed else PATIENCE)
        except RankError as error:
            if not failed:
                raise
            raise RankError(
                "parallel: not all ranks failed alike: others are gone, or in the midst of it; start again for the rest"
            ) from error


@cache
def team() -> Team:
    """All processes of ``torchrun``, joined now if they are not yet; else this process alone."""
    if count_of("WORLD_SIZE") < 2:
        return Team()
    device = device_of(None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    join(device)
    return _Ranks()


def parallel_of(args: argparse.Namespace) -> Any:
    """What ``args`` ask ``patch_pipeline(parallel=...)`` for: under ``torchrun`` always something."""
    return args.parallel or ("auto" if team().size > 1 else None)


def check_parallel(args: argparse.Namespace) -> None:
    """Raise if there is nobody to split a clip with, before anything is loaded."""
    if args.parallel and team().size == 1:
        raise UsageError("--parallel: there is one process; start with torchrun --nproc-per-node 2 -m vidaccel")
