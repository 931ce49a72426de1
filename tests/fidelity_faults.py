"""The table of what ``vidaccel.compare`` says of planted faults and of right variants: measured, recorded, drawn.

    make faults                     # on a CPU, in float32
    make faults DEVICE=cuda         # on a GPU, in float32, float16 and bfloat16
    python tests/fidelity_faults.py --draw --device cuda    # the table alone

Each fault is planted into the bundled model with the check at first sight off and on.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# On a CPU blocks take the ways that are for kernels only where these could run; they do not (_few_kernels).
if "cuda" not in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from planted_faults import FAULTS, Fault, planted
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from vidaccel import compare
from vidaccel.clips.clip_request import ClipRequest
from vidaccel.clips.generation import call_arguments, resolve
from vidaccel.clips.outputs import write_json
from vidaccel.clips.video_model import find_model, load_pipeline
from vidaccel.environment import environment
from vidaccel.fidelity.comparison import Baseline, Comparison, unpatched

_FOLDER = Path(__file__).parents[1] / "samples" / "benchmarks"
RECORDS = {"cpu": _FOLDER / "fidelity-faults-cpu.json", "cuda": _FOLDER / "fidelity-faults.json"}
DEFAULTS = {"cpu": (["float32"], 1), "cuda": (["float32", "float16", "bfloat16"], 9)}  # dtypes, processes
PARTS = ("unchecked faults", "checked faults", "right variants")  # of the table, in the order of its rows
REQUEST = {"cpu": ClipRequest(height=64, width=64, frames=6, steps=3), "cuda": ClipRequest(frames=8, steps=6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", nargs="+", help="default: float32 on a CPU, all three on a GPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="of the table")
    parser.add_argument("--processes", type=int, help="parts of the table that are measured at a time")
    parser.add_argument("--commit", help="of the code that is measured (default: what git says)")
    parser.add_argument("--out", type=Path, help="default: in samples/benchmarks")
    parser.add_argument("--draw", action="store_true", help="draw the table from the record, measure nothing")
    args = parser.parse_args()
    out = args.out or RECORDS[args.device]
    if not args.draw:
        dtypes, processes = DEFAULTS[args.device]
        tasks = [(part, dtype) for part in args.parts for dtype in args.dtype or dtypes]
        _measure(args.device, tasks, args.processes or processes, args.commit, out)
    out.with_suffix(".md").write_text(table(json.loads(out.read_text()), out.name))


def _measure(device: str, tasks: list[tuple[str, str]], processes: int, commit: str | None, out: Path) -> None:
    """Measure parts of the table in dtypes, some at a time, and leave what there is in ``out`` after each."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {task: [] for task in tasks}
    start = time.perf_counter()
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(_rows, part, device, dtype): (part, dtype) for part, dtype in rows}
        for done in tqdm(as_completed(waiting), desc="parts", total=len(waiting)):
            rows[waiting[done]] = done.result()
            record = {"environment": environment(torch.device(device)), "request": _request(device)}
            record["environment"] |= {"commit": commit} if commit else {}
            every = [row for part in rows.values() for row in part]
            write_json(out, record | {"seconds": time.perf_counter() - start, "rows": every})


def _request(device: str) -> dict[str, Any]:
    return {name: value for name, value in vars(REQUEST[device]).items() if value is not None}


def _rows(part: str, device: str, dtype: str) -> list[dict[str, Any]]:
    """One of ``PARTS`` in ``dtype``, in a process of its own: faults are planted by its environment."""
    logging.disable(logging.WARNING)  # sites that fail say so, and here they are to
    model = find_model()
    pipe = load_pipeline(model, getattr(torch, dtype), torch.device(device))
    call = call_arguments(model.pipeline_class, resolve(model, REQUEST[device]))
    rows = []
    with _few_kernels(device):
        baseline = unpatched(pipe, progress=False, **call)
        if part == "right variants":
            for name, patch, around in _right_variants(pipe, device):
                with around:
                    found = compare(pipe, patch, baseline=baseline, progress=False)
                rows.append(_row(found, dtype, name, None, checked=True))
            return rows
        for fault in FAULTS:
            check = part == "checked faults"
            rows.append(_row(_of_fault(pipe, fault, check, baseline), dtype, fault.name, fault, checked=check))
    return rows


def _of_fault(pipe: Any, fault: Fault, check: bool, baseline: Baseline) -> Comparison:
    # a graph would go on with what a fault of later calls was at the first
    patch = {"self_check": check, "cuda_graph": False if fault.first_call != 1 else "auto"}
    with planted(pipe, fault, steps=baseline.call["num_inference_steps"]):
        return compare(pipe, patch, baseline=baseline, progress=False)


@contextmanager
def _few_kernels(device: str) -> Iterator[None]:
    """On a CPU no interpreted kernels: what is planted is in PyTorch."""
    if device == "cpu":
        os.environ["VIDACCEL_IMPL"] = "torch"
    yield
    os.environ.pop("VIDACCEL_IMPL", None)


def _right_variants(pipe: Any, device: str) -> Iterator[tuple[str, dict[str, Any], AbstractContextManager[Any]]]:
    yield "patched as by default", {}, nullcontext()
    yield "math-exact sites of the VAE alone", {"only": "vae"}, nullcontext()
    yield "bit-exact sites alone", {"allow": "bit-exact"}, nullcontext()
    yield "other attention: math", {}, sdpa_kernel(SDPBackend.MATH)
    yield "references in place of kernels", {}, _implementation("torch")
    if device == "cuda":
        yield "without CUDA graphs", {"cuda_graph": False}, nullcontext()
        yield "with CUDA graphs", {"cuda_graph": True}, nullcontext()
        yield "other attention: efficient", {}, sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION)
        yield "nothing measured: default kernels", {}, _environment("VIDACCEL_TUNE", "0")
        yield "torch.compile", {"cuda_graph": False}, _compiled(pipe.unet)


@contextmanager
def _compiled(model: Any) -> Iterator[None]:
    model.compile()
    try:
        yield
    finally:
        model._compiled_call_impl = None
        torch._dynamo.reset()


def _implementation(name: str) -> AbstractContextManager[None]:
    return _environment("VIDACCEL_IMPL", name)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _row(found: Comparison, dtype: str, name: str, fault: Fault | None, checked: bool) -> dict[str, Any]:
    blamed = [site for site in found.blame or () if site.ratio > 1]
    right = fault is not None and bool(blamed) and all(fault.is_at(site.path, site.op) for site in blamed)
    worst = min((control.clip.psnr_db.minimum for control in found.floor), default=math.inf)
    return {
        "fault": None if fault is None else name,
        "variant": name if fault is None else None,
        "dtype": dtype,
        "first_sight_check": checked,
        "passed": found.passed,
        "rule": found.verdict.rule,
        "minimum_psnr_db": _finite(found.clip.psnr_db.minimum),
        "floor_psnr_db": _finite(worst),
        "margin_db": _finite(found.clip.psnr_db.minimum - worst),
        "blamed": [f"{site.path}:{site.op}" for site in blamed],
        "ratio": _finite(max((site.ratio for site in blamed), default=0.0)),
        "as_it_should_be": found.passed if fault is None else not found.passed and right,
        "seconds": found.seconds["patched"] + found.seconds["steps"] + found.seconds["sites"],
        "reasons": list(found.verdict.reasons[:4]),
    }


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def table(record: dict[str, Any], name: str) -> str:
    """The record, which is in a file called ``name`` beside it, in Markdown."""
    of, rows = record["environment"], record["rows"]
    commits = sorted({str(row.get("commit", of["commit"]))[:9] for row in rows})  # of parts that were measured apart
    head = [
        "# What `vidaccel.compare` says of planted faults",
        "",
        f"Drawn from [{name}]({name}) by `tests/fidelity_faults.py`: {of['device']}, "
        f"torch {of['torch']}, diffusers {of['diffusers']}, commit {' and '.join(commits)}; the bundled model, "
        f"{record['request']['frames']} frames, {record['request']['steps']} steps.",
        "",
        "The margin is how far the clip's worst frame is above (+) or below (-) the worst frame of equal maths. "
        "*Check*: whether sites were held against their references at first sight, which sends a site that is wrong "
        "back to the original code: the clip is right then, and fails all the same.",
    ]
    right = sum(row["as_it_should_be"] for row in rows)
    lines = [*head, "", f"**{right} of {len(rows)} as they should be.**", ""]
    for title, kind in (
        ("Faults: each has to fail, with its site", "fault"),
        ("Right variants: each has to pass", "variant"),
    ):
        lines += [f"## {title}", "", f"| {kind} | dtype | check | verdict | rule | margin, dB | site blamed |"]
        lines += ["|---|---|---|---|---|---|---|"]
        lines += [_line(row, row[kind]) for row in rows if row[kind]]
        lines.append("")
    return "\n".join(lines)


def _line(row: dict[str, Any], name: str) -> str:
    margin = row["margin_db"]
    blamed = row["blamed"]
    site = f"`{blamed[0]}`" + (f" and {len(blamed) - 1} more" if len(blamed) > 1 else "") if blamed else ""
    cells = (
        name,
        row["dtype"],
        "on" if row["first_sight_check"] else "off",
        ("pass" if row["passed"] else "fail") + ("" if row["as_it_should_be"] else " **(wrong)**"),
        row["rule"],
        f"{margin:+.1f}" if isinstance(margin, float) else margin,
        site,
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
