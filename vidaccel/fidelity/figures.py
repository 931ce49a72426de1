"""Figures of a comparison in words: the same in a terminal and on a page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["decibels", "error", "flat", "ratio", "similarity"]


def decibels(value: float | None) -> str:
    if value is None:
        return "-"
    if math.isfinite(value):
        return f"{value:.2f} dB"
    return "identical" if value > 0 else "not finite"


def similarity(value: float) -> str:
    """An SSIM, which is rounded down: nothing but 1 looks like 1."""
    return f"{math.floor(value * 1e6) / 1e6:.6f}" if math.isfinite(value) else "not finite"


def error(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1e}" if math.isfinite(value) else "not finite"


def ratio(value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of nested arguments, those that say something."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", f"{value:.2f}" if isinstance(value, float) else str(value)
