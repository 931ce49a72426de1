"""An op itself: which implementation runs, for how long that stands, and what is told of it."""

from __future__ import annotations

import gc
import logging
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from vidaccel.kernels import choice
from vidaccel.kernels.check import Part
from vidaccel.kernels.op import MOST_PLANS, WHOLE_CHECKS, Costs, Implementation, Op, listening, note, ops
from vidaccel.kernels.sampling import sampling
from vidaccel.kernels.settings import Settings, allowed, constants_overridden

calls: Counter[str] = Counter()


def double_ref(x: Tensor, scale: float) -> Tensor:
    calls["torch"] += 1
    return 2 * x * scale


def _way(name: str) -> Any:
    def run(x: Tensor, scale: float) -> Tensor:
        calls[name] += 1
        return (x + x) * scale

    return run


def _narrow(x: Tensor, scale: float) -> str | None:
    return "x is not contiguous" if not x.is_contiguous() else "scale is odd" if scale % 2 else None


def _costs(x: Tensor, scale: float) -> Costs:
    return Costs(bytes=2 * x.numel() * x.element_size(), flops=x.numel())


def _validate(x: Tensor, scale: float) -> None:
    calls["validate"] += 1
    if scale < 0:
        raise ValueError(f"double: scale={scale} is negative")


def make(**options: Any) -> Op:
    ways = {"fast": Implementation(_way("fast"), _narrow), "safe": Implementation(_way("safe"))}
    defaults = {"implementations": ways, "fake": lambda x, scale: torch.empty_like(x), "costs": _costs}
    return Op("double", **({"reference": double_ref, "validate": _validate} | defaults | options))


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The ops made here are none of the project's."""
    ops()
    monkeypatch.setattr("vidaccel.kernels.op._ops", {})
    monkeypatch.delenv("VIDACCEL_IMPL", raising=False)
    calls.clear()
    with torch.no_grad():
        yield


def ran(op: Op, *args: Any, **options: Any) -> str:
    """What ran; its result is right."""
    with listening() as events:
        out = op(*args, **options)
    assert torch.equal(out, 2 * args[0] * args[1])
    (event,) = events
    return event.implementation


X = torch.arange(6.0).view(2, 3)


def test_the_first_that_serves_runs() -> None:
    op = make()
    assert [ran(op, X, 2), ran(op, X.T, 2), ran(op, X, 3)] == ["fast", "safe", "safe"]


def test_the_argument_goes_before_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    op = make()
    monkeypatch.setenv("VIDACCEL_IMPL", "safe")
    assert [ran(op, X, 2), ran(op, X, 2, impl="torch"), ran(op, X, 2, impl="fast")] == ["safe", "torch", "fast"]
    with pytest.raises(ValueError, match="double: impl='fast' cannot run: scale is odd"):
        op(X, 3, impl="fast")
    with pytest.raises(ValueError, match="double: impl must be one of fast, safe, torch, got 'quick'"):
        op(X, 2, impl="quick")


def test_a_wish_that_cannot_run_is_passed_over_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    op = make()
    monkeypatch.setenv("VIDACCEL_IMPL", "other=torch,double=fast,safe")
    with listening() as events:
        op(X, 2), op(X, 3)
    assert [(event.implementation, event.reason) for event in events] == [("fast", ""), ("safe", "scale is odd")]


def measuring(monkeypatch: pytest.MonkeyPatch, **milliseconds: float) -> list[str]:
    """Let implementations take that long; returns the names of those that are measured, as they are."""
    measured: list[str] = []

    def clock(run: Any) -> float:
        before = calls.copy()
        run()
        (name,) = calls - before
        measured.append(name)
        return milliseconds[name]

    monkeypatch.setattr(choice, "gpu_milliseconds", clock)
    return measured


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[None]:
    monkeypatch.setenv("VIDACCEL_CACHE_DIR", str(tmp_path))
    choice.drop()
    yield
    choice.drop()


def test_the_fastest_by_measurement_goes_before_the_first(monkeypatch: pytest.MonkeyPatch, cache: None) -> None:
    op = make(measures=lambda x, scale: scale != 8, key=lambda x, scale: {"shape": tuple(x.shape)})
    measured = measuring(monkeypatch, fast=3.0, safe=1.0, torch=2.0)
    assert ran(op, X, 2) == "safe" and measured
    assert ran(op, X, 8) == "fast", "where measuring does not pay"
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")
    assert ran(op, X, 2) == "torch"
    monkeypatch.setenv("VIDACCEL_IMPL", "")
    monkeypatch.setenv("VIDACCEL_TUNE", "0")
    assert ran(op, X, 2) == "fast"


def test_a_plan_stands_until_something_about_the_call_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    op = make(implementations={"fast": Implementation(_way("fast"), lambda *args: asked.append(args))})
    for _ in range(3):
        op(X, 2)
    assert len(asked) == 1 and calls["validate"] == 1
    for other in ((X.T.contiguous().T, 2), (X[:1], 2), (X.double(), 2), (X, 4)):
        before = len(asked)
        for _ in range(2):
            op(*other)
        assert len(asked) == before + 1, other
    for change in (
        lambda: monkeypatch.setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark),
        lambda: monkeypatch.setenv("VIDACCEL_IMPL", "fast"),
    ):
        change()
        before = len(asked)
        op(X, 2), op(X, 2)
        assert len(asked) == before + 1
    with constants_overridden(BLOCK=4):
        before = len(asked)
        op(X, 2)
        assert len(asked) == before + 1
    op.forget()
    before = len(asked)
    op(X, 2)
    assert len(asked) == before + 1


def test_what_is_bound_serves_later_calls_of_its_signature() -> None:
    bound: list[Any] = []

    def bind(x: Tensor, scale: float) -> Any:
        bound.append(x.shape)
        return lambda x, scale: 2 * x * scale

    op = make(implementations={"fast": Implementation(_way("fast"), bind=bind)})
    for _ in range(3):
        assert ran(op, X, 2) == "fast" and ran(op, X[:1], 2) == "fast"
    assert bound == [X.shape, X[:1].shape]


def test_wrong_arguments_raise_every_time() -> None:
    op = make()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"double: scale=-1 is negative"):
            op(X, -1)


def test_events_tell_bytes_and_flops() -> None:
    op = make()
    with listening() as events:
        op(X, 2)
        note("shortcut", "torch", "it is shorter")
        op(X.double(), 2)
    assert [(event.op, event.costs) for event in events] == [
        ("double", Costs(48, 6)),
        ("shortcut", Costs(0)),
        ("double", Costs(96, 6)),
    ]


def test_a_listener_hears_its_own_context() -> None:
    op = make()
    with listening() as outer:
        op(X, 2)
        with listening() as inner:
            op(X, 4), op(X, 6)
        thread = threading.Thread(target=op, args=(X, 8))
        thread.start()
        thread.join()
    op(X, 2)
    assert (len(outer), len(inner)) == (1, 2)


def test_only_references_run_for_one_who_asks() -> None:
    op = make()
    with listening(only_references=True) as events:
        op(X, 2)
    assert [event.implementation for event in events] == ["fast"], "chosen as ever"
    assert calls["torch"] == 1 and not calls["fast"]


def test_what_raises_is_replaced_for_good_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    def fails(x: Tensor, scale: float) -> Tensor:
        calls["fails"] += 1
        raise RuntimeError("out of resource: shared memory\nHardware limit: 1")

    op = make(implementations={"fails": Implementation(fails)})
    with caplog.at_level(logging.WARNING, "vidaccel"), listening() as events:
        for _ in range(3):
            assert torch.equal(op(X, 2), 4 * X)
    assert calls["fails"] == 1 and len(caplog.records) == 1
    assert {(event.implementation, event.reason) for event in events} == {
        ("torch", "fails: RuntimeError: out of resource: shared memory")
    }
    with pytest.raises(RuntimeError, match="out of resource"):
        op(X, 2, impl="fails")


@pytest.mark.parametrize("gradients", [False, True])
def test_what_raises_is_said_once_whatever_the_shape(gradients: bool, caplog: pytest.LogCaptureFixture) -> None:
    def fails(*args: Any) -> Any:
        raise RuntimeError("no kernel image is available")

    ways = {"fails": Implementation(fails), "unbound": Implementation(_way("unbound"), bind=fails)}
    for name, way in ways.items():
        op = make(implementations={name: way})
        with torch.set_grad_enabled(gradients):
            for size in (1, 2, 1, 2):
                assert torch.equal(op(X[:size], 2), 4 * X[:size])
    assert len(caplog.records) == (1 if gradients else 2), "with gradients nothing is bound"


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("raises", [False, True])
def test_new_sizes_for_ever_take_no_memory(gradients: bool, raises: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "vidaccel")  # the fixture would keep the warnings

    def run(x: Tensor, scale: float) -> Tensor:
        if raises:
            raise RuntimeError(f"no kernel for {x.shape}")
        return 2 * x * scale

    op = make(implementations={"fast": Implementation(run)})
    x, kept = torch.zeros(3 * MOST_PLANS), []
    with torch.set_grad_enabled(gradients):
        for size in range(len(x)):
            op(x[:size], 2)
            if size % MOST_PLANS == 16:
                kept.append(len(gc.get_objects()))
    assert kept[-1] - kept[0] < MOST_PLANS, "objects: less than one for each size of the time between"


def test_new_settings_for_ever_take_no_memory() -> None:
    op = make()
    for block in range(2000):
        with constants_overridden(BLOCK=block):
            op(X, 2)
    op.forget()
    assert sum(type(x) is Settings for x in gc.get_objects()) < 1000


def test_what_raises_after_it_has_written_spoils_nothing() -> None:
    def fails(x: Tensor, scale: float) -> Tensor:
        x.zero_()
        raise RuntimeError("the second of two kernels")

    op = make(implementations={"fails": Implementation(fails)}, overwrites=0)
    with listening(checks=True) as events:
        assert torch.equal(op(X.clone(), 2), 4 * X)
    assert "the second of two kernels" in events[0].reason


def test_no_memory_is_the_callers_to_know() -> None:
    def fails(x: Tensor, scale: float) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    op = make(implementations={"fails": Implementation(fails)})
    with pytest.raises(torch.OutOfMemoryError):
        op(X, 2)


def test_a_lossy_implementation_runs_only_where_that_is_allowed() -> None:
    op = make(implementations={"int8": Implementation(_way("int8"), fidelity="lossy")})
    assert ran(op, X, 2) == "torch"
    with pytest.raises(ValueError, match=r"impl='int8' cannot run: it is lossy, and what may run is math-exact"):
        op(X, 2, impl="int8")
    with allowed("lossy"):
        assert ran(op, X, 2) == "int8"
    assert ran(op, X, 2) == "torch"
    with allowed("bit-exact"):
        exact = make(implementations={"near": Implementation(_way("near"))})
        with pytest.raises(ValueError, match=r"it is math-exact, and what may run is bit-exact"):
            exact(X, 2, impl="near")


@pytest.mark.parametrize("right", [True, False])
def test_an_op_that_overwrites_an_argument_is_checked_on_what_that_was(right: bool) -> None:
    def add_(x: Tensor, scale: float) -> Tensor:
        return x.mul_(2 * scale if right else 2.1 * scale)

    op = make(implementations={"in place": Implementation(add_)}, overwrites=0)
    x = torch.randn(4, 8)
    expected = 4 * x
    with listening(checks=True) as events:
        out = op(x.clone(), 2)
    assert torch.allclose(out, expected, rtol=1e-6)
    assert bool(events[0].problem) != right
    mine = x.clone()
    assert op(mine, 2) is mine, "without a check no copy is made"


@pytest.mark.usefixtures("cache")
@pytest.mark.slow
def test_registered_implementations_compile_in_one_graph() -> None:
    def run(x: Tensor, scale: float) -> Tensor:
        return (x + x) * scale

    op = Op(
        "test_op_double",
        reference=lambda x, scale: 2 * x * scale,
        implementations={"fast": Implementation(run, registered=True)},
        fake=lambda x, scale: torch.empty_like(x),
        costs=_costs,
    )
    compiled = torch.compile(lambda x: op(x, 2.0) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X), 4 * X + 1)
    torch.library.opcheck(op.registered["fast"], (X, 2.0))


def test_a_probe_finds_an_epsilon_that_the_input_hides() -> None:
    def norm(eps: float) -> Any:
        return lambda x, scale: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    ways = {"wrong": Implementation(norm(1e-5))}
    x = torch.linspace(1, 100, 60, dtype=torch.float16).view(2, 30)
    for small, found in ((None, False), (lambda factor, x, scale: (x * factor, scale), True)):
        op = make(reference=norm(1e-6), implementations=ways, small=small)
        with listening(checks=True, probes=True) as events:
            op(x, 1.0)
        assert bool(events[0].problem) is found
    assert "when its input is small" in events[0].problem


SAMPLED_ROWS = 4


def _row(number: int, x: Tensor, scale: float) -> Iterator[Part]:
    row = number % SAMPLED_ROWS
    yield Part((x[row : row + 1], scale), lambda outputs: (outputs[0][row : row + 1],))


def faulty(wrong: Tensor) -> Op:
    """Doubles, but for row 0, as long as ``wrong`` is."""

    def run(x: Tensor, scale: float) -> Tensor:
        y = 2 * x * scale
        y[0] *= 1.5 if wrong else 1.0
        return y

    return make(implementations={"fast": Implementation(run)}, sample=_row)


def problems(op: Op, times: int, x: Tensor) -> list[bool]:
    """Of as many calls that are checked: whether each was found wrong; their results are right if one was."""
    found = []
    for _ in range(times):
        with listening(checks=True) as events:
            out = op(x, 2)
        (event,) = events
        assert not event.problem or torch.equal(out, 4 * x)
        found.append(bool(event.problem))
    return found


def test_calls_that_are_alike_are_sampled_behind_the_first() -> None:
    x, wrong = torch.randn(SAMPLED_ROWS, 8), torch.tensor(False)
    op = faulty(wrong)
    with sampling():
        assert problems(op, WHOLE_CHECKS, x) == [False] * WHOLE_CHECKS
        wrong.fill_(True)
        found = problems(op, SAMPLED_ROWS, x)
        first = found.index(True)  # when it is the turn of the row that is wrong
        assert first == -WHOLE_CHECKS % SAMPLED_ROWS
        assert all(found[first:]), "as soon as one was wrong, all are checked whole"
        assert problems(op, 1, x.half()) == [True], "another dtype is another signature"


def test_a_fault_that_is_there_from_the_start_is_found_in_every_call() -> None:
    with sampling():
        assert all(problems(faulty(torch.tensor(True)), 3 * SAMPLED_ROWS, torch.randn(SAMPLED_ROWS, 8)))


def test_outside_a_call_of_a_model_every_check_is_whole() -> None:
    x, wrong = torch.randn(SAMPLED_ROWS, 8), torch.tensor(False)
    op = faulty(wrong)
    with sampling():
        problems(op, 2 * WHOLE_CHECKS, x)
    problems(op, 2 * WHOLE_CHECKS, x)
    wrong.fill_(True)
    assert problems(op, 1, x) == [True]
    with sampling():
        assert problems(op, 1, x) == [True], "what has passed in another call says nothing"
