"""The command itself: what becomes of output that nobody takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
from vidaccel import cli
from vidaccel.errors import UsageError

class Command:
    def add_arguments(parser): pass
    def run(args):
        {body}

cli.import_module = lambda name: Command
sys.exit(cli.main(["env"]))
"""


def run(body: str, stdout: str | int = subprocess.PIPE, **environment: str) -> subprocess.CompletedProcess[bytes]:
    with Path(stdout if isinstance(stdout, str) else os.devnull).open("wb") as file:
        return subprocess.run(
            [sys.executable, "-c", CODE.replace("{body}", body)],
            stdout=file if isinstance(stdout, str) else stdout,
            stderr=subprocess.PIPE,
            env=os.environ | environment,
            check=False,
        )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("lines", [1, 100_000], ids=["at-the-end", "at-once"])
def test_output_that_has_no_room_is_one_line(lines: int) -> None:
    done = run(f"[print('line') for _ in range({lines})]; return 0", "/dev/full")
    assert done.returncode == 1
    assert done.stderr == b"vidaccel: error: cannot write any more: No space left on device\n"


def test_a_reader_who_leaves_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = run("print('line', flush=True); return 0", writing)
    finally:
        os.close(writing)
    assert done.returncode == 1 and done.stderr == b""


def test_names_that_a_terminal_cannot_show() -> None:
    done = run(r"print('\udcff \u00b7'); raise UsageError('\ud800')", PYTHONIOENCODING="ascii")
    assert done.stdout == b"\\udcff \\xb7\n" and done.stderr == b"vidaccel: error: \\ud800\n" and done.returncode == 2
