"""What ``vidaccel bench`` does: set up what is measured, measure it, keep the record, print the table."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vidaccel.bench.first_calls import measure_new_processes
from vidaccel.bench.measure import measure_pipeline
from vidaccel.bench.ops import measure_ops, measured_ops
from vidaccel.bench.record import Recorder, table
from vidaccel.bench.settings import Settings
from vidaccel.bench.subject import load_subject
from vidaccel.bench.timing import ceilings
from vidaccel.bench.variants import BASELINES, DEFAULT, parse_variants
from vidaccel.bench.workloads import SCOPES
from vidaccel.clips.outputs import check_record
from vidaccel.clips.video_model import dtype_of
from vidaccel.environment import device_of, environment
from vidaccel.errors import UsageError, nearest
from vidaccel.parallel.team import team
from vidaccel.patching.patch import check_choice

__all__ = ["benchmark"]

_QUICK_REPEATS = 3


def benchmark(args: argparse.Namespace, command_line: str) -> int:
    """Run the command, which the record is to show as ``command_line``; exit code 1 if a variant failed."""
    deadline = time.monotonic() + args.time_limit
    path = Path(args.out) if args.out and team().leads else None
    if path:
        check_record(path)
    device = device_of(args.device)
    dtype = dtype_of(args.dtype, device)
    if device.index is not None:
        torch.cuda.set_device(device)  # events and compiled kernels go by the current device
    settings = _settings(args, device)
    if args.op:
        _check_op(args.op)
    head = {
        "command": command_line,
        "environment": environment(device, args.commit),
        **({"note": args.note} if args.note else {}),
        "subject": {name: getattr(args, name) for name in ("model", "synthetic", "op", "size") if getattr(args, name)},
        "dtype": str(dtype).removeprefix("torch."),
        "settings": asdict(settings),
        **({"ranks": team().size} if team().size > 1 else {}),
    }
    recorder = Recorder(head, path, deadline)
    if args.op:
        recorder.record["ceilings"] = ceilings(device)
        measure_ops(args.op, args.size, device, dtype, settings, recorder)
    else:
        _measure_pipeline(args, device, dtype, settings, recorder)
    recorder.finish()
    if team().leads:
        _print(recorder)
    rows = (*recorder.rows, *recorder.record.get("new_processes", ()))
    return 1 if any(row["status"] == "failed" for row in rows) else 0


def _print(recorder: Recorder) -> None:
    if first := recorder.record.get("new_processes"):
        print(table(first), end="\n\n")
    print(table(recorder.rows))
    if failed := recorder.record.get("failed_ops"):
        print(f"failed: {', '.join(failed)}")
    for variant, patch in recorder.record.get("patch_reports", {}).items():
        print(f"{variant}: {_in_short(patch)}")
    print(
        "ceilings of this run: "
        + ", ".join(f"{name} {value:.4g}" for name, value in recorder.record["ceilings"].items())
    )


def _settings(args: argparse.Namespace, device: torch.device) -> Settings:
    if args.model and (args.synthetic or args.op):
        raise UsageError("--model: not allowed with --synthetic or --op")
    if args.size == "tiny" and not (args.synthetic or args.op):
        raise UsageError("--size tiny means nothing without --synthetic or --op")
    for name, least in (("repeats", 1), ("warmup", 0)):
        if getattr(args, name) < least:
            raise UsageError(f"--{name} must be at least {least}, got {getattr(args, name)}")
    if args.new_process and args.op:
        raise UsageError("--new-process means nothing to --op")
    if team().size > 1 and (args.new_process or args.op):
        raise UsageError("--new-process and --op are for one process, not for torchrun")
    scopes = {scope.strip() for scope in args.scope.split(",")}
    if unknown := scopes - set(SCOPES):
        raise UsageError(f"--scope: unknown {', '.join(sorted(unknown))}; scopes are {', '.join(SCOPES)}")
    quick = args.quick or args.size == "tiny"
    strong = args.synthetic is not None and device.type == "cuda" and not quick
    return Settings(
        scopes=tuple(scope for scope in SCOPES if scope in scopes),
        variants=parse_variants(args.variants) if args.variants else DEFAULT + (BASELINES if strong else ()),
        repeats=min(args.repeats, _QUICK_REPEATS) if quick else args.repeats,
        warmup=args.warmup,
        budget_seconds=args.budget,
        with_reference=not (args.quick or args.no_reference),
        compile_backend=args.compile_backend or ("eager" if args.size == "tiny" else "inductor"),
        new_process=args.new_process,
        cpus=args.cpus,
        empty_caches=args.empty_caches,
        only=args.only,
        skip=args.skip,
        seed=args.seed or 0,
    )


def _check_op(name: str) -> None:
    names = [*measured_ops(), "all"]
    if name not in names:
        raise UsageError(f"--op {name}: unknown{nearest(name, names)}")


def _measure_pipeline(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype, settings: Settings, recorder: Recorder
) -> None:
    if settings.new_process:  # before this process holds any memory of the GPU
        measure_new_processes(args, device, dtype, settings, recorder)
    recorder.record["ceilings"] = ceilings(device)
    pipe, arguments = load_subject(args, device, dtype)
    if any("patched" in variant.split("+") for variant in settings.variants):
        # What cannot be patched, or an --only that names nothing, is found out before eager has been measured. No patch
        # is tried: kernels of the first patched call would compile meanwhile.
        check_choice(pipe, args.only, args.skip)
    measure_pipeline(pipe, arguments, device, settings, recorder)


def _in_short(patch: dict[str, Any]) -> str:
    """A patch report's summary in one line; the record has the whole."""
    left_alone, failed = (sum(entry["sites"] for entry in patch[state]) for state in ("left_alone", "failed"))
    calls = sum(entry["calls"] for entry in patch["fallbacks"])
    return f"{patch['active']} sites active, {left_alone} left alone, {failed} failed, {calls} calls fell back"
