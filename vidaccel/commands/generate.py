"""``vidaccel generate``: its arguments. What it does is in ``batch.py``, which imports torch and diffusers."""

from __future__ import annotations

import argparse
from pathlib import Path

from vidaccel.clips.clip_request import add_clip_arguments, add_model_arguments, add_parallel_argument
from vidaccel.clips.jobs import output_path
from vidaccel.errors import nearest

__all__ = ["add_arguments", "run"]

_ENGINES = ("process", "ray")


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
        type=output_path,
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
    add_parallel_argument(parser)
    parser.add_argument("--quiet", action="store_true", help="print errors, the names of clips and comparisons alone")
    parser.add_argument(
        "--engine",
        type=_engine,
        default="process",
        help="process makes clip after clip right here, ray those of a job file on the GPUs of a machine or cluster, "
        "or on its CPUs (default: %(default)s)",
    )
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="of a running Ray cluster; auto: the one on this machine (default: a new one on this machine)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="how many clips Ray makes at a time (default: one on each GPU; without GPUs, as many as fit if each has "
        "the threads of a single process, which OMP_NUM_THREADS sets)",
    )
    parser.add_argument("--ray-logs", action="store_true", help="also print what Ray and its workers log")


def _engine(name: str) -> str:
    if name not in _ENGINES:
        raise argparse.ArgumentTypeError(f"there is no engine {name!r}{nearest(name, _ENGINES)}")
    return name


def run(args: argparse.Namespace) -> int:
    from vidaccel.clips.batch import make_clips

    return make_clips(args)
