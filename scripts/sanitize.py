"""Every op's kernels under NVIDIA's compute-sanitizer, at small odd shapes; leaves a JSON record.

    python scripts/sanitize.py --out samples/benchmarks/sanitizer.json

The calls are those of ``tests/kernels/test_fuzz.py`` on a GPU, a few for each op. PyTorch's allocator is told to ask
the driver for each tensor: in its own blocks an access out of bounds would find memory of somebody else. The exit code
is 1 if a tool found an error, a test failed, or a tool said nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck", "initcheck")
MISSING = (
    "sanitize: error: compute-sanitizer is not on PATH, nor in CUDA_HOME; it comes with the CUDA toolkit "
    "(apt-get install cuda-sanitizer-12-8, or conda install -c nvidia cuda-sanitizer-api)"
)


class Found(NamedTuple):
    """What one tool said: how many errors, in which kernels; None where there is no summary."""

    errors: int | None
    kernels: dict[str, int]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("sanitizer.json"), help="the record")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--only", default="", help="ops whose name has this in it")
    parser.add_argument("--run", type=Path, metavar="FILE", help=argparse.SUPPRESS)  # what runs under a tool
    args = parser.parse_args()
    if args.run:
        return run_calls(args.only, args.run)
    program = find_program()
    if program is None:
        print(MISSING, file=sys.stderr)
        return 2
    import torch

    if not torch.cuda.is_available():
        print("sanitize: error: there is no GPU, and nothing else runs under compute-sanitizer", file=sys.stderr)
        return 2
    results = [run_tool(program, tool, args.only) for tool in args.tools]
    args.out.write_text(json.dumps({**about(program), "results": results}, indent=2) + "\n")
    for result in results:
        print(f"{result['tool']}: {result['verdict']} ({len(result['kernels'])} kernels, {result['seconds']} s)")
    return 0 if all(result["verdict"] == "clean" for result in results) else 1


def find_program() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in (*homes, "/usr/local/cuda") if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def run_tool(program: str, tool: str, only: str) -> dict[str, Any]:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        names = Path(folder) / "kernels.json"
        options = [
            "--tool",
            tool,
            "--target-processes",
            "all",
            "--print-limit",
            "1000",
            "--log-file",
            f"{folder}/%p.log",
        ]
        calls = [sys.executable, __file__, "--only", only, "--run", str(names)]
        environment = os.environ | {
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
            "VIDACCEL_TUNE": "0",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        code = subprocess.run([program, *options, *calls], env=environment, cwd=ROOT, check=False).returncode
        text = "\n".join(path.read_text(errors="replace") for path in Path(folder).glob("*.log"))
        kernels = json.loads(names.read_text()) if names.exists() else []
    found = parse(text)
    return {
        "tool": tool,
        "verdict": verdict(found, code, kernels),
        "errors": found.errors,
        "errors_by_kernel": found.kernels,
        "exit_code": code,
        "kernels": kernels,
        "seconds": round(time.monotonic() - start, 1),
        "first_lines": [line for line in text.splitlines() if "SUMMARY" not in line][:40] if found.errors else [],
    }


def parse(text: str) -> Found:
    """What the log of a run, of one process or several, tells."""
    errors = [int(count) for count in re.findall(r"ERROR SUMMARY: (\d+) error", text)]
    hazards = [int(count) for count in re.findall(r"RACECHECK SUMMARY: (\d+) hazard", text)]
    places = re.findall(r"=========\s+at (?:0x\w+ in )?([^\s+(]+)", text)
    return Found(sum(errors) + sum(hazards) if errors or hazards else None, dict(Counter(places)))


def verdict(found: Found, code: int, kernels: list[str]) -> str:
    if found.errors:
        return f"{found.errors} errors"
    if code:
        return f"the calls failed (exit code {code})"
    if found.errors is None:
        return "no summary: the tool did not run"
    return "clean" if kernels else "no kernel ran"


def about(program: str) -> dict[str, Any]:
    import torch

    from vidaccel.environment import environment

    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    return {
        "environment": environment(torch.device("cuda")),
        "sanitizer": next((line for line in version.splitlines() if "ersion" in line), "unknown").strip(),
    }


def run_calls(only: str, names: Path) -> int:
    """Under a tool: call every op, and write the names of the kernels that ran."""
    import pytest

    tests = str(ROOT / "tests" / "kernels" / "test_fuzz.py")
    chosen = " and ".join(filter(None, ("test_an_op_on_a_gpu", only)))
    code = pytest.main([tests, "-q", "-m", "gpu", "-k", chosen, "-p", "no:cacheprovider"])
    names.write_text(json.dumps(sorted(ran())))
    return int(code)


def ran() -> set[str]:
    """The kernels that this process has compiled or loaded."""
    import vidaccel.kernels

    found = set()
    for kind in ("norm", "attention", "conv", "ffn"):
        for module in pkgutil.iter_modules([f"{path}/{kind}" for path in vidaccel.kernels.__path__]):
            if file := sys.modules.get(f"vidaccel.kernels.{kind}.{module.name}"):
                kernels = (x for x in vars(file).values() if hasattr(x, "device_caches"))
                found |= {
                    kernel.__name__ for kernel in kernels if any(cache[0] for cache in kernel.device_caches.values())
                }
    return found


if __name__ == "__main__":
    sys.exit(main())
