"""``vidaccel env``: devices, versions, settings, supported pipelines and remembered choices."""

from __future__ import annotations

import argparse
import os
from collections import Counter

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="device to describe (default: the first GPU, else the CPU)")
    parser.add_argument(
        "--drop-choices", nargs="?", const="", metavar="OP", help="forget what was measured, of one op or of all"
    )


def run(args: argparse.Namespace) -> int:
    if args.drop_choices is not None:
        return _drop(args.drop_choices)

    from vidaccel.config import cache_directory, check_environment
    from vidaccel.environment import device_of, environment
    from vidaccel.kernels import choice
    from vidaccel.patching.families import served_pipelines

    facts = environment(device_of(args.device))
    facts |= {name: value for name, value in sorted(os.environ.items()) if name.startswith("VIDACCEL_")}
    facts["pipelines"] = ", ".join(served_pipelines())
    counts = Counter(op for op, _, _ in choice.remembered())
    listed = ", ".join(f"{op} {count}" for op, count in counts.items()) or "none"
    facts["choices"] = f"{listed} (in {cache_directory()})"
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value if value is not None else '-'}")
    check_environment()
    return 0


def _drop(op: str) -> int:
    from vidaccel.errors import UsageError, nearest
    from vidaccel.kernels import choice
    from vidaccel.kernels.op import ops

    known = {*ops(), *(name for name, _, _ in choice.remembered())} if op else set()
    if op and op not in known:
        raise UsageError(f"--drop-choices: there is no op {op!r}{nearest(op, known)}")
    print(f"{choice.drop(op or None)} choices dropped")
    return 0
