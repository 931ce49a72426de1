"""The coexistence matrix as a page, drawn from a record: ``make matrix`` gathers the outcomes of all cells.

A run of some cells (``pytest tests/coexistence --matrix FILE.md -k Mochi``) renews these in the record, FILE.json.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from coexistence.families import FAMILIES
from coexistence.features import FEATURES
from coexistence.matrix import ORDERS, Outcome

__all__ = ["MatrixRecord", "page"]

HEAD = """\
# Coexistence

What users do with a pipeline (rows), on a tiny pipeline of each family (columns), before the patch and after it: the
patched pipeline gives what the unpatched one gives with the same done to it. `make matrix` makes this page and fails
where a cell is not so. {count} cells, {done} of them possible; float32 on a CPU, where blocks run their PyTorch twins.
Cells by commit: {commits}.

| sign | meaning, in both runs with it on |
|---|---|
| `=` | the same bits |
| `≈` | equal within the class of the sites: 2e-5 of the clip; in low precision twice stock's own error |
| `p3` | equal; some sites went the original way, for reason 3 below, and the report counts them |
| `o3` | the same, for all sites: stock's code runs |
| `x` | unpatched diffusers raises, too |
| `·` | this pipeline has no such thing, or it was not tried: see the end of this page |
| `!` | fails |

One sign: it is the same before the patch and after; two: first before, then after. In every cell the patch was taken
away while the thing was on, which gave stock's bits with it, and then the thing, which gave stock's bits without it;
and then the other way round: undone under the patch, the patch taken away last, stock's bits again. Copies, and what
quantises a patched model's convolutions, keep the memory order of its weights, and with it the last bits of what these
give.
"""
COLUMNS = 9
SIGNS = {"same": "=", "equal": "≈", "partly": "p", "original": "o", "failed": "!"}
RAISES = "stock raises"  # how the reason begins of what unpatched diffusers raises for
Cells = Mapping[tuple[str, str, str], Outcome]  # by feature, family, order


class MatrixRecord:
    """A pytest plugin: gathers the outcomes that the tests of the matrix report, from every process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cells: dict[tuple[str, str, str], Outcome] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties if report.when == "call" else ():
            if name == "cell":
                feature, family, order, kind, reasons = value
                found = Outcome("failed") if report.failed else Outcome(kind, tuple(reasons))
                self._cells[feature, family, order] = found

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        import torch

        from vidaccel.environment import environment

        record = self._path.with_suffix(".json")
        before = json.loads(record.read_text()) if record.exists() else []
        runs = renewed(before, self._cells, str(environment(torch.device("cpu"))["commit"]))
        record.write_text(json.dumps(runs, indent=1, ensure_ascii=False) + "\n")
        text = page(runs)
        self._path.write_text(text)
        terminalreporter.write(f"\n{text}\n")


def renewed(runs: list[dict[str, Any]], cells: Cells, commit: str) -> list[dict[str, Any]]:
    """A record in which ``cells`` are of ``commit``, the others as they were: for each commit its outcomes with cells.

    What is no feature or family any more is left out.
    """
    found = {cell: (outcome, commit) for cell, outcome in cells.items()}
    known = {feature.name for feature in FEATURES}
    for run in runs:
        for cell, outcome in _cells_of(run).items():
            if cell[0] in known and cell[1] in FAMILIES:
                found.setdefault(cell, (outcome, run["commit"]))
    by_commit: dict[str, dict[Outcome, list[tuple[str, str, str]]]] = {}
    for cell, (outcome, its_commit) in sorted(found.items()):
        by_commit.setdefault(its_commit, {}).setdefault(outcome, []).append(cell)
    return [
        {
            "commit": its_commit,
            "outcomes": [
                {"kind": outcome.kind, "reasons": list(outcome.reasons), "cells": _folded(cells_of_it)}
                for outcome, cells_of_it in outcomes.items()
            ],
        }
        for its_commit, outcomes in by_commit.items()
    ]


def _folded(cells: list[tuple[str, str, str]]) -> dict[str, dict[str, list[str]]]:
    """``{feature: {order: families}}``."""
    folded: dict[str, dict[str, list[str]]] = {}
    for feature, family, order in cells:
        folded.setdefault(feature, {}).setdefault(order, []).append(family)
    return folded


def _cells_of(run: dict[str, Any]) -> dict[tuple[str, str, str], Outcome]:
    return {
        (feature, family, order): Outcome(outcome["kind"], tuple(outcome["reasons"]))
        for outcome in run["outcomes"]
        for feature, orders in outcome["cells"].items()
        for order, families in orders.items()
        for family in families
    }


def page(runs: list[dict[str, Any]]) -> str:
    """The tables of a record, and the reasons that they refer to."""
    cells = {cell: outcome for run in runs for cell, outcome in _cells_of(run).items()}
    commits = Counter({run["commit"][:9]: len(_cells_of(run)) for run in runs})
    numbers: dict[str, int] = {}
    families = [family for family in FAMILIES if any(cell[1] == family for cell in cells)]
    done = sum(outcome.kind != "n/a" for outcome in cells.values())
    told = ", ".join(f"{count} of {commit}" for commit, count in commits.most_common())
    lines = [HEAD.format(count=len(cells), done=done, commits=told)]
    if missing := [family for family in FAMILIES if family not in families]:
        lines += [f"Not in this run: {', '.join(missing)}.", ""]
    for at in range(0, len(families), COLUMNS):
        lines += [*_table(cells, families[at : at + COLUMNS], numbers), ""]
    lines += ["## Reasons to go the original way", ""]
    lines += [f"{number}. {reason}" for reason, number in numbers.items()]
    lines += ["", "## What unpatched diffusers cannot do, or was not tried", ""]
    return "\n".join([*lines, *_unable(cells)]) + "\n"


def _table(cells: Cells, families: list[str], numbers: dict[str, int]) -> Iterable[str]:
    yield f"| | {' | '.join(families)} |"
    yield f"|---|{'---|' * len(families)}"
    for feature in FEATURES:
        signs = [_signs(cells, feature.name, family, numbers) for family in families]
        if any(signs):
            yield f"| {feature.name} | {' | '.join(signs)} |"


def _signs(cells: Cells, feature: str, family: str, numbers: dict[str, int]) -> str:
    outcomes = [cells[key] for order in ORDERS if (key := (feature, family, order)) in cells]
    return " ".join(dict.fromkeys(_sign(outcome, numbers) for outcome in outcomes))


def _sign(outcome: Outcome, numbers: dict[str, int]) -> str:
    if outcome.kind == "n/a":
        return "x" if outcome.reasons[0].startswith(RAISES) else "·"
    found = sorted({numbers.setdefault(_general(reason), len(numbers) + 1) for reason in outcome.reasons})
    return SIGNS[outcome.kind] + ",".join(map(str, found))


def _general(reason: str) -> str:
    """A reason without what differs from family to family."""
    reason = re.sub(r"\((\d+, )+\d+\)", "(...)", reason.removesuffix(": patch before turning that on"))
    return re.sub(r"\b(a|an) [A-Z]\w*(?= (has|was)\b| \()|of a [A-Z]\w*", _anything, reason)


def _anything(match: re.Match[str]) -> str:
    return "of a module" if match[0].startswith("of") else "a module"


def _unable(cells: Cells) -> Iterable[str]:
    for feature in FEATURES:
        reasons: dict[str, list[str]] = {}
        for (name, family, order), outcome in cells.items():
            if name == feature.name and outcome.kind == "n/a" and order == ORDERS[0]:
                reasons.setdefault(outcome.reasons[0], []).append(family)
        for reason, families in reasons.items():
            every = len(families) == len({family for _, family, _ in cells})
            yield f"- {feature.name}: {'all' if every else ', '.join(families)}: {reason}"
