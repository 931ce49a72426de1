"""A site: one op, or a chain of ops, at one place of a model; what it is, whether it is on, what ran there."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Literal

from vidaccel.kernels.op import Event
from vidaccel.kernels.settings import Fidelity
from vidaccel.sites.memo import generation, plans_changed

__all__ = ["Fidelity", "Site", "SiteGroup", "State"]

logger = logging.getLogger(__name__)

# Ops that do more than the one whose site they run at.
SITE_OF = {
    "block_causal_attention": "spatial_attention",
    "conv_epilogue_and_statistics": "conv_epilogue",
    "upsample_cells": "upsample_conv",
    "upsample_conv_and_statistics": "upsample_conv",
    "frame_statistics": "group_norm_silu",
    "merged_taps": "upsample_clip",
    "group_norm_and_sum": "group_norm_silu",
    "padded_group_norm": "group_norm_silu",
}

State = Literal["active", "off", "left alone", "failed", "restored"]


class Site:
    """One op at one module path.

    Attributes:
        path: Where, e.g. ``unet.down_blocks.0.resnets.0.spatial_res_block``.
        op: What, e.g. ``group_norm_silu``.
        fidelity: ``bit-exact``, ``math-exact`` or ``lossy``.
        implementations: What has run here so far (``triton``, ``torch``); empty before the first call.
        fallbacks: How many calls went another way than planned, by reason.
    """

    def __init__(self, path: str, op: str, fidelity: Fidelity, left_alone: str = "") -> None:
        self.path, self.op, self.fidelity = path, op, fidelity
        self.implementations: set[str] = set()
        self.fallbacks: Counter[str] = Counter()
        self._left_alone = left_alone
        self._failed = ""
        self._on = True
        self._in_place: Callable[[], str | None] | None = None
        self._switch: Callable[[bool], None] | None = None

    @property
    def state(self) -> State:
        """What is so now: ``left alone`` also where somebody has put something else in its place since."""
        if self._left_alone:
            return "left alone"
        if self._in_place is None:
            return "restored"
        if self._failed:
            return "failed"
        if self._in_place():
            return "left alone"
        return "active" if self._on else "off"

    @property
    def reason(self) -> str:
        """Why it was left alone, or failed."""
        return self._left_alone or self._failed or (self._in_place and self._in_place()) or ""

    @property
    def on(self) -> bool:
        """Whether the op runs here; may be switched while the site is in place."""
        return self._on

    @on.setter
    def on(self, value: bool) -> None:
        if value != self._on:
            self._on = value
            if self._switch is not None:
                self._switch(value)
            plans_changed()

    @property
    def runs(self) -> bool:
        """Whether the fused code of this site is to run."""
        return self._on and not self._failed

    @property
    def implementation(self) -> str:
        """What ran here: a name, several joined by ``+``, or ``not run yet``."""
        return "+".join(sorted(self.implementations)) or "not run yet"

    def put_in_place(self, in_place: Callable[[], str | None], switch: Callable[[bool], None] | None = None) -> None:
        """From now on ``in_place`` tells what stands where this site's code was put, or None if that still does.

        ``switch`` is called when the site is switched, for one that no call of a block asks whether it is on.
        """
        self._in_place, self._switch = in_place, switch

    def taken_away(self) -> None:
        self._in_place = self._switch = None

    def fail(self, reason: str) -> None:
        """The original code runs here from now on; said once, and kept in the report."""
        self._failed = reason
        plans_changed()
        logger.warning("%s: %s: back to the original code: %s", self.path, self.op, reason)

    def __repr__(self) -> str:
        return f"Site({self.path!r}, {self.op!r}, {self.state!r})"


class SiteGroup:
    """The sites of one module or processor, by op.

    Attributes:
        checks: Whether calls are held against their references.
        seen: What is known of each kind of call, by its hash, for as long as the sites are in place.
    """

    def __init__(self, sites: Iterable[Site], checks: bool) -> None:
        self.sites = {site.op: site for site in sites}
        self.checks = checks
        self.seen: dict[int, Any] = {}
        self._running: frozenset[str] = frozenset()
        self._generation = -1

    def runs(self, op: str) -> bool:
        """Whether the fused code of ``op`` is to run here."""
        return op in self.running()

    def running(self) -> frozenset[str]:
        """The ops whose fused code is to run here."""
        if self._generation != generation():
            self._running = frozenset(op for op, site in self.sites.items() if site.runs)
            self._generation = generation()
        return self._running

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of what has sites has none: it has no report that could tell of it, and nobody to restore it."""

    @property
    def paths(self) -> str:
        return ", ".join(sorted({site.path for site in self.sites.values()}))

    def hear(self, events: Iterable[Event]) -> None:
        """Note what ran; a site whose op disagreed with its reference fails."""
        told = set()
        for event in events:
            op = SITE_OF.get(event.op, event.op)
            told.add(op)
            site = self.sites.get(op)
            if site is not None:
                site.implementations.add(event.implementation)
            if event.problem:
                self.fail(event.problem, op)
        for op, site in self.sites.items():
            if op not in told and site.runs:  # plain PyTorch: a shortcut, or another memory order
                site.implementations.add("torch")

    def count(self, reason: str, op: str = "", calls: int = 1) -> None:
        """Count calls that went another way: of the whole group, or of one ``op`` of it."""
        for site in self.sites.values():
            if SITE_OF.get(op, op) in ("", site.op):
                site.fallbacks[reason] += calls

    def fail(self, reason: str, op: str = "") -> None:
        """Let the site of ``op`` fail; all of them, if it has none of its own here."""
        for site in [self.sites[op]] if op in self.sites else list(self.sites.values()):
            if site.runs:
                site.fail(reason)
