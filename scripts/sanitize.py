"""Every op's kernels under NVIDIA's compute-sanitizer, at small odd shapes; leaves a JSON record.

    python scripts/sanitize.py --out samples/benchmarks/sanitizer.json

The calls are those of ``tests/kernels/test_fuzz.py`` on a GPU, a few for each op, each op in a process of its own. That
a kernel did not run is a problem like an error in it.
PyTorch's allocator is told to ask the driver for each tensor: in its own blocks an access out of bounds would find
memory of somebody else. What a tool reports in a kernel of PyTorch's or of a library is listed under "elsewhere".

initcheck may not see what TMA writes, and would then report every kernel that reads the result of a product. So under
it a kernel of PyTorch's writes each such result anew: that is reported, "elsewhere", and not what ours reads. A few
calls whose writes are known run under it, too (the "controls"): they show what it sees. ``nan-fill`` runs the calls
without the sanitizer, with NaN in all new tensors: a kernel that reads memory which nobody has written gives a wrong
result.

racecheck may not understand how Triton sends the warps of a specialised kernel to their partitions: numbers in shared
memory, with barriers around them. Its control is a kernel whose partitions share nothing. A race counts as explained if
that kernel was reported, and if all accesses are in lines before the partitions: they have left the function by then.

The exit code is 1 if a tool found an error in a kernel of ours, a test failed, or a tool said nothing.
"""

from __future__ import annotations

import argparse
import inspect
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
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SANITIZER = ("memcheck", "racecheck", "initcheck")
NAN_FILL = "nan-fill"
TOOLS = (*SANITIZER, NAN_FILL)
MISSING = (
    "sanitize: error: compute-sanitizer is not on PATH, nor in CUDA_HOME; it comes with the CUDA toolkit "
    "(apt-get install cuda-sanitizer-12-8, or conda install -c nvidia cuda-sanitizer-api)"
)
# Whether they are to be reported (under initcheck: PyTorch's copy of what they return); None: they find that out.
CONTROLS: dict[str, dict[str, bool | None]] = {
    "initcheck": {"nothing written": True, "a plain store": False, "a TMA store": None, "a product": None},
    "racecheck": {"partitions that share nothing": None},
}


class Report(NamedTuple):
    """One error that a tool lists: in which kernel ("": none is named), in which lines of the source.

    The errors of a launch that did not fit into the tool's buffer are one report without lines.
    """

    kernel: str
    lines: tuple[int, ...] = ()


class Found(NamedTuple):
    """What one tool said: how many errors, None where there is no summary; and those that it lists."""

    errors: int | None
    reports: list[Report]


class Run(NamedTuple):
    """The calls of one op, or a control, under a tool.

    Attributes:
        name: The op or the control.
        code: Its exit code.
        found: What the tool said.
        kernels: Those of ours that ran; for one whose warps part, the first and last line of what they do before.
    """

    name: str
    code: int
    found: Found
    kernels: dict[str, tuple[int, int] | None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("sanitizer.json"), help="the record")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--only", default="", help="ops whose name has this in it")
    parser.add_argument("--jobs", type=int, default=4, help="processes at a time (default: 4)")
    parser.add_argument("--run", nargs=3, metavar=("TOOL", "NAME", "FILE"), help=argparse.SUPPRESS)  # under a tool
    args = parser.parse_args()
    if args.run:
        tool, name, file = args.run
        return run_calls(tool, name, Path(file))
    program = find_program()
    if program is None and {*args.tools} & {*SANITIZER}:
        print(MISSING, file=sys.stderr)
        return 2
    import torch

    from vidaccel.kernels.op import ops

    if not torch.cuda.is_available():
        print("sanitize: error: there is no GPU, and nothing else runs under compute-sanitizer", file=sys.stderr)
        return 2
    names = [name for name in ops() if args.only in name]
    results = []
    for tool in args.tools:
        result = run_tool(program, tool, names, args.jobs, set() if args.only else every_kernel())
        counts = f"{len(result['kernels'])} kernels, {sum(result['elsewhere'].values())} errors elsewhere"
        print(f"{tool}: {result['verdict']} ({counts}, {result['seconds']} s)", flush=True)
        results.append(result)
        args.out.write_text(json.dumps({**about(program), "results": results}, indent=2) + "\n")
    return 0 if all(result["verdict"] == "clean" for result in results) else 1


def find_program() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in (*homes, "/usr/local/cuda") if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def every_kernel() -> set[str]:
    """All kernels that there are, by their names in ``kernels/``."""
    texts = (path.read_text(encoding="utf-8") for path in (ROOT / "kernels").rglob("*.py"))
    return {name for text in texts for name in re.findall(r"^def (\w+_kernel)\(", text, re.M)}


def run_tool(program: str | None, tool: str, names: list[str], jobs: int, kernels: set[str]) -> dict[str, Any]:
    start = time.monotonic()
    names = [*names, *CONTROLS.get(tool, ())]
    with ThreadPoolExecutor(jobs) as pool:
        runs = list(pool.map(lambda name: run_under(program, tool, name), names))
    return {"tool": tool, **judge(tool, runs, kernels), "seconds": round(time.monotonic() - start, 1)}


def run_under(program: str | None, tool: str, name: str) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "run.json"
        calls = [sys.executable, __file__, "--run", tool, name, str(told)]
        options = ["--tool", tool, "--target-processes", "all", "--print-limit", "1000000", "--show-backtrace", "no"]
        options += ["--force-blocking-launches"]  # what overflows the buffer is of one launch
        under = [program, *options, "--log-file", f"{folder}/%p.log"] if program and tool != NAN_FILL else []
        environment = os.environ | {
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
            "VIDACCEL_TUNE": "0",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        done = subprocess.run(
            [*under, *calls], env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        found = parse("".join(path.read_text(errors="replace") for path in Path(folder).glob("*.log")))
        kernels = json.loads(told.read_text()) if told.exists() else {}
    if done.returncode:
        print(f"{tool}, {name}: exit code {done.returncode}\n{done.stdout[-3000:]}", file=sys.stderr, flush=True)
    return Run(name, done.returncode, found, kernels)


def parse(text: str) -> Found:
    """What the log of a run, of one process or several, tells."""
    totals = re.findall(r"^========= (?:ERROR SUMMARY: (\d+) errors?$|RACECHECK SUMMARY: (\d+) hazard)", text, re.M)
    reports: list[Report] = []
    for entry in re.split(r"^========= (?=\S)", text, flags=re.M):
        if entry.startswith("Warning: Error buffer overflow"):  # in the launch whose errors it follows
            reports.append(Report(reports[-1].kernel if reports else ""))
        elif re.match(r"Invalid|Uninitialized|(Error|Warning): (Race|Potential)|Program hit|Host API", entry):
            reports.append(parse_entry(entry.replace("(anonymous namespace)::", "")))
    return Found(sum(int(errors or hazards) for errors, hazards in totals) if totals else None, reports)


def parse_entry(entry: str) -> Report:
    place = re.search(
        r"(?:^=========\s+at (?:0x\w+ in )?|(?:Read|Write|Atomic) access at |on access by )(?:void )?([^\s+<(]+)",
        entry,
        re.M,
    )
    lines = re.findall(r"\+0x\w+ in \S+\.py:(\d+)", entry)
    return Report(place[1] if place else "", tuple(map(int, lines)))


def judge(tool: str, runs: Iterable[Run], expected: Iterable[str] = ()) -> dict[str, Any]:
    """The verdict on our kernels, of which the ``expected`` are to have run, with what was reported where."""
    runs = list(runs)
    controls = CONTROLS.get(tool, {})
    reported = {run.name: None if run.code else bool(run.found.reports) for run in runs if run.name in controls}
    runs = [run for run in runs if run.name not in controls]
    kernels = {kernel for run in runs for kernel in run.kernels}
    ours: dict[str, Counter[str]] = {}
    explained: dict[str, Counter[str]] = {}
    elsewhere: Counter[str] = Counter()
    problems = [f"{run.name}: exit code {run.code}" for run in runs if run.code]
    problems += [f"{run.name}: no summary: the tool did not run" for run in runs if says_nothing(tool, run)]
    problems += [
        f"control {name!r}: {'reported' if value else 'not reported' if value is False else 'it failed'}"
        for name, value in reported.items()
        if controls[name] not in (None, value) or value is None
    ]
    for run in runs:
        for report in run.found.reports:
            if report.kernel and report.kernel not in kernels:
                elsewhere[report.kernel] += 1
            else:
                known = bool(reported.get("partitions that share nothing")) and is_before_partitions(report, run)
                (explained if known else ours).setdefault(run.name, Counter())[report.kernel or "no kernel named"] += 1
        if (more := (run.found.errors or 0) - len(run.found.reports)) > 0:
            problems.append(f"{run.name}: {more} errors are not listed")
    problems += [f"{name}: {count} errors in {kernel}" for name in ours for kernel, count in ours[name].items()]
    if not kernels:
        problems.append("no kernel ran")
    elif missing := sorted({*expected} - kernels):
        problems.append(f"did not run: {', '.join(missing)}")
    return {
        "verdict": "; ".join(problems) or "clean",
        "errors": sum(run.found.errors or 0 for run in runs),
        "in_our_kernels": ours,
        "explained_by_the_controls": explained,
        "elsewhere": elsewhere,
        "controls_reported": reported,
        "kernels": sorted(kernels),
    }


def says_nothing(tool: str, run: Run) -> bool:
    return tool != NAN_FILL and run.found.errors is None


def is_before_partitions(report: Report, run: Run) -> bool:
    first, last = run.kernels.get(report.kernel) or (0, 0)
    return bool(report.lines) and all(first <= line <= last for line in report.lines)


def about(program: str | None) -> dict[str, Any]:
    import torch

    from vidaccel.environment import environment

    told = subprocess.run([program, "--version"], capture_output=True, text=True).stdout if program else ""
    version = next((line for line in told.splitlines() if "ersion" in line), "unknown").strip()
    return {"environment": environment(torch.device("cuda")), "sanitizer": version}


def run_calls(tool: str, name: str, told: Path) -> int:
    """Under a tool: make the calls, and write which kernels ran."""
    code = control(name) if name in CONTROLS.get(tool, ()) else test_op(tool, name)
    told.write_text(json.dumps(ran()))
    return code


def test_op(tool: str, name: str) -> int:
    import pytest
    import torch

    on_gpu = torch.cuda.is_available()
    which = f"test_an_op{'_on_a_gpu' if on_gpu else ''}[{name}] or test_large{'_on_a_gpu' if on_gpu else ''}[{name}]"
    options = [f"{ROOT}/tests/kernels/test_fuzz.py", "-k", which, "-q", "-p", "no:cacheprovider"]
    if tool == NAN_FILL:
        torch.use_deterministic_algorithms(True, warn_only=True)
        assert torch.empty(1, device="cuda" if on_gpu else "cpu").isnan().all()
        options += ["-W", "ignore::UserWarning"]
    with products_written_anew() if tool == "initcheck" else nullcontext():
        return int(pytest.main(options))


def products_written_anew() -> AbstractContextManager[Any]:
    """While it lasts, the result of each product and convolution is what a kernel of PyTorch's has written."""
    from torch import Tensor, ops
    from torch.utils._python_dispatch import TorchDispatchMode

    aten = ops.aten
    products = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution}

    class WrittenAnew(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            # times one, for a plain copy would be no kernel
            return out.mul(1) if func.overloadpacket in products and isinstance(out, Tensor) else out

    return WrittenAnew()


def control(name: str) -> int:
    """Do what is known to be right, or wrong: whether a tool reports it shows what the tool sees.

    Under initcheck PyTorch copies what was written in some way.
    """
    import torch
    from specialised_warps import run_partitions  # beside this script

    from vidaccel.kernels.attention.spatial_attention import spatial_attention
    from vidaccel.kernels.ffn.geglu import geglu

    x = torch.ones(64, 64, dtype=torch.float16, device="cuda" if torch.cuda.is_available() else "cpu")
    writes: dict[str, Callable[[], list[torch.Tensor]]] = {
        "nothing written": lambda: [torch.empty_like(x)],
        "a plain store": lambda: [geglu(x, impl="triton")],
        "a TMA store": lambda: [spatial_attention(x[None], x[None], x[None], 1, impl="gluon")],
        "a product": lambda: [torch.mm(x[:rows], x) for rows in (1, 8, 64)],
        "partitions that share nothing": lambda: [run_partitions(programs) for programs in (1, 2, 200)],
    }
    print([float(y.double().sum()) for y in writes[name]()])  # waits for the GPU
    return 0


def ran() -> dict[str, tuple[int, int] | None]:
    """The kernels that this process has compiled or loaded; see ``Run``."""
    import vidaccel.kernels

    found = {}
    for kind in ("norm", "attention", "conv", "ffn"):
        for module in pkgutil.iter_modules([f"{path}/{kind}" for path in vidaccel.kernels.__path__]):
            if file := sys.modules.get(f"vidaccel.kernels.{kind}.{module.name}"):
                kernels = (x for x in vars(file).values() if hasattr(x, "device_caches"))
                found |= {
                    kernel.__name__: lines_before_partitions(kernel.fn)
                    for kernel in kernels
                    if any(cache[0] for cache in kernel.device_caches.values())
                }
    return dict(sorted(found.items()))


def lines_before_partitions(function: Callable[..., None]) -> tuple[int, int] | None:
    lines, first = inspect.getsourcelines(function)
    return (first, first + len(lines) - 1) if any("gl.warp_specialize(" in line for line in lines) else None


if __name__ == "__main__":
    sys.exit(main())
