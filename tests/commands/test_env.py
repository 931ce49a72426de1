"""``vidaccel env``: what it prints, and the choices that it lists and drops."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest

from vidaccel.cli import main
from vidaccel.kernels import choice


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with choices for two ops, and a file that is none."""
    monkeypatch.setenv("VIDACCEL_CACHE_DIR", str(tmp_path))
    for op, count in (("geglu", 1), ("spatial_attention", 2)):
        (tmp_path / op).mkdir()
        for i in range(count):
            record = {"key": {"rows": i}, "winner": "triton", "milliseconds": {"triton": 1.0}, "problems": {}}
            (tmp_path / op / f"{i}.json").write_text(json.dumps(record))
    (tmp_path / "geglu" / "broken.json").write_text("{")
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())


def test_it_prints_versions_and_pipelines(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--device", "cpu"]) == 0
    lines = printed(capsys)
    assert lines["diffusers"] == diffusers.__version__
    assert "StableVideoDiffusionPipeline" in lines["pipelines"]
    assert lines["VIDACCEL_CACHE_DIR"] == str(cache)
    assert lines["choices"] == f"geglu 1, spatial_attention 2 (in {cache})"


def test_choices_of_one_op_are_dropped(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--drop-choices", "spatial_attention"]) == 0
    assert capsys.readouterr().out == "2 choices dropped\n"
    assert [op for op, _, _ in choice.remembered()] == ["geglu"]


def test_all_choices_are_dropped(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--drop-choices"]) == 0
    assert not list(choice.remembered()) and not list(cache.glob("*/*"))
    capsys.readouterr()
    assert main(["env", "--device", "cpu"]) == 0
    assert printed(capsys)["choices"] == f"none (in {cache})"


def test_an_unknown_op_drops_nothing(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--drop-choices", "gegul"]) == 2
    assert capsys.readouterr().err == ("vidaccel: error: --drop-choices: there is no op 'gegul'; did you mean geglu?\n")
    assert len(list(cache.glob("*/*"))) == 4


def test_a_wrong_variable_is_said_after_all_else(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VIDACCEL_TUNEE", "0")
    assert main(["env", "--device", "cpu"]) == 2
    output = capsys.readouterr()
    assert "choices" in output.out
    assert output.err == "vidaccel: error: VIDACCEL_TUNEE is no setting of vidaccel; did you mean VIDACCEL_TUNE?\n"


def test_it_is_quick() -> None:
    code = (
        "import sys; from vidaccel.cli import main; main(['env', '--device', 'cpu'])\n"
        "assert not {'diffusers', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
