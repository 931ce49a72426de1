"""Of calls that are alike, the first that are checked stand for the others, until one was wrong.

The blocks of a model call an op alike, and are alike themselves: what is wrong with a kernel, or with the code of a
block, is wrong in all of them. What has been found right is kept for one call of a model (:func:`sampling`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from contextlib import AbstractContextManager
from contextvars import ContextVar

from vidaccel.kernels.context import while_set

__all__ = ["count_check", "forget_samples", "sampling", "times_right"]

_right: ContextVar[dict[Hashable, float] | None] = ContextVar("right", default=None)


def sampling() -> AbstractContextManager[object]:
    """Inside the ``with`` block, which is a call of a model, count what is found right."""
    return while_set(_right, {})


def times_right(alike: Hashable) -> float:
    """How many checks of what is ``alike`` have found it right in this call; -inf: one has not."""
    counts = _right.get()
    return 0 if counts is None else counts.get(alike, 0)


def count_check(alike: Hashable, right: bool) -> None:
    """Note a check of what is ``alike``."""
    if (counts := _right.get()) is not None:
        counts[alike] = counts.get(alike, 0) + 1 if right else -math.inf


def forget_samples() -> None:
    """Check whole again, in this call of a model, what was found right so far."""
    if (counts := _right.get()) is not None:
        counts.clear()
