"""``generate --engine ray``: the clips of a single process, whatever happens to the workers; two of them on a CPU."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import torch

from vidaccel.cli import main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "samples" / "models" / "svd-tiny-scenes"
SMALL = ("--height", "32", "--width", "32", "--frames", "2", "--steps", "2", "--device", "cpu", "--quiet")
COMMAND = ("generate", "--model", str(MODEL), *SMALL)
RAY = (*COMMAND, "--engine", "ray", "--workers", "2")
CLIPS = 6


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For two workers on two cores; each has as many as this process."""
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def jobs(tmp_path: Path, image: Path) -> Path:
    """Clips, and in their midst one that overflows."""
    lines = [{"image": str(image), "seed": seed, "out": f"{seed}.gif"} for seed in range(CLIPS)]
    lines.insert(3, {"image": str(image), "guidance_scale": 9e18, "out": "overflown.gif"})
    path = tmp_path / "jobs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def clips_in(folder: Path) -> list[Path]:
    return [folder / name for name in files_in(folder) if not name.startswith(".") and name.endswith(".gif")]


def workers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "ray::ClipWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


@contextmanager
def meanwhile(happened: Callable[[], object]) -> Iterator[None]:
    """Call ``happened`` again and again while the block runs, until it says so; it must."""
    done, over = threading.Event(), threading.Event()

    def watch() -> None:
        while not over.wait(0.01) and not done.is_set():
            if happened():
                done.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
    assert done.is_set()


def test_a_killed_worker_changes_no_clip(jobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, expected, first_line = tmp_path / "out", tmp_path / "expected", tmp_path / "first.jsonl"
    first_line.write_text(jobs.read_text().splitlines()[0])
    assert main([*COMMAND, "--jobs", str(first_line), "--out", str(out)]) == 0
    made_before = (out / "0.gif").stat().st_mtime_ns
    capsys.readouterr()

    def kill_one() -> bool:
        if len(clips_in(out)) > 1:
            workers()[0].kill()
        return len(clips_in(out)) > 1

    with meanwhile(kill_one):
        assert main([*RAY, "--jobs", str(jobs), "--out", str(out)]) == 1
    printed, complaint = capsys.readouterr()
    assert sorted(printed.splitlines()) == [str(clip) for clip in clips_in(out)[1:]], "each clip once"
    assert complaint.count("\n") == 1 and "jobs.jsonl line 4" in complaint and "is not finite" in complaint
    assert (out / "0.gif").stat().st_mtime_ns == made_before, "it was done already"
    assert not workers()

    assert main([*COMMAND, "--jobs", str(jobs), "--out", str(expected)]) == 1
    assert len(clips_in(expected)) == CLIPS and files_in(out) == files_in(expected)
    assert [clip.read_bytes() for clip in clips_in(out)] == [clip.read_bytes() for clip in clips_in(expected)]


@pytest.mark.gpu
def test_on_gpus_the_clips_are_those_of_one_process(
    jobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.delenv("VIDACCEL_IMPL")
    monkeypatch.setenv("VIDACCEL_CACHE_DIR", str(tmp_path / "choices"))
    by_ray, expected = tmp_path / "ray", tmp_path / "expected"
    for out, engine in ((by_ray, "ray"), (expected, "process")):
        assert main([*COMMAND, "--device", "cuda", "--jobs", str(jobs), "--out", str(out), "--engine", engine]) == 1
    assert len(clips_in(expected)) == CLIPS and files_in(by_ray) == files_in(expected)
    assert [clip.read_bytes() for clip in clips_in(by_ray)] == [clip.read_bytes() for clip in clips_in(expected)]


def test_ctrl_c_ends_all_processes_and_leaves_whole_clips(
    jobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, rays = tmp_path / "out", set[psutil.Process]()
    others = set(psutil.Process().children(recursive=True))

    def interrupt() -> bool:
        if clips_in(out):
            rays.update(set(psutil.Process().children(recursive=True)) - others)
            os.kill(os.getpid(), signal.SIGINT)
        return bool(rays)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # xdist has another
    with meanwhile(interrupt):
        assert main([*RAY, "--workers", "1", "--jobs", str(jobs), "--out", str(out)]) == 130
    signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "vidaccel: interrupted\n"
    assert len(rays) > 1 and not psutil.wait_procs(rays, timeout=60)[1]
    made = clips_in(out)
    assert 1 <= len(made) < CLIPS
    assert files_in(out) == sorted(name for clip in made for name in (clip.name, f"{clip.name}.json"))


WRONG = {
    "no-job-file": (["--engine", "ray"], "--engine ray makes the clips of a job file"),
    "engine": (["--engine", "rai"], "there is no engine 'rai'; did you mean ray?"),
    "address-alone": (["--address", "auto"], "--address, --workers and --ray-logs are for --engine ray"),
    "no-workers": (["--engine", "ray", "--jobs", "{jobs}", "--workers", "0"], "workers must be at least 1, got 0"),
    "one-gpu": (["--engine", "ray", "--jobs", "{jobs}", "--device", "cuda:1"], "takes --device cuda or cpu"),
    "no-gpu": (["--engine", "ray", "--jobs", "{jobs}", "--device", "cuda"], "this machine has no GPU"),
    "url": (["--engine", "ray", "--jobs", "{jobs}", "--out", "s3://bucket/clips"], "'s3://bucket/clips' is a URL"),
    "nobody-listens": (
        ["--engine", "ray", "--jobs", "{jobs}", "--address", "127.0.0.1:{port}"],
        "cannot reach the Ray cluster at 127.0.0.1:{port}: Connection refused",
    ),
    "no-address": (
        ["--engine", "ray", "--jobs", "{jobs}", "--address", "here"],
        "cannot reach the Ray cluster at here: ValueError: Invalid address",
    ),
}


@pytest.mark.parametrize(("options", "reason"), WRONG.values(), ids=WRONG)
def test_wrong_options_are_one_line(
    options: list[str], reason: str, jobs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # nobody listens there
        names = {"jobs": jobs, "port": unused.getsockname()[1]}
        assert main([*COMMAND, *(option.format(**names) for option in options)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and reason.format(**names) in lines[0]


def test_without_ray_the_error_says_what_to_install(
    jobs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "vidaccel.clips.ray_engine", raising=False)
    assert main([*RAY, "--jobs", str(jobs)]) == 2
    assert "pip install 'vidaccel[ray]'" in capsys.readouterr().err
