"""A run that is killed at any moment: what is finished stays, nothing half-written counts, and the next run goes on.

Where it was to replace clips, each of them is the old one or the new one, whole, as soon as a next run has looked.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vidaccel.cli import main
from vidaccel.clips import clip_maker
from vidaccel.clips.outputs import fingerprint, record_path

pytestmark = pytest.mark.slow

JOBS = [{"out": "one.gif"}, {"out": "frames"}, {"out": "deep/two.gif", "seed": 5}]
SMALL = ("--height", "32", "--width", "32", "--frames", "2", "--steps", "1", "--device", "cpu", "--quiet", "--no-patch")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


def test_a_run_is_killed_before_everything_that_it_does_to_its_files(model: Path, image: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "VIDACCEL_IMPL": "torch"}
    command = [sys.executable, __file__, str(model), str(image), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert min(map(int, done.stdout.splitlines()[-2:])) > 20


def in_a_process(run: Callable[[], object]) -> int:
    """What a forked process that calls ``run`` ends with: its exit code, or -9 if it was killed."""
    child = os.fork()
    if not child:
        try:
            os._exit(int(run() or 0))  # type: ignore[call-overload]
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(number: int, folder: Path, run: Callable[[], object]) -> object:
    """``run``, but for the process to be killed before the ``number``-th thing that it does to a file in ``folder``."""
    done = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal done
        if event == "open" and not args[2] & WRITES:  # what is only read stays as it was
            return
        if event in EVENTS and any(str(folder) in os.fsdecode(x) for x in args if isinstance(x, str | bytes | Path)):
            done += 1
            if done == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return run()


def clips_in(folder: Path) -> dict[str, bytes]:
    """Every file that is neither a record, which holds times, nor hidden, as what is being written is."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".json"]
    names = {path: str(path.relative_to(folder)) for path in files}
    return {name: path.read_bytes() for path, name in names.items() if not f"/{name}".count("/.")}


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def kill_again_and_again(model: str, image: str, folder: Path) -> list[int]:
    """How many moments there were to be killed at: in a run that makes clips, and in one that replaces them."""
    made: dict[int, Any] = {}  # by seed: the clips of the first run, for the others to be quick
    load_pipeline, generate_clip = clip_maker.load_pipeline, clip_maker.generate
    pipes: list[Any] = []

    def load_once(*args: Any, **kwargs: Any) -> Any:
        if not pipes:
            pipes.append(load_pipeline(*args, **kwargs))
        return pipes[0]

    def generate_once(pipe: Any, arguments: dict[str, Any], seed: int, **kwargs: Any) -> Any:
        if seed not in made:
            made[seed] = generate_clip(pipe, arguments, seed, **kwargs)
        return made[seed]

    clip_maker.load_pipeline, clip_maker.generate = load_once, generate_once

    def run(out: Path, *more: str) -> int:
        jobs = folder / "jobs.jsonl"
        jobs.write_text("\n".join(map(json.dumps, JOBS[: 2 if more else None])))
        options = ("--model", model, "--image", image, "--jobs", str(jobs), "--out", str(out / "clip.gif"))
        return main(["generate", *options, *SMALL, *more])

    return [kill_while_making(run, folder), kill_while_replacing(run, folder)]


def kill_while_making(run: Callable[..., int], folder: Path) -> int:
    assert run(folder / "whole") == 0
    expected, names = clips_in(folder / "whole"), files_in(folder / "whole")
    for number in range(1, 1000):
        out = folder / f"killed-{number}"
        out.mkdir()
        code = in_a_process(lambda: killed_at(number, out, lambda: run(out)))  # noqa: B023
        if code == 0:
            return number - 1
        assert code == -signal.SIGKILL, code
        left = clips_in(out)
        assert all(expected[name] == content for name, content in left.items()), (number, "half a clip", sorted(left))
        times = {name: (out / name).stat().st_mtime_ns for name in left}
        assert run(out) == 0, (number, "the next run failed")
        assert clips_in(out) == expected, number
        assert times == {name: (out / name).stat().st_mtime_ns for name in times}, (number, "made again")
        assert files_in(out) == names, (number, files_in(out))
    raise AssertionError("the run never ended")


def kill_while_replacing(run: Callable[..., int], folder: Path) -> int:
    old, new = folder / "whole", folder / "new"
    (old / "frames" / ".DS_Store").touch()
    shutil.copytree(old, new)
    assert run(new, "--seed", "7", "--overwrite") == 0
    names = files_in(old)
    assert files_in(new) == names

    def look(out: Path) -> int:
        before, asked = clip_maker.generate, []
        clip_maker.generate = lambda *args, **kwargs: asked.append(args)
        code = run(out)
        clip_maker.generate = before
        assert not asked, "no clip is missing, so none is made"
        return code

    for number in range(1, 1000):
        out = folder / f"replaced-{number}"
        shutil.copytree(old, out)
        code = in_a_process(lambda: killed_at(number, out, lambda: run(out, "--seed", "7", "--overwrite")))  # noqa: B023
        if code == 0:
            return number - 1
        assert code == -signal.SIGKILL, code
        assert look(out) in (0, 1), (number, "a clip is lost")
        assert files_in(out) == names, (number, files_in(out))
        for job in JOBS:
            place = out / str(job["out"])
            record = json.loads(record_path(place).read_text())
            assert any(fingerprint(place) == fingerprint(whole / str(job["out"])) for whole in (old, new)), number
            assert record["output"] == fingerprint(place), (number, "a record of another clip")
    raise AssertionError("the run never ended")


if __name__ == "__main__":
    print(*kill_again_and_again(*sys.argv[1:3], Path(sys.argv[3])), sep="\n")
