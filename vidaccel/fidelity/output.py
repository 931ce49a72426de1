"""Where the commands that compare clips leave what they found: lines, a JSON record, a page."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vidaccel.clips.outputs import aside, check_record, json_text, write_json
from vidaccel.errors import UsageError

__all__ = ["check_files", "put_out"]


def check_files(args: argparse.Namespace) -> None:
    """Try to write where ``--json`` and ``--html`` say, before a clip is made.

    Raises:
        UsageError: nobody can, or it would take the place of a clip that is compared, or of the other.
    """
    files = [Path(name) for name in (None if args.json == "-" else args.json, args.html) if name is not None]
    clips = [clip.resolve() for clip in (vars(args).get("a"), vars(args).get("b")) if clip is not None]
    for path in files:
        check_record(path)
        if any(clip in (path.resolve(), path.resolve().parent) for clip in clips):
            if path.exists():
                raise UsageError(f"{path} is of a clip that is compared, and would be replaced")
            raise UsageError(f"{path} would be taken for a frame of a clip that is compared")
    if len({path.resolve() for path in files}) < len(files):
        raise UsageError(f"{files[0]}: --json and --html need a file each")


def put_out(
    args: argparse.Namespace,
    summary: Mapping[str, Any],
    lines: Sequence[str],
    pairs: Iterable[tuple[np.ndarray, np.ndarray]],
    names: tuple[str, str],
    fps: float,
) -> None:
    """Write the record and the page that ``args`` ask for, and print the lines, or the record in their place."""
    if args.json not in (None, "-"):
        write_json(Path(args.json), summary)
    if args.html is not None:
        from vidaccel.fidelity.page import page  # Matplotlib and Jinja, which nothing else needs

        text = page(summary, pairs, names, fps)
        with aside(Path(args.html)) as part:
            part.write_text(text, encoding="utf-8")
    print(json_text(summary) if args.json == "-" else "\n".join(lines))
