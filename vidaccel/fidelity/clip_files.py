"""What ``vidaccel psnr`` does: two clips that are there already, compared frame by frame.

Both are read as a stream of 8-bit RGB frames. PSNR is over the pixels and channels of a frame, as ``psnr_avg`` of
FFmpeg's ``psnr`` filter on the format ``gbrp``; flicker is the PSNR of what changes from one frame to the next. SSIM is
FFmpeg's (``ffmpeg_ssim.py``).
"""

from __future__ import annotations

import argparse
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio
from tqdm import tqdm

from vidaccel.clips.frames import frame_pairs
from vidaccel.environment import environment
from vidaccel.errors import UsageError
from vidaccel.fidelity.ffmpeg_ssim import FfmpegSsim
from vidaccel.fidelity.metrics import Likeness, Scores
from vidaccel.fidelity.output import check_files, put_out
from vidaccel.fidelity.table import clip_lines

__all__ = ["compare_files", "measure"]


def compare_files(args: argparse.Namespace) -> int:
    """Run the command; exit code 1 if the worst frame does not reach ``--min-psnr``."""
    check_files(args)
    clip = measure(args.a, args.b, show_progress=True)
    passed = args.min_psnr is None or clip["psnr_db"]["minimum"] >= args.min_psnr
    lines = clip_lines(clip)
    if args.min_psnr is not None:
        rule = "has at least" if passed else "does not have"
        lines.append(f"{'PASS' if passed else 'FAIL'}: the worst frame {rule} {args.min_psnr:g} dB")
    summary = {
        "command": "psnr",
        "passed": passed,
        "clip": clip,
        "arguments": {"a": str(args.a), "b": str(args.b), "min_psnr_db": args.min_psnr},
        "environment": environment(torch.device("cpu")),
    }
    put_out(args, summary, lines, frame_pairs(args.a, args.b), (str(args.a), str(args.b)), args.fps)
    return 0 if passed else 1


def measure(a: Path, b: Path, show_progress: bool = False) -> dict[str, Any]:
    """Every metric of two clips, as plain types. However long they are, two frames of each are held at a time.

    Raises:
        UsageError: they cannot be read, differ in size or length, or are too small for SSIM.
    """
    pairs = frame_pairs(a, b)
    first = next(pairs)
    height, width, _ = first[0].shape
    try:
        ssim = FfmpegSsim(height, width)
    except ValueError as error:
        raise UsageError(f"{a}: {error}") from error
    values: list[float] = []
    flicker: list[float] = []
    identical, before = True, None
    with ssim:
        bar = {"desc": "frames", "unit": " frames", "leave": False, "disable": not show_progress}
        for pair in tqdm(chain([first], pairs), **bar):
            ssim.add(*pair)
            identical &= np.array_equal(*pair)
            now = np.stack(pair).astype(np.float64)  # [2, H, W, 3]
            values.append(_psnr(*now))
            if before is not None:
                flicker.append(_psnr(*(now - before)))
            before = now
    scores = Scores(np.array(values))
    likeness = Likeness(identical, scores, Scores(ssim.frames), Scores(np.array(flicker)) if flicker else None)
    summary = {"frames": len(values), "height": height, "width": width, **likeness.summary()}
    summary["psnr_db"]["of_mean_error"] = _of_mean_error(scores.frames)
    return summary


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    with np.errstate(divide="ignore"):  # of equal frames it is infinite
        return float(peak_signal_noise_ratio(a, b, data_range=255))


def _of_mean_error(psnr_db: np.ndarray) -> float:
    """The PSNR of the clip as a whole, which FFmpeg calls its average."""
    with np.errstate(divide="ignore"):
        return float(-10 * np.log10(np.mean(10 ** (-psnr_db / 10))))
