"""Where clips go: what can be known of it before a clip is made, what is done, and files that appear whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vidaccel.clips.outputs import (
    Claims,
    aside,
    check_output,
    check_record,
    comparison_path,
    fingerprint,
    is_done,
    record_path,
    recover,
)
from vidaccel.clips.video import write_clip
from vidaccel.errors import UsageError

CLIP = np.zeros((2, 8, 8, 3), np.float32)
CLIP[1] = 1


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("out", "fps", "reason"),
    [
        (".", 8, "is a folder, and names no clip"),
        ("..", 8, "is a folder, and names no clip"),
        ("/", 8, "is a folder, and names no clip"),
        (".mp4", 8, "has no name before its suffix"),
        ("clip.avi", 8, "cannot write .avi"),
        ("a\0b.mp4", 8, "has a null byte"),
        ("\ud800.mp4", 8, "cannot write .*surrogates"),
        ("n" * 242 + ".mp4", 8, "takes 257 bytes, and 255 are allowed"),
        ("\u00e4" * 121 + ".mp4", 8, "takes 257 bytes, and 255 are allowed"),
        ("x" * 300 + "/clip.mp4", 8, "File name too long"),
        ("/no-such-folder/clip.mp4", 8, "is not made at the root"),
        ("clip.gif", 51, "gif shows 50 frames a second at most, got 51"),
        ("clip.mp4", 1e9, "mp4 shows 1000 frames a second at most"),
        ("clip.webp", 120, "webp shows 90 frames a second at most"),
    ],
)  # fmt: skip
def test_what_nobody_can_write(here: Path, out: str, fps: float, reason: str) -> None:
    with pytest.raises(UsageError, match=f"(?s){reason}"):
        check_output(Path(out), fps)
    assert not list(here.iterdir()) and not Path("/no-such-folder").exists()


def test_the_longest_name_there_can_be(here: Path) -> None:
    for compare, length in ((False, 244), (True, 241)):
        out = here / ("n" * (length - 4) + ".mp4")
        check_output(out, 8, compare)
        with pytest.raises(UsageError, match="too long"):
            check_output(out.with_name(f"n{out.name}"), 8, compare)


def test_a_folder_that_is_in_use(here: Path) -> None:
    check_output(here / "new", 8)
    with pytest.raises(UsageError, match="is a folder in use"):
        check_output(here, 8)
    for name in ("clip.gif.json", "clip.compare.gif"):
        (here / name).mkdir()
        with pytest.raises(UsageError, match=f"{name} is a folder"):
            check_output(here / "clip.gif", 8, compare=True)
        (here / name).rmdir()


def test_a_file_of_the_name_of_a_record_is_not_replaced(here: Path) -> None:
    (here / "jobs.json").write_text('{"prompt": "a cat", "out": "jobs"}')
    with pytest.raises(UsageError, match=r"jobs\.json is not the record of a clip"):
        check_output(Path("jobs"), 8)
    (here / "jobs.json").write_text('{"arguments": {}}')  # of a run that was killed before its clip
    check_output(Path("jobs"), 8)


def test_ffmpeg_is_missed_before_it_is_needed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(here / "nothing"))
    check_output(here / "clip.gif", 8)
    with pytest.raises(UsageError, match="mp4 needs ffmpeg: No such file"):
        check_output(here / "clip.mp4", 8)
    (here / "ffmpeg").write_text("#!/bin/sh\necho aac\n")
    (here / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(here / "ffmpeg"))
    with pytest.raises(UsageError, match="has no encoder libx264"):
        check_output(here / "clip.mp4", 8)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_is_read_only(here: Path) -> None:
    (here / "folder").mkdir(mode=0o555)
    with pytest.raises(UsageError, match="cannot write into"):
        check_output(here / "folder" / "clip.gif", 8)


def test_a_record_makes_one_folder_at_most(here: Path) -> None:
    check_record(Path("new/record.json"))
    assert (here / "new").is_dir()
    with pytest.raises(UsageError, match=r"/one is not there"):
        check_record(Path("one/two/record.json"))
    with pytest.raises(UsageError, match="is not made at the root"):
        check_record(Path("/no-such-folder/record.json"))
    assert sorted(path.name for path in here.iterdir()) == ["new"] and not Path("/no-such-folder").exists()


@pytest.mark.parametrize(
    "second", ["a.gif", "./a.gif", "{here}/a.gif", "link/a.gif", "sub/../a.gif"], ids=lambda text: text
)  # fmt: skip
def test_two_spellings_of_one_path(here: Path, second: str) -> None:
    (here / "sub").mkdir()
    (here / "link").symlink_to(here)
    claims = Claims()
    claims.add(Path("a.gif"))
    claims.add(Path("sub/a.gif"))
    with pytest.raises(UsageError, match="an earlier job writes"):
        claims.add(Path(second.format(here=here)))


@pytest.mark.parametrize(("first", "second"), [("A.gif", "a.gif"), ("\u00e9.gif", "e\u0301.gif")], ids=["case", "form"])
def test_names_are_one_where_the_file_system_says_so(here: Path, first: str, second: str) -> None:
    (here / "probe").mkdir()
    (here / "probe" / first).touch()
    one = (here / "probe" / second).exists()
    claims = Claims()
    claims.add(here / first)
    if one:
        with pytest.raises(UsageError, match="already"):
            claims.add(here / second)
    else:
        claims.add(here / second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("clip.gif", "clip.compare.gif"),
        ("clip.compare.gif", "clip.gif"),
        ("frames", "frames/a.gif"),
        ("frames/a.gif", "frames"),
    ],
)  # fmt: skip
def test_what_stands_beside_or_inside_is_claimed_too(here: Path, first: str, second: str) -> None:
    (here / "frames").mkdir()
    claims = Claims()
    claims.add(Path(first), compare=True)
    with pytest.raises(UsageError, match="an earlier job writes"):
        claims.add(Path(second), compare=True)


def made(out: Path, **arguments: Any) -> None:
    """A clip as the command leaves it."""
    with aside(out) as part:
        write_clip(CLIP, part, 8)
    record_path(out).write_text(json.dumps({"arguments": arguments, "output": fingerprint(out)}))


@pytest.mark.parametrize("name", ["clip.gif", "clip"])
def test_a_clip_is_done_while_it_is_what_was_written(here: Path, name: str) -> None:
    out = here / name
    assert not is_done(out, {"steps": 1})
    made(out, steps=1)
    assert is_done(out, {"steps": 1})
    with pytest.raises(UsageError, match=r"made with other arguments \(steps 1, now 2\)"):
        is_done(out, {"steps": 2})
    file = out / "frame-0001.png" if out.is_dir() else out
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UsageError, match="changed or cut short"):
        is_done(out, {"steps": 1})


@pytest.mark.parametrize("text", ["", "[]", "{", '{"arguments": 3}', '{"arguments": [1]}', "[" * 100_000, "\x00"])
def test_a_record_that_is_none(here: Path, text: str) -> None:
    made(here / "clip.gif")
    record_path(here / "clip.gif").write_text(text)
    with pytest.raises(UsageError, match="exists without a record"):
        is_done(here / "clip.gif", {})


@pytest.mark.parametrize("now", ["m", "./m", "m/", "{here}/m", "sub/../m", "link"])
@pytest.mark.parametrize("name", ["model", "image"])
def test_one_path_by_any_name_is_the_same_input(
    here: Path, monkeypatch: pytest.MonkeyPatch, name: str, now: str
) -> None:
    for folder in ("m", "other", "sub"):
        (here / folder).mkdir()
    (here / "link").symlink_to("m")
    now = now.format(here=here)
    for recorded in ("m", "./m", str(here / "m")):
        made(here / "clip.gif", **{name: recorded})
        assert is_done(here / "clip.gif", {name: now})
        with pytest.raises(UsageError, match="other arguments"):
            is_done(here / "clip.gif", {name: "other"})
    monkeypatch.chdir(here / "sub")
    made(here / "clip.gif", **{name: "m"})
    assert is_done(here / "clip.gif", {name: str(here / "m")}), "from another folder"


def test_a_random_seed_stands_for_any(here: Path) -> None:
    made(here / "clip.gif", seed=123)
    assert is_done(here / "clip.gif", {"seed": -1})


def test_what_a_desktop_leaves_in_a_folder_of_frames_blocks_nothing(here: Path) -> None:
    out = here / "clip"
    made(out)
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._frame-0000.png", ".hidden"):
        (out / name).write_text("kept")
    check_output(out, 8)
    with aside(out) as part:
        write_clip(CLIP[:1], part, 8)
    assert {path.name for path in out.iterdir()} >= {"frame-0000.png", ".DS_Store", "Thumbs.db", ".hidden"}
    assert not (out / "frame-0001.png").exists()
    assert [path.name for path in here.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("name", ["notes.txt", "frame-final.png", "more"])
def test_what_else_is_in_a_folder_of_frames_is_never_removed(here: Path, name: str) -> None:
    out = here / "clip"
    made(out)
    (out / name).mkdir()
    with pytest.raises(UsageError, match="is not a folder of PNG frames"):
        check_output(out, 8)
    with pytest.raises(OSError, match=f"{name} has come into it"), aside(out) as part:
        write_clip(CLIP, part, 8)
    assert (out / name).exists() and (out / "frame-0001.png").exists()


def test_a_run_that_was_killed_leaves_nothing_that_counts(here: Path) -> None:
    (here / ".clip.part.gif").write_bytes(b"half a clip")
    (here / ".clip.old").mkdir()
    record_path(here / "clip.gif").write_text(json.dumps({"arguments": {}, "output": {}}))
    assert not is_done(here / "clip.gif", {})
    made(here / "clip.gif")
    made(here / "clip")
    assert sorted(path.name for path in here.iterdir()) == ["clip", "clip.gif", "clip.gif.json", "clip.json"]


def test_a_killed_run_that_had_written_all_is_finished(here: Path) -> None:
    new = {"arguments": {"steps": 2}, "comparison": {"psnr_db": 40}}
    for name in ("clip.gif", "clip"):
        out = here / name
        made(out, steps=1)
        out.rename(out.with_name(f".{out.stem}.old")) if out.is_dir() else None
        part, compared = (path.with_name(f".{path.stem}.part{path.suffix}") for path in (out, comparison_path(out)))
        write_clip(1 - CLIP, part, 8)
        write_clip(CLIP, compared, 8)
        record_path(out).write_text(json.dumps({**new, "output": fingerprint(part)}))
        recover(out)
        assert is_done(out, {"steps": 2})
    assert not [path.name for path in here.iterdir() if path.name.startswith(".")]


def test_a_killed_run_that_had_not_written_all_is_undone(here: Path) -> None:
    out = here / "clip"
    made(out, steps=1)
    (out / ".DS_Store").touch()
    out.rename(here / ".clip.old")
    (here / ".clip.part").mkdir()
    recover(out)
    assert is_done(out, {"steps": 1})
    assert sorted(path.name for path in here.iterdir()) == ["clip", "clip.json"]


def test_there_is_nothing_to_recover_of_the_longest_name(here: Path) -> None:
    recover(here / ("n" * 240 + ".gif"))
    assert not list(here.iterdir())
