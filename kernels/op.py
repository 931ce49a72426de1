"""An op: one meaning with several implementations, and all that they share.

An op knows its reference, its implementations (how each runs, why it cannot run on given arguments, its fidelity
class), the shapes of its outputs, the bytes and FLOPs of a call, and how its arguments are cut into parts. What is made
of that is written once, here: which implementation runs, registration for ``torch.compile``, the check against the
reference, the event of a call.

Which implementation runs is settled the first time that an op sees a signature (sizes, strides, dtypes and devices of
its tensors, values of all else, settings of PyTorch and of this project), and stands from then on. Order: the ``impl``
argument (an error if that cannot run), then ``VIDACCEL_IMPL`` (a wish: passed over if it cannot), then the fastest by
measurement where the op says that measuring pays (``choice.py``), then the first that serves the arguments.

What an op does is told as an :class:`Event` to whoever listens in the same context (:func:`listening`).
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, get_args, get_type_hints

import torch
import triton
from torch import Tensor

from vidaccel.config import entries, preferred_implementation
from vidaccel.errors import UsageError, first_line, nearest
from vidaccel.kernels import choice, compile_ahead, settings
from vidaccel.kernels.check import Part, Problem, Verdicts, disagreement
from vidaccel.kernels.context import while_set
from vidaccel.kernels.launch import launching_ahead
from vidaccel.kernels.sampling import count_check, times_right
from vidaccel.kernels.settings import FIDELITIES, Fidelity

__all__ = [
    "DTYPES",
    "REFERENCE",
    "Costs",
    "Event",
    "Implementation",
    "Listener",
    "Op",
    "capturing",
    "device_reason",
    "listening",
    "note",
    "one_or",
    "ops",
    "overheard",
    "runs_triton",
    "scaled",
    "tensors_reason",
    "when_failing",
]

logger = logging.getLogger(__name__)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
REFERENCE = "torch"  # the name of the implementation that is the reference itself
SMALL_INPUT = 2.0**-10  # the root mean square of a probe: its square is near the epsilons of norms
MOST_COPIED = 2**29  # bytes of a checked call's arguments, so that a check takes little memory beside the call
MOST_PLANS = 4096  # that an op keeps: more than the shapes of several models
WHOLE_CHECKS = 2  # of calls that are alike, before samples are enough
# Fixed when Triton is imported, and not a thing that Dynamo can trace.
INTERPRETED = bool(triton.knobs.runtime.interpret)
_POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
_PLAIN = frozenset([int, float, bool, str, tuple, type(None), torch.dtype])  # tuples of these, that is

Outputs = Any  # a Tensor, or a tuple or list of them
Signature = tuple[Any, ...]


class Costs(NamedTuple):
    """What a call has to move and to multiply, at least: bytes through device memory, FLOPs on the tensor cores."""

    bytes: int
    flops: int = 0


class Event(NamedTuple):
    """One call of an op.

    Attributes:
        op: Its name.
        implementation: What ran.
        reason: Why another one, wished for or faster, did not; empty if it did.
        costs: Bytes and FLOPs of the call.
        problem: What the check against the reference found, in one line; the reference's result was returned then.
    """

    op: str
    implementation: str
    reason: str = ""
    costs: Costs = Costs(0)
    problem: str = ""


class Listener(NamedTuple):
    """Who hears the events of a context."""

    hear: Callable[[Event], None]
    checks: bool = False  # whether every call is held against its reference
    probes: bool = False  # whether that is done for a small input, too
    only_references: bool = False  # whether references run in place of what was chosen
    covers: bool = False  # whether what lies between the ops has been checked already
    verdicts: Verdicts | None = None  # who asks for the results of the checks of all calls at once


_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)
# Called when an implementation has failed and another one takes its place: for those who keep what they have heard.
when_failing: list[Callable[[], None]] = []


@contextmanager
def listening(
    *,
    checks: bool = False,
    only_references: bool = False,
    covers: bool = False,
    probes: bool = False,
    verdicts: Verdicts | None = None,
) -> Iterator[list[Event]]:
    """Collect the events inside the ``with`` block, in this thread; what a nested listener hears is its own.

    Args:
        checks: Hold the result of every op against its reference, and return the reference's where they disagree.
        only_references: Choose as ever, but run the reference: for a check of what lies between the ops.
        covers: Tell blocks below that this check has been made, for them too.
        probes: With ``checks``, also for the same input made small, where a wrong epsilon shows, or a lost bias.
        verdicts: With ``checks``, what is told of their first looks; results that need another one are returned. None:
            each is waited for.
    """
    events: list[Event] = []
    with while_set(_listener, Listener(events.append, checks, probes, only_references, covers, verdicts)):
        yield events


def overheard() -> Listener | None:
    """Who listens in this context, or None."""
    return _listener.get()


def note(op: str, implementation: str, reason: str = "") -> None:
    """Tell of something that is no op with kernels: a shortcut, another memory order."""
    if not torch.compiler.is_compiling() and (listener := _listener.get()):
        listener.hear(Event(op, implementation, reason))


def device_reason(x: Tensor) -> str | None:
    """Why no Triton kernel can run on ``x``'s device, or None."""
    if x.is_cuda or INTERPRETED:
        return None
    return f"Triton has no {x.device.type} backend here (TRITON_INTERPRET=1 interprets the kernels)"


def tensors_reason(x: Tensor, *others: Tensor | None) -> str | None:
    """Why no kernel here can take ``x`` together with ``others`` (dtype, gradients), or None."""
    if x.dtype not in DTYPES:
        return f"the kernel takes float16, bfloat16 and float32, x is {x.dtype}"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others)):
        return "the kernel has no backward pass (call it under torch.no_grad)"
    return None


def one_or(whole: int, size: int) -> bool:
    """Whether ``size`` broadcasts to ``whole``; Dynamo, which knows no ``in`` of symbolic sizes, can trace it."""
    return size == 1 or size == whole


def runs_triton(op: str, x: Tensor) -> bool:
    """Whether ``op`` would run as Triton on ``x``'s device: for callers whose detour only the kernel makes worth it."""
    wishes = settings.current().preferred
    served = x.is_cuda or INTERPRETED
    return served and not (wishes and preferred_implementation(op, wishes) == REFERENCE)


def _serves_all(*args: Any) -> None:
    return None


def _always(*args: Any) -> bool:
    return True


class Implementation(NamedTuple):
    """One way to compute an op.

    Attributes:
        run: Takes the op's arguments, by position.
        reason: Takes the same; why this implementation does not serve them, or None.
        bind: Takes the same; returns what takes them in later calls of the same signature, everything prepared that
            follows from that. None: ``run`` itself.
        fidelity: Its class.
        registered: Whether ``torch.compile`` sees it as one opaque op (whatever launches a kernel).
        competes: Whether it is tried where implementations are measured.
        pays: Takes the arguments; whether it is better than those behind it at all. No is no reason worth telling.
    """

    run: Callable[..., Outputs]
    reason: Callable[..., str | None] = _serves_all
    bind: Callable[..., Callable[..., Outputs]] | None = None
    fidelity: Fidelity = "math-exact"
    registered: bool = False
    competes: bool = True
    pays: Callable[..., bool] = _always

    @classmethod
    def bound(
        cls,
        bind: Callable[..., Callable[..., Outputs]],
        reason: Callable[..., str | None],
        arguments: Callable[..., Any] | None = None,
        *,
        run: Callable[..., Outputs] | None = None,
        **others: Any,
    ) -> Implementation:
        """One that launches kernels, and is registered.

        Args:
            bind: As above; annotated with what the bound call returns, ``Callable[..., Tensor]``.
            reason: As above.
            arguments: The function, or tuple with names, whose annotations are the types of the op's arguments. None:
                ``bind``, as far as it takes them by position.
            run: Runs without having been bound. None: what ``bind`` returns, at once.
            others: As above.
        """
        runs = _typed(run or _at_once(bind), arguments or bind, _bound_result(bind))
        return cls(runs, reason, bind, registered=True, **others)


def _at_once(bind: Callable[..., Callable[..., Outputs]]) -> Callable[..., Outputs]:
    return lambda *args: bind(*args)(*args)


def _bound_result(bind: Callable[..., Any]) -> Any:
    """The type of what a bound call returns."""
    return get_args(inspect.signature(bind, eval_str=True).return_annotation)[1]


def _typed(run: Callable[..., Outputs], arguments: Callable[..., Any], result: Any) -> Callable[..., Outputs]:
    """``run`` with a signature to register it by, which lists the positional arguments of ``arguments``."""
    if isinstance(arguments, type):  # whose signature does not evaluate its annotations
        hints = get_type_hints(arguments)
        taken = [inspect.Parameter(name, _POSITIONAL, annotation=hint) for name, hint in hints.items()]
    else:
        given = inspect.signature(arguments, eval_str=True).parameters.values()
        taken = [parameter for parameter in given if parameter.kind is _POSITIONAL]
    run.__signature__ = inspect.Signature(taken, return_annotation=result)  # type: ignore[attr-defined]
    return run


def scaled(*positions: int) -> Callable[..., tuple[Any, ...]]:
    """For ``Op(small=...)``: multiplies the arguments at ``positions``, as far as they are there, by the factor."""
    return lambda factor, *args: tuple(
        x * factor if at in positions and x is not None else x for at, x in enumerate(args)
    )  # fmt: skip


class _Plan(NamedTuple):
    """What runs for a signature."""

    name: str
    run: Callable[..., Outputs]
    reason: str = ""
    stands: bool = True  # False: to be settled again at the next call


class Op:
    """One meaning with several implementations; a callable that takes its arguments by position.

    Args:
        name: As its file is called.
        reference: Its specification in PyTorch, for any float dtype; also the implementation ``"torch"``.
        implementations: By name, those that are better where they serve first; the reference comes last by itself.
        fake: Takes the arguments; empty outputs of the right shapes, dtypes and strides.
        costs: Takes the arguments; bytes and FLOPs of a call.
        parts: Takes the arguments; cuts them so that the reference can work part by part. None: all at once.
        measures: Takes the arguments; whether measuring the implementations would pay. None: never.
        key: Takes the arguments; what the fastest implementation depends on: strings, numbers, tuples of them. Needed
            with ``measures``.
        default: Takes the arguments; the implementation to run where nothing is measured. None: the first that serves.
        overwrites: Position of the argument whose memory the result may take, if there is one; or what takes the
            arguments and returns it.
        beaten: Takes the names of those that compete and serve, then the arguments; those that another of them always
            beats, which are not measured. None: nobody knows.
        validate: Takes the arguments; raises if they do not fit one another. Asked once for a signature. None: they do.
        small: Takes a factor and the arguments; these with all that an epsilon or a bias is added to times the factor.
            None: the op has neither.
        sample: Takes a number and the arguments; parts that stand for all of them (:func:`sampling`), others for the
            next number. None: a check always looks at all.
        screen: How far the rows of a right result may be off before float64 decides, in units of what suits others: of
            what eager rounds several times, or sums up where terms cancel.
    """

    def __init__(
        self,
        name: str,
        *,
        reference: Callable[..., Outputs],
        implementations: Mapping[str, Implementation],
        fake: Callable[..., Outputs],
        costs: Callable[..., Costs],
        parts: Callable[..., Iterator[Part]] | None = None,
        measures: Callable[..., bool] | None = None,
        key: Callable[..., Mapping[str, Any]] | None = None,
        default: Callable[..., str] | None = None,
        overwrites: int | Callable[..., int | None] | None = None,
        beaten: Callable[..., Set[str]] | None = None,
        validate: Callable[..., None] | None = None,
        small: Callable[..., tuple[Any, ...]] | None = None,
        sample: Callable[..., Iterator[Part]] | None = None,
        screen: float = 1.0,
    ) -> None:
        self.name = name
        self.reference = reference
        self.implementations = {**implementations, REFERENCE: Implementation(reference)}
        self.fake = fake
        self.costs = costs
        self.parts = parts
        self.screen = screen
        self.registered = {
            way: self._register(way, implementation)
            for way, implementation in implementations.items()
            if implementation.registered
        }
        self._measures, self._key, self._default, self._beaten = measures, key, default, beaten
        self._overwrites, self._validate, self._small, self._sample = overwrites, validate, small, sample
        self._plans: dict[Signature, _Plan] = {}
        self._foretold: set[Any] = set()
        self._failed: dict[Signature, _Plan] = {}  # those of them in whose place the reference runs
        self._told: set[str] = set()
        _ops[name] = self

    def __call__(self, *args: Any, impl: str | None = None) -> Any:
        if torch.compiler.is_compiling():
            return self._traced(args, impl)
        listener = _listener.get()
        if impl is not None:
            signature, plan = None, self._plan(args, impl)
        elif torch.is_grad_enabled():  # what requires gradients is no part of a signature
            signature = _signature(args)
            plan = self._failed.get(signature) or self._plan(args, None)
        else:
            signature = _signature(args)
            plan = self._plans.get(signature) or self._settle(signature, args)
        if listener is None:
            return self._run(plan, args, signature)
        return self._run_heard(plan, args, signature, listener)

    def unserved(self, *args: Any, impl: str) -> str | None:
        """Why the implementation called ``impl`` cannot run on these arguments as things are, or None."""
        implementation = self.implementations[impl]
        allowed = settings.current().allowed
        if FIDELITIES.index(implementation.fidelity) > FIDELITIES.index(allowed):
            return f"it is {implementation.fidelity}, and what may run is {allowed} (allow={implementation.fidelity!r})"
        return implementation.reason(*args)

    def competitors(self, *args: Any) -> list[str]:
        """The implementations that would be measured for these arguments, the likely winner first.

        The reference is measured only where it is the default: it is written to be read.
        """
        serving = [
            name
            for name, way in self.implementations.items()
            if way.competes and name != REFERENCE and self.unserved(*args, impl=name) is None
        ]
        beaten = self._beaten(set(serving), *args) if self._beaten else ()
        return [name for name in serving if name not in beaten]

    def compile_ahead(self, device: torch.device, *args: Any, impl: str) -> None:
        """Begin to compile, in the background, what ``impl`` launches on ``device``; nothing is launched.

        Args:
            device: The GPU.
            args: As those of a call; tensors may be on the meta device.
            impl: An implementation's name.
        """
        way = self.implementations[impl]
        with torch.no_grad(), launching_ahead(device):
            (way.bind(*args) if way.bind else way.run)(*args)

    def _foretell(self, plan: _Plan, args: tuple[Any, ...]) -> None:
        """Compile ahead for the call whose corner has these arguments: what runs for it, or might by measurement."""
        alike = plan.name, _signature(args)
        if alike in self._foretold:
            return
        self._foretold.add(alike)
        device = next(x.device for x in args if isinstance(x, Tensor))
        try:
            names = [plan.name, *(self.competitors(*args) if self._measures else ())]
            with listening(only_references=True):  # ops within this one
                for name in dict.fromkeys(names):
                    if self.implementations[name].registered:
                        self.compile_ahead(device, *self._with_copy(args), impl=name)
        except Exception as error:  # the call will tell, if it is an error there
            logger.debug("%s: nothing is compiled beforehand: %s", self.name, first_line(error))

    def forget(self) -> None:
        """Settle every signature anew."""
        self._foretold.clear()
        self._plans.clear()
        self._failed.clear()
        self._told.clear()

    def _register(self, way: str, implementation: Implementation) -> Any:
        registered = torch.library.custom_op(f"vidaccel::{self.name}_{way}", implementation.run, mutates_args=())
        registered.register_fake(self.fake)
        return registered

    def _settle(self, signature: Signature, args: tuple[Any, ...]) -> _Plan:
        plan = self._plan(args, None)
        if plan.stands:
            try:
                if bind := self.implementations[plan.name].bind:
                    plan = plan._replace(run=bind(*args))
            except Exception as error:
                if _stops(plan, error):
                    raise
                return self._without(plan, signature, first_line(error))
            self._keep(signature, plan)
        return plan

    def _keep(self, signature: Signature, plan: _Plan) -> None:
        if len(self._plans) >= MOST_PLANS:
            self.forget()
        self._plans[signature] = plan

    def _without(self, plan: _Plan, signature: Signature, error: str) -> _Plan:
        """The plan for ``signature`` from now on, where that of before has raised ``error``.

        Whatever a kernel does on a new GPU, or with a new compiler, the clip goes on without it.
        """
        reason = f"{plan.name}: {error}"
        plan = self._plan_of(REFERENCE, reason)
        self._keep(signature, plan)
        self._failed[signature] = plan
        if reason not in self._told:  # the same may happen at every shape
            self._told.add(reason)
            logger.warning("%s: PyTorch runs from now on where this happens: %s", self.name, reason)
        for tell in when_failing:
            tell()
        return plan

    def _plan(self, args: tuple[Any, ...], impl: str | None) -> _Plan:
        if self._validate is not None:
            self._validate(*args)
        if impl is not None:
            if impl not in self.implementations:
                raise ValueError(f"{self.name}: impl must be one of {', '.join(self.implementations)}, got {impl!r}")
            if reason := self.unserved(*args, impl=impl):
                raise ValueError(f"{self.name}: impl={impl!r} cannot run: {reason}")
            return self._plan_of(impl)
        wish, reason = self._wish(args)
        if wish is not None:
            return self._plan_of(wish)
        if self._measures is not None and settings.current().tunes and self._measures(*args):
            with listening():  # what runs for the clock is nobody's call, and is not checked
                settled = choice.settle(self, args, self._default_of(args))
            if settled is None:  # a graph is being captured, and nothing can be measured
                return self._plan_of(self._default_of(args), reason, stands=False)
            return self._plan_of(settled.winner, reason or settled.reason)
        default = self._default_of(args)
        return self._plan_of(default, reason or self._why_not_first(args, default))

    def _plan_of(self, name: str, reason: str = "", stands: bool = True) -> _Plan:
        return _Plan(name, self.implementations[name].run, reason, stands)

    def _wish(self, args: tuple[Any, ...]) -> tuple[str | None, str]:
        """What ``VIDACCEL_IMPL`` asks for if it can run here; else why it is passed over."""
        wish = preferred_implementation(self.name, settings.current().preferred)
        if wish is None or wish not in self.implementations:
            return None, ""
        reason = self.unserved(*args, impl=wish)
        return (None, reason) if reason else (wish, "")

    def _default_of(self, args: tuple[Any, ...]) -> str:
        if self._default is not None:
            return self._default(*args)
        ways = self.implementations.items()
        serving = (name for name, way in ways if way.pays(*args) and self.unserved(*args, impl=name) is None)
        return next(serving, REFERENCE)  # which has to run even where it is looser than what is allowed

    def _why_not_first(self, args: tuple[Any, ...], default: str) -> str:
        """Why the first implementation does not run, where that is worth telling: on a device that it is made for."""
        first, way = next(iter(self.implementations.items()))
        if self._default is not None or first == default or device_reason(args[0]) or not way.pays(*args):
            return ""
        return self.unserved(*args, impl=first) or ""

    def key(self, *args: Any) -> Mapping[str, Any]:
        """What the fastest implementation for these arguments depends on."""
        assert self._key is not None
        return self._key(*args)

    def _run(
        self, plan: _Plan, args: tuple[Any, ...], signature: Signature | None, given: tuple[Any, ...] | None = None
    ) -> Outputs:
        """The outputs; where the implementation raises and nobody has asked for it by name, the reference's.

        ``given``: what it gets in place of the arguments, which stay as they are.
        """
        try:
            return plan.run(*(args if given is None else given))
        except Exception as error:
            if signature is None or _stops(plan, error):
                raise
            self._without(plan, signature, first_line(error))
            return self.reference(*args)

    def _run_heard(
        self, plan: _Plan, args: tuple[Any, ...], signature: Signature | None, listener: Listener
    ) -> Outputs:
        if listener.only_references:
            if compile_ahead.is_cold():
                self._foretell(plan, args)
            out = self.reference(*args)
            listener.hear(Event(self.name, plan.name, plan.reason, self.costs(*args)))
            return out
        problem = ""
        checked = listener.checks and plan.name != REFERENCE
        given = self._with_copies(args) if checked else args
        out = self._run(plan, args, signature, given)
        if signature is not None:  # what ran may have failed, and be another one from now on
            plan = self._failed.get(signature, plan)
        if checked and plan.name != REFERENCE:
            problem = self._problem(plan, args, out, signature, listener.verdicts, given) or ""
            if problem:
                out = self.reference(*args)
            elif listener.probes and signature is not None and not torch.is_grad_enabled():
                problem = self._problem_when_small(args)
        listener.hear(Event(self.name, plan.name, plan.reason, self.costs(*args), problem))
        return out

    def _overwritten(self, args: tuple[Any, ...]) -> int | None:
        """Position of the argument whose memory the result may take."""
        return self._overwrites(*args) if callable(self._overwrites) else self._overwrites

    def _with_copy(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments such that the reference will find all of them as they are after the op has run."""
        at = self._overwritten(args)
        return args if at is None else (*args[:at], args[at].clone(), *args[at + 1 :])

    def _with_copies(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The same if the op is at fault and writes to what it should only read, as far as copies take little memory.

        Weights stay: what was made of one may be kept by the tensor that it is.
        """
        at = self._overwritten(args)
        args = self._with_copy(args)
        read = {
            place: x
            for place, x in enumerate(args)
            if isinstance(x, Tensor) and not isinstance(x, torch.nn.Parameter) and place != at
        }
        if sum(x.nbytes for x in read.values()) > MOST_COPIED:
            return args
        return tuple(_copied(x) if place in read else x for place, x in enumerate(args))

    def _problem(
        self,
        plan: _Plan,
        args: tuple[Any, ...],
        out: Outputs,
        signature: Signature | None,
        verdicts: Verdicts | None = None,
        given: tuple[Any, ...] | None = None,
    ) -> Problem | None:
        alike = self.name, plan.name, signature
        times = 0 if signature is None else times_right(alike)
        sample = self._sample(times, *args) if self._sample and times >= WHOLE_CHECKS else None
        try:
            fidelity = self.implementations[plan.name].fidelity
            copies = [] if given is None else self._copies(given, args)
            problem = disagreement(self, args, out, fidelity, sample, verdicts, copies)
        except torch.OutOfMemoryError:  # for the check alone: the call itself had what it needed
            logger.warning("%s: not checked against its reference: out of memory", self.name)
            return None
        if signature is not None:
            count_check(alike, not problem)
        return problem

    def _copies(self, given: tuple[Any, ...], args: tuple[Any, ...]) -> list[tuple[Tensor, Tensor]]:
        """Copies among what the op was given, and what they were made of; but for what it may overwrite."""
        at = self._overwritten(args)
        pairs = enumerate(zip(given, args, strict=True))
        return [(copy, x) for place, (copy, x) in pairs if copy is not x and place != at]

    def _problem_when_small(self, args: tuple[Any, ...]) -> str:
        """The same of other numbers: so small that a wrong epsilon, or a bias, is no rounding beside them."""
        first = args[0]
        size = float(torch.linalg.vector_norm(first, dtype=torch.float32)) / math.sqrt(max(first.numel(), 1))
        if self._small is None or not 0 < size < math.inf:
            return ""
        args = self._small(SMALL_INPUT / size, *args)
        signature = _signature(args)
        plan = self._plans.get(signature) or self._settle(signature, args)
        problem = self._problem(plan, args, self._run(plan, args, signature, self._with_copy(args)), None)
        return Problem(f"{problem} when its input is small", problem.distance) if problem else ""

    def _traced(self, args: tuple[Any, ...], impl: str | None) -> Outputs:
        """A call that Dynamo traces: nothing is measured, remembered or told."""
        if self._validate is not None:
            self._validate(*args)
        name = impl or self._wish(args)[0]
        if name is None and self._measures is not None:
            name = choice.known(self, args)
            name = None if name is None or self.unserved(*args, impl=name) else name
        name = name or self._default_of(args)
        return self.registered.get(name, self.implementations[name].run)(*args)


_ops: dict[str, Op] = {}


@functools.cache
def ops() -> Mapping[str, Op]:
    """Every op there is, by name."""
    import importlib
    import pkgutil

    from vidaccel import kernels

    for kind in ("norm", "attention", "conv", "ffn"):
        folders = [f"{path}/{kind}" for path in kernels.__path__]
        for module in pkgutil.iter_modules(folders):
            if not module.name.endswith("_gluon"):  # imported where it runs: Gluon is not in every Triton
                importlib.import_module(f"{kernels.__name__}.{kind}.{module.name}")
    return dict(sorted(_ops.items()))


def check_wishes(shortcuts: Sequence[str] = ()) -> None:
    """Hold ``VIDACCEL_IMPL`` against what there is; ``shortcuts`` are further names that may stand in it.

    Raises:
        UsageError: it names no op, or no implementation.
    """
    known = {name: list(op.implementations) for name, op in ops().items()}
    every = sorted({"triton", REFERENCE, *(way for ways in known.values() for way in ways)})
    for entry in entries(settings.current().preferred):
        op, equals, way = entry.rpartition("=")
        if equals and op not in known and op not in shortcuts:
            raise UsageError(f"VIDACCEL_IMPL: there is no op {op!r}{nearest(op, [*known, *shortcuts])}")
        ways = known.get(op, every)
        if way not in ways:
            which = f"{op} has" if op else "there is"
            raise UsageError(f"VIDACCEL_IMPL: {which} no implementation {way!r}{nearest(way, ways)}")


def _copied(x: Tensor) -> Tensor:
    """``x`` in other memory of the same order; itself if it lies there with gaps, or some of it twice."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride != expected:
            return x
        expected *= size
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def _stops(plan: _Plan, error: Exception) -> bool:
    """Whether nothing can take the place of what has raised, or nothing should: a capture is broken off, no op is."""
    return plan.name == REFERENCE or isinstance(error, torch.OutOfMemoryError) or capturing()


def capturing() -> bool:
    """Whether what this thread launches goes into a CUDA graph. Asked where something has raised: it takes a while."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _signature(args: tuple[Any, ...]) -> Signature:
    """Everything that may decide what runs for ``args``."""
    return (
        settings.untraced(),
        *[x if type(x) in _PLAIN else (type(x), x.shape, x.stride(), x.dtype, x.device) for x in args],
    )
