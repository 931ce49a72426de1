"""How the clip of the call under way lies over ranks: the one object that blocks ask.

Blocks that mix what is spread (frames, tokens) ask :func:`layout`; all others see a smaller clip and need not know.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import torch

from vidaccel.parallel.ranks import Ranks

__all__ = ["Layout", "layout", "spread"]


@dataclass(frozen=True)
class Layout:
    """Frames or tokens over ranks: each has a stretch of them, one after the other.

    Attributes:
        what: What is spread.
        ranks: Over whom.
        total: How many there are on all ranks together.
    """

    what: Literal["frames", "tokens"]
    ranks: Ranks
    total: int

    @property
    def own(self) -> slice:
        """Those of this rank."""
        return self.ranks.own(self.total)

    @property
    def count(self) -> int:
        """How many this rank has."""
        return self.own.stop - self.own.start


_layout: ContextVar[Layout | None] = ContextVar("layout", default=None)


def layout(what: Literal["frames", "tokens"] | None = None) -> Layout | None:
    """The layout of the call under way in this thread, or None; of ``what``, if that is given.

    None in code that Dynamo traces: what is compiled runs whole.
    """
    if torch.compiler.is_compiling():
        return None
    found = _layout.get()
    return found if found is not None and what in (None, found.what) else None


@contextmanager
def spread(over: Layout | None) -> Iterator[None]:
    """Let ``over`` be the layout inside the ``with`` block."""
    token = _layout.set(over)
    try:
        yield
    finally:
        _layout.reset(token)
