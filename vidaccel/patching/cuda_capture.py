"""What ``cuda_graph.py`` asks of the GPU: capture a call, time it, and clean up if that fails."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from vidaccel.errors import first_line

__all__ = ["CaptureError", "Captured", "CudaCapture"]

# One capture at a time, and no memory given back meanwhile: stream and allocator are the process's.
_one_capture = threading.RLock()


class CaptureError(Exception):
    """A call could not be captured; the message is the first thing that went wrong, in one line."""


class Captured(NamedTuple):
    """A graph: what launches it, where its outputs appear, and the memory pool that others may share."""

    replay: Callable[[], None]
    outputs: Any
    pool: Any


class CudaCapture:
    """Capture on one CUDA device at a time. The tests put another one in its place, which works without a GPU."""

    device_type = "cuda"

    def __init__(self) -> None:
        self._last_stream: torch.cuda.Stream | None = None

    @staticmethod
    def unavailable_reason() -> str | None:
        return None if torch.cuda.is_available() else "there is no CUDA device"

    def capturing(self) -> bool:
        """Whether somebody else is capturing what happens now."""
        return torch.cuda.is_current_stream_capturing()

    def capture(self, run: Callable[[], Any], device: torch.device, pool: Any) -> Captured:
        """``run`` as a graph that works in ``pool``, or in a new pool if None.

        Raises:
            CaptureError: it cannot be captured, for it waits for the GPU, say. Streams, allocator and random numbers
                are as before.
        """
        failure = ""
        with _one_capture, torch.cuda.device(device):
            graph = torch.cuda.CUDAGraph()
            pool = pool or torch.cuda.graph_pool_handle()
            stream, before = _capture_stream(device), torch.cuda.current_stream()
            try:
                # thread_local: another thread that allocates meanwhile does not break the capture off
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    try:
                        outputs = run()
                    except Exception as error:  # the end of a broken capture raises too, and says less
                        failure = first_line(error)
                        raise
            except Exception as error:
                failure = failure or first_line(error)
            if failure:
                _clean_up(graph, pool, stream, before)
                raise CaptureError(failure)
        return Captured(graph.replay, outputs, pool)

    def follow_last_stream(self, device: torch.device) -> None:
        """Let what comes next wait for the replay before it, should that be on another stream."""
        stream = torch.cuda.current_stream(device)
        if self._last_stream is not None and self._last_stream != stream:
            stream.wait_stream(self._last_stream)
        self._last_stream = stream

    def milliseconds(self, run: Callable[[], Any], device: torch.device) -> float:
        """How long ``run`` takes from an idle GPU to an idle GPU."""
        stream = _idle_stream(device)
        start = time.perf_counter()
        run()
        stream.synchronize()
        return 1e3 * (time.perf_counter() - start)

    def queueing_milliseconds(self, run: Callable[[], Any], device: torch.device) -> tuple[Any, float, float]:
        """What ``run`` returns, after how long, and after how long the GPU has done its work, from an idle GPU on."""
        stream = _idle_stream(device)
        start = time.perf_counter()
        out = run()
        queued = time.perf_counter()
        stream.synchronize()
        return out, 1e3 * (queued - start), 1e3 * (time.perf_counter() - start)

    def wait(self) -> None:
        """Until no replay is under way, so that its graph may go."""
        if self._last_stream is not None:
            self._last_stream.synchronize()

    def give_back_memory(self) -> None:
        with _one_capture:
            torch.cuda.empty_cache()


def _idle_stream(device: torch.device) -> torch.cuda.Stream:
    """The current stream, when all that was queued on it is done.

    To wait for the whole device is an error while another thread captures, in both threads.
    """
    stream = torch.cuda.current_stream(device)
    stream.synchronize()
    return stream


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that all captures on ``device`` use.

    cuBLAS keeps its workspace for each stream as long as the process lives. It is made to allocate it here, for inside
    a capture it would take it from the graph's pool, and hold on to a large piece of that.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream), torch.no_grad():
        ones = torch.ones(16, 16, device=device)
        torch.addmm(ones[0], ones, ones @ ones)  # one product through cuBLAS, one through cuBLASLt
    return stream


def _clean_up(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream, before: torch.cuda.Stream) -> None:
    """Undo what PyTorch leaves behind when the end of a capture fails."""
    graph.reset()
    with suppress(RuntimeError):  # it says so if the allocator does not direct allocations to the pool any more
        torch._C._cuda_endAllocateToPool(stream.device_index, pool)
        torch._C._cuda_releasePool(stream.device_index, pool)
    # The default generator may believe that the capture goes on, and refuse to draw; one that ends well puts it right.
    with suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        torch.zeros(1, device=stream.device)
    torch.cuda.set_stream(before)
