"""Where the commands that compare clips leave what they found: lines, a JSON record, a page."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vidaccel.clips.outputs import aside, check_record, json_text, write_json

__all__ = ["check_files", "put_out"]


def check_files(args: argparse.Namespace) -> None:
    """Try to write where ``--json`` and ``--html`` say, before a clip is made.

    Raises:
        UsageError: nobody can.
    """
    for name in (args.json, args.html):
        if name not in (None, "-"):
            check_record(Path(name))


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
