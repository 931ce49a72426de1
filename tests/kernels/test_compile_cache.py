"""Triton's folder of compiled kernels, where it cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import triton

from vidaccel.kernels.compile_cache import ensure_writable


@pytest.fixture(autouse=True)
def knobs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_CACHE_DIR", os.environ.get("TRITON_CACHE_DIR", ""))  # put back afterwards
    with triton.knobs.cache.scope():
        yield


def test_a_folder_that_can_be_written_stays(tmp_path: Path) -> None:
    triton.knobs.cache.dir = str(tmp_path / "new")
    ensure_writable()
    assert triton.knobs.cache.dir == str(tmp_path / "new") and not list((tmp_path / "new").iterdir())


def test_another_takes_its_place_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    for _ in range(2):
        triton.knobs.cache.dir = str(tmp_path / "file")
        ensure_writable()
        if caplog.records:
            own = Path(caplog.records[0].args[2])  # type: ignore[index,arg-type]
    assert len(caplog.records) == 1 and "Triton cannot write into" in caplog.text
    (own / "kernel").touch()


RUNS_A_KERNEL = """
import torch
from vidaccel.kernels.ffn.geglu import GEGLU
from vidaccel.kernels.op import listening
x = torch.randn(3, 5, 64, device="cuda")
with torch.no_grad(), listening(checks=True) as events:
    GEGLU(x)
assert not events[0].problem, events
assert events[0].implementation == "triton" or "triton: " in events[0].reason, events
"""


@pytest.mark.gpu
@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_a_broken_folder_costs_no_result(tmp_path: Path, kept: float) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", RUNS_A_KERNEL], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        kernels = [path for path in tmp_path.rglob("*") if path.suffix in (".cubin", ".json", ".ptx", ".ttir")]
        assert kernels
        for path in kernels:
            content = path.read_bytes()
            path.write_bytes(content[: int(kept * len(content))])
