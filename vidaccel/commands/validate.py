"""``vidaccel validate``: its arguments. What it does is in ``validation.py``, which imports torch and diffusers."""

from __future__ import annotations

import argparse

from vidaccel.clips.clip_request import add_clip_arguments, add_model_arguments, add_parallel_argument
from vidaccel.commands.psnr import add_output_arguments, decibels

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_clip_arguments(parser)
    parser.add_argument("--only", nargs="+", metavar="SITE", help="patch only these ops, parts or module paths")
    parser.add_argument("--skip", nargs="+", metavar="SITE", help="patch all but these")
    parser.add_argument("--strict", action="store_true", help="stop if a site cannot be patched")
    parser.add_argument(
        "--margin",
        type=decibels,
        default=3.0,
        metavar="DB",
        help="how far the worst frame may be below the worst that changes of equal maths give (default: %(default)g)",
    )
    parser.add_argument(
        "--min-psnr", type=decibels, metavar="DB", help="what the PSNR of the worst frame must reach besides"
    )
    parser.add_argument("--require-bit-exact", action="store_true", help="fail if one bit differs")
    parser.add_argument(
        "--quick", action="store_true", help="at most 3 steps, 5 to 9 frames and 2 changes of equal maths"
    )
    parser.add_argument("--blame", action="store_true", help="hold sites against the original code at more calls")
    parser.add_argument(
        "--controls", nargs="+", metavar="NAME", help="changes of equal maths to try (default: all that apply)"
    )
    parser.add_argument("--compile-control", action="store_true", help="also try torch.compile as one, which is slow")
    add_parallel_argument(parser)
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from vidaccel.fidelity.validation import validate

    return validate(args)
