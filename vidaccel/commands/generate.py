"""``vidaccel generate``: its arguments. What it does is in ``clip_maker.py``, which imports torch and diffusers."""

from __future__ import annotations

import argparse
from pathlib import Path

from vidaccel.clips.clip_request import add_clip_arguments, add_model_arguments

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_clip_arguments(parser)
    several = parser.add_mutually_exclusive_group()
    several.add_argument("--num-clips", type=int, default=1, help="how many clips, with consecutive seeds")
    several.add_argument(
        "--jobs",
        type=Path,
        metavar="FILE",
        help="one image path, prompt or JSON object with these options as keys per line, or a JSON array of such; "
        "# begins a comment",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("clip.mp4"),
        help="mp4, gif or webp file; without a suffix a folder of PNG frames. Several clips are numbered; without a "
        "suffix, this is then the folder of their mp4 files (default: %(default)s)",
    )
    parser.add_argument(
        "--allow-outside",
        action="store_true",
        help="let the out of a job lie outside of the folder of --out; it is then meant from the current folder",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="make clips again that are done or were made otherwise"
    )
    parser.add_argument("--no-patch", action="store_true", help="stock diffusers, unpatched")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="also run unpatched with the same seed, and write both side by side, with PSNR and times",
    )
    parser.add_argument("--only", nargs="+", metavar="SITE", help="patch only these ops, parts or module paths")
    parser.add_argument("--skip", nargs="+", metavar="SITE", help="patch all but these")
    parser.add_argument("--strict", action="store_true", help="stop if a site cannot be patched")
    parser.add_argument(
        "--cuda-graph",
        action="store_true",
        help="also capture the denoiser's calls as CUDA graphs: the same clip, sooner where the GPU waits for Python",
    )
    parser.add_argument("--quiet", action="store_true", help="print errors, the names of clips and comparisons alone")


def run(args: argparse.Namespace) -> int:
    from vidaccel.clips.clip_maker import make_clips

    return make_clips(args)
