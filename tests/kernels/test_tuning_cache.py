from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vidaccel.kernels.tuning_cache import REPEATS, Measured, fastest, load, save, settled

KEY = {"device": "a GPU", "shape": [1, 2]}
MEASURED = Measured("ours", {"ours": 1.0, "theirs": 2.0}, {"slow": "RuntimeError: no"})


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VIDACCEL_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_what_is_saved_is_loaded(folder: Path) -> None:
    assert load("op", KEY) is None
    save("op", KEY, MEASURED)
    assert load("op", KEY) == MEASURED
    assert load("other_op", KEY) is None and load("op", KEY | {"device": "another"}) is None
    assert len(files(folder)) == 1, "nothing half-written is left behind"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"key": {}}', "\0\xff"], ids=repr)
def test_a_damaged_file_counts_as_absent_and_is_replaced(folder: Path, text: str) -> None:
    save("op", KEY, MEASURED)
    [path] = files(folder)
    path.write_text(text)
    assert load("op", KEY) is None
    save("op", KEY, MEASURED)
    assert load("op", KEY) == MEASURED


def test_a_file_that_answers_another_question_is_passed_over(folder: Path) -> None:
    save("op", KEY, MEASURED)
    [path] = files(folder)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"key": {"device": "another"}}))
    assert load("op", KEY) is None


def test_a_folder_that_cannot_be_written_is_no_error(folder: Path) -> None:
    folder.write_text("a file is in the way")
    save("op", KEY, MEASURED)
    assert load("op", KEY) is None


def test_writers_at_the_same_time(folder: Path) -> None:
    """Whoever reads sees the whole of one answer, and nobody's answer to another question is lost."""
    keys = [{"n": n % 4} for n in range(32)]
    threads = [threading.Thread(target=save, args=("op", key, MEASURED)) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(load("op", key) == MEASURED for key in keys)
    assert len(files(folder)) == 4


class FakeClock:
    """Times of calls by name, from a list; counts them."""

    def __init__(self, times: dict[str, list[float]]) -> None:
        self.times: dict[str, Iterator[float]] = {name: iter(values) for name, values in times.items()}
        self.calls: list[str] = []

    def candidate(self, name: str) -> Callable[[], Tensor]:
        return lambda: torch.full((), float(sum(map(ord, name))))

    def candidates(self) -> dict[str, Callable[[], Tensor]]:
        named = {}
        for name in self.times:
            run = self.candidate(name)
            run.__name__ = name
            named[name] = run
        return named

    def milliseconds(self, run: Callable[[], object]) -> float:
        self.calls.append(run.__name__)
        return next(self.times[run.__name__])


def right(out: Tensor) -> None:
    return None


def test_the_fastest_wins_by_its_median() -> None:
    clock = FakeClock({"a": [2.0, 2.0, 2.0, 9.0, 2.0, 2.0], "b": [2.5, 1.0, 1.0, 9.0, 9.0, 1.0]})
    measured = fastest(clock.candidates(), right, clock.milliseconds)
    assert measured == Measured("b", {"a": 2.0, "b": 1.0}, {})
    assert clock.calls.count("a") == clock.calls.count("b") == 1 + REPEATS


@pytest.mark.parametrize(("challenger", "winner"), [(0.98, "favourite"), (0.96, "challenger")])
def test_the_favourite_is_beaten_by_a_margin_only(challenger: float, winner: str) -> None:
    times = {"challenger": [challenger] * (1 + REPEATS), "favourite": [1.0] * (1 + REPEATS)}
    clock = FakeClock(times)
    measured = fastest(clock.candidates(), right, clock.milliseconds, "favourite")
    assert measured is not None and measured.winner == winner


def test_a_hopeless_candidate_is_timed_once() -> None:
    clock = FakeClock({"a": [1.0] * (1 + REPEATS), "slow": [1.6]})
    measured = fastest(clock.candidates(), right, clock.milliseconds)
    assert measured is not None and measured.milliseconds == {"a": 1.0, "slow": 1.6}


def test_a_wrong_result_never_wins_and_is_not_timed() -> None:
    clock = FakeClock({"wrong": [], "right": [3.0] * (1 + REPEATS)})
    wrong = clock.candidate("wrong")()
    measured = fastest(clock.candidates(), lambda out: "is off" if out == wrong else None, clock.milliseconds)
    assert measured == Measured("right", {"right": 3.0}, {"wrong": "is off"})


def test_a_candidate_that_raises_never_wins() -> None:
    clock = FakeClock({"a": [3.0] * (1 + REPEATS), "dies while timed": [1.0]})

    def out_of_shared_memory() -> Tensor:
        raise RuntimeError("out of resource: shared memory\nRequired: 300000")

    candidates = {"raises": out_of_shared_memory, **clock.candidates()}
    measured = fastest(candidates, right, clock.milliseconds)
    assert measured is not None and measured.winner == "a" and measured.milliseconds == {"a": 3.0}
    assert measured.problems["raises"] == "RuntimeError: out of resource: shared memory"
    assert "StopIteration" in measured.problems["dies while timed"]


def test_no_candidate_left() -> None:
    assert fastest({}, right, lambda run: 1.0) is None
    assert fastest({"a": lambda: torch.ones(())}, lambda out: "is off", lambda run: 1.0) is None


def test_a_question_is_settled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu(Tensor):
        is_cuda = True

    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    x, outcomes = torch.ones(1).as_subclass(OnGpu), [None, Measured("fast", {"fast": 1.0}, {}), Measured("new", {}, {})]

    def settle(names: tuple[str, ...] = ("fast", "slow"), x: Tensor = x) -> Measured | None:
        return settled("op", {"shape": 3}, names, lambda: outcomes.pop(0), x)

    assert settle() is None, "nothing is timed while a graph is being captured"
    capturing[0] = False
    assert settle() == Measured("", {}, {}), "no candidate was right, which is not remembered"
    assert settle() == settle() == Measured("fast", {"fast": 1.0}, {})
    capturing[0] = True
    assert settle() == Measured("fast", {"fast": 1.0}, {}), "what is remembered may be used then, too"
    assert settle(("new",)) is None
    capturing[0] = False
    assert settle(("new",)) == Measured("new", {}, {}), "an answer of another version is forgotten"
    assert not outcomes
