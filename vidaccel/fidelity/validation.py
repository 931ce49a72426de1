"""What ``vidaccel validate`` does: one clip unpatched, the same clip patched, a verdict on the two."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vidaccel import patch_pipeline
from vidaccel.clips.clip_request import request_from_arguments
from vidaccel.clips.generation import Clip, call_arguments, generate, resolve
from vidaccel.clips.outputs import check_record, json_text, write_json
from vidaccel.clips.video_model import dtype_of, find_model, load_pipeline
from vidaccel.environment import device_of, environment
from vidaccel.errors import UsageError
from vidaccel.fidelity.verdict import DEFAULT_MIN_PSNR_DB, judge
from vidaccel.patching.report import path_pattern

__all__ = ["validate"]


def validate(args: argparse.Namespace) -> int:
    """Run the command; exit code 1 if the clips are not the same clip."""
    record_file = Path(args.json) if args.json not in (None, "-") else None
    if record_file:
        check_record(record_file)
    device = device_of(args.device)
    dtype = dtype_of(args.dtype, device)
    min_psnr_db = DEFAULT_MIN_PSNR_DB[dtype] if args.min_psnr is None else args.min_psnr
    model = find_model(args.model)
    model.check_patchable()
    request = resolve(model, request_from_arguments(args))
    arguments, seed = call_arguments(model.pipeline_class, request), request.seed or 0
    pipe = load_pipeline(model, dtype, device, show_progress=True)

    stock = generate(pipe, arguments, seed, show_progress=True)
    with patch_pipeline(pipe, only=args.only, skip=args.skip, strict=args.strict) as report:
        patched = generate(pipe, arguments, seed, show_progress=True)
        summary = report.summary()
    try:
        verdict = judge(stock.frames, patched.frames, min_psnr_db)
    except ValueError as error:
        raise UsageError(str(error)) from error
    record = {
        "command": "validate",
        "model": model.source,
        "request": asdict(request),
        "dtype": str(dtype).removeprefix("torch."),
        "environment": environment(device),
        "verdict": verdict.summary(),
        "seconds": {"stock": asdict(stock.timings), "patched": asdict(patched.timings)},
        "patch": summary,
    }
    if record_file is not None:
        write_json(record_file, record)
    if args.json == "-":
        print(json_text(record))
    else:
        print("\n".join([*_patched(summary["ops"]), *_exceptions(summary), _seconds(stock, patched), str(verdict)]))
    return 0 if verdict.passed else 1


def _patched(ops: dict[str, dict[str, Any]]) -> list[str]:
    """One line per op: how many of its sites are in which state, what ran there, and what may differ."""
    width = max(map(len, ops), default=0)
    return [
        f"{op:{width}}  {', '.join(f'{count} {state}' for state, count in outcome['states'].items())} "
        f"({'+'.join(outcome['implementations'])}, {outcome['fidelity']})"
        for op, outcome in ops.items()
    ]


def _exceptions(summary: dict[str, Any]) -> list[str]:
    """What did not run as planned, one line per reason and kind of place."""
    lines = [
        f"{state.replace('_', ' ')}: {entry['path']}: {entry['op']} at {entry['sites']} sites: {entry['reason']}"
        for state in ("left_alone", "failed")
        for entry in summary[state]
    ]
    calls: Counter[tuple[str, str, str]] = Counter()
    for fallback in summary["fallbacks"]:
        calls[path_pattern(fallback["path"]), fallback["op"], fallback["reason"]] += fallback["calls"]
    return lines + [f"fell back: {path}: {op} in {n} calls: {reason}" for (path, op, reason), n in calls.items()]


def _seconds(stock: Clip, patched: Clip) -> str:
    return (
        f"unpatched {stock.timings.total:.2f} s ({stock.timings.step:.3f} s a step), "
        f"patched {patched.timings.total:.2f} s ({patched.timings.step:.3f} s a step), first calls included"
    )
