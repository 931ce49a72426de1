"""The record that ``make gpu-test`` leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TESTS = """
import pytest

def test_passes(): pass
def test_fails(): assert 1 == 2, "one is not two"
@pytest.fixture
def broken():
    yield
    raise ValueError("cannot clean up")
def test_passes_but_breaks(broken): pass
@pytest.mark.skip(reason="no")
def test_is_skipped(): pass
def test_skips_itself(): pytest.skip("no")
"""
RUN = """
import sys
from pathlib import Path
import pytest, torch
from gpu_record import GpuRecord
record = GpuRecord(Path(sys.argv[2]), torch.device("cpu"))
sys.exit(pytest.main(["--continue-on-collection-errors", sys.argv[1]], plugins=[record]))
"""


def test_it_counts_every_test_once_and_names_failures(tmp_path: Path) -> None:
    tests = tmp_path / "suite"
    tests.mkdir()
    (tests / "test_some.py").write_text(TESTS)
    (tests / "test_other.py").write_text("import nothing_of_this_name")
    path = tmp_path / "record.json"
    command = [sys.executable, "-c", RUN, str(tests), str(path)]
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    done = subprocess.run(
        command, cwd=tests, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": paths}
    )
    assert done.returncode == 1, done.stdout
    record = json.loads(path.read_text())
    assert record["counts"] == {"passed": 1, "failed": 3, "skipped": 2}
    failures = {name.rpartition("/")[2]: reason for name, reason in record["failures"].items()}
    assert failures["test_some.py::test_fails"].startswith("AssertionError: one is not two")
    assert failures["test_some.py::test_passes_but_breaks"] == "ValueError: cannot clean up"
    assert "nothing_of_this_name" in failures["test_other.py"]
    assert record["seconds"] > 0 and {"commit", "device", "torch"} <= record["environment"].keys()
