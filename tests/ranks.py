"""Ranks of a process group on the CPU (gloo), for tests: processes that stay, and run what they are sent.

What runs there is a function of a test file, given by itself, with arguments that can be pickled; each rank sends back
what it returned, or raised. Kernels are not what these tests are about: the ranks run PyTorch's implementations.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import get_context

ANSWER_WITHIN = 150  # seconds, of a machine that is busy with other tests


class Team:
    """``size`` processes, which begin when the first call comes."""

    def __init__(self, size: int, folder: Path) -> None:
        context = get_context("forkserver")  # which has imported what takes long once for all
        context.set_forkserver_preload(["tiny_models", "vidaccel.patching.patch"])
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size, str(folder / "store")), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``function(*args)`` returns on every rank; raises what the first rank that failed has raised."""
        outcomes = self.outcomes(function, *args)
        for value, text in outcomes:
            if isinstance(value, BaseException):
                raise AssertionError(text) from value
        return [value for value, _ in outcomes]

    def outcomes(self, function: Callable[..., Any], *args: Any) -> list[tuple[Any, str]]:
        """The same, with errors as values beside their traceback; EOFError for a process that has ended."""
        for pipe in self.pipes:
            pipe.send((function.__code__.co_filename, function.__name__, args))
        return [self._answer(pipe) for pipe in self.pipes]

    @staticmethod
    def _answer(pipe: Any) -> tuple[Any, str]:
        if not pipe.poll(ANSWER_WITHIN):
            return TimeoutError("a rank hangs"), "a rank hangs"
        try:
            answer: tuple[Any, str] = pipe.recv()
            return answer
        except EOFError as error:
            return error, "a rank has ended"

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@cache
def _loaded(file: str) -> ModuleType:
    """A test file as a module: pytest imports it by a name that only it knows."""
    spec = spec_from_file_location(Path(file).stem, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _serve(pipe: Any, rank: int, size: int, store: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "VIDACCEL_IMPL": "torch"}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        file, name, args = pipe.recv()
        try:
            pipe.send((getattr(_loaded(file), name)(*args), ""))
        except BaseException as error:
            pipe.send((error, traceback.format_exc()))
