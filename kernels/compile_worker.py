"""The process that compiles kernels ahead of their first launch; see ``compile_ahead.py``.

It reads jobs from stdin, one JSON object a line, and forks once for each: a compiler that crashes takes nothing else
with it. It answers on stdout: ``ready`` once, then the number of each job that has ended, well or badly. It never calls
the GPU's driver.

A model's first call is a race with it, so it does without PyTorch, whose import takes longer than all else here. The
modules of kernels import PyTorch for the code around the kernels, which does not run here: they are given a stand-in.

It kills itself and its jobs when stdin closes, when its parent is gone, or when nothing came for a while.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import json
import os
import select
import signal
import sys
import types
from contextlib import suppress
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import triton_key

__all__ = ["main"]

NICENESS = 10
IDLE_SECONDS = 60
CHECK_SECONDS = 5  # how often it looks whether its parent lives: children of the parent may keep stdin open


class _Anything(type):
    """The class of what has every attribute and takes every call, and is itself all of these."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls


class _Stub(metaclass=_Anything):
    """A class, so that classes can derive from it."""


class _StubModule(types.ModuleType):
    version = types.SimpleNamespace(hip=None)  # kernels are compiled ahead for NVIDIA GPUs alone

    def __getattr__(self, name: str) -> Any:
        return getattr(_Stub, name)


class _StubTorch(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a stub for every module of PyTorch."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        of_torch = name.partition(".")[0] == "torch"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if of_torch else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StubModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Driver:
    """Tells Triton which GPU to compile for, in place of the driver."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0


def main() -> None:
    """Serve until there is nobody to serve."""
    os.nice(NICENESS)
    sys.meta_path.insert(0, _StubTorch())
    triton_key()  # a hash of all of Triton, part of every cache key: the jobs inherit it
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a module or the compiler prints is no answer
    parent, idle, unread = os.getppid(), 0, b""
    running: dict[int, int] = {}  # numbers of jobs, by the pipe that closes when the job's process ends
    print("ready", file=answers, flush=True)
    while os.getppid() == parent and idle < IDLE_SECONDS:
        ended, _, _ = select.select([0, *running], [], [], CHECK_SECONDS)
        idle = 0 if ended or running else idle + CHECK_SECONDS
        for pipe in ended:
            if pipe in running:
                os.close(pipe)
                os.wait()
                print(running.pop(pipe), file=answers, flush=True)
            elif received := os.read(0, 1 << 16):
                *lines, unread = (unread + received).split(b"\n")
                for job in map(json.loads, lines):
                    running[_start(job)] = job["number"]
            else:
                idle = IDLE_SECONDS
    os.killpg(0, signal.SIGKILL)  # its jobs, and the assemblers that these have started


def _start(job: dict[str, Any]) -> int:
    """Compile in a process of its own; the end of a pipe that is readable once that has ended."""
    with suppress(Exception):  # left to the job, which fails alone
        importlib.import_module(job["module"])
    readable, writable = os.pipe()
    if os.fork():
        os.close(writable)
        return readable
    with suppress(BaseException):
        _compile(**job)
    os._exit(0)


def _compile(module: str, kernel: str, target: list[Any], specialization: str, **_: Any) -> None:
    function = getattr(importlib.import_module(module), kernel)
    triton.runtime.driver.set_active(_Driver(GPUTarget(*target)))
    compiled = function.preload(specialization)
    if target[0] == "cuda":
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(compiled.src, compiled.metadata)  # the C code that launches it is compiled, and cached, as well
