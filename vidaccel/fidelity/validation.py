"""What ``vidaccel validate`` does: one clip unpatched, the same clip patched, a verdict on the two."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vidaccel import patch_pipeline
from vidaccel.clips.clip_request import request_from_arguments
from vidaccel.clips.generation import Clip, call_arguments, generate, resolve
from vidaccel.clips.outputs import check_record, json_text, write_json
from vidaccel.clips.video_model import dtype_of, find_model, load_pipeline
from vidaccel.environment import device_of, environment
from vidaccel.errors import UsageError
from vidaccel.fidelity.metrics import psnr, ssim
from vidaccel.patching.report import path_pattern

__all__ = ["judge", "validate"]

DEFAULT_MIN_PSNR_DB = {torch.float32: 60.0, torch.float16: 25.0, torch.bfloat16: 25.0}


@dataclass(frozen=True)
class Verdict:
    """What the comparison of two clips gave; ``psnr`` and ``ssim`` are ``[F]``, one value a frame."""

    psnr: np.ndarray
    ssim: np.ndarray
    bit_identical: bool
    min_psnr_db: float

    @property
    def passed(self) -> bool:
        """Whether the worst frame reaches the floor; a frame that is not finite never does."""
        return bool(self.psnr.min() >= self.min_psnr_db)

    @property
    def mean_psnr(self) -> float:
        """Over the frames that differ at all: equal ones have no finite PSNR."""
        differing = self.psnr[self.psnr != np.inf]
        return float(differing.mean()) if differing.size else float("inf")

    def summary(self) -> dict[str, Any]:
        """The verdict as plain types, ready for a record."""
        return {
            "passed": self.passed,
            "bit_identical": self.bit_identical,
            "min_psnr_db": self.min_psnr_db,
            "psnr_db": {
                "mean": self.mean_psnr,
                "minimum": float(self.psnr.min()),
                "worst_frame": int(self.psnr.argmin()),
                "frames": self.psnr.tolist(),
            },
            "ssim": {"mean": float(self.ssim.mean()), "minimum": float(self.ssim.min()), "frames": self.ssim.tolist()},
        }

    def __str__(self) -> str:
        if self.bit_identical:
            return "bit-identical: every value of every frame is equal\nPASS"
        comparison = "at least" if self.passed else "not at least"
        return "\n".join(
            (
                f"PSNR  mean {self.mean_psnr:.2f} dB, minimum {self.psnr.min():.2f} dB (frame {self.psnr.argmin()})",
                f"SSIM  mean {self.ssim.mean():.6f}, minimum {self.ssim.min():.6f} (frame {self.ssim.argmin()})",
                f"{'PASS' if self.passed else 'FAIL'}: the worst frame has {comparison} {self.min_psnr_db:g} dB",
            )
        )


def judge(stock: np.ndarray, patched: np.ndarray, min_psnr_db: float) -> Verdict:
    """Compare two clips ``[F, H, W, C]`` in 0..1.

    Raises:
        ValueError: they differ in shape, or are too small for SSIM's window.
    """
    identical = stock.shape == patched.shape and np.array_equal(stock, patched)
    return Verdict(psnr(stock, patched), ssim(stock, patched), identical, min_psnr_db)


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
