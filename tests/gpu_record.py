"""A pytest plugin: ``--gpu-record FILE`` leaves a JSON record of a run on a GPU."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

__all__ = ["GpuRecord"]


class GpuRecord:
    """Counts the outcomes of a session, and writes them with where they were seen.

    A test that fails in its set-up or its tear-down counts as failed, and counts once; so does a file that cannot be
    imported.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self._path = path
        self._device = device
        self._outcomes: dict[str, str] = {}
        self._failures: dict[str, str] = {}
        self._started = time.monotonic()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._fail(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._fail(report)
        elif report.skipped or report.when == "call":
            self._outcomes.setdefault(report.nodeid, report.outcome)

    def _fail(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        self._outcomes[report.nodeid] = "failed"
        self._failures.setdefault(report.nodeid, _reason(report))

    def pytest_sessionfinish(self) -> None:
        from vidaccel.clips.outputs import write_json
        from vidaccel.environment import environment

        counts = Counter(self._outcomes.values())
        record: dict[str, Any] = {
            "environment": environment(self._device),
            "counts": {outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")},
            "failures": self._failures,
            "seconds": round(time.monotonic() - self._started, 1),
        }
        write_json(self._path, record)


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = crash.message.splitlines() if crash else report.longreprtext.strip().splitlines()[-1:]
    return lines[0] if lines else ""
