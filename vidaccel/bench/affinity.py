"""Fewer CPU cores: a GPU waits for the host sooner where the host is slow or shared."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from vidaccel.errors import UsageError

__all__ = ["pinned"]


@contextmanager
def pinned(cpus: int | None) -> Iterator[None]:
    """Inside the ``with`` block this thread, and the threads and processes it starts, share ``cpus`` cores.

    Args:
        cpus: How many; None changes nothing.

    Raises:
        UsageError: the process has not so many, or the system cannot pin.
    """
    if cpus is None:
        yield
        return
    if not hasattr(os, "sched_setaffinity"):
        raise UsageError("--cpus: this system cannot hold a process to some cores")
    before = os.sched_getaffinity(0)
    if not 1 <= cpus <= len(before):
        raise UsageError(f"--cpus must be 1 to {len(before)}, got {cpus}")
    os.sched_setaffinity(0, sorted(before)[:cpus])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
