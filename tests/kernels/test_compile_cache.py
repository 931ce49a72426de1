"""Triton's folder of compiled kernels, where it cannot be written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import triton

from vidaccel.kernels.compile_cache import ensure_writable


@pytest.fixture(autouse=True)
def knobs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_CACHE_DIR", os.environ.get("TRITON_CACHE_DIR", ""))  # put back afterwards
    with triton.knobs.cache.scope():
        yield


def test_a_folder_that_can_be_written_stays(tmp_path: Path) -> None:
    triton.knobs.cache.dir = str(tmp_path / "new")
    ensure_writable()
    assert triton.knobs.cache.dir == str(tmp_path / "new") and not list((tmp_path / "new").iterdir())


def test_another_takes_its_place_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    for _ in range(2):
        triton.knobs.cache.dir = str(tmp_path / "file")
        ensure_writable()
        if caplog.records:
            own = Path(caplog.records[0].args[2])  # type: ignore[index,arg-type]
    assert len(caplog.records) == 1 and "Triton cannot write into" in caplog.text
    (own / "kernel").touch()
