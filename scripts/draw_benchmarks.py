"""Draw the README's benchmark tables from the committed records, so that no figure is ever typed by hand.

python scripts/draw_benchmarks.py                      # print the tables
python scripts/draw_benchmarks.py --readme README.md   # put them between the README's two marks
python scripts/draw_benchmarks.py --readme README.md --check   # exit code 1 if they are not what stands there
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vidaccel.bench.record import best_compile

RECORDS = Path(__file__).resolve().parents[1] / "samples" / "benchmarks"
BEGIN, END = "<!-- benchmarks -->\n", "<!-- /benchmarks -->\n"
NONE = "-"
Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw the benchmark tables from records.")
    parser.add_argument("records", nargs="*", type=Path, help="JSON files (default: all in samples/benchmarks)")
    parser.add_argument("--readme", type=Path, help=f"file to put them into, between {BEGIN.strip()} and {END.strip()}")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the file is out of date")
    args = parser.parse_args()
    drawn = draw([json.loads(path.read_text()) for path in args.records or sorted(RECORDS.glob("*.json"))])
    if args.readme is None:
        print(drawn, end="")
        return 0
    before = args.readme.read_text()
    after = placed(drawn, before)
    if args.check:
        return int(before != after)
    args.readme.write_text(after)
    return 0


def draw(records: list[dict[str, Any]]) -> str:
    """Markdown: a table of calls, a table of ops, and where each record comes from."""
    pipelines = [record for record in records if "op" not in record["subject"]]
    ops = [record for record in records if "op" in record["subject"]]
    tables = [
        _table(_CALL_COLUMNS, (_call_row(record, scope) for record in pipelines for scope in _scopes(record))),
        _table(_OP_COLUMNS, (_op_row(record, case) for record in ops for case in _scopes(record))),
        "\n".join(_origin(record) for record in records),
    ]
    return "\n\n".join(filter(None, tables)) + "\n"


def placed(drawn: str, text: str) -> str:
    """``text`` with ``drawn`` between its marks."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"no {BEGIN.strip()} ... {END.strip()} to put the tables between")
    return f"{head}{begin}\n{drawn}\n{end}{tail}"


_CALL_COLUMNS = (
    "call",
    "eager",
    "best torch.compile",
    "patched (of eager, of compile)",
    "patched + torch.compile",
    "cold start: compile, patched",
    "peak memory: eager, patched",
    "error against float32: eager, patched",
)
_OP_COLUMNS = ("op", "eager", "best torch.compile", "ours (of eager, of compile)", "of copy bandwidth", "one stage")


def _call_row(record: dict[str, Any], scope: str) -> list[str]:
    rows = _measured(record, scope)
    eager, patched = rows.get("eager"), rows.get("patched")
    compiled = best_compile(record["results"], scope)
    return [
        f"{_subject(record)} {scope}, {_shape(record, scope)}, {record['dtype']}",
        _milliseconds(eager),
        f"{_milliseconds(compiled)} ({compiled['variant']})" if compiled else NONE,
        _with_ratios(patched),
        _with_ratios(rows.get("patched+compile")),
        _pair(compiled, patched, "cold_start_s", "{:.3g} s".format),
        _pair(eager, patched, "peak_memory_gib", "{:.1f} GiB".format),
        _pair(eager, patched, "error_to_reference", "{:.1e}".format),
    ]


def _op_row(record: dict[str, Any], case: str) -> list[str]:
    rows = _measured(record, case)
    ours = rows.get("ours")
    return [
        f"{record['subject']['op']}, {case}, {record['dtype']}",
        _milliseconds(rows.get("eager")),
        _milliseconds(best_compile(record["results"], case)),
        _with_ratios(ours),
        f"{ours['of_copy_bandwidth']:.0%}" if ours else NONE,
        _milliseconds(rows.get("ours, one stage")),
    ]


def _measured(record: dict[str, Any], scope: str) -> dict[str, Row]:
    return {row["variant"]: row for row in record["results"] if row["scope"] == scope and row["status"] == "ok"}


def _scopes(record: dict[str, Any]) -> Iterable[str]:
    return dict.fromkeys(row["scope"] for row in record["results"])


def _subject(record: dict[str, Any]) -> str:
    subject = record["subject"]
    return str(subject.get("synthetic") or Path(subject.get("model", "bundled model")).name)


def _shape(record: dict[str, Any], scope: str) -> str:
    shapes = record["shapes"][scope]
    if isinstance(shapes, list):  # of every call of a module: its first tensor tells enough
        shape = next(iter(shapes[0].values()))
        return shape if len(shapes) == 1 else f"{shape} and {len(shapes) - 1} more"
    return f"{shapes['num_frames']} frames {shapes['width']}x{shapes['height']}, {shapes['num_inference_steps']} steps"


def _milliseconds(row: Row | None) -> str:
    if row is None:
        return NONE
    value = row["median_ms"]
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _with_ratios(row: Row | None) -> str:
    if row is None:
        return NONE
    ratios = (f"{row[name]:.2f}" for name in ("of_eager", "of_best_compile") if row.get(name) is not None)
    return f"{_milliseconds(row)} ({', '.join(ratios)})"


def _pair(first: Row | None, second: Row | None, key: str, show: Callable[[Any], str]) -> str:
    values = [None if row is None else row.get(key) for row in (first, second)]
    return ", ".join(NONE if value is None else show(value) for value in values)


def _table(columns: tuple[str, ...], rows: Iterable[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *lines]) if lines else ""


def _origin(record: dict[str, Any]) -> str:
    where = record["environment"]
    versions = ", ".join(f"{name} {where[name]}" for name in ("torch", "triton", "diffusers") if where[name])
    commit = f", commit {where['commit'][:10]}" if where["commit"] else ""
    return f"- `{record['command']}`: {where['device']}, {versions}{commit}, {where['date'][:10]}"


if __name__ == "__main__":
    sys.exit(main())
