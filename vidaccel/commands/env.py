"""``vidaccel env``: devices, versions, settings and supported pipelines."""

from __future__ import annotations

import argparse
import os

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="device to describe (default: the first GPU, else the CPU)")


def run(args: argparse.Namespace) -> int:
    from vidaccel.bench.record import environment
    from vidaccel.clips.video_model import device_of
    from vidaccel.patching.families import served_pipelines

    facts = environment(device_of(args.device))
    facts |= {name: value for name, value in sorted(os.environ.items()) if name.startswith("VIDACCEL_")}
    facts["pipelines"] = ", ".join(served_pipelines())
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value if value is not None else '-'}")
    return 0
