"""``vidaccel validate``: its arguments. What it does is in ``validation.py``, which imports torch and diffusers."""

from __future__ import annotations

import argparse

from vidaccel.clips.clip_request import add_clip_arguments, add_model_arguments

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_clip_arguments(parser)
    parser.add_argument("--only", nargs="+", metavar="SITE", help="patch only these ops, parts or module paths")
    parser.add_argument("--skip", nargs="+", metavar="SITE", help="patch all but these")
    parser.add_argument("--strict", action="store_true", help="stop if a site cannot be patched")
    parser.add_argument(
        "--min-psnr",
        type=float,
        metavar="DB",
        help="what the PSNR of the worst frame must reach (default: 60 in float32; 25 in float16 and bfloat16, where "
        "correct implementations of the same maths drift that far apart over a clip)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write a record; - prints it, and nothing else")


def run(args: argparse.Namespace) -> int:
    from vidaccel.fidelity.validation import validate

    return validate(args)
