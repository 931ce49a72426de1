"""``vidaccel bench``: its arguments. What it does is in ``benchmark.py``, which imports torch and diffusers."""

from __future__ import annotations

import argparse
import os
import shlex

from vidaccel.bench.affinity import pinned
from vidaccel.clips.clip_request import add_clip_arguments, add_model_arguments

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    subject = parser.add_mutually_exclusive_group()
    subject.add_argument("--synthetic", metavar="NAME", help="a pipeline with random weights instead of --model")
    subject.add_argument("--op", metavar="NAME", help="one op at the models' shapes instead of a pipeline; or all")
    add_clip_arguments(parser)
    parser.add_argument(
        "--size", choices=("full", "tiny"), default="full", help="tiny: a quick dry run of --synthetic or --op"
    )
    parser.add_argument(
        "--scope",
        default="denoiser,vae,end-to-end",
        metavar="LIST",
        help="what to time: denoiser, one call of it; vae, the decode of one clip; encode, that of the same clip; "
        "end-to-end, the whole pipeline (default: %(default)s)",
    )
    parser.add_argument(
        "--variants",
        metavar="LIST",
        help="eager, or any of patched, no_graph (patched without CUDA graphs), compile, compile_blocks (a denoiser's "
        "blocks alone), cudnn.benchmark and channels_last joined by +; eager is always measured, and first (default: "
        "eager,patched,compile,patched+compile, and for --synthetic on a GPU also stronger torch.compile baselines)",
    )
    parser.add_argument("--only", nargs="+", metavar="SITE", help="patch only these ops, parts or module paths")
    parser.add_argument("--skip", nargs="+", metavar="SITE", help="patch all but these")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls at most (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="untimed calls after the first (default: %(default)s)")
    parser.add_argument(
        "--new-process",
        action="store_true",
        help="also measure calls 1 to 10 (of whole clips 1 to 3) of each variant without torch.compile in a new "
        "process, patched ones with empty disk caches and then with those that the first one left",
    )
    parser.add_argument("--cpus", type=int, metavar="N", help="hold the process to this many CPU cores")
    parser.add_argument(
        "--budget",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="stop repeating a call after so long, but not before three repeats (default: %(default)s)",
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        default=float("inf"),
        metavar="SECONDS",
        help="record what has not begun by then as skipped",
    )
    parser.add_argument(
        "--quick", action="store_true", help="three repeats, no stronger baselines, no float32 reference"
    )
    parser.add_argument("--no-reference", action="store_true", help="compare with eager only, not with float32")
    parser.add_argument("--compile-backend", help="of torch.compile (default: inductor; for --size tiny, eager)")
    parser.add_argument(
        "--empty-caches",
        action="store_true",
        help="hide the disk caches of torch.compile and Triton from every variant, so that each cold start is cold",
    )
    parser.add_argument("--out", metavar="FILE", help="JSON record, saved after every measurement")
    parser.add_argument("--note", help="a remark that the record keeps, as on what the disk caches held before")
    parser.add_argument("--commit", help="what to record as the commit where there is no checkout")


def run(args: argparse.Namespace) -> int:
    with pinned(args.cpus):  # before PyTorch counts the cores
        from vidaccel.bench.benchmark import benchmark

        return benchmark(args, _command_line(args))


def _command_line(args: argparse.Namespace) -> str:
    """The command with the options that were given, but for where its record went."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    ranks = os.environ.get("WORLD_SIZE", "1")
    words = (
        ["vidaccel", "bench"] if ranks == "1" else ["torchrun", "--nproc-per-node", ranks, "-m", "vidaccel", "bench"]
    )
    for name, default in vars(parser.parse_args([])).items():
        value = getattr(args, name)
        if value == default or name in ("out", "commit", "note"):
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += [str(entry) for entry in (value if isinstance(value, list) else [value])]
    return shlex.join(words)
