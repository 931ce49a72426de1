"""Triton's folder of compiled kernels: where it takes nothing, this process gets one of its own.

Triton writes what it compiles into that folder and loads it from there. If the folder is read-only or full, no kernel
runs.
"""

from __future__ import annotations

import atexit
import functools
import logging
import shutil
import tempfile
from pathlib import Path

import triton

__all__ = ["ensure_writable"]

logger = logging.getLogger(__name__)

PROBE = 2**20  # bytes: a large kernel with all that Triton keeps of it


def ensure_writable() -> None:
    """Have Triton, in this process and in those that it starts, use a folder that can be written."""
    _ensure(triton.knobs.cache.dir)


@functools.lru_cache(maxsize=100)
def _ensure(folder: str) -> None:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(PROBE))
    except OSError as error:
        try:
            own = tempfile.mkdtemp(prefix="vidaccel-triton-")
        except OSError:  # then the first kernel says what is wrong
            return
        atexit.register(shutil.rmtree, own, ignore_errors=True)
        triton.knobs.cache.dir = own  # and TRITON_CACHE_DIR with it
        logger.warning("Triton cannot write into %s (%s): kernels are compiled into %s", folder, error.strerror, own)
