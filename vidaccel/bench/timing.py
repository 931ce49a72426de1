"""Latencies on a GPU or a CPU, time of the host, peak memory, and the two ceilings that they are judged by."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from vidaccel.parallel.team import team

__all__ = [
    "Call",
    "Latency",
    "ceilings",
    "time_call",
    "time_calls",
    "time_queued",
    "time_run",
]

_FEWEST_REPEATS = 3
_MOST_REPLAYS = 40

_Mark = Any  # seconds of the host's clock, or a CUDA event


class Latency(NamedTuple):
    """Order statistics of repeated calls, in milliseconds."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int


class Call(NamedTuple):
    """A call that found the device idle, in milliseconds.

    Attributes:
        host_ms: Until it returned to Python, the GPU perhaps still at work: the time that queueing takes.
        wall_ms: Until all that it queued was done.
    """

    host_ms: float
    wall_ms: float


def _mark(device: torch.device) -> _Mark:
    """This point in the work queued on ``device`` (CUDA), or this moment (elsewhere)."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _elapsed_ms(start: _Mark, end: _Mark) -> float:
    """Milliseconds between two marks; waits until ``end`` is reached."""
    if isinstance(start, torch.cuda.Event):
        end.synchronize()
        return float(start.elapsed_time(end))
    return 1e3 * float(end - start)


def time_call(call: Callable[[], object], device: torch.device) -> Call:
    """Times of one call by the host's clock; waits for ``device`` before and after it."""
    _synchronize(device)
    start = time.perf_counter()
    call()
    returned = time.perf_counter()
    _synchronize(device)
    return Call(1e3 * (returned - start), 1e3 * (time.perf_counter() - start))


def time_run(call: Callable[[], object], device: torch.device, calls: int) -> float:
    """Milliseconds of a call in a run of them, as a pipeline makes its steps: the device is waited for at the end."""
    return time_call(lambda: [call() for _ in range(calls)], device).wall_ms / calls


def time_calls(
    call: Callable[[], object],
    device: torch.device,
    *,
    repeats: int,
    warmup: int = 0,
    budget_seconds: float = float("inf"),
) -> Latency:
    """Latency of ``call`` in a steady state: on CUDA one call is always queued while the one before it runs.

    Args:
        call: Queues the work; it may take fresh inputs from a rotation of its own.
        device: Where the work runs.
        repeats: Timed calls at most.
        warmup: Untimed calls before them.
        budget_seconds: Stop repeating after so long, but not before three repeats (or ``repeats``, if fewer).
    """
    for _ in range(warmup):
        call()
    _synchronize(device)
    milliseconds: list[float] = []
    previous: tuple[_Mark, _Mark] | None = None
    started = time.perf_counter()
    for done in range(repeats):
        # ranks that share a call repeat it equally often
        if done >= _FEWEST_REPEATS and team().tell(time.perf_counter() - started > budget_seconds):
            break
        start = _mark(device)
        call()
        end = _mark(device)
        # Waiting for the lap before this one keeps the queue from running dry, and the budget honest.
        if previous is not None:
            milliseconds.append(_elapsed_ms(*previous))
        previous = start, end
    if previous is not None:
        milliseconds.append(_elapsed_ms(*previous))
    return _summarise(milliseconds)


def time_queued(calls: Sequence[Callable[[], object]], device: torch.device, *, budget_seconds: float) -> Latency:
    """Latency of a call on a GPU that never waits for the host: all ``calls`` in one CUDA graph, replayed.

    Each lap is the mean of ``calls``. Their inputs together should exceed the L2 cache several times over; what they
    return is kept until the last one is through, or the next call would write to memory that the cache still holds.

    Args:
        calls: The same work on different inputs, all of them warm.
        device: A CUDA device.
        budget_seconds: About how long to replay.
    """
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = [call() for call in calls]
        once = time_call(graph.replay, device).wall_ms
        replays = min(max(int(1e3 * budget_seconds / once), _FEWEST_REPEATS), _MOST_REPLAYS)
        laps = time_calls(graph.replay, device, repeats=replays, warmup=1)
        del outputs
    median, p20, p80 = (milliseconds / len(calls) for milliseconds in laps[:3])
    return Latency(median, p20, p80, laps.repeats)


def _summarise(milliseconds: list[float]) -> Latency:
    """Order statistics of measured times."""
    p20, median, p80 = np.percentile(milliseconds, (20, 50, 80)).tolist()
    return Latency(median, p20, p80, len(milliseconds))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ceilings(device: torch.device) -> dict[str, float]:
    """What this very device reaches: copy bandwidth (bytes read + written) and matmul rate, on random data."""
    if device.type == "cuda":
        return {
            "copy_gb_s": _copy_gb_s(2**31, device),
            "matmul_bfloat16_tflop_s": _matmul_tflop_s(8192, torch.bfloat16, device),
        }
    return {
        "copy_gb_s": _copy_gb_s(2**25, device),
        "matmul_float32_tflop_s": _matmul_tflop_s(512, torch.float32, device),
    }


def _copy_gb_s(size: int, device: torch.device) -> float:
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / time_calls(lambda: target.copy_(source), device, repeats=20, warmup=3).median_ms / 1e6


def _matmul_tflop_s(size: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / time_calls(lambda: a @ b, device, repeats=20, warmup=3).median_ms / 1e9
