"""``vidaccel generate`` and ``validate`` on two ranks: one clip, one voice, one record."""

from __future__ import annotations

import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from io import StringIO
from pathlib import Path
from subprocess import run
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from ranks import Team

from vidaccel.cli import main
from vidaccel.clips import clip_maker
from vidaccel.clips.frames import read_frames
from vidaccel.parallel import team

pytestmark = pytest.mark.slow

SMALL = ["--device", "cpu", "--dtype", "float32", "--frames", "5", "--steps", "2"]


def command(*words: str) -> tuple[int, str]:
    """The exit code of a command, and what it prints, but for progress bars and errors."""
    with redirect_stdout(StringIO()) as printed:
        code = main(words)
    return code, printed.getvalue()


def test_two_processes_make_the_clip_of_one(two_ranks: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text("".join(json.dumps({"seed": seed, "out": f"{seed}"}) + "\n" for seed in (1, 2)))
    words = "generate", "--jobs", str(jobs), "--out", str(tmp_path / "two"), *SMALL
    (code, printed), silent = two_ranks.run(command, *words)
    assert code == 0 and silent == (0, "")
    assert [line for line in printed.splitlines() if line.startswith(str(tmp_path))] == [
        str(tmp_path / "two" / name) for name in ("1", "2")
    ]
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")
    assert main(["generate", "--jobs", str(jobs), "--out", str(tmp_path / "one"), *SMALL, "--quiet"]) == 0
    for name in ("1", "2"):
        one, two = (np.stack(list(read_frames(tmp_path / folder / name))).astype(int) for folder in ("one", "two"))
        assert np.abs(one - two).max() <= 1, "of 255"
    record = json.loads((tmp_path / "two" / "2.json").read_text())
    axes = {site["axis"]: site for site in record["report"]["parallel"]}
    assert {"guidance", "decode"} <= set(axes) and all(site["ranks"] == 2 for site in axes.values())
    assert axes["guidance"]["bytes_sent"] > 0
    (_, printed), silent = two_ranks.run(command, *words)
    assert printed.count("done already, skipped") == 2 and silent == (0, "")


def fails_on_the_second(seed: int, *words: str) -> tuple[int, str]:
    """The exit code, and the errors, of a command that fails in the midst of a clip on the second rank."""
    make = clip_maker.generate

    def generate(pipe: Any, arguments: dict[str, Any], of_this: int, **options: Any) -> Any:
        def end_of_step(*_: Any) -> None:
            raise RuntimeError("out of luck")

        fails = {"callback_on_step_end": end_of_step} if of_this == seed else {}
        return make(pipe, arguments | fails, of_this, **options)

    with pytest.MonkeyPatch.context() as patch, redirect_stderr(StringIO()) as errors:
        patch.setattr(team, "AFTER_A_FAILURE", timedelta(seconds=5))
        if dist.get_rank() == 1:
            patch.setattr(clip_maker, "generate", generate)
        code = main(words)
    if dist.get_rank() == 1 and "not all ranks failed alike" in errors.getvalue():
        os._exit(code)  # as the command does
    return code, errors.getvalue()


def test_a_clip_that_fails_on_one_rank_ends_all(tmp_path: Path) -> None:
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text("".join(json.dumps({"seed": seed, "out": f"{seed}.mp4"}) + "\n" for seed in range(1, 5)))
    ranks = Team(2, tmp_path)
    try:
        words = "generate", "--jobs", str(jobs), "--out", str(tmp_path / "out"), *SMALL
        ((code, errors), _), (gone, _) = ranks.outcomes(fails_on_the_second, 2, *words)
    finally:
        ranks.close()
    assert isinstance(gone, EOFError), "the second rank ends, and says why"
    assert code == 1 and "another rank is gone" in errors
    assert sorted(path.name for path in (tmp_path / "out").glob("*.mp4")) == ["1.mp4"], "none is of two jobs"


def test_validate_holds_a_split_clip_against_stock(two_ranks: Team, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    words = "validate", "--quick", "--controls", "other roundings", "--json", str(record), *SMALL
    (code, printed), silent = two_ranks.run(command, *words)
    assert code == 0 and silent == (0, "")
    assert json.loads(record.read_text())["verdict"]["passed"]
    assert printed.count("PASS") == 1


def test_what_is_wrong_on_all_ranks_is_said_once(tmp_path: Path) -> None:
    torchrun = sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    words = "-m", "vidaccel", "generate", "--parallel", "framse", "--out", str(tmp_path / "clip.mp4")
    done = run([*torchrun, *words], capture_output=True, text=True)
    assert done.returncode and done.stderr.count("vidaccel: error:") == 1, done.stderr


def test_parallel_without_torchrun_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--parallel", "auto"]) == 2
    assert "torchrun --nproc-per-node 2" in capsys.readouterr().err
