"""Without a GPU Triton kernels run in Triton's interpreter, which must be asked for before a kernel is defined."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gpu_record import GpuRecord
from hypothesis import HealthCheck, Phase, settings

MOST_SECONDS_FOR_ROOM = 60  # that a test waits for those of other processes

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from interpreter import make_faster  # imports Triton, which must find the variable

    make_faster()

# The same few examples in every run. `make fuzz` takes the profile "fuzz": many, others each time, and where some fail
# the smallest of them, with the line that makes it again.
_CHECKS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
_FEW = {"derandomize": True, "max_examples": 5, "phases": (Phase.explicit, Phase.generate), "database": None}
settings.register_profile("ci", deadline=None, suppress_health_check=_CHECKS, **_FEW)
settings.register_profile("fuzz", deadline=None, suppress_health_check=_CHECKS, max_examples=300, print_blob=True)
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-record", type=Path, metavar="FILE", help="where a run on a GPU leaves its record (JSON)")
    parser.addoption("--matrix", type=Path, metavar="FILE", help="run the whole coexistence matrix; its table")


def pytest_configure(config: pytest.Config) -> None:
    """Record the run, of GPU tests where there is a GPU; in one process only, that of the session."""
    if hasattr(config, "workerinput"):
        return
    path = config.getoption("--gpu-record")
    if path and torch.cuda.is_available():
        config.pluginmanager.register(GpuRecord(path, torch.device("cuda")))
    if table := config.getoption("--matrix"):
        from coexistence.table import MatrixRecord

        config.pluginmanager.register(MatrixRecord(table))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests need a GPU; the others fix the CPU as their device and are the same everywhere."""
    if not torch.cuda.is_available():
        no_gpu = pytest.mark.skip(reason="needs a GPU")
        for item in items:
            if item.get_closest_marker("gpu"):  # not "in keywords": they hold the names of parameters too
                item.add_marker(no_gpu)


def pytest_collection_finish() -> None:
    """What there is by now stays, and the garbage collector need not go through it each time: 0.3 s of a full run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """torch.compile takes sizes for variable that differed in a test before: another graph, and twice the time."""
    yield
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()


@pytest.fixture(autouse=True)
def same_attention_backend() -> Iterator[None]:
    """A model's ``set_attention_backend`` sets that of the process, too."""
    module = sys.modules.get("diffusers.models.attention_dispatch")
    before = module._AttentionBackendRegistry.get_active_backend()[0] if module else None
    yield
    if module := sys.modules.get("diffusers.models.attention_dispatch"):
        registry = module._AttentionBackendRegistry
        registry.set_active_backend(before or module.AttentionBackendName.NATIVE)


@pytest.fixture
def device() -> torch.device:
    """Where kernels run in this session: the GPU if there is one, else the CPU under the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The PyTorch implementations, for tests that are not about kernels: interpreted these are slow."""
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")


@pytest.fixture(autouse=True)
def memory_of_the_gpu_is_shared(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where several processes share a GPU: a test waits until there is room for a large one, and keeps nothing."""
    if request.node.get_closest_marker("gpu"):
        deadline = time.monotonic() + MOST_SECONDS_FOR_ROOM
        while not _has_room() and time.monotonic() < deadline:
            time.sleep(0.1)
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _has_room() -> bool:
    free, total = torch.cuda.mem_get_info()
    return free > total / 3
