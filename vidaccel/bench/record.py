"""A benchmark record: where it was measured, how it is written, and the table that it prints.

A record is one JSON object. Its ``results`` are rows, one per (scope, variant): ``status`` is ``ok``, ``failed`` or
``skipped`` (then ``reason`` says why), and an ``ok`` row carries its figures. Its ``new_processes``, if it has any, are
such rows of first calls, one per (variant, caches, scope).
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vidaccel.bench.variants import COMPILED, is_split
from vidaccel.clips.outputs import write_json
from vidaccel.errors import first_line
from vidaccel.parallel.team import team

__all__ = [
    "Recorder",
    "Row",
    "add_ratios",
    "best_compile",
    "is_compile_baseline",
    "table",
]

logger = logging.getLogger(__name__)

Row = dict[str, Any]


class Recorder:
    """Collects rows into a record and saves it after every one of them, so that nothing measured is ever lost.

    Args:
        head: What the record says before its results.
        path: Where it is saved; None keeps it in memory.
        deadline: Moment of ``time.monotonic()`` after which whatever is left is recorded as skipped.
    """

    def __init__(self, head: dict[str, Any], path: Path | None, deadline: float) -> None:
        self.rows: list[Row] = []
        self.record = {**head, "complete": False, "results": self.rows}
        self._path = path
        self._deadline = deadline
        self._bar = tqdm(leave=False, disable=None if team().leads else True)

    def measure(self, scope: str, variant: str, work: Callable[[], Row]) -> None:
        """Add the row that ``work`` returns; if it fails, or there is no time for it, a row that says so."""
        if self.out_of_time:
            self.skip_for_time(scope, variant)
            return
        self._bar.set_description(f"{scope}: {variant}")
        try:
            row = work()
        except Exception as error:  # whatever one variant does, the others are still worth measuring
            logger.debug("%s of %s failed", variant, scope, exc_info=True)
            self.fail(scope, variant, error)
        else:
            self._add(scope, variant, "ok", row)

    def note_first_calls(self, row: Row) -> None:
        """Add a row to the record's ``new_processes``."""
        self.record.setdefault("new_processes", []).append(row)
        outcome = f"first call {row['first_call_s']:.2f} s" if row["status"] == "ok" else row["reason"]
        self._bar.write(f"{row['scope']}: {row['variant']}, {row['caches']} caches: {outcome}", file=sys.stderr)
        self._save()

    def skip(self, scope: str, variant: str, reason: str) -> None:
        """Add a row for what is not tried."""
        self._add(scope, variant, "skipped", {"reason": reason})

    @property
    def out_of_time(self) -> bool:
        return team().tell(time.monotonic() > self._deadline)

    def skip_for_time(self, scope: str, variant: str) -> None:
        """Add a row for what there was no time for."""
        self.skip(scope, variant, "the time limit was reached")

    def fail(self, scope: str, variant: str, error: Exception) -> None:
        """Add a row for what did not work."""
        self._add(scope, variant, "failed", {"reason": first_line(error)})

    def finish(self) -> None:
        """Mark the record as complete."""
        self._bar.close()
        self.record["complete"] = True
        self._save()

    def _add(self, scope: str, variant: str, status: str, row: Row) -> None:
        self.rows.append({"scope": scope, "variant": variant, "status": status, **row})
        add_ratios(self.rows)
        outcome = f"{row['median_ms']:.3f} ms" if status == "ok" else f"{status}: {row['reason']}"
        if team().leads:
            self._bar.write(f"{scope}: {variant}: {outcome}", file=sys.stderr)
        self._bar.update()
        self._save()

    def _save(self) -> None:
        if self._path is not None:
            write_json(self._path, self.record)


def is_compile_baseline(variant: str) -> bool:
    """Whether a variant is stock code under torch.compile: the baseline that counts."""
    parts = set(variant.split("+"))
    return bool(COMPILED & parts) and "patched" not in parts


def best_compile(rows: Iterable[Row], scope: str) -> Row | None:
    """The fastest torch.compile variant of stock code in ``scope``."""
    baselines = [r for r in rows if r["scope"] == scope and r["status"] == "ok" and is_compile_baseline(r["variant"])]
    return min(baselines, key=lambda row: row["median_ms"], default=None)


def add_ratios(rows: list[Row]) -> None:
    """Give every measured row its time as a fraction of eager's and of the best torch.compile variant's."""
    for row in rows:
        if row["status"] != "ok":
            continue
        eager, patched = (
            next((r for r in rows if (r["scope"], r["variant"], r["status"]) == (row["scope"], name, "ok")), None)
            for name in ("eager", "patched")
        )
        compiled = best_compile(rows, row["scope"])
        if is_split(row["variant"]):
            row["speedup"] = patched["median_ms"] / row["median_ms"] if patched else None
            if "step_ms" in row and patched:
                row["step_speedup"] = patched["step_ms"] / row["step_ms"]
                row["decode_speedup"] = patched["decode_ms"] / row["decode_ms"]
        row["of_eager"] = row["median_ms"] / eager["median_ms"] if eager else None
        row["of_best_compile"] = row["median_ms"] / compiled["median_ms"] if compiled else None


def _number(digits: int) -> Callable[[Any], str]:
    return lambda value: f"{value:.{digits}f}"


def _unless_ok(status: str) -> str:
    return "" if status == "ok" else status


_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("scope", "scope", str),
    ("variant", "variant", str),
    ("median_ms", "median ms", _number(3)),
    ("p20_ms", "p20", _number(3)),
    ("p80_ms", "p80", _number(3)),
    ("of_eager", "of eager", _number(3)),
    ("of_best_compile", "of best compile", _number(3)),
    ("speedup", "over one GPU", _number(2)),
    ("step_ms", "step ms", _number(1)),
    ("step_speedup", "step over one GPU", _number(2)),
    ("decode_ms", "decode ms", _number(1)),
    ("decode_speedup", "decode over one GPU", _number(2)),
    ("gb_s", "GB/s", _number(0)),
    ("of_copy_bandwidth", "of copy", _number(2)),
    ("tflop_s", "TFLOP/s", _number(2)),
    ("of_matmul_rate", "of matmul", _number(2)),
    ("bound", "bound by", str),
    ("sent_gb", "GB sent", "{:.3g}".format),
    ("host_ms", "host ms", _number(2)),
    ("caches", "caches", str),
    ("first_call_s", "first call s", _number(2)),
    ("next_ms", "2nd to 10th call ms", _number(3)),
    ("next_worst_ms", "worst", _number(3)),
    ("next_host_ms", "their host ms", _number(2)),
    ("run_ms", "in a run ms", _number(3)),
    ("cold_start_s", "cold start s", _number(1)),
    ("peak_memory_gib", "peak GiB", _number(2)),
    ("peak_reserved_gib", "reserved GiB", _number(2)),
    ("error_to_eager", "error to eager", "{:.1e}".format),
    ("error_to_patched", "error to one GPU", "{:.1e}".format),
    ("error_to_reference", "error to reference", "{:.1e}".format),
    ("psnr_min_to_eager_db", "min PSNR dB", _number(1)),
    ("psnr_min_to_patched_db", "min PSNR dB to one GPU", _number(1)),
    ("status", "", _unless_ok),
    ("reason", "", str),
)


def table(rows: list[Row]) -> str:
    """The rows as aligned text, without the columns that no row fills."""
    cells = [[_cell(row.get(key), show) for key, _, show in _COLUMNS] for row in rows]
    used = [i for i in range(len(_COLUMNS)) if any(line[i] for line in cells)]
    lines = [[_COLUMNS[i][1] for i in used], *([line[i] for i in used] for line in cells)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = {i for i, column in enumerate(used) if _COLUMNS[column][2] in (str, _unless_ok)}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _cell(value: Any, show: Callable[[Any], str]) -> str:
    return "" if value is None else show(value)
