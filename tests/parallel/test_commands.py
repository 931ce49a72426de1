"""``vidaccel generate`` and ``validate`` under torchrun: one clip, one voice, one record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vidaccel.cli import main
from vidaccel.clips.frames import read_frames

SMALL = ["--device", "cpu", "--dtype", "float32", "--frames", "5", "--steps", "2"]


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "vidaccel", *words]
    plain = os.environ | {"VIDACCEL_IMPL": "torch", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=150, check=False, env=plain)


def test_two_processes_make_the_clip_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text("".join(json.dumps({"seed": seed, "out": f"{seed}"}) + "\n" for seed in (1, 2)))
    done = torchrun("generate", "--jobs", str(jobs), "--out", str(tmp_path / "two"), *SMALL)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line for line in done.stdout.splitlines() if line.startswith(str(tmp_path))] == [
        str(tmp_path / "two" / name) for name in ("1", "2")
    ]
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")
    assert main(["generate", "--jobs", str(jobs), "--out", str(tmp_path / "one"), *SMALL, "--quiet"]) == 0
    for name in ("1", "2"):
        one, two = (np.stack(list(read_frames(tmp_path / folder / name))).astype(int) for folder in ("one", "two"))
        assert np.abs(one - two).max() <= 1, "of 255"
    record = json.loads((tmp_path / "two" / "2.json").read_text())
    axes = {site["axis"]: site for site in record["report"]["parallel"]}
    assert {"guidance", "decode"} <= set(axes) and all(site["ranks"] == 2 for site in axes.values())
    assert axes["guidance"]["bytes_sent"] > 0
    again = torchrun("generate", "--jobs", str(jobs), "--out", str(tmp_path / "two"), *SMALL)
    assert again.stdout.count("done already, skipped") == 2, "and by one process alone"


def test_validate_holds_a_split_clip_against_stock(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    done = torchrun("validate", "--quick", "--controls", "other roundings", "--json", str(record), *SMALL)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(record.read_text())["verdict"]["passed"]
    assert done.stdout.count("PASS") == 1


def test_parallel_without_torchrun_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--parallel", "auto"]) == 2
    assert "torchrun --nproc-per-node 2" in capsys.readouterr().err
