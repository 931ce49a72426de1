"""The ``psnr`` command on small clips."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vidaccel.cli import main
from vidaccel.clips.encoding import encode

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command runs: ``a`` and ``b`` are folders, ``b`` 20 dB off in its second frame; and a film of ``a``."""
    monkeypatch.chdir(tmp_path)
    a = np.full((3, 16, 24, 3), 100, np.uint8)
    a[:, :8] = 50
    b = a + np.array([2, 25, 1], np.uint8).reshape(3, 1, 1, 1)
    for name, clip in (
        ("a", a),
        ("b", b),
        ("a.mp4", a),
        ("short", a[:2]),
        ("narrow", a[:, :, :16]),
        ("tiny", a[:, :4]),
    ):
        encode(clip, Path(name), 8)
    return tmp_path


def test_what_is_printed(capsys: Capture) -> None:
    assert main(["psnr", "a", "b"]) == 0
    out = capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    assert "3 frames of 24x16 pixels" in out
    assert rows["PSNR"][-3:] == ["20.17", "dB", "1"]
    assert rows["flicker"][-3:] == ["20.53", "dB", "2"]
    assert rows["PSNR of the mean error"][-2:] == ["24.91", "dB"]


@pytest.mark.parametrize(("least", "code", "said"), [(20, 0, "PASS"), (20.2, 1, "FAIL")])
def test_the_least_psnr_decides_the_exit_code(least: float, code: int, said: str, capsys: Capture) -> None:
    assert main(["psnr", "a", "b", "--min-psnr", str(least), "--html", "page.html"]) == code
    assert f'<span class="badge">{said}</span>' in Path("page.html").read_text()
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{said}: the worst frame ")


def test_record_and_page(capsys: Capture) -> None:
    assert main(["psnr", "a", "b", "--json", "new/record.json", "--html", "page.html"]) == 0
    record = json.loads(Path("new/record.json").read_text())
    assert record["clip"]["psnr_db"]["worst_frame"] == 1 and len(record["clip"]["ssim"]["frames"]) == 3
    assert record["arguments"]["a"] == "a" and record["environment"]["vidaccel"]
    text = Path("page.html").read_text()
    assert "<title>a and b · vidaccel</title>" in text and text.count("<canvas>") == 3 and text.count("<svg") == 3
    capsys.readouterr()
    assert main(["psnr", "a", "a", "--json", "-"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["clip"]["psnr_db"]["frames"] == ["inf"] * 3 and record["clip"]["bit_identical"]


def test_a_film_and_a_folder() -> None:
    assert main(["psnr", "a.mp4", "a", "--min-psnr", "35"]) == 0


def broken(folder: Path) -> None:
    (folder / "broken.mp4").write_bytes(b"no film")


def broken_gif(folder: Path) -> None:
    (folder / "broken.gif").write_bytes(b"GIF89a")


def no_picture(folder: Path) -> None:
    (folder / "a" / "notes.txt").write_text("no picture")


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")


def empty(folder: Path) -> None:
    (folder / "empty").mkdir()


def of_two_sizes(folder: Path) -> None:
    Image.new("RGB", (30, 16)).save(folder / "a" / "frame-0003.png")


def nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (nothing, ["a", "missing.mp4"], "no such clip: missing.mp4"),
        (broken, ["a", "broken.mp4"], "cannot read the clip broken.mp4: "),
        (broken_gif, ["broken.gif", "a"], "cannot read the clip broken.gif: "),
        (empty, ["empty", "a"], "empty has no frames"),
        (no_picture, ["a", "b"], "a/notes.txt is not an image"),
        (of_two_sizes, ["a", "a"], "a: frame 3 is 30x16, those before are 24x16"),
        (nothing, ["a", "short"], "a has 3 frames, short 2; only clips of one length can be compared"),
        (nothing, ["short", "a"], "short has 2 frames, a 3; only clips of one length can be compared"),
        (nothing, ["a", "narrow"], "a is 24x16 pixels, narrow 16x16; only clips of one size can be compared"),
        (nothing, ["tiny", "tiny"], "tiny: ssim: frames must be at least 8x8 pixels, got 4x24"),
        (nothing, ["a", "b", "--min-psnr", "nan"], "expected a number of decibels, 0 or more, got nan"),
        (nothing, ["a", "b", "--min-psnr", "-1"], "expected a number of decibels, 0 or more, got -1"),
        (nothing, ["a", "b", "--fps", "0"], "expected frames per second, more than 0, got 0"),
        (nothing, ["a", "b", "--html", "/"], "/ is a folder"),
        (nothing, ["a", "a.mp4", "--json", "./a.mp4"], "a.mp4 is of a clip that is compared, and would be replaced"),
        (no_picture, ["b", "a", "--html", "a/notes.txt"], "a/notes.txt is of a clip that is compared"),
        (nothing, ["a", "b", "--json", "a/new.json"], "a/new.json would be taken for a frame of a clip"),
        (pipe, ["a", "b", "--html", "pipe"], "pipe is a device or a pipe, not a file"),
        (nothing, ["a", "b", "--html", "x" * 300], "is too long a name"),
        (nothing, ["a", "b", "--json", "x" * 250], "with what is written beside it, it takes"),
        (nothing, ["x" * 300, "b"], "File name too long"),
        (nothing, ["a", "b", "--json", "x", "--html", "./x"], "x: --json and --html need a file each"),
        (nothing, ["a"], "the following arguments are required: b"),
    ],
)
def test_bad_input_gets_one_line(
    prepare: Callable[[Path], None], arguments: list[str], message: str, clips: Path, capsys: Capture
) -> None:
    prepare(clips)
    assert main(["psnr", *arguments]) == 2
    captured = capsys.readouterr()
    errors = captured.err.replace("\r", "\n").strip().splitlines()
    assert captured.out == "" and errors[-1].startswith("vidaccel: error: ") and message in errors[-1]


@pytest.mark.parametrize("program", ["/nowhere/ffmpeg", "/bin/false", "/bin/true"])
def test_without_ffmpeg_one_line_says_so(program: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", program)
    assert main(["psnr", "a", "b"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "vidaccel: error: SSIM needs ffmpeg: " in captured.err
