"""``vidaccel psnr``: its arguments. What it does is in ``clip_files.py``."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

__all__ = ["add_arguments", "add_output_arguments", "decibels", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    clip = "mp4, webm, gif, webp, ... or a folder of pictures, which are ordered by the numbers in their names"
    parser.add_argument("a", type=Path, help=clip)
    parser.add_argument("b", type=Path, help="the same; one may be a file and the other a folder")
    parser.add_argument("--min-psnr", type=decibels, metavar="DB", help="what the worst frame must reach")
    parser.add_argument("--fps", type=_rate, default=8, help="how fast the page plays (default: %(default)g)")
    add_output_arguments(parser)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """For commands that compare clips."""
    parser.add_argument("--json", metavar="FILE", help="also write a record; - prints it, and nothing else")
    parser.add_argument("--html", metavar="FILE", help="also write a page with both clips, their difference and curves")


def decibels(text: str) -> float:
    """An argument's value."""
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"expected a number of decibels, 0 or more, got {text}")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"expected frames per second, more than 0, got {text}")
    return value


def run(args: argparse.Namespace) -> int:
    from vidaccel.fidelity.clip_files import compare_files

    return compare_files(args)
