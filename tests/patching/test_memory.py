"""What a patched pipeline keeps: nothing that grows with the calls, little of each size, and nothing once restored.

And what it gives: the same bits each time, as the stock pipeline does.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakSet

import numpy as np
import pytest
import torch
from tiny_models import tiny_motion_unet, tiny_synthetic_pipeline
from torch import Tensor, nn

from vidaccel import patch_module, patch_pipeline
from vidaccel.clips.generation import generate
from vidaccel.sites.plain import hook_reason

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("plain_pytorch")]

ONE_LEVEL = {  # with attention in the middle
    "down_block_types": ("DownBlockMotion",),
    "up_block_types": ("UpBlockMotion",),
    "block_out_channels": (64,),
}
ONE_STEP = {"num_inference_steps": 1}
PIPELINES = ("svd", "animatediff", "wan2.1-t2v-1.3b", "ltx-video-2b", "hunyuanvideo1.5-480p")


def called(unet: nn.Module, size: int, device: torch.device | None = None) -> Tensor:
    torch_random = torch.Generator().manual_seed(size)
    sample = torch.randn(2, 4, 3, 8, size, generator=torch_random).to(device)
    with torch.no_grad():
        return unet(sample, torch.tensor(5.0).to(device), torch.randn(6, 7, 32).to(device)).sample


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())


def test_fifty_calls_in_two_threads_leave_nothing() -> None:
    unet = tiny_motion_unet(**ONE_LEVEL)
    with patch_module(unet), ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda size: called(unet, size), [8, 16] * 4))
        before, objects = tensors(), len(gc.get_objects())
        list(pool.map(lambda size: called(unet, size), [8, 16] * 25))
        assert tensors() == before
        assert len(gc.get_objects()) < objects + 200


def test_another_size_takes_little_memory() -> None:
    unet = tiny_motion_unet()
    modules = len(list(unet.modules()))
    with patch_module(unet):
        called(unet, 8)
        gc.collect()
        tracemalloc.start()
        try:
            for size in range(10, 26, 2):
                called(unet, size)
            gc.collect()
            kept, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert kept < 8 * modules * 500, "bytes for each size and module"


@pytest.mark.parametrize("name", PIPELINES)
def test_a_restored_pipeline_keeps_nothing(name: str) -> None:
    pipe, arguments = tiny_synthetic_pipeline(name)
    first = generate(pipe, arguments, seed=0).frames
    before = tensors()
    with patch_pipeline(pipe) as report:
        generate(pipe, arguments, seed=0)
    assert np.array_equal(generate(pipe, arguments, seed=0).frames, first)
    assert tensors() == before and report.sites


def test_classes_that_libraries_make_for_each_module_may_go() -> None:
    kinds: WeakSet[type] = WeakSet()
    for _ in range(1500):
        kind = type("Parametrized", (nn.Linear,), {})
        kinds.add(kind)
        hook_reason(kind(1, 1))
    gc.collect()
    assert len(kinds) < 1100


@pytest.mark.gpu
def test_fifty_calls_on_a_gpu_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIDACCEL_IMPL")
    unet, gpu = tiny_motion_unet().to("cuda"), torch.device("cuda")
    with patch_module(unet), ThreadPoolExecutor(2) as pool:
        allocated = []
        for _ in range(2):  # at first libraries take memory for each thread
            list(pool.map(lambda size: called(unet, size, gpu), [8, 16] * 25))
            gc.collect()
            allocated.append(torch.cuda.memory_allocated())
        assert allocated[0] == allocated[1]


SIZES = ((32, 32), (16, 32), (32, 16), (16, 48), (48, 16))
ROUNDS = 25  # of two clips each


def running_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def in_use_after_each_round(measure: Callable[[], int], device: str = "cpu") -> list[int]:
    """Bytes, after rounds of two whole clips, each by its own pipeline in a new thread, at one size after another."""
    made = [tiny_synthetic_pipeline("wan2.1-t2v-1.3b") for _ in range(2)]

    def clip(pipe: Any, arguments: dict[str, Any], number: int) -> None:
        height, width = SIZES[number % len(SIZES)]
        changed = {"height": height, "width": width, "num_frames": 5, **ONE_STEP}
        moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in (arguments | changed).items()}
        generate(pipe, moved, seed=number)

    found = []
    with ExitStack() as patched:
        for pipe, _ in made:
            patched.enter_context(patch_pipeline(pipe.to(device)))
        for number in range(ROUNDS):
            threads = running_threads()
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(clip, *zip(*made, strict=True), [number] * 2))
            deadline = time.monotonic() + 1
            while running_threads() > threads and time.monotonic() < deadline:
                time.sleep(0.001)  # an ended thread frees what libraries keep for it after Python has let go of it
            gc.collect()
            found.append(measure())
    return found


def grown(found: list[int]) -> float:
    """From clips 11 to 20 on to the last ten: the medians of each."""
    return statistics.median(found[-len(SIZES) :]) - statistics.median(found[len(SIZES) : 2 * len(SIZES)])


class Mallinfo(ctypes.Structure):
    """What glibc tells of its heaps, of all threads."""

    _fields_: ClassVar = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
    )]  # fmt: skip


def test_fifty_clips_leave_nothing_on_the_host() -> None:
    """The resident set would tell less: it has what malloc keeps for threads to come, and moves by tens of MB."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("needs glibc 2.33")
    libc.mallinfo2.restype = Mallinfo
    blocks = []

    def tensors_and_all_else_in_c() -> int:
        blocks.append(sys.getallocatedblocks())
        heaps = libc.mallinfo2()
        return int(heaps.uordblks + heaps.hblkhd)

    found = in_use_after_each_round(tensors_and_all_else_in_c)
    assert grown(found) < 2**18, "bytes"
    assert grown(blocks) < 1000, "Python's objects"


@pytest.mark.gpu
def test_fifty_clips_leave_nothing_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIDACCEL_IMPL")
    reserved = []

    def allocated() -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
        return torch.cuda.memory_allocated()

    found = in_use_after_each_round(allocated, "cuda")
    assert grown(found) < 2**18
    assert grown(reserved) < 2**23


def digests(name: str) -> list[str]:
    """Of a clip, unpatched and patched."""
    pipe, arguments = tiny_synthetic_pipeline(name)

    def digest() -> str:
        first, second = (generate(pipe, arguments | ONE_STEP, seed=3).frames for _ in range(2))
        assert np.array_equal(first, second), "the same process"
        return hashlib.sha256(np.ascontiguousarray(first)).hexdigest()

    unpatched = digest()
    with patch_pipeline(pipe):
        return [unpatched, digest()]


def test_a_seed_gives_the_same_bits_in_every_process() -> None:
    names = PIPELINES[:3]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__, *names], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [found for name in names for found in digests(name)]


if __name__ == "__main__":  # the other process
    for name in sys.argv[1:]:
        print(*digests(name))
