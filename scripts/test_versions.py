"""The test suite on the oldest and the newest versions that pyproject.toml claims, each in a virtual environment.

    python scripts/test_versions.py                                  # torch, triton and diffusers, both ends
    python scripts/test_versions.py --packages diffusers --ends oldest -- tests/patching -q

What is not moved has the versions of constraints.txt. Prints a table; the exit code is 1 if a run failed, or could not
be made because something cannot be installed here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "diffusers")
ENDS = ("oldest", "newest")
# A newer diffusers may ask for newer ones.
COMPANIONS = ("transformers", "huggingface_hub", "tokenizers", "accelerate", "safetensors")
VERSIONS = "import json; from importlib.metadata import version; print(json.dumps({x: version(x) for x in %r}))"


class Outcome(NamedTuple):
    """A row of the table."""

    end: str
    versions: dict[str, str]
    result: str
    seconds: float
    good: bool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", nargs="+", choices=PACKAGES, default=PACKAGES, help="those to move")
    parser.add_argument("--ends", nargs="+", choices=ENDS, default=ENDS)
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-versions", help="for the environments")
    parallel = ["-n", "auto", "--dist", "worksteal"]
    parser.add_argument("pytest", nargs="*", default=["-q", *parallel, "-m", "not gpu"], help="arguments of pytest")
    args = parser.parse_args()
    outcomes = [run(end, args.packages, args.folder / end, args.pytest) for end in args.ends]
    print(table(outcomes))
    return 0 if all(outcome.good for outcome in outcomes) else 1


def claimed() -> dict[str, str]:
    """The oldest version of each package that pyproject.toml allows."""
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)', (ROOT / "pyproject.toml").read_text()))
    return {package: bounds[package] for package in PACKAGES}


def run(end: str, packages: list[str], folder: Path, pytest: list[str]) -> Outcome:
    """Make the environment of one end, and run the suite there."""
    start = time.perf_counter()
    python = folder / "bin" / "python"
    try:
        call([sys.executable, "-m", "venv", "--clear", folder])
        call([python, "-m", "pip", "install", "-q", *requirements(end, packages, folder), "--editable", f"{ROOT}[dev]"])
        versions = json.loads(call([python, "-c", VERSIONS % (PACKAGES,)]))
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip() or error.stdout.strip() or f"exit code {error.returncode}").splitlines()
        told = next((line for line in said if "ERROR" in line), said[-1])
        return Outcome(end, {}, f"not run: {told}", time.perf_counter() - start, good=False)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.Popen(
        [python, "-m", "pytest", *pytest], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert done.stdout is not None
    last = ""
    for line in done.stdout:
        print(line, end="", flush=True)
        last = line.strip("= \n") or last
    good = done.wait() == 0
    return Outcome(end, versions, last if good else f"FAILED: {last}", time.perf_counter() - start, good)


def requirements(end: str, packages: list[str], folder: Path) -> list[str]:
    """What pip is to install, and to hold on to."""
    moved = {*packages, "triton"}  # each PyTorch asks for its own
    if end == "newest":
        moved |= {*COMPANIONS}
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(pin for pin in pins if pin.partition("==")[0] not in moved))
    oldest = claimed()
    wanted = [f"{name}=={oldest[name]}" if end == "oldest" else name for name in packages]
    return ["--upgrade", "--constraint", str(constraints), *wanted]


def call(command: list[str | Path]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def table(outcomes: list[Outcome]) -> str:
    head = ("end", *PACKAGES, "seconds", "result")
    rows = [(o.end, *(o.versions.get(name, "-") for name in PACKAGES), f"{o.seconds:.0f}", o.result) for o in outcomes]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows))
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    sys.exit(main())
