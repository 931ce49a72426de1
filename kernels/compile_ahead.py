"""Compiling kernels before they are needed, in other processes.

A model's first call needs dozens of kernels, and compiles them one after the other. Which ones follows in part from its
weights alone: blocks foretell those when they are patched. The others are foretold by the check of a block's corner,
which comes to every op of the block before the first kernel runs (``Op._foretell``). They are compiled meanwhile by a
process that fills Triton's disk cache, where the first launch finds them. Threads would not do: compiling holds
Python's lock for long enough to slow the calls beside it.

Nothing depends on it. Whatever is not compiled when its first launch comes is compiled by that launch: where the
process is not ready, where it failed, where it is not started at all.
"""

from __future__ import annotations

import atexit
import hashlib
import itertools
import json
import logging
import multiprocessing
import multiprocessing.spawn
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Hashable, Mapping
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime import JITFunction

from vidaccel.config import count_of
from vidaccel.kernels.compile_cache import ensure_writable
from vidaccel.kernels.context import while_set

__all__ = [
    "USUAL",
    "Foreseen",
    "available_cpus",
    "begin",
    "finish",
    "foreseeing",
    "foreseen",
    "is_cold",
    "is_under_way",
    "start_if_cold",
    "under_way",
]

logger = logging.getLogger(__name__)

LEAST_CPUS = 4  # with fewer, it would slow the calls beside it
MOST_JOBS = 8  # at a time
MOST_UNDER_WAY = 1024  # from which on the ended ones are forgotten that no launch has asked for
PATIENCE_SECONDS = 30  # that a launch waits for a job that has begun
# sys.path as it is here, and no folder before it
_COMMAND = "import sys; sys.path[:] = sys.argv[1:]; from vidaccel.kernels.compile_worker import main; main()"


class Foreseen(NamedTuple):
    """What weights do not tell of the calls to come.

    Attributes:
        frames: Of a clip: what most pipelines make if they are not told.
        upcast: Whether the weights will be float32.
    """

    frames: int = 16
    upcast: bool = False


USUAL = Foreseen()
_foreseen: ContextVar[Foreseen] = ContextVar("foreseen", default=USUAL)
foreseen = _foreseen.get


def foreseeing(calls: Foreseen) -> AbstractContextManager[object]:
    """Compile for such calls inside the ``with`` block."""
    return while_set(_foreseen, calls)


class _Worker:
    """The process, and what is to be compiled there. A job that has not been sent can be cancelled."""

    def __init__(self, most_jobs: int) -> None:
        self._most_jobs = most_jobs
        self._free = 0  # until the process is ready
        self._numbers = itertools.count()
        self._waiting: deque[tuple[Future[None], dict[str, Any]]] = deque()
        self._running: dict[int, Future[None]] = {}
        self._lock = threading.Lock()
        self.was_ready = self.has_ended = False
        self._process = subprocess.Popen(
            [multiprocessing.spawn.get_executable(), "-c", _COMMAND, *map(str, sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is not for it
        )
        atexit.register(self.close)
        threading.Thread(target=self._listen, name="vidaccel-compile", daemon=True).start()

    def submit(self, job: dict[str, Any]) -> Future[None]:
        """Compile when there is room; the future tells when that has ended, not whether it went well."""
        future: Future[None] = Future()
        with self._lock:
            if self.has_ended:
                future.cancel()
            else:
                self._waiting.append((future, job))
                self._send()
        return future

    def close(self) -> None:
        """End the process and its jobs."""
        with suppress(OSError):  # it has ended by itself
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _send(self) -> None:
        """Start as many jobs as there is room for. The caller holds the lock."""
        while self._free and self._waiting:
            future, job = self._waiting.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            number = next(self._numbers)
            self._running[number] = future
            self._free -= 1
            with suppress(OSError, ValueError):  # the process has ended, and ``_listen`` is about to see it
                stdin: Any = self._process.stdin
                stdin.write(json.dumps(job | {"number": number}).encode() + b"\n")
                stdin.flush()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._lock:
                if line == b"ready\n":
                    self.was_ready, self._free = True, self._most_jobs
                elif line.strip().isdigit():  # and not what some module prints when it is imported
                    self._running.pop(int(line)).set_result(None)
                    self._free += 1
                self._send()
        with self._lock:
            self.has_ended = True
            for future in self._running.values():
                future.set_result(None)
            for future, _ in self._waiting:
                future.cancel()
        atexit.unregister(self.close)
        self.close()


_worker: _Worker | None = None
_lock = threading.Lock()
under_way: dict[Hashable, Future[None]] = {}


def begin(
    name: Hashable, kernel: JITFunction, device: torch.device, arguments: tuple[Any, ...], constants: Mapping[str, Any]
) -> None:
    """Begin to compile a kernel in the background, if that is possible here.

    Args:
        name: What :func:`finish` will call this job.
        kernel: A kernel of a module that can be imported.
        device: The GPU to compile for.
        arguments: The kernel's arguments before its constants, a dtype in place of each tensor.
        constants: Its constexprs, and options of the compiler.
    """
    with _lock:
        if name in under_way or not _may_start():
            return
        try:
            with torch.cuda.device(device):
                job = _job(kernel, arguments, constants)
            if len(under_way) >= MOST_UNDER_WAY:
                _forget_ended()
            under_way[name] = _nothing_to_do() if job is None else _the_worker().submit(job)
        except Exception as error:  # the launch will tell, if it is an error there
            logger.debug("%s is not compiled ahead: %s", kernel.__name__, error)


def _nothing_to_do() -> Future[None]:
    """For a kernel in the cache: a model's blocks ask for the same ones, and each time it takes 1 ms to find out."""
    future: Future[None] = Future()
    future.set_result(None)
    return future


def start_if_cold() -> None:
    """Start the process now if Triton's cache is empty: there will be kernels to compile, and it takes a while."""
    ensure_writable()
    with _lock, suppress(OSError):
        if _may_start() and not any(Path(triton.knobs.cache.dir).iterdir()):
            _the_worker()


def is_cold() -> bool:
    """Whether this process had kernels to compile: then there may be more of them."""
    return _worker is not None


def is_under_way(name: Hashable) -> bool:
    """Whether a job has begun, or waits for its turn, and has not ended."""
    future = under_way.get(name)
    return future is not None and not future.done()


def _forget_ended() -> None:
    for name in [name for name, future in list(under_way.items()) if future.done()]:
        under_way.pop(name, None)


def finish(name: Hashable) -> None:
    """Wait for a job that is being compiled; drop one that is not."""
    future = under_way.get(name)
    if future is not None and not future.cancel():
        wait([future], PATIENCE_SECONDS)
    under_way.pop(name, None)


def available_cpus() -> int:
    """CPUs for this process: its affinity, cut by its container's quota and shared with the ranks of its host."""
    cpus = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):  # no such file, or no quota ("max")
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cpus = min(cpus, int(quota) // int(period))
    return cpus // count_of("LOCAL_WORLD_SIZE")


def _may_start() -> bool:
    failed = _worker is not None and _worker.has_ended and not _worker.was_ready
    frozen = getattr(sys, "frozen", False)  # its executable is no Python
    return not (failed or frozen or multiprocessing.current_process().daemon or available_cpus() < LEAST_CPUS)


def _the_worker() -> _Worker:
    global _worker
    if _worker is None or _worker.has_ended:
        _worker = _Worker(min(available_cpus() // 2, MOST_JOBS))
    return _worker


def _job(kernel: Any, arguments: tuple[Any, ...], constants: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the process needs to know, or None: the kernel is in the cache, or cannot be made anew from text.

    The steps are those of ``JITFunction.run`` up to where it compiles.
    """
    from triton.runtime.jit import MockTensor, serialize_specialization_data

    module, name = kernel.fn.__module__, kernel.fn.__qualname__
    names: Any = vars(sys.modules[module])
    if names.get(name) is not kernel or module == "__main__":
        return None
    keywords = dict(constants)
    keywords["debug"] = keywords.get("debug", kernel.debug) or triton.knobs.runtime.debug
    keywords["instrumentation_mode"] = triton.knobs.compilation.instrumentation_mode
    _, _, target, backend, binder = kernel.device_caches[torch.cuda.current_device()]
    bound, specialization, options = binder(*map(MockTensor.wrap_dtype, arguments), **keywords)
    options, signature, constexprs, attrs = kernel._pack_args(backend, keywords, bound, specialization, options)
    if not all(map(_survives_text, constexprs.values())):
        return None
    if _is_cached(kernel.ASTSource(kernel, signature, constexprs, attrs), backend, options):
        return None
    data = serialize_specialization_data(f"{module}.{name}", signature, constexprs, attrs, options, key="")
    return {
        "module": module,
        "kernel": name,
        "target": [target.backend, target.arch, target.warp_size],
        "specialization": data,
    }


def _survives_text(constant: Any) -> bool:
    if isinstance(constant, str):
        return not tl.dtype.is_dtype(constant)
    return constant is None or isinstance(constant, (bool, int, float, tl.dtype))


def _is_cached(source: Any, backend: Any, options: Any) -> bool:
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.runtime.cache import get_cache_key, get_cache_manager

    key = get_cache_key(source, backend, options, get_cache_invalidating_env_vars())
    manager = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
    return manager.get_group(f"{source.name[:150]}.json") is not None
