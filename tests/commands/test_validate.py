"""The ``validate`` command in-process, on a tiny pipeline that is really loaded and run twice."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vidaccel.blocks.unet.normalization import FusedGroupNorm
from vidaccel.cli import main

pytestmark = pytest.mark.usefixtures("plain_pytorch")

Validate = Callable[..., int]

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--height", "32", "--width", "32", "--frames", "2", "--steps", "1", "--device", "cpu")
SHORT = ("--quick", "--controls", "math attention")


@pytest.fixture
def validate(model: Path, image: Path) -> Validate:
    def run(*options: object) -> int:
        return main(["validate", "--model", str(model), "--image", str(image), *SMALL, *SHORT, *map(str, options)])

    return run


@pytest.fixture
def wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    right = FusedGroupNorm.fused_forward
    monkeypatch.setattr(FusedGroupNorm, "fused_forward", lambda self, input: 1.1 * right(self, input))


def test_a_good_patch_passes(validate: Validate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new folder"
    assert validate("--json", folder / "record.json", "--html", folder / "page.html") == 0
    record = json.loads((folder / "record.json").read_text())
    verdict = record["verdict"]
    assert verdict["passed"] and verdict["margin_db"] == 3 and not verdict["reasons"]
    assert [control["control"] for control in record["floor"]] == ["math attention"]
    scores = record["clip"]["psnr_db"]
    assert len(scores["frames"]) == len(record["clip"]["ssim"]["frames"]) == 2
    assert 60 < scores["minimum"] == min(scores["frames"]) <= scores["mean"]
    assert record["patch"]["active"] > 0 and record["request"]["frames"] == 2 and record["dtype"] == "float32"
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("PASS (worst frame, steps and sites): worst frame ")
    assert "floor: math attention" in out and "fell back" not in out
    assert sorted(file.name for file in folder.iterdir()) == ["page.html", "record.json"]
    page = (folder / "page.html").read_text()
    assert ">PASS<" in page and "math attention" in page and page.count("<canvas>") == 3


def test_a_hard_gate_decides_the_exit_code(validate: Validate, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate("--min-psnr", 500, "--margin", 0) == 1
    out = capsys.readouterr().out.splitlines()
    verdict = next(i for i, line in enumerate(out) if line.startswith("FAIL (minimum PSNR): "))
    assert out[verdict].endswith("needs 500.00 dB") and "500.0 dB asked for" in out[verdict + 1]


def test_a_wrong_kernel_fails_and_is_blamed(
    validate: Validate, wrong_kernel: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VIDACCEL_SELF_CHECK", "0")
    assert validate("--json", "-") == 1
    record = json.loads(capsys.readouterr().out)
    worst = record["blame"][0]
    # all its sites are as wrong, and which is worst depends on the CPU
    assert worst["op"] == "group_norm_silu" and worst["ratio"] > 1 and "norm" in worst["path"].rpartition(".")[2]
    assert worst["path"] in worst["skip"]


def test_a_site_that_failed_its_check_fails_the_clip(
    validate: Validate, wrong_kernel: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert validate() == 1
    out = capsys.readouterr().out
    assert "failed: unet.down_blocks.*.attentions.*.norm: group_norm_silu at 1 sites: " in out
    assert "FAIL (guard rail): " in out


def test_bit_exact_sites_give_a_bit_identical_clip(validate: Validate, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate("--only", "unit_division", "--require-bit-exact", "--json", "-") == 0
    record = json.loads(capsys.readouterr().out)  # nothing else on standard output
    assert record["clip"]["bit_identical"] and record["verdict"]["rule"] == "bit-identical"
    assert record["clip"]["psnr_db"]["minimum"] == "inf"
    assert set(record["patch"]["ops"]) == {"unit_division"}


def test_fallbacks_are_told(
    validate: Validate, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FusedGroupNorm, "call_reason", lambda self, input: "no time for norms today")
    assert validate() == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fell back: unet.")]
    assert lines and all(line.endswith("no time for norms today") for line in lines)
    assert len(lines) == len(set(lines)), "the same kind of place is told once"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(["--only", "no_such_op"], "ops are: ", id="site"),
        pytest.param(["--height", "33"], "not a multiple of 8", id="height"),
        pytest.param(["--steps", "0"], "steps must be at least 1", id="steps"),
        pytest.param(["--device", "cuda:99"], "cannot be used here", id="device"),
        pytest.param(["--json", "/"], "/ is a folder", id="json"),
        pytest.param(["--html", "/"], "/ is a folder", id="html"),
        pytest.param(["--min-psnr", "high"], "invalid decibels value: 'high'", id="floor"),
        pytest.param(["--margin", "nan"], "expected a number of decibels, 0 or more, got nan", id="margin"),
        pytest.param(["--margin=-1"], "expected a number of decibels, 0 or more, got -1", id="negative"),
        pytest.param(["--controls", "mathematics"], "there is no 'mathematics'", id="control"),
        pytest.param(["--height", "8", "--width", "8"], "at least 11x11 pixels", id="too-small"),
    ],
)
def test_bad_input_gets_one_line(
    validate: Validate, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert validate(*options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vidaccel: error: ") and message in error


def test_another_pipeline_gets_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    assert main(["validate", "--model", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and "StableDiffusionPipeline" in error[0]


def test_the_script_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["scripts/validate.py", "--model", "no/such model"])
    with pytest.raises(SystemExit) as exited:
        runpy.run_path(str(ROOT / "scripts" / "validate.py"), run_name="__main__")
    assert exited.value.code == 2
    assert "no such model folder" in capsys.readouterr().err
