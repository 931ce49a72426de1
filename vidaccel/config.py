"""Every ``VIDACCEL_*`` environment variable, read here and nowhere else (listed in the README).

A leaf: it imports nothing of the project, so every floor may import it.
"""

from __future__ import annotations

import os

__all__ = [
    "cache_directory",
    "preferred_implementation",
    "preferred_implementations",
    "self_check_enabled",
    "tuning_enabled",
]


def preferred_implementations() -> str:
    """``VIDACCEL_IMPL``: ``"torch"`` for all ops, or ``"op=torch,other_op=triton"``."""
    return os.environ.get("VIDACCEL_IMPL", "")


def preferred_implementation(op: str) -> str | None:
    """What ``VIDACCEL_IMPL`` asks for ``op``."""
    wishes = preferred_implementations()
    if not wishes:  # as nearly always, and every call of every op asks
        return None
    for entry in filter(None, wishes.split(",")):
        name, _, implementation = entry.strip().rpartition("=")
        if name in ("", op):
            return implementation
    return None


def self_check_enabled() -> bool:
    """``VIDACCEL_SELF_CHECK=0`` turns off the first-sight comparison of every site with the original code."""
    return os.environ.get("VIDACCEL_SELF_CHECK", "1") != "0"


def cache_directory() -> str:
    """``VIDACCEL_CACHE_DIR``: where measured choices are kept between runs."""
    return os.environ.get("VIDACCEL_CACHE_DIR") or "~/.cache/vidaccel"


def tuning_enabled() -> bool:
    """``VIDACCEL_TUNE=0``: run default implementations, measure nothing and read no earlier measurement."""
    return os.environ.get("VIDACCEL_TUNE", "1") != "0"
