"""Job files: what is a line, what is a job, and where its clip may go."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vidaccel.clips.clip_request import RANDOM_SEED, ClipRequest
from vidaccel.clips.jobs import Job, LineErrors, jobs_from_file, numbered_jobs
from vidaccel.errors import OutputError, UsageError

Read = Callable[..., list[Job]]
BOTH = ("image", "prompt")  # what the pipeline takes


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """The jobs of a file with these bytes, read in its folder."""
    monkeypatch.chdir(tmp_path)

    def run(content: str | bytes, out: str = "clip.mp4", **options: Any) -> list[Job]:
        path = Path("jobs")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return jobs_from_file(path, ClipRequest(seed=10), Path(out), BOTH, LineErrors(), **options)

    return run


def prompts(jobs: list[Job]) -> list[str | None]:
    return [job.request.prompt for job in jobs]


def the_complaints(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.removeprefix("vidaccel: error: ") for line in capsys.readouterr().err.splitlines()]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order-mark"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
def test_lines_of_utf8(read: Read, mark: bytes, end: bytes) -> None:
    jobs = read(mark + end.join([b'{"prompt": "a cat", "seed": 3}', b"", b"# none", "ein Käfer".encode()]))
    assert prompts(jobs) == ["a cat", "ein Käfer"]
    assert [job.request.seed for job in jobs] == [3, 11]


def test_a_mark_between_two_files_that_were_joined(read: Read) -> None:
    assert prompts(read('{"prompt": "one"}\n\ufeff{"prompt": "two"}\n')) == ["one", "two"]


@pytest.mark.parametrize("character", "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r", ids=lambda c: hex(ord(c)))
def test_only_a_line_feed_ends_a_line(read: Read, character: str) -> None:
    assert prompts(read(f"a cat{character}on a mat\n")) == [f"a cat{character}on a mat"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"prompt": "a"}\n'.encode("utf-16"), "it is UTF-16; save it as UTF-8"),
        ('{"prompt": "a"}\n'.encode("utf-32"), "it is UTF-32; save it as UTF-8"),
        ("one\ntwo\n".encode("utf-16-le"), "line 1 has null bytes, as in UTF-16"),
        ("one\ncafé\n".encode("latin-1"), r"line 2 is not UTF-8 \(byte 0xe9\)"),
        (b'[\n{"prompt": "a"},\n]\n', "begins like a JSON array, but is none: Expecting value: line 3"),
        (b"[" * 100_000, "begins like a JSON array, but is none"),
        (b"[]", "holds no job"),
        (b"\xef\xbb\xbf \n# nothing\n", "holds no job"),
    ],
    ids=["utf-16", "utf-32", "utf-16-without-mark", "latin-1", "broken-array", "deep", "empty-array", "empty"],
)
def test_a_file_that_cannot_be_read(read: Read, content: bytes, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        read(content)


def test_an_array_of_jobs(read: Read, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = read(json.dumps([{"prompt": "a", "seed": 1}, "b", 5, {"framez": 3}], indent=2))
    assert prompts(jobs) == ["a", "b"]
    third, fourth = the_complaints(capsys)
    assert third == "jobs entry 3: a job is a text or a JSON object, got 5"
    assert fourth.startswith("jobs entry 4: unknown key 'framez'")


def test_one_object_over_several_lines(read: Read) -> None:
    assert prompts(read(json.dumps({"prompt": "a", "seed": 1}, indent=2))) == ["a"]


def test_pieces_of_json_are_no_prompts(read: Read, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["a cat", "{", '"prompt": "a",', "},", '["b"]', "[wide] a dog", '"quoted", he said', '{"prompt": "c"},']
    assert prompts(read("\n".join(lines))) == ["a cat", "[wide] a dog", '"quoted", he said']
    complaints = the_complaints(capsys)
    assert [line.partition(": ")[0] for line in complaints] == [f"jobs line {n}" for n in (2, 3, 4, 5, 8)]
    assert all("JSON" in line for line in complaints)


@pytest.mark.parametrize("prompt", ["p" * 280, "p" * 100_000, "a/" * 3000, "what\\ever", "~nobody/x"])
def test_any_prompt_is_one(read: Read, prompt: str) -> None:
    assert prompts(read(prompt)) == [prompt]


@pytest.mark.parametrize("value", ["1e999", "NaN", "1" + "0" * 400, "-Infinity", '"3"', "true"])
def test_numbers_that_are_none(read: Read, capsys: pytest.CaptureFixture[str], value: str) -> None:
    assert read(f'{{"prompt": "a", "guidance_scale": {value}}}') == []
    (complaint,) = the_complaints(capsys)
    assert "guidance_scale must be" in complaint


def test_a_random_seed_for_each(read: Read) -> None:
    assert [job.request.seed for job in read('{"seed": "random"}\n{"seed": -1}\na\n')] == [RANDOM_SEED, RANDOM_SEED, 12]
    several = numbered_jobs(ClipRequest(seed=RANDOM_SEED), Path("clip.gif"), 2)
    assert [job.request.seed for job in several] == [RANDOM_SEED] * 2


def own(out: str) -> str:
    return json.dumps({"prompt": "a", "out": out})


def test_out_is_a_path_in_the_output_folder(read: Read, tmp_path: Path) -> None:
    inside = tmp_path / "clips" / "c.gif"
    jobs = read("\n".join(map(own, ("a.gif", "clips/b.gif", str(inside), "x/../d.gif"))), out="clips")
    assert [job.out.resolve() for job in jobs] == [tmp_path / "clips" / f"{name}.gif" for name in "abcd"]
    assert [job.out for job in read(own("sub/a.gif"), out="clip.mp4")] == [Path("sub/a.gif")]


@pytest.mark.parametrize("out", ["../a.gif", "clips/../../a.gif", "/tmp/a.gif", "link/a.gif", "loop/a.gif", "a\0.gif"])
def test_out_does_not_leave_the_output_folder(
    read: Read, tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "link").symlink_to("/tmp")
    (tmp_path / "clips" / "loop").symlink_to("loop")
    assert read(own(out), out="clips") == []
    (complaint,) = the_complaints(capsys)
    assert complaint.startswith("jobs line 1: ")
    assert "--allow-outside" in complaint or "cannot write" in complaint


def test_out_may_leave_it_if_asked(read: Read) -> None:
    assert [job.out for job in read(own("../a.gif"), out="clips", allow_outside=True)] == [Path("../a.gif")]


def test_one_job_that_fails_in_any_way_ends_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    errors = LineErrors()
    with errors.survived("jobs line 1"):
        raise RuntimeError("the GPU is on fire\nand more")
    assert errors.count == 1 and the_complaints(capsys) == ["jobs line 1: RuntimeError: the GPU is on fire"]
    with errors.survived(""):
        raise OutputError("the disk is full")
    assert errors.count == 2 and the_complaints(capsys) == ["the disk is full"]
    with pytest.raises(RuntimeError), errors.survived(""):
        raise RuntimeError("of a single clip")
