"""The coexistence matrix as a page: ``make matrix`` gathers the outcomes of all cells and writes it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

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

| sign | meaning, in both runs with it on |
|---|---|
| `=` | the same bits |
| `≈` | equal within the class of the sites: 1e-5 of the clip; in low precision twice stock's own error |
| `p3` | equal; some sites went the original way, for reason 3 below, and the report counts them |
| `o3` | the same, for all sites: stock's code runs |
| `·` | unpatched diffusers cannot do it with this pipeline either, or it was not tried |
| `!` | fails |

One sign: it is the same before the patch and after; two: first before, then after. In every cell the patch was taken
away while the thing was on, which gave stock's bits with it, and then the thing, which gave stock's bits without it;
and then the other way round: undone under the patch, the patch taken away last, stock's bits again. Copies, and what
quantises a patched model's convolutions, keep the memory order of its weights, and with it the last bits of what these
give.
"""
COLUMNS = 9
SIGNS = {"same": "=", "equal": "≈", "partly": "p", "original": "o", "n/a": "·", "failed": "!"}
Cells = Mapping[tuple[str, str, str], Outcome]


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
        text = page(self._cells)
        self._path.write_text(text)
        terminalreporter.write(f"\n{text}\n")


def page(cells: Cells) -> str:
    """The tables, and the reasons that they refer to."""
    numbers: dict[str, int] = {}
    families = [family for family in FAMILIES if any(cell[1] == family for cell in cells)]
    done = sum(outcome.kind != "n/a" for outcome in cells.values())
    lines = [HEAD.format(count=len(cells), done=done)]
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
        return SIGNS["n/a"]
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
