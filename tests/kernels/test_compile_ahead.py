"""That kernels compiled in another process are what the first launch finds, and that nothing depends on the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from vidaccel.kernels import compile_ahead
from vidaccel.kernels.hopper import gluon_reason
from vidaccel.kernels.launch import DIRECT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DIRECT, reason="nothing is compiled ahead with this version of Triton"),
]

# A user's script, without ``if __name__ == "__main__"``, on a machine with a Hopper GPU and four CPUs.
SCRIPT = """
import contextlib, json, multiprocessing.spawn, os, signal, subprocess, sys, time
import torch, triton
from triton.backends.compiler import GPUTarget

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0

triton.runtime.driver.set_active(Driver())
torch.cuda.current_device = lambda: 0
torch.cuda.device = lambda device: contextlib.nullcontext()

from vidaccel.kernels import compile_ahead
from vidaccel.kernels.ffn.geglu import _geglu_kernel as kernel

compile_ahead.available_cpus = lambda: 4
processes = []
class Popen(subprocess.Popen):
    def __init__(self, *args, **keywords):
        if "compile_worker" in str(args):
            processes.append(self)
        super().__init__(*args, **keywords)
subprocess.Popen = Popen
hits = []
triton.knobs.compilation.listener = lambda *, cache_hit=False, **_: hits.append(cache_hit)

def begin(block):
    dtypes = (torch.float16, torch.float16)
    options = dict(ACTIVATION="gelu", BLOCK=block, num_warps=4)
    compile_ahead.begin(block, kernel, torch.device("cuda", 0), (*dtypes, 320, 64000), options)

def first_launch(block):
    compile_ahead.finish(block)
    kernel.warmup(torch.float16, torch.float16, 320, 64000, ACTIVATION="gelu", BLOCK=block, num_warps=4, grid=(1,))

BLOCKS = (256, 512, 1024)
"""
REPORT = 'print(json.dumps({"hits": hits, "processes": [p.pid for p in processes]}))\n'
UNTIL_COMPILED = """
from pathlib import Path
cache, started = Path(os.environ["TRITON_CACHE_DIR"]), time.time()
while len(list(cache.glob("*/__grp__*"))) < len(BLOCKS) and time.time() < started + 60:
    time.sleep(0.05)
"""


def run(script: str, cache: Path) -> dict[str, Any]:
    """What the script reports: for each kernel asked for, whether the cache had it; the processes it started."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script + REPORT]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def assert_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "it outlives its parent"
        time.sleep(0.05)


UNDER_WAY = """
begin(2048)
while not [found for found in cache.glob("*/*.ttir") if found.stat().st_mtime > started]:
    time.sleep(0.002)
first_launch(2048)
"""
FORGOTTEN = """
compile_ahead.MOST_UNDER_WAY = 2
begin(4096), begin(8192)
while not all(job.done() for job in compile_ahead.under_way.values()):
    time.sleep(0.002)
begin(16384)
assert list(compile_ahead.under_way) == [16384]
"""
CACHED = """
processes[0].kill(), processes[0].wait()
time.sleep(0.5)
for block in BLOCKS:
    begin(block)
"""


def test_the_first_launch_finds_what_was_compiled(tmp_path: Path) -> None:
    script = "for block in BLOCKS: begin(block)\n" + UNTIL_COMPILED + "for block in BLOCKS: first_launch(block)\n"
    script += "started = time.time()\n" + UNDER_WAY  # a launch waits for a job that has begun
    script += FORGOTTEN  # jobs that ended long ago and that no launch has asked for
    script += CACHED  # what is in the cache is not compiled again, and no process is started for it
    report = run(SCRIPT + script, tmp_path)
    assert report["hits"] == [True] * 4
    (pid,) = report["processes"]
    assert_gone([pid])


NOT_COMPILED_YET = """
def launched(block):
    first_launch(block)
    counts.append(len(processes))

counts = []
compile_ahead.available_cpus = lambda: 3  # too few
begin(256), launched(256)
compile_ahead.available_cpus = lambda: 4
process = multiprocessing.current_process()
process._config["daemon"] = True  # which may have no children
begin(512), launched(512)
process._config["daemon"] = False
begin(1024), launched(1024)  # the process is not ready
begin(2048), os.killpg(processes[0].pid, signal.SIGKILL), launched(2048)
assert counts == [0, 0, 1, 1], counts
"""
COLD = """
folder = os.path.join(os.environ["TRITON_CACHE_DIR"], "kernel")
os.makedirs(folder), compile_ahead.start_if_cold()
assert not processes, "there may be nothing to compile"
os.rmdir(folder), compile_ahead.start_if_cold(), compile_ahead.start_if_cold()
begin(256), os.killpg(processes[0].pid, signal.SIGKILL), first_launch(256)
"""
BROKEN = """
multiprocessing.spawn.set_executable('/bin/false')
begin(512), processes[0].wait(), time.sleep(0.5), begin(256), first_launch(256)
"""


@pytest.mark.parametrize(
    ("script", "launches"), [(NOT_COMPILED_YET, 4), (COLD, 1), (BROKEN, 1)], ids=["not-compiled-yet", "cold", "broken"]
)
def test_a_launch_compiles_what_the_process_has_not(script: str, launches: int, tmp_path: Path) -> None:
    report = run(SCRIPT + script, tmp_path)
    assert report["hits"] == [False] * launches
    assert len(report["processes"]) == 1
    assert_gone(report["processes"])


GLUON = (
    """
from vidaccel.kernels import gluon_parts, hopper
from vidaccel.kernels.ffn import linear_geglu_gluon
from vidaccel.kernels.attention import spatial_attention_gluon
from vidaccel.kernels.attention.spatial_attention import SPATIAL_ATTENTION
from vidaccel.kernels.ffn.linear_geglu import LINEAR_GEGLU
from triton.runtime.jit import MockTensor

def meta(*shape):
    return torch.empty(*shape, dtype=torch.float16, device="meta")

device, BLOCKS = torch.device("cuda", 0), (0, 1)
LINEAR_GEGLU.compile_ahead(device, meta(128, 320), meta(2560, 320), meta(2560), impl="gluon")
rows = meta(1, 128, 640)
SPATIAL_ATTENTION.compile_ahead(device, rows, rows, rows, 10, 1.0, impl="gluon")
"""
    + UNTIL_COMPILED
    + """
# as real tensors would be told to Triton: of other sizes, and strides of a packed projection
rows = meta(4, 1000, 1920)[..., :640]
geglu = linear_geglu_gluon.prepare(6400, 320, 1280, torch.float16, torch.device("meta"))
attention = spatial_attention_gluon.bind(rows, rows, rows, 10, 0.125)
for launch, tensors in ((geglu, 4), (attention, 4)):
    compile_ahead.finish(launch._name())
    mocks = [MockTensor(torch.float16)] * tensors
    launch._kernel.warmup(*launch._arguments(mocks), *launch._numbers, grid=(1,), **launch._constants)
"""
)


def test_gluon_kernels_are_compiled_ahead(tmp_path: Path) -> None:
    pytest.importorskip("vidaccel.kernels.gluon_parts")
    assert run(SCRIPT + GLUON, tmp_path)["hits"] == [True] * 2


WITHOUT_TORCH = """
import importlib, sys
from vidaccel.kernels.compile_worker import _StubTorch
sys.meta_path.insert(0, _StubTorch())
for name in {names}:
    importlib.import_module(name)
assert type(sys.modules["torch"]).__name__ == "_StubModule"
"""


def test_kernels_are_compiled_without_torch() -> None:
    kernels = Path(compile_ahead.__file__).parent
    paths = [path.relative_to(kernels).with_suffix("") for path in kernels.rglob("*.py")]
    names = [".".join(("vidaccel", "kernels", *path.parts)) for path in paths]
    assert "vidaccel.kernels.attention.spatial_attention_gluon" in names
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH.format(names=names)], env=environment, check=True)


def test_cpus_are_shared_by_the_ranks_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(Path, "read_text", lambda path: "2000000 100000\n")
    assert compile_ahead.available_cpus() == 20
    monkeypatch.setattr(Path, "read_text", lambda path: "max 100000\n")
    assert compile_ahead.available_cpus() == 64
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert compile_ahead.available_cpus() == 8


ON_A_GPU = (
    """
import json, os, time
import torch, triton
from vidaccel.kernels import compile_ahead
from vidaccel.kernels.ffn.geglu import _geglu_kernel, geglu_ref
from vidaccel.kernels.launch import Launch

BLOCKS = (256, 512, 1024)
compile_ahead.available_cpus = lambda: 4
hits, processes = [], []
triton.knobs.compilation.listener = lambda *, cache_hit=False, **_: hits.append(cache_hit)
x, y = torch.randn(64, 640, device="cuda").half(), torch.empty(64, 320, device="cuda").half()
options = {"ACTIVATION": "gelu", "num_warps": 4}
launches = [Launch(_geglu_kernel, (y.numel() // b,), 320, y.numel(), BLOCK=b, **options) for b in BLOCKS]
for launch in launches:
    launch.compile_ahead(x.device, x.dtype, y.dtype)
"""
    + UNTIL_COMPILED
    + """
for launch in launches * 2:
    y.fill_(torch.nan)
    launch(x, y)
    torch.testing.assert_close(y, geglu_ref(x))
"""
)


@pytest.mark.gpu
def test_the_first_launch_on_a_gpu_compiles_nothing(tmp_path: Path) -> None:
    assert run(ON_A_GPU, tmp_path)["hits"] == [True] * 3


GLUON_ON_A_GPU = (
    """
import json, os, time
import torch, triton
from vidaccel.kernels import compile_ahead
from vidaccel.kernels.attention import spatial_attention
from vidaccel.kernels.ffn import linear_geglu

BLOCKS = range(3)  # two kernels, and that of the GELU behind a product
compile_ahead.available_cpus = lambda: 4
hits, processes = [], []
triton.knobs.compilation.listener = lambda *, cache_hit=False, **_: hits.append(cache_hit)
x, bias = torch.randn(2, 256, 320, device="cuda").half(), torch.randn(2560, device="cuda").half()
weight = torch.randn(2560, 320, device="cuda").half() / 16
spatial_attention.compile_ahead(weight[:320], 5)
linear_geglu.compile_ahead(weight)
"""
    + UNTIL_COMPILED
    + """
torch.testing.assert_close(
    spatial_attention.spatial_attention(x, x, x, 5, impl="gluon"),
    spatial_attention.spatial_attention(x, x, x, 5, impl="torch"), atol=2e-3, rtol=2e-3,
)
torch.testing.assert_close(
    linear_geglu.linear_geglu(x, weight, bias, impl="gluon"),
    linear_geglu.linear_geglu(x, weight, bias, impl="torch"), atol=2e-2, rtol=2e-2,
)
"""
)


@pytest.mark.gpu
def test_the_first_launch_of_a_gluon_kernel_compiles_nothing(tmp_path: Path) -> None:
    if reason := gluon_reason(torch.empty(0, device="cuda")):
        pytest.skip(reason)
    assert run(GLUON_ON_A_GPU, tmp_path)["hits"] == [True] * 2
