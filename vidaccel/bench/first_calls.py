"""The first calls of a new process, as a user meets them: one process for each variant, with disk caches of its own.

What runs in the background then, and slows the calls beside it, is there to be seen. Compiled variants are left out:
their first call is what compiling takes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vidaccel.bench.record import Recorder, Row
from vidaccel.bench.settings import Settings
from vidaccel.bench.subject import Subject, load_subject
from vidaccel.bench.timing import time_call, time_run
from vidaccel.bench.variants import COMPILED, applied
from vidaccel.bench.workloads import workloads
from vidaccel.errors import first_line

__all__ = ["first_calls", "measure_new_processes"]

CALLS = 10  # of a denoiser or a decode
CLIPS = 3
# Where compiled kernels and measured choices are kept.
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH", "VIDACCEL_CACHE_DIR")


def measure_new_processes(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype, settings: Settings, recorder: Recorder
) -> None:
    """Fill the record's ``new_processes``: rows as :func:`first_calls` returns them.

    The first patched process finds the disk caches empty; a second one, and those of other patched variants, find what
    it has left. Eager, which leaves nothing there, runs once.
    """
    with tempfile.TemporaryDirectory() as folder:
        filled = False
        for variant in settings.variants:
            if COMPILED & set(variant.split("+")):
                continue
            patched = "patched" in variant.split("+")
            for caches in ("warm",) if filled else ("empty", "warm") if patched else ("empty",):
                for row in _in_new_process(Path(folder), args, variant, device, dtype, settings, recorder):
                    recorder.note_first_calls({"variant": variant, "caches": caches, **row})
            filled = filled or patched


def _in_new_process(
    folder: Path,
    args: argparse.Namespace,
    variant: str,
    device: torch.device,
    dtype: torch.dtype,
    settings: Settings,
    recorder: Recorder,
) -> list[Row]:
    if recorder.out_of_time:
        return [_no_row("skipped", settings, "the time limit was reached")]
    spawn = multiprocessing.get_context("spawn")
    try:
        with _caches_in(folder), ProcessPoolExecutor(1, mp_context=spawn) as process:
            return process.submit(_load_and_call, args, variant, device, dtype, settings).result()
    except Exception as error:  # whatever one process does, the others are still worth measuring
        return [_no_row("failed", settings, first_line(error))]


def _no_row(status: str, settings: Settings, reason: str) -> Row:
    return {"scope": ", ".join(settings.scopes), "status": status, "reason": reason}


@contextmanager
def _caches_in(folder: Path) -> Iterator[None]:
    """Inside the ``with`` block, new processes keep their disk caches in ``folder``."""
    before = {name: os.environ.get(name) for name in CACHES}
    os.environ.update({name: str(folder / name) for name in CACHES})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _load_and_call(
    args: argparse.Namespace, variant: str, device: torch.device, dtype: torch.dtype, settings: Settings
) -> list[Row]:
    if device.index is not None:
        torch.cuda.set_device(device)
    return first_calls(load_subject(args, device, dtype), variant, device, settings)


def first_calls(subject: Subject, variant: str, device: torch.device, settings: Settings) -> list[Row]:
    """The first calls of ``variant`` in this process, which should not have made any.

    Returns:
        For each scope a row: ``patch_s``, what putting the variant in place took; ``first_call_s``; ``calls_ms`` and
        ``calls_host_ms`` of the calls after it, each waited for; their median and worst, ``next_ms`` and
        ``next_worst_ms``, and the median of the host, ``next_host_ms``; ``run_ms`` of a call in as many more without
        waiting in between. Of whole clips there are fewer, and no figures of the host.
    """
    pipe, arguments = subject
    by_scope = workloads(pipe, arguments, settings.scopes, settings.seed)
    started = time.perf_counter()
    with applied(variant, pipe, settings):
        patch_s = time.perf_counter() - started
        rows = []
        for scope, workload in by_scope.items():
            clips = scope == "end-to-end"
            first, *others = [time_call(workload.run, device) for _ in range(CLIPS if clips else CALLS)]
            row = {"scope": scope, "status": "ok", "patch_s": patch_s, "first_call_s": first.wall_ms / 1e3}
            patch_s = 0.0  # what comes next finds it in place
            row |= _statistics([call.wall_ms for call in others], None if clips else [call.host_ms for call in others])
            if not clips:
                row["run_ms"] = time_run(workload.run, device, len(others))
            rows.append(row)
    return rows


def _statistics(wall_ms: list[float], host_ms: list[float] | None) -> dict[str, Any]:
    figures: dict[str, Any] = {"calls_ms": wall_ms}
    figures |= {"next_ms": statistics.median(wall_ms), "next_worst_ms": max(wall_ms)}
    if host_ms is not None:
        figures |= {"calls_host_ms": host_ms, "next_host_ms": statistics.median(host_ms)}
    return figures
