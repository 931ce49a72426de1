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
from vidaccel.fidelity import validation
from vidaccel.patching import patch as patching

Validate = Callable[..., int]

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--height", "32", "--width", "32", "--frames", "2", "--steps", "1", "--device", "cpu")


@pytest.fixture(autouse=True)
def plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The PyTorch implementations: this is about the command, and interpreted kernels are slow."""
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")


@pytest.fixture
def validate(model: Path, image: Path) -> Validate:
    def run(*options: object) -> int:
        return main(["validate", "--model", str(model), "--image", str(image), *SMALL, *map(str, options)])

    return run


def test_a_good_patch_passes(validate: Validate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new folder" / "record.json"
    assert validate("--json", path) == 0
    record = json.loads(path.read_text())
    verdict = record["verdict"]
    assert verdict["passed"] and not verdict["bit_identical"]
    assert verdict["min_psnr_db"] == 60  # float32
    assert len(verdict["psnr_db"]["frames"]) == len(verdict["ssim"]["frames"]) == 2
    assert 60 < verdict["psnr_db"]["minimum"] == min(verdict["psnr_db"]["frames"]) <= verdict["psnr_db"]["mean"]
    assert record["patch"]["active"] > 0 and record["request"]["frames"] == 2 and record["dtype"] == "float32"
    out = capsys.readouterr().out
    assert "PASS: the worst frame has at least 60 dB" in out
    assert "fell back" not in out
    assert [file.name for file in path.parent.iterdir()] == ["record.json"]


def test_the_floor_decides_the_exit_code(validate: Validate, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate("--min-psnr", 500) == 1
    assert "FAIL: the worst frame has not at least 500 dB" in capsys.readouterr().out


@pytest.fixture
def wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    right = FusedGroupNorm.fused_forward
    monkeypatch.setattr(FusedGroupNorm, "fused_forward", lambda self, input: 1.1 * right(self, input))


def test_a_wrong_kernel_fails(validate: Validate, wrong_kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_SELF_CHECK", "0")
    assert validate() == 1


def test_a_site_that_checked_itself_and_failed_is_told(
    validate: Validate, wrong_kernel: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert validate() == 0
    assert "failed: unet.down_blocks.*.attentions.*.norm: group_norm_silu at 1 sites: " in capsys.readouterr().out


def test_bit_exact_sites_give_a_bit_identical_clip(validate: Validate, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate("--only", "unit_division", "--json", "-") == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)  # nothing else on standard output
    assert record["verdict"]["bit_identical"]
    assert record["verdict"]["psnr_db"]["minimum"] == "inf"
    assert set(record["patch"]["ops"]) == {"unit_division"}


def test_fallbacks_are_told(
    validate: Validate, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FusedGroupNorm, "call_reason", lambda self, input: "no time for norms today")
    assert validate() == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fell back: unet.")]
    assert lines and all(line.endswith("no time for norms today") for line in lines)
    assert len(lines) == len(set(lines)), "the same kind of place is told once"


def test_the_patch_is_undone(validate: Validate, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = []

    def patch_pipeline(*args: object, **kwargs: object) -> object:
        reports.append(patching.patch_pipeline(*args, **kwargs))
        return reports[-1]

    monkeypatch.setattr(validation, "patch_pipeline", patch_pipeline)
    validate()
    assert {site.state for report in reports for site in report.sites} == {"restored"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(["--only", "no_such_op"], "ops are: ", id="site"),
        pytest.param(["--height", "33"], "not a multiple of 8", id="height"),
        pytest.param(["--steps", "0"], "steps must be at least 1", id="steps"),
        pytest.param(["--device", "cuda:99"], "cannot be used here", id="device"),
        pytest.param(["--json", "/"], "/ is a folder", id="json"),
        pytest.param(["--min-psnr", "high"], "invalid float", id="floor"),
        pytest.param(["--height", "8", "--width", "8"], "at least 11x11 pixels", id="too-small"),
    ],
)
def test_bad_input_gets_one_line(
    validate: Validate, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert validate(*options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vidaccel: error: ") and message in error


def test_the_script_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["scripts/validate.py", "--model", "no/such model"])
    with pytest.raises(SystemExit) as exited:
        runpy.run_path(str(ROOT / "scripts" / "validate.py"), run_name="__main__")
    assert exited.value.code == 2
    assert "no such model folder" in capsys.readouterr().err
