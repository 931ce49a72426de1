"""What a figure alone would not tell: clips that are no clips, patches that patched nothing, a baseline that wavers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vidaccel.patching.report import PatchReport

__all__ = ["Guard", "guards_of_clip", "guards_of_patch"]

_FLAT = 1e-3  # of 0..1: less between the darkest and the brightest value of a frame is a constant frame


@dataclass(frozen=True)
class Guard:
    """Something that a figure alone would not tell; ``fails``: whether it fails the clip."""

    what: str
    detail: str
    fails: bool


def guards_of_clip(name: str, frames: np.ndarray, expected: np.ndarray | None = None) -> Iterator[Guard]:
    """What is wrong with the clip called ``name``, ``[F, H, W, C]`` in 0..1; ``expected`` is the reference.

    A constant frame fails a clip only where the reference has none there.
    """
    if lost := _listed(~np.isfinite(frames).all((1, 2, 3))):
        yield Guard("not finite", f"{name}: {lost}: NaN or infinite values", True)
    flat = _is_flat(frames)
    new = flat if expected is None else flat & ~_is_flat(expected)
    for some, fails in ((new, expected is not None), (flat & ~new, False)):
        if listed := _listed(some):
            yield Guard("constant frames", f"{name}: {listed}: one colour, or black", fails)


def _is_flat(frames: np.ndarray) -> np.ndarray:
    finite = np.nan_to_num(frames)
    flat: np.ndarray = np.ptp(finite.reshape(len(frames), -1), axis=1) < _FLAT
    return flat


def _listed(which: np.ndarray) -> str:
    numbers = [str(i) for i in np.flatnonzero(which)]
    shown = ", ".join(numbers[:8]) + (" ..." if len(numbers) > 8 else "")
    return f"frame{'s' if len(numbers) > 1 else ''} {shown}" if numbers else ""


def guards_of_patch(report: PatchReport) -> Iterator[Guard]:
    """What is wrong with a patch whose clip has been made."""
    active = [site for site in report.sites if site.state == "active"]
    if not active:
        yield Guard("nothing patched", "no site of the pipeline is active: the clip says nothing of a patch", True)
    # Sites of a whole model are memory orders. Where a model is compiled nothing is heard, and nothing falls back.
    elif report.fallbacks and not any(site.implementations for site in active if "." in site.path):
        yield Guard("everything fell back", _most_frequent(report), True)
    for site in report.sites:
        if site.state == "failed":
            yield Guard("a site failed its check", f"{site.path}: {site.op}: {site.reason}", True)


def _most_frequent(report: PatchReport) -> str:
    (path, op, reason), calls = max(report.fallbacks.items(), key=lambda entry: entry[1])
    return f"no site ran in any call; {path}: {op} in {calls} calls: {reason}"
