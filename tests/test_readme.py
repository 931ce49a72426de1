"""The README says what the project does: its tables are drawn from the records, its files are there."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_tables_are_drawn_from_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    script = ROOT / "scripts" / "draw_benchmarks.py"
    pages = "--readme", str(ROOT / "README.md"), "--tables", str(ROOT / "samples" / "benchmarks" / "README.md")
    monkeypatch.setattr(sys, "argv", [str(script), *pages, "--check"])
    with pytest.raises(SystemExit) as exited:
        runpy.run_path(str(script), run_name="__main__")
    assert exited.value.code == 0, "run `make benchmarks` and commit both pages"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "samples/benchmarks/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text())
    missing = [link for link in links if "://" not in link and not (ROOT / page).parent.joinpath(link).exists()]
    assert not missing


def test_every_variable_is_listed() -> None:
    variables = set(re.findall(r"VIDACCEL_[A-Z_]+", (ROOT / "vidaccel" / "config.py").read_text())) - {"VIDACCEL_"}
    assert variables and all(f"`{name}`" in (ROOT / "README.md").read_text() for name in variables)
