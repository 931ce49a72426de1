"""Measured choices: remembered, asked again when something differs, the same on every rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vidaccel.kernels import choice
from vidaccel.kernels.choice import Measured, fastest
from vidaccel.kernels.op import Costs, Implementation, Op, listening

X = torch.arange(6.0)


def double_ref(x: Tensor) -> Tensor:
    return 2 * x


def _first(x: Tensor) -> Tensor:
    return x + x


def _second(x: Tensor) -> Tensor:
    return x * 2


def make(name: str = "test_choice", **ways: Callable[..., Any]) -> Op:
    ways = ways or {"first": _first, "second": _second}
    return Op(
        name,
        reference=double_ref,
        implementations={way: Implementation(run) for way, run in ways.items()},
        fake=torch.empty_like,
        costs=lambda x: Costs(8 * x.numel()),
        measures=lambda x: True,
        key=lambda x: {"size": x.numel()},
    )


class Clock:
    """In place of the GPU's: the implementations take these milliseconds in turn; counts what it is asked."""

    def __init__(self, *milliseconds: float) -> None:
        self.milliseconds, self.asked = milliseconds, []

    def __call__(self, run: Callable[[], Any]) -> float:
        run()
        function = run.func  # type: ignore[attr-defined]
        if function not in self.asked:
            self.asked.append(function)
        return self.milliseconds[self.asked.index(function)]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("VIDACCEL_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("VIDACCEL_IMPL", raising=False)
    monkeypatch.setattr("vidaccel.kernels.op._ops", {})
    choice.drop()
    with torch.no_grad():
        yield tmp_path
    choice.drop()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(3.0, 1.0, 2.0)
    monkeypatch.setattr(choice, "gpu_milliseconds", clock)
    return clock


def ran(op: Op, x: Tensor = X) -> str:
    op.forget()  # as another process, which asks anew
    with listening() as events:
        assert torch.equal(op(x), 2 * x)
    return events[0].implementation


def as_another_process(cache: Path) -> None:
    """Forget what is not on disk."""
    files = {path: path.read_bytes() for path in cache.rglob("*.json")}
    choice.drop()
    for path, content in files.items():
        path.write_bytes(content)


def test_measured_once_and_remembered(cache: Path, clock: Clock) -> None:
    op = make()
    assert ran(op) == "second" and clock.asked == [_first, _second], "the reference is written to be read"
    clock.asked.clear()
    assert ran(op) == "second"
    as_another_process(cache)
    assert ran(op) == "second" and not clock.asked
    assert ran(op, X[:2]) == "second" and clock.asked, "another key is another question"
    assert len(list(cache.glob("test_choice/*.json"))) == 2 and not list(cache.rglob("*.part"))


def test_remembered_and_drop(cache: Path, clock: Clock) -> None:
    ran(make()), ran(make("test_choice_of_another"))
    (first, key, measured), (second, *_) = choice.remembered()
    assert (first, second) == ("test_choice", "test_choice_of_another")
    assert measured == Measured("second", {"first": 3.0, "second": 1.0}, {})
    assert set(key) >= {"gpu", "driver", "vidaccel", "torch", "triton", "cudnn", "source", "competitors", "size"}
    assert key["torch"] == torch.__version__ and key["competitors"] == ["first", "second"]
    assert choice.drop("test_choice") == 1
    assert [name for name, *_ in choice.remembered()] == ["test_choice_of_another"]
    clock.asked.clear()
    assert ran(make()) == "second" and clock.asked, "asked again"
    assert choice.drop() == 2 and not list(choice.remembered())


def test_a_process_keeps_the_answers_it_has_asked_for_last(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "MOST_SETTLED", 3)
    op = make()
    for size in (1, 2, 3, 1, 4, 5):
        ran(op, torch.ones(size))
    kept = [size for size in range(1, 6) if choice.known(op, (torch.ones(size),))]
    assert kept == [1, 4, 5]
    clock.asked.clear()
    assert ran(op, torch.ones(2)) == "second" and not clock.asked, "the others are on disk"


@pytest.mark.parametrize("name", ["gpu", "driver", "vidaccel", "torch", "triton", "cudnn", "source"])
def test_an_answer_of_another_machine_or_version_does_not_count(cache: Path, clock: Clock, name: str) -> None:
    op = make()
    ran(op)
    (path,) = cache.rglob("*.json")
    record = json.loads(path.read_text())
    record["key"][name] = "another"
    path.write_text(json.dumps(record))
    as_another_process(cache)
    clock.asked.clear()
    assert ran(op) == "second" and clock.asked


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "[" * 100_000, '{"winner": "second"}', '{"key": 1, "winner": 2}', "\x00\xff"]
)
def test_a_broken_file_counts_as_absent(cache: Path, clock: Clock, text: str, caplog: pytest.LogCaptureFixture) -> None:
    op = make()
    ran(op)
    (path,) = cache.rglob("*.json")
    path.write_text(text)
    as_another_process(cache)
    assert ran(op) == "second"
    assert json.loads(path.read_text())["winner"] == "second", "and is written anew"
    path.write_text(text)
    as_another_process(cache)
    assert ran(op) == "second"
    assert [record.levelname for record in caplog.records] == ["WARNING"], "said once"


@pytest.mark.parametrize("name", ["gone", "torch"], ids=["gone", "does-not-compete"])
def test_an_implementation_that_is_gone_is_no_answer(cache: Path, clock: Clock, name: str) -> None:
    op = make()
    ran(op)
    (path,) = cache.rglob("*.json")
    path.write_text(path.read_text().replace('"winner": "second"', f'"winner": "{name}"'))
    as_another_process(cache)
    assert ran(op) == "second"


def _a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").touch()
    monkeypatch.setenv("VIDACCEL_CACHE_DIR", str(folder / "file"))


def _read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_CACHE_DIR", "/proc/vidaccel")  # where not even root can write


def _homeless(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_CACHE_DIR", "~nobody-of-that-name/cache")


def _full(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "hardlink_to", no_space)
    monkeypatch.setattr(Path, "replace", no_space)


@pytest.mark.parametrize("spoil", [_a_file, _read_only, _homeless, _full], ids=lambda spoil: spoil.__name__.strip("_"))
def test_a_folder_that_takes_nothing_is_no_error(
    cache: Path,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    spoil(cache, monkeypatch)
    assert ran(make()) == ran(make("test_choice_of_another")) == "second"
    assert not list(cache.rglob("*.part")), "nothing half written stays"
    assert [record.levelname for record in caplog.records] == ["WARNING"], "said once"
    assert not list(choice.remembered())


def test_what_is_wrong_or_raises_cannot_win(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("no kernel image is available\nfor this device")

    def wrong(x: Tensor) -> Tensor:
        return 2.1 * x

    monkeypatch.setattr(choice, "gpu_milliseconds", lambda run: 1.0)
    op = make(broken=broken, wrong=wrong, second=_second)
    with listening() as events:
        assert torch.equal(op(X), 2 * X)
    assert events[0].implementation == "second"
    assert "broken: RuntimeError: no kernel image is available;" in events[0].reason
    assert "wrong: " in events[0].reason and "off by" in events[0].reason


def test_the_favourite_is_beaten_by_a_margin_only() -> None:
    times = {"favourite": 1.0, "barely": 0.98, "slow": 9.0}

    def measured(**others: float) -> Measured:
        clock = times | others
        return fastest(
            {name: lambda name=name: name for name in clock}, lambda *_: None, lambda run: clock[run()], "favourite"
        )

    assert measured().winner == "favourite"
    assert measured(barely=0.9).winner == "barely"


@pytest.mark.parametrize(("milliseconds", "timed"), [(0.1, 6), (8.0, 3), (60.0, 1)])
def test_what_takes_long_is_not_timed_often(milliseconds: float, timed: int) -> None:
    times: list[float] = []

    def clock(run: Callable[[], object]) -> float:
        times.append(milliseconds)
        return milliseconds

    fastest({"only": lambda: None}, lambda *_: None, clock, "only")
    assert len(times) == timed


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_of_several_processes_the_first_to_be_done_answers(
    links: bool, cache: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = make()
    assert ran(op) == "second"
    (path,) = cache.rglob("*.json")
    answer = path.read_text().replace('"winner": "second"', '"winner": "first"')
    choice.drop()

    def while_another_is_done(run: Callable[[], Any]) -> float:
        path.write_text(answer)
        return clock(run)

    def no_links(*args: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(choice, "gpu_milliseconds", while_another_is_done)
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", no_links)
    assert ran(op) == "first" and path.read_text() == answer
    assert not list(cache.rglob("*.part"))


def test_several_processes_write_one_folder(cache: Path, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """Each asks, writes and drops while the others do; none ever reads half an answer."""
    op, others = make(), []
    for _ in range(3):
        child = os.fork()
        if not child:
            try:
                wrong = sum(_asked_anew(op) != "second" for _ in range(100))
                os._exit(wrong or len(caplog.records))
            finally:
                os._exit(99)
        others.append(child)
    assert {_asked_anew(op) for _ in range(100)} == {"second"} and not caplog.records
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in others] == [0] * 3
    assert not list(cache.rglob("*.part"))


def _asked_anew(op: Op) -> str:
    """What runs once the answers of this process, and those on disk, are forgotten."""
    choice.drop()
    return ran(op)


def rank(number: int, folder: str, store: str) -> list[str]:
    """One process of a group; each finds another implementation the faster one. What it ran."""
    os.environ |= {"VIDACCEL_CACHE_DIR": f"{folder}/{number}", "MASTER_ADDR": "localhost"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    choice.gpu_milliseconds = Clock(1.0, 2.0, 3.0) if number == 0 else Clock(2.0, 1.0, 3.0)
    op = make()
    with torch.no_grad(), listening() as events:
        for size in range(1, 9):
            if size % 2 == number:  # neither of them is always the first to ask
                torch.distributed.barrier()
            op(torch.ones(size))
            if size % 2 != number:
                torch.distributed.barrier()
    torch.distributed.barrier()  # the store is one rank's: it stays until both have asked
    torch.distributed.destroy_process_group()
    return [event.implementation for event in events]


@pytest.mark.slow
def test_all_ranks_of_a_group_choose_alike(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    commands = [[sys.executable, __file__, str(number), str(tmp_path), str(tmp_path / "store")] for number in range(2)]
    processes = [subprocess.Popen(c, env=environment, stdout=subprocess.PIPE, text=True) for c in commands]
    found = [json.loads(process.communicate(timeout=100)[0]) for process in processes]
    assert found[0] == found[1]
    assert set(found[0]) == {"first", "second"}, "each of them was the first to know of some"


if __name__ == "__main__":  # a rank
    print(json.dumps(rank(int(sys.argv[1]), *sys.argv[2:])))
