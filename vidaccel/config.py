"""Every ``VIDACCEL_*`` environment variable, read here and nowhere else (listed in the README), and torchrun's counts.

A leaf: it imports nothing of the project but its errors, so every floor may import it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from vidaccel.errors import UsageError, nearest

__all__ = [
    "adopt",
    "cache_directory",
    "check_environment",
    "count_of",
    "entries",
    "preferred_implementation",
    "preferred_implementations",
    "self_check_enabled",
    "tuning_enabled",
    "variables",
]

_NAMES = ("VIDACCEL_CACHE_DIR", "VIDACCEL_IMPL", "VIDACCEL_SELF_CHECK", "VIDACCEL_TUNE")
_SWITCH = {"0": False, "off": False, "false": False, "no": False, "1": True, "on": True, "true": True, "yes": True}


def preferred_implementations() -> str:
    """``VIDACCEL_IMPL``: ``"torch"`` for all ops, or ``"op=torch,other_op=triton"``."""
    return os.environ.get("VIDACCEL_IMPL", "")


def entries(wishes: str) -> list[str]:
    """The parts of ``wishes``, of the form of ``VIDACCEL_IMPL``."""
    return [part.strip() for part in wishes.split(",") if part.strip()]


def preferred_implementation(op: str, wishes: str) -> str | None:
    """What ``wishes``, of the form of ``VIDACCEL_IMPL``, asks for ``op``."""
    if not wishes:  # as nearly always, and every call of every op asks
        return None
    for entry in entries(wishes):
        name, _, implementation = entry.rpartition("=")
        if name in ("", op):
            return implementation
    return None


def self_check_enabled() -> bool:
    """``VIDACCEL_SELF_CHECK=0`` turns off the comparison of every site with its references."""
    return _switch("VIDACCEL_SELF_CHECK")


def cache_directory() -> str:
    """``VIDACCEL_CACHE_DIR``: where measured choices are kept between runs."""
    return os.environ.get("VIDACCEL_CACHE_DIR") or "~/.cache/vidaccel"


def tuning_enabled() -> bool:
    """``VIDACCEL_TUNE=0``: run default implementations, measure nothing and read no earlier measurement."""
    return _switch("VIDACCEL_TUNE")


def count_of(name: str) -> int:
    """A number of processes that ``torchrun`` sets; 1 if it has not.

    Raises:
        UsageError: it is no whole number.
    """
    value = os.environ.get(name) or "1"
    if not value.isdecimal():
        raise UsageError(f"{name}={value!r} is no whole number")
    return int(value)


def variables() -> dict[str, str]:
    """What is set, for another process to :func:`adopt`."""
    return {name: os.environ[name] for name in _NAMES if name in os.environ}


def adopt(wanted: Mapping[str, str]) -> None:
    """Set in this process what :func:`variables` gave in another, and nothing else."""
    for name in _NAMES:
        os.environ.pop(name, None)
    os.environ.update(wanted)


def check_environment() -> None:
    """Hold the names and the switches against what there is.

    Raises:
        UsageError: a variable has a name or a value that means nothing.
    """
    for name in os.environ:
        if name.startswith("VIDACCEL_") and name not in _NAMES:
            raise UsageError(f"{name} is no setting of vidaccel{nearest(name, _NAMES)}")
    self_check_enabled(), tuning_enabled()


def _switch(name: str) -> bool:
    value = os.environ.get(name, "1")
    if value.lower() not in _SWITCH:
        raise UsageError(f"{name}={value!r} is neither on nor off{nearest(value, _SWITCH)}")
    return _SWITCH[value.lower()]
