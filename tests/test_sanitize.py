"""What the script that runs compute-sanitizer makes of its words, and says where it cannot run."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "sanitize.py"
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
WRONG = """========= Invalid __global__ read of size 4 bytes
=========     at _geglu_kernel+0x1a0 in geglu.py:58
=========     by thread (3,0,0) in block (0,0,0)
========= Invalid __global__ read of size 4 bytes
=========     at 0x90 in _geglu_kernel
========= ERROR SUMMARY: 2 errors
"""
RACES = "========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)\n"


@pytest.mark.parametrize(
    ("text", "code", "kernels", "verdict"),
    [
        (CLEAN, 0, ["_geglu_kernel"], "clean"),
        (CLEAN + WRONG, 0, ["_geglu_kernel"], "2 errors"),
        (RACES, 0, ["_geglu_kernel"], "3 errors"),
        (CLEAN, 1, ["_geglu_kernel"], "the calls failed (exit code 1)"),
        (CLEAN, 0, [], "no kernel ran"),
        ("", 0, ["_geglu_kernel"], "no summary: the tool did not run"),
    ],
)
def test_what_a_log_says(text: str, code: int, kernels: list[str], verdict: str) -> None:
    script = runpy.run_path(str(SCRIPT))
    found = script["parse"](text)
    assert script["verdict"](found, code, kernels) == verdict
    assert found.kernels == ({"_geglu_kernel": 2} if WRONG in text else {})


def test_a_missing_tool_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and "apt-get install" in done.stderr
