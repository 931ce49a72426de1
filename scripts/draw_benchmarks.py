"""Draw the benchmark tables from the committed records, so that no figure is ever typed by hand.

python scripts/draw_benchmarks.py                      # print all tables
python scripts/draw_benchmarks.py --tables samples/benchmarks/README.md   # put them between that file's two marks
python scripts/draw_benchmarks.py --readme README.md   # put a short one between those of the README
python scripts/draw_benchmarks.py --readme README.md --check   # exit code 1 if it is not what stands there
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vidaccel.bench.record import best_compile, is_compile_baseline

RECORDS = Path(__file__).resolve().parents[1] / "samples" / "benchmarks"
BEGIN, END = "<!-- benchmarks -->\n", "<!-- /benchmarks -->\n"
NONE = "-"
Row = dict[str, Any]
FirstCalls = Mapping[tuple[str, str], Row]  # by variant and caches


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw the benchmark tables from records.")
    parser.add_argument("records", nargs="*", type=Path, help="JSON files (default: all in samples/benchmarks)")
    between = f"between {BEGIN.strip()} and {END.strip()}"
    parser.add_argument("--readme", type=Path, help=f"file to put the short table into, {between}")
    parser.add_argument("--tables", type=Path, help=f"file to put all tables into, {between}")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a file is out of date")
    args = parser.parse_args()
    records = [json.loads(path.read_text()) for path in args.records or sorted(RECORDS.glob("*.json"))]
    records = [record for record in records if "subject" in record]  # those of tests have none
    if not (args.readme or args.tables):
        print(draw(records), end="")
        return 0
    pages = [(args.readme, summary), (args.tables, draw)]
    before = {path: path.read_text() for path, _ in pages if path}
    after = {path: placed(drawn(records), before[path]) for path, drawn in pages if path}
    if args.check:
        return int(before != after)
    for path, text in after.items():
        path.write_text(text)
    return 0


def summary(records: list[dict[str, Any]]) -> str:
    """Markdown: for each device one row a call of a pipeline, from the newest record of it on any."""
    newest: dict[str, tuple[dict[str, Any], str]] = {}
    for record in sorted(records, key=lambda record: str(record["environment"]["date"])):
        if "op" not in record["subject"] and "ranks" not in record:
            newest |= {_call(record, scope): (record, scope) for scope in _scopes(record)}
    parts = []
    for device in dict.fromkeys(record["environment"]["device"] for record in records):
        here = [(call, *found) for call, found in newest.items() if found[0]["environment"]["device"] == device]
        here.sort(key=lambda found: (_ORDER.index(found[2]), found[0]))
        if rows := [row for found in here for row in _summary_row(*found)]:
            parts += [f"On one {device}:", _table(_SUMMARY_COLUMNS, rows)]
    return "\n\n".join(parts) + "\n"


def _summary_row(call: str, record: dict[str, Any], scope: str) -> Iterator[list[str]]:
    """One, or none if the patched pipeline's call was not measured."""
    rows, compiled = _measured(record, scope), best_compile(record["results"], scope)
    if "patched" not in rows or "eager" not in rows:
        return
    stock, ours = rows["eager"], rows["patched"]
    memory = [_shown(row, "peak_memory_gib", "{:.1f}") for row in (stock, ours)]
    yield [
        call,
        *map(_milliseconds, (stock, compiled, ours)),
        _shown(ours, "of_eager", "**{:.2f}**"),
        _shown(ours, "of_best_compile", "{:.2f}"),
        _first_calls_of(ours["variant"], _first_calls(record, scope)),
        " -> ".join(memory) + " GiB" if NONE not in memory else NONE,
    ]


def draw(records: list[dict[str, Any]]) -> str:
    """Markdown: for each device a table of calls and a table of ops, then where each record comes from."""
    devices = dict.fromkeys(record["environment"]["device"] for record in records)
    parts = [part for device in devices for part in _tables(device, records)]
    return "\n\n".join([*parts, "\n".join(_origin(record) for record in records)]) + "\n"


def _tables(device: str, records: list[dict[str, Any]]) -> list[str]:
    here = [record for record in records if record["environment"]["device"] == device]
    split = [record for record in here if "ranks" in record]
    pipelines = [record for record in here if "op" not in record["subject"] and record not in split]
    ops = [record for record in here if "op" in record["subject"]]
    labels = Counter(_call(record, scope) for record in pipelines for scope in _scopes(record))
    calls = _table(_CALL_COLUMNS, (row for record in pipelines for row in _call_rows(record, labels)))
    kernels = _table(_OP_COLUMNS, (row for record in ops for row in _op_rows(record)))
    over_ranks = _table(_SPLIT_COLUMNS, (row for record in split for row in _split_rows(record)))
    several = f"On several {device}, each clip split over all:" if over_ranks else ""
    return list(filter(None, (f"On one {device}:" if pipelines or ops else "", calls, kernels, several, over_ranks)))


def placed(drawn: str, text: str) -> str:
    """``text`` with ``drawn`` between its marks."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"no {BEGIN.strip()} ... {END.strip()} to put the tables between")
    return f"{head}{begin}\n{drawn}\n{end}{tail}"


_ORDER = ("denoiser", "vae", "encode", "end-to-end")  # of scopes
_SUMMARY_COLUMNS = (
    "call",
    "stock",
    "best torch.compile",
    "vidaccel",
    "of stock's",
    "of torch.compile's",
    "first call of a process, warm caches (empty)",
    "peak memory",
)
_CALL_COLUMNS = (
    "call",
    "variant",
    "median",
    "of eager",
    "of best torch.compile",
    "first call, warm caches (empty)",
    "2nd to 10th call, of eager's (worst), warm caches; empty",
    "host",
    "peak memory (reserved)",
    "relative error to float32, to eager",
    "worst PSNR to eager",
)
_OP_COLUMNS = (
    "op",
    "eager",
    "best torch.compile",
    "ours",
    "x eager",
    "x torch.compile",
    "of copy bandwidth",
    "of matmul rate",
    "gained by prefetch",
)


_SPLIT_COLUMNS = (
    "call",
    "GPUs",
    "variant",
    "median",
    "x one GPU",
    "step: x one GPU",
    "decode: x one GPU",
    "sent by each GPU",
    "peak memory",
    "relative error to one GPU",
)


def _split_rows(record: dict[str, Any]) -> Iterator[list[str]]:
    for scope in _scopes(record):
        call = _call(record, scope)
        for row in record["results"]:
            if row["scope"] == scope and row["status"] == "ok":
                yield [
                    call,
                    str(record["ranks"]) if row["variant"] != "patched" else "1",
                    row["variant"],
                    _milliseconds(row),
                    *(_shown(row, name, "{:.2f}") for name in ("speedup", "step_speedup", "decode_speedup")),
                    _shown(row, "sent_gb", "{:.3g} GB"),
                    _shown(row, "peak_memory_gib", "{:.1f} GiB"),
                    _shown(row, "error_to_patched", "{:.1e}"),
                ]
                call = ""


def _call(record: dict[str, Any], scope: str) -> str:
    cpus = record.get("settings", {}).get("cpus")
    pinned = f", on {cpus} CPU cores" if cpus else ""
    return f"{_subject(record)} {scope}, {_shape(record, scope)}, {record['dtype']}{pinned}"


def _call_rows(record: dict[str, Any], labels: Mapping[str, int]) -> Iterator[list[str]]:
    """A row per scope and variant; of the torch.compile baselines only the fastest, the record has the others.

    Of several records of one call, each says by its note what it is about.
    """
    for scope in _scopes(record):
        compiled = best_compile(record["results"], scope)
        call = _call(record, scope)
        if labels[call] > 1 and "note" in record:
            call += f"; {record['note']}"
        for row in record["results"]:
            slower = is_compile_baseline(row["variant"]) and row["status"] == "ok" and row is not compiled
            if row["scope"] == scope and not slower:
                yield [call, *_call_cells(row, _first_calls(record, scope))]
                call = ""  # said once


def _first_calls(record: dict[str, Any], scope: str) -> FirstCalls:
    rows = record.get("new_processes", [])
    return {(r["variant"], r["caches"]): r for r in rows if r["scope"] == scope and r["status"] == "ok"}


def _call_cells(row: Row, first: FirstCalls) -> list[str]:
    if row["status"] != "ok":
        return [row["variant"], f"{row['status']}: {row['reason']}", *[NONE] * 8]
    memory, reserved = row.get("peak_memory_gib"), row.get("peak_reserved_gib")
    return [
        row["variant"],
        _milliseconds(row),
        _shown(row, "of_eager", "{:.2f}"),
        _shown(row, "of_best_compile", "{:.2f}"),
        _first_call(row, first),
        _next_calls(row["variant"], first),
        _shown(row, "host_ms", "{:.3g} ms"),
        NONE if memory is None else f"{memory:.1f} GiB" + (f" ({reserved:.1f})" if reserved is not None else ""),
        f"{_shown(row, 'error_to_reference', '{:.1e}')}, {_shown(row, 'error_to_eager', '{:.1e}')}",
        _shown(row, "psnr_min_to_eager_db", "{:.1f} dB"),
    ]


def _first_call(row: Row, first: FirstCalls) -> str:
    """Seconds, patching or compiling included: in new processes if there were any, else as it came in a longer one."""
    in_new_processes = _first_calls_of(row["variant"], first)
    return _shown(row, "cold_start_s", "{:.3g} s") if in_new_processes == NONE else in_new_processes


def _first_calls_of(variant: str, first: FirstCalls) -> str:
    rows = [first.get((variant, caches)) for caches in ("warm", "empty")]
    seconds = [f"{row['patch_s'] + row['first_call_s']:.3g} s" for row in rows if row]
    return seconds[0] + (f" ({seconds[1]})" if len(seconds) == 2 else "") if seconds else NONE


def _next_calls(variant: str, first: FirstCalls) -> str:
    """The median (and the worst) of the calls after the first, over the median of eager's."""
    eager = first.get(("eager", "empty"))
    rows = [first[variant, caches] for caches in ("warm", "empty") if (variant, caches) in first]
    if eager is None or not rows:
        return NONE
    ratios = ([r[figure] / eager["next_ms"] for figure in ("next_ms", "next_worst_ms")] for r in rows)
    return "; ".join(f"{median:.2f} ({worst:.2f})" for median, worst in ratios)


def _op_rows(record: dict[str, Any]) -> Iterator[list[str]]:
    """A row per case, or several where ours was measured under several settings."""
    for row in record["results"]:
        if row["variant"].partition("+")[0] == "ours":
            settings = row["variant"].removeprefix("ours").replace("+", " with ")
            yield [f"{row['scope']}, {record['dtype']}{settings}", *_op_cells(record, row)]


def _op_cells(record: dict[str, Any], ours: Row) -> list[str]:
    rows, compiled = _measured(record, ours["scope"]), best_compile(record["results"], ours["scope"])
    baselines = [_milliseconds(rows.get("eager")), _milliseconds(compiled)]
    if ours["status"] != "ok":
        return [*baselines, f"{ours['status']}: {ours['reason']}", *[NONE] * 5]
    rate = f"{_shown(ours, 'of_matmul_rate', '{:.0%}')} ({_shown(ours, 'tflop_s', '{:.0f} TFLOP/s')})"
    return [
        *baselines,
        _milliseconds(ours),
        _times_faster(ours, rows.get("eager")),
        _times_faster(ours, compiled),
        f"{_shown(ours, 'of_copy_bandwidth', '{:.0%}')} ({_shown(ours, 'gb_s', '{:.0f} GB/s')})",
        rate if "tflop_s" in ours else NONE,
        _times_faster(ours, rows.get(f"{ours['variant']}, one stage")),
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


def _times_faster(row: Row, other: Row | None) -> str:
    return NONE if other is None else f"{other['median_ms'] / row['median_ms']:.2f}"


def _shown(row: Row, key: str, form: str) -> str:
    """A figure of ``row``; those that JSON has no number for come as strings."""
    value = row.get(key)
    return NONE if value is None else form.format(float(value))


def _table(columns: tuple[str, ...], rows: Iterable[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *lines]) if lines else ""


def _origin(record: dict[str, Any]) -> str:
    where = record["environment"]
    versions = ", ".join(f"{name} {where[name]}" for name in ("torch", "triton", "diffusers") if where[name])
    commit = f", commit {where['commit'][:10]}" if where["commit"] else ""
    note = f"; {record['note']}" if "note" in record else ""
    note += "" if record.get("complete", True) else "; cut short"
    return f"- `{record['command']}`: {where['device']}, {versions}{commit}, {where['date'][:10]}{note}"


if __name__ == "__main__":
    sys.exit(main())
