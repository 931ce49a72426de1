"""What ``vidaccel bench`` does: set up what is measured, measure it, keep the record, print the table."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from vidaccel.bench.measure import SCOPES, measure_pipeline
from vidaccel.bench.op_cases import OPS
from vidaccel.bench.ops import measure_ops
from vidaccel.bench.record import Recorder, table
from vidaccel.bench.settings import Settings
from vidaccel.bench.synthetic import build_pipeline, pipeline_inputs, specification
from vidaccel.bench.timing import ceilings
from vidaccel.bench.variants import BASELINES, DEFAULT, parse_variants
from vidaccel.clips.clip_request import pipeline_names, request_from_arguments
from vidaccel.clips.generation import call_arguments, resolve
from vidaccel.clips.outputs import check_record
from vidaccel.clips.video_model import dtype_of, find_model, load_pipeline
from vidaccel.environment import device_of, environment
from vidaccel.errors import UsageError
from vidaccel.patching.patch import patch_pipeline

__all__ = ["benchmark"]

_QUICK_REPEATS = 3
_SYNTHETIC_STEPS = 4  # a step is also timed by itself


def benchmark(args: argparse.Namespace, command_line: str) -> int:
    """Run the command, which the record is to show as ``command_line``; exit code 1 if a variant failed."""
    deadline = time.monotonic() + args.time_limit
    path = Path(args.out) if args.out else None
    if path:
        check_record(path)
    device = device_of(args.device)
    dtype = dtype_of(args.dtype, device)
    if device.index is not None:
        torch.cuda.set_device(device)  # events and compiled kernels go by the current device
    settings = _settings(args, device)
    prepare = _prepare_op if args.op else _prepare_pipeline
    measure = prepare(args, device, dtype, settings)
    limits = ceilings(device)
    head = {
        "command": command_line,
        "environment": environment(device, args.commit),
        **({"note": args.note} if args.note else {}),
        "subject": {name: getattr(args, name) for name in ("model", "synthetic", "op", "size") if getattr(args, name)},
        "dtype": str(dtype).removeprefix("torch."),
        "settings": asdict(settings),
        "ceilings": limits,
    }
    recorder = Recorder(head, path, deadline)
    measure(recorder)
    recorder.finish()
    print(table(recorder.rows))
    if failed := recorder.record.get("failed_ops"):
        print(f"failed: {', '.join(failed)}")
    for variant, patch in recorder.record.get("patch_reports", {}).items():
        print(f"{variant}: {_in_short(patch)}")
    print("ceilings of this run: " + ", ".join(f"{name} {value:.4g}" for name, value in limits.items()))
    return 1 if any(row["status"] == "failed" for row in recorder.rows) else 0


def _settings(args: argparse.Namespace, device: torch.device) -> Settings:
    if args.model and (args.synthetic or args.op):
        raise UsageError("--model: not allowed with --synthetic or --op")
    if args.size == "tiny" and not (args.synthetic or args.op):
        raise UsageError("--size tiny means nothing without --synthetic or --op")
    for name, least in (("repeats", 1), ("warmup", 0)):
        if getattr(args, name) < least:
            raise UsageError(f"--{name} must be at least {least}, got {getattr(args, name)}")
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
        empty_caches=args.empty_caches,
        only=args.only,
        skip=args.skip,
        seed=args.seed or 0,
    )


def _prepare_op(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype, settings: Settings
) -> Callable[[Recorder], None]:
    names = list(OPS) if args.op == "all" else [args.op]
    if unknown := set(names) - set(OPS):
        raise UsageError(f"--op {unknown.pop()}: unknown; there are {', '.join(OPS)}, and all")
    return partial(measure_ops, names, args.size, device, dtype, settings)


def _prepare_pipeline(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype, settings: Settings
) -> Callable[[Recorder], None]:
    if args.synthetic:
        pipe, arguments = _synthetic(args, device, dtype)
    else:
        model = find_model(args.model)
        request = resolve(model, request_from_arguments(args))
        arguments = call_arguments(model.pipeline_class, request)
        pipe = load_pipeline(model, dtype, device, show_progress=True)
    if any("patched" in variant.split("+") for variant in settings.variants):
        # What cannot be patched, or an --only that names nothing, is found out before eager has been measured.
        patch_pipeline(pipe, only=args.only, skip=args.skip).restore()
    return partial(measure_pipeline, pipe, arguments, device, settings)


def _synthetic(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> tuple[DiffusionPipeline, dict[str, Any]]:
    specified = specification(args.synthetic, args.size)
    call = specified["call"]
    call["num_inference_steps"] = min(call["num_inference_steps"], _SYNTHETIC_STEPS)
    request = request_from_arguments(args)
    for option in fields(request):
        value = getattr(request, option.name)
        names = pipeline_names(option.name)
        if value is None or option.name == "seed":
            continue
        if not (taken := set(names) & call.keys()):
            raise UsageError(f"--{option.name.replace('_', '-')} means nothing to --synthetic {args.synthetic}")
        call[taken.pop()] = value
    return build_pipeline(specified, device, dtype), call | pipeline_inputs(specified, device, dtype)


def _in_short(patch: dict[str, Any]) -> str:
    """A patch report's summary in one line; the record has the whole."""
    left_alone, failed = (sum(entry["sites"] for entry in patch[state]) for state in ("left_alone", "failed"))
    calls = sum(entry["calls"] for entry in patch["fallbacks"])
    return f"{patch['active']} sites active, {left_alone} left alone, {failed} failed, {calls} calls fell back"
