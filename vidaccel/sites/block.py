"""A fused block stands in for a diffusers block, and every call of it goes through here.

A fused block is a subclass of the diffusers class that it replaces, put in place by assigning ``module.__class__``. A
call goes to the fused forward, or to the original one where the fused does not serve it; the reason is counted. Which
of the two is settled the first time that a call of this signature is seen under a :class:`~vidaccel.sites.memo.Memo`,
and stands as long as that does.

The first call of a signature is checked, and others now and then, for a fault may need other values. Every op in it is
held against its reference on its very tensors (``kernels/check.py``); nobody else's code, no hook and no random number
runs twice. Where a second run could do no harm, the host waits for the verdicts of all ops of a block together, and
for those of all blocks in it, and the block runs once more only if one of them is not clear.

What lies between the ops, the block itself, is held against the original block where that is safe: where all below it
is plain, on the call's own tensors or a corner of them, with references in place of kernels. That covers all blocks
below, which are looked at one by one only if it finds something, and all blocks of this call of the model that are
alike (of one class, with the same attributes, sizes of weights and arguments), whose code does the same. So a check
takes little memory and time.

A module that lost its sites (a copy, or a bound forward that somebody kept when it was restored) does what the original
does.
"""

from __future__ import annotations

import inspect
import logging
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map

from vidaccel.environment import memory_ran_out
from vidaccel.errors import first_line
from vidaccel.kernels import settings
from vidaccel.kernels.check import Verdicts, in_float64, is_changed, near, perturbing
from vidaccel.kernels.op import Event, capturing, listening, overheard
from vidaccel.kernels.sampling import count_check, forget_samples, times_right
from vidaccel.kernels.without_plans import WithoutPlans
from vidaccel.parallel.layout import layout, tokens
from vidaccel.sites.memo import BY_VALUE, Memo, Way, generation, held, holding, once_per_call, signature
from vidaccel.sites.plain import (
    fingerprint,
    method_reason,
    plain_reason,
    random_reason,
    replaced_reason,
    rows_are_seen,
    subtree_reason,
)
from vidaccel.sites.site import Fidelity, SiteGroup

__all__ = [
    "CHANGES_ARGUMENTS",
    "SITES",
    "FusedBlock",
    "Host",
    "call_site",
    "cut_corner",
    "fused_way",
    "fuses",
    "going",
    "have_no_numbers",
    "looking_reason",
    "numberless_way",
    "original_of",
    "original_way",
    "put_back",
    "run_part",
    "unserved_reason",
    "with_copies",
]

logger = logging.getLogger(__name__)

SITES = "_vidaccel"  # the attribute that a module or processor has its sites in
CORNER = 8  # pixels of an image's sides, in a check of what lies between ops
CORNER_ROWS = CORNER * CORNER
CORNERS = 1  # that are looked at of blocks that are alike, in a call of a model
MOST_WHOLE = 2**21  # numbers in a call's tensors that need not be cut
# A checked call costs about two; so few of a model's blocks are due at once, and later ones ever more rarely.
FIRST_RECHECK, RECHECK_SPREAD, RECHECK_GROWTH = 32, 128, 4
MOST_SEEN = 1024  # kinds of calls that a block remembers
GRADIENTS = "gradients are being recorded (fused sites serve inference only: use torch.no_grad())"
FORWARD_GRADIENTS = "gradients are being taken forwards (torch.func.jvp), and fused sites serve inference only"
CHANGES_ARGUMENTS = "the block changes its arguments"
NO_NUMBERS = "its tensors have no numbers to go by (meta device, FakeTensorMode, torch.jit.trace, torch.func)"

Block = TypeVar("Block", bound="type[FusedBlock]")
Result = TypeVar("Result")


class _Seen:
    """How often calls of one kind were seen, and when the next check is due."""

    def __init__(self, path: str, checks: bool) -> None:
        self.calls = 0
        self._spread = zlib.crc32(path.encode()) % RECHECK_SPREAD
        self._due: float = 1 if checks else float("inf")

    def counted(self) -> bool:
        """Count a call; whether it is to be checked."""
        self.calls += 1
        if self.calls < self._due:
            return False
        if self.calls == 1:
            self._due = FIRST_RECHECK + self._spread
        else:
            self._due = self.calls * RECHECK_GROWTH + self._spread
        return True

    def postponed(self) -> None:
        """The check that was due came to no end: the next call is due."""
        self._due = self.calls


class _Plan:
    """What stands for calls of one signature: the reason to go the original way, or none; what fell back inside."""

    __slots__ = ("fallbacks", "heard", "path", "reason", "seen")

    def __init__(self, reason: str, path: int, seen: _Seen) -> None:
        self.reason = reason
        self.path = path  # of blocks of one kind with the same, all do the same
        self.seen = seen
        self.heard = False
        self.fallbacks: list[tuple[str, str]] = []


class Host:
    """What can have sites: a fused block, or an attention processor, in place of its ``original`` class.

    A subclass implements :meth:`fused_forward` and :meth:`original_forward`, both with the parameters that
    :func:`call_site` was called with.
    """

    original: ClassVar[type[Any]]

    @classmethod
    def original_forward(cls, host: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def fused_forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    @classmethod
    def left_alone_reason(cls, module: Any) -> str | None:
        """Why a module cannot be fused at all as it is configured, or None; also asked later: it may have changed."""
        return None

    def call_reason(self, *args: Any, **kwargs: Any) -> str | None:
        """Why this very call goes to the original forward, or None. No tensor data; Dynamo can trace it."""
        return None

    def spread_reason(self, *args: Any, **kwargs: Any) -> str | None:
        """Why a call that would be served goes to the original forward where its tokens are spread, or None."""
        return "it does not know of tokens on other ranks"

    def comparable(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """These arguments without what fused and original forward need not do the same with (padding)."""
        return args, kwargs

    def corner(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Small arguments for which fused and original forward do the same, cut from these; None if there are none."""
        return cut_corner(args, kwargs)

    def can_run_again(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the fused forward could run twice on these arguments: it changes none, and takes no random number."""
        return all(map(_stays, (*args, *kwargs.values())))

    def path_in_data(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the values of a call's tensors decide about the way that it takes, hashable; None: nothing."""
        return None

    def module_of(self, args: tuple[Any, ...]) -> nn.Module:
        """The module that a call runs."""
        raise NotImplementedError


class FusedBlock(Host, nn.Module):
    """Mixin that goes before the diffusers class; made with ``@fuses(Original, {op: fidelity})``.

    It keeps the original ``forward`` signature and hands its arguments to :func:`call_site`.
    """

    ops: ClassVar[dict[str, Fidelity]]

    @classmethod
    def stands_for(cls, module: Any) -> bool:
        """Whether ``module`` is of the kind that this block is about, where diffusers has one class for several."""
        return True

    @classmethod
    def original_forward(cls, host: Any, *args: Any, **kwargs: Any) -> Any:
        if (over := tokens()) is not None and over.holds(host):
            return over.run_whole(cls.original.forward, host, *args, **kwargs)
        return cls.original.forward(host, *args, **kwargs)

    def module_of(self, args: tuple[Any, ...]) -> nn.Module:
        return self

    def runs(self, op: str) -> bool:
        """Whether the fused code of ``op`` is to run in this block."""
        sites: SiteGroup | None = getattr(self, SITES, None)
        return sites is not None and op in sites.running()

    def compile_ahead(self) -> None:
        """Begin to compile kernels that the first call will need. What is not foretold here is compiled when needed."""

    def serves_parent(self, *args: Any, **kwargs: Any) -> bool:
        """Whether a fused parent may run parts of this block, with :func:`run_part`, instead of calling it."""
        return _may_be_bypassed(self) and self.call_reason(*args, **kwargs) is None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy is a stock module: it has no report that could tell of it, and nobody to restore it."""
        state = {name: value for name, value in nn.Module.__getstate__(self).items() if name != SITES}
        return _new, (self.original,), state


@once_per_call
def _may_be_bypassed(block: FusedBlock) -> bool:
    sites = getattr(block, SITES, None)
    unfused = sites is None or not sites.running() or block.left_alone_reason(block)
    return not unfused and plain_reason(block, block.original) is None


def _new(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


def fuses(original: type[nn.Module], ops: dict[str, Fidelity]) -> Callable[[Block], Block]:
    """Class decorator: this fused block replaces ``original`` and has sites of ``ops``.

    It takes the original's name, because diffusers finds blocks by ``__class__.__name__`` (``_no_split_modules``,
    ``_repeated_blocks``).

    Raises:
        TypeError: The forwards take different parameters: the original is that of another diffusers.
    """

    def decorate(cls: Block) -> Block:
        ours, theirs = (", ".join(inspect.signature(kind.forward).parameters) for kind in (cls, original))
        if ours != theirs and not replaced_reason(original):
            raise TypeError(f"{original.__name__}.forward takes ({theirs}), expected ({ours})")
        cls.original, cls.ops = original, ops
        cls.__name__, cls.__qualname__ = original.__name__, original.__qualname__
        return cls

    return decorate


def call_site(kind: type[Host], host: Any, *args: Any, **kwargs: Any) -> Any:
    """A call of ``host``, a ``kind`` or what was one: the fused forward if it serves the call, else the original."""
    over = tokens()
    if over is None or not over.holds(host) or over.too_few(host, args[0]):
        return _call_site(kind, host, *args, **kwargs)
    x, *others = args
    return over.leave(host, _call_site(kind, host, over.enter(host, x), *others, **kwargs))


def _call_site(kind: type[Host], host: Any, *args: Any, **kwargs: Any) -> Any:
    sites: SiteGroup | None = getattr(host, SITES, None)
    if sites is None:
        return kind.original_forward(host, *args, **kwargs)
    if torch.compiler.is_compiling():
        reason = unserved_reason(host, sites, args, kwargs)
        return kind.original_forward(host, *args, **kwargs) if reason else host.fused_forward(*args, **kwargs)
    memo = held()
    if memo is None:
        with holding(_memo_of_one_call(host, args, kwargs)):
            return _call_site(kind, host, *args, **kwargs)
    if memo.way:
        return memo.way(kind, host, sites, args, kwargs)
    gradients = torch.is_grad_enabled() or forward_ad._current_level >= 0
    # asked first: what other questions compute would be recorded, and told apart from what is when a call is made anew
    reason, in_data = _gradients_reason(host, args, kwargs) if gradients else None, None
    if reason is None:
        try:
            in_data = host.path_in_data(args, kwargs)
        except Exception as error:
            reason = _of_a_question(error)
    if reason:
        sites.count(reason)
        return kind.original_forward(host, *args, **kwargs)
    over = layout()
    question = (
        host,
        gradients,
        in_data,
        None if over is None else over.total,  # all ranks are to plan alike, whatever their own shares
        *signature(args),
        *signature(kwargs.values()),
    )
    plan = memo.get(question)
    if plan is None or gradients:
        plan = memo[question] = _plan(host, sites, question[1:], args, kwargs)
    if plan.reason:
        sites.count(plan.reason)
        return kind.original_forward(host, *args, **kwargs)
    checked = plan.seen.counted()
    if checked or not plan.heard:
        return _heard(kind, host, sites, plan, args, kwargs, checked)
    for op, reason in plan.fallbacks:
        sites.count(reason, op)
    return host.fused_forward(*args, **kwargs)


def _memo_of_one_call(host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Memo:
    """For a block that is called by itself, or by the forward of a model that is (PEFT's wrapper does so)."""
    memo = Memo()
    memo.hooked = rows_are_seen(*host.module_of(args).modules())
    memo.way = numberless_way if have_no_numbers(args, kwargs) else None
    return memo


def have_no_numbers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether blocks cannot ask what is in the tensors of a call, or the answer would be kept for all later calls."""
    of_passing = torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None
    tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
    return of_passing or any(x.is_meta or isinstance(x, FakeTensor) for x in tensors)


def original_way(kind: type[Host], host: Any, sites: SiteGroup, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call of ``host`` by its original forward."""
    return kind.original_forward(host, *args, **kwargs)


def numberless_way(kind: type[Host], host: Any, sites: SiteGroup, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """:func:`original_way`, counted, for tensors without numbers, or with passing ones: blocks ask what is in them."""
    sites.count(NO_NUMBERS)
    return original_way(kind, host, sites, args, kwargs)


def looking_reason(host: Host, *tensors: Tensor) -> str | None:
    """Why ``host`` may not look at the ``tensors`` of a call before it comes to :func:`call_site`, or None."""
    return NO_NUMBERS if have_no_numbers(tensors, {}) else _gradients_reason(host, tensors, {})


def fused_way(kind: type[Host], host: Any, sites: SiteGroup, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call of ``host`` by its fused forward where that serves it."""
    if unserved_reason(host, sites, args, kwargs):
        return kind.original_forward(host, *args, **kwargs)
    return host.fused_forward(*args, **kwargs)


@contextmanager
def going(way: Way) -> Iterator[None]:
    """Let every block inside the ``with`` block, in this thread, go ``way``, in what is else the call under way."""
    memo = Memo()
    memo.way = way
    if of_the_call := held():
        memo.text, memo.hooked, memo.of_model = of_the_call.text, of_the_call.hooked, of_the_call.of_model
    with holding(memo):
        yield


def run_part(host: Host, part: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """``part(*args, **kwargs)``, a method of ``host``, on behalf of a fused parent: its events are told of ``host``."""
    if torch.compiler.is_compiling() or (listener := overheard()) is None or listener.only_references:
        return part(*args, **kwargs)
    sites: SiteGroup = getattr(host, SITES)
    with listening(
        checks=listener.checks, covers=listener.covers, probes=listener.probes, verdicts=listener.verdicts
    ) as events:
        result = part(*args, **kwargs)
    _hear(sites, events)
    return result


def _hear(sites: SiteGroup, events: list[Event]) -> None:
    sites.hear(events)
    if (memo := held()) is not None:
        memo.flops += sum(event.costs.flops for event in events)
        memo.ops += len(events)


def _plan(host: Host, sites: SiteGroup, kind_of_call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Plan:
    reason = unserved_reason(host, sites, args, kwargs) or ""
    # A site that has failed, or is off, leaves another path, whose ops may not have been checked yet.
    # Only a hash is kept: a block's attributes are many, and a model's sites meet every size that somebody tries.
    path = hash((kind_of_call, settings.current(), sites.running(), fingerprint(host.module_of(args))))
    seen = sites.seen.get(path)
    if seen is None:
        if len(sites.seen) >= MOST_SEEN:
            sites.seen.clear()
        seen = sites.seen[path] = _Seen(sites.paths, sites.checks)
    return _Plan(reason, path, seen)


def unserved_reason(host: Any, sites: SiteGroup, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why a call of ``host`` goes to the original forward, or None.

    A question that raises is about arguments of another kind, which the original may serve, or refuse in its own words.
    """
    if torch.compiler.is_compiling():
        return _unserved_reason(host, sites, args, kwargs)
    try:
        return _unserved_reason(host, sites, args, kwargs)
    except Exception as error:
        return _of_a_question(error)


def _of_a_question(error: Exception) -> str:
    """The reason that an error of a question is."""
    if memory_ran_out(error):
        raise error
    return first_line(error)


def _unserved_reason(host: Any, sites: SiteGroup, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    if not sites.running():
        return "it is off, or failed"
    if reason := _gradients_reason(host, args, kwargs) or replaced_reason(host.original):
        return reason
    if isinstance(host, nn.Module) and (reason := method_reason(host)):
        return reason
    if reason := random_reason(host.module_of(args)) or host.left_alone_reason(host):
        return reason
    if reason := host.call_reason(*args, **kwargs):
        return reason
    over = tokens()
    return host.spread_reason(*args, **kwargs) if over is not None and over.holds(host) else None


def _gradients_reason(host: Host, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    if forward_ad._current_level >= 0:
        return FORWARD_GRADIENTS
    if not torch.is_grad_enabled():
        return None
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    recorded = any(x.requires_grad for x in (*tensors, *host.module_of(args).parameters()))
    return GRADIENTS if recorded else None


def _heard(
    kind: type[Host],
    host: Any,
    sites: SiteGroup,
    plan: _Plan,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    checked: bool,
) -> Any:
    """A call whose events are noted, and whose ops and what lies between them are checked if it is their turn."""
    unsafe = subtree_reason(host.module_of(args))
    checks_before = len(_checks_of_call())
    if checked:
        _checks_of_call().append(plan.seen.postponed)
    listener = overheard()
    judged = checked and not unsafe and not (listener is not None and listener.covers)
    try:
        # not where a clip is spread over ranks: the others would wait for what the corner's blocks send
        problem = _problem_of_kind(kind, host, sites, plan, args, kwargs) if judged and not layout() else None
        given = with_copies(args, kwargs) if problem == CHANGES_ARGUMENTS else []
        together = checked and not unsafe and not layout() and host.can_run_again(args, kwargs)
        run = _judged_together if together else _listened
        out, events = run(host, sites, args, kwargs, checked, checked and not unsafe and not problem)
        put_back(given)
        # Where a block below is at fault, it has failed by now, and this one is right.
        if wrong := problem and _problem_between_ops(kind, host, sites, args, kwargs):
            sites.fail(wrong)
            return kind.original_forward(host, *args, **kwargs)
    except BaseException as error:
        _make_due_again(checks_before)
        if unsafe or memory_ran_out(error) or not isinstance(error, Exception):
            raise  # it may be the user's own, or an interrupt
        if capturing() or layout():
            raise  # the graph fails, not this block; or the other ranks wait for what it was to send
        # If the arguments themselves are wrong, the original raises the error that its users know.
        out = kind.original_forward(host, *args, **kwargs)
        plan.reason = first_line(error)
        sites.count(plan.reason)
        logger.warning("%s: the fused block failed, the original runs: %s", sites.paths, plan.reason)
        return out
    plan.heard = True
    plan.fallbacks = [(event.op, event.reason) for event in events if event.reason]
    for op, reason in plan.fallbacks:
        sites.count(reason, op)
    return out


def _listened(
    host: Any, sites: SiteGroup, args: tuple[Any, ...], kwargs: dict[str, Any], checks: bool, covers: bool
) -> tuple[Any, list[Event]]:
    """The fused forward and its events; the host waits for the verdict of every op."""
    with listening(checks=checks, covers=covers) as events:
        out = host.fused_forward(*args, **kwargs)
    _hear(sites, events)
    return out, events


def _judged_together(
    host: Any, sites: SiteGroup, args: tuple[Any, ...], kwargs: dict[str, Any], checks: bool, covers: bool
) -> tuple[Any, list[Event]]:
    """As :func:`_listened`, but the host waits once for all ops.

    A block in one that is judged like this leaves its verdicts to that one, which would run it again.
    """
    listener, checks_before = overheard(), len(_checks_of_call())
    above = None if listener is None else listener.verdicts
    verdicts = above or Verdicts()
    with verdicts.about(sites.fail), listening(checks=checks, covers=covers, verdicts=verdicts) as events:
        out = host.fused_forward(*args, **kwargs)
    if not above and (doubted := verdicts.doubted()):
        _make_due_again(checks_before)  # what followed a wrong result is wrong, too, and blocks were checked on that
        forget_samples()
        first, so_far = _tensors(out), generation()
        del out
        out, events = _listened(host, sites, args, kwargs, checks, covers)
        if generation() == so_far and any(map(near, first, _tensors(out))):  # nothing has failed
            doubted[0]("it returned something else when it ran once more")  # what came before it was right
        return out, events
    _hear(sites, events)
    return out, events


def _checks_of_call() -> list[Callable[[], None]]:
    memo = held()
    assert memo is not None, "call_site holds one"
    return memo.postpone


def _make_due_again(since: int) -> None:
    """Let the checks of this call, but for so many at its start, count for nothing."""
    for postpone in _checks_of_call()[since:]:
        postpone()


def _stays(value: Any) -> bool:
    """Whether a call finds this argument as the one before found it; a list, a dict, an object may be a cache."""
    if isinstance(value, tuple):
        return all(map(_stays, value))
    return isinstance(value, Tensor | nn.Module) or type(value) in BY_VALUE


def _problem_of_kind(
    kind: type[Host], host: Any, sites: SiteGroup, plan: _Plan, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """:func:`_problem_between_ops`, but for blocks that are like one which was right in this call of the model."""
    alike = kind, plan.path
    if times_right(alike) >= CORNERS:
        return None
    problem = _problem_between_ops(kind, host, sites, args, kwargs)
    count_check(alike, not problem)
    return problem


def _problem_between_ops(
    kind: type[Host], host: Any, sites: SiteGroup, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """What the fused block does other than the original one on a corner of its arguments, or None."""
    corner = host.corner(args, kwargs)
    if corner is None or unserved_reason(host, sites, *corner):
        return None
    args, kwargs = corner
    try:
        with WithoutPlans():
            with going(original_way):
                expected = _tensors(kind.original_forward(host, *args, **kwargs))
            given = with_copies(args, kwargs)
            with going(fused_way), listening(only_references=True):
                found = _tensors(host.fused_forward(*args, **kwargs))
        if put_back(given):
            return CHANGES_ARGUMENTS
        if len(found) != len(expected):
            return f"the block returns {len(found)} tensors, the original {len(expected)}"
        if not any(map(near, found, expected)):
            return None
        # It may be the original that is wrong, or both: a norm of a near constant, or of next to nothing, is roundings.
        gold, moved = (original_of(kind, host, change, args, kwargs) for change in (in_float64, perturbing()))
        return next(filter(None, map(near, found, expected, gold, moved)), None)
    except RuntimeError as error:
        if not memory_ran_out(error):
            raise
        # for the check alone: the call itself may have what it needs
        logger.warning("%s: not checked against the original block: out of memory", sites.paths)
        return None


def original_of(
    kind: type[Host], host: Any, change: Callable[[Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Tensor]:
    """What the original block makes of changed arguments with changed parameters and buffers."""
    args, kwargs = tree_map(change, (args, kwargs))
    with going(original_way), _changed(host.module_of(args), change):
        return _tensors(kind.original_forward(host, *args, **kwargs))


@contextmanager
def _changed(module: nn.Module, change: Callable[[Any], Any]) -> Iterator[None]:
    """``module`` with its parameters and buffers changed inside the ``with`` block."""
    tables: list[Any] = [table for part in module.modules() for table in (part._parameters, part._buffers)]
    kept = [(table, name, x) for table in tables for name, x in table.items() if x is not None]
    try:
        for table, name, x in kept:
            twin = change(x.detach())
            table[name] = nn.Parameter(twin, requires_grad=False) if isinstance(x, nn.Parameter) else twin
        yield
    finally:
        for table, name, x in kept:
            table[name] = x


def with_copies(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Copies of the plain tensors of a call, each with what it was made of."""
    return [(x.clone(), x) for x in _tensors((args, kwargs)) if type(x) is Tensor]


def put_back(given: list[tuple[Tensor, Tensor]]) -> bool:
    """Undo what was written to tensors since they were copied; whether anything was."""
    changed = [pair for pair in given if is_changed(*pair)]
    for copy, x in changed:
        x.copy_(copy)
    return bool(changed)


def _tensors(outputs: Any) -> list[Tensor]:
    return [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]


def cut_corner(
    args: tuple[Any, ...], kwargs: dict[str, Any], most_whole: int = MOST_WHOLE
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the first pixels of images and clips, and the first rows of ``[B, S, C]``, if they are many."""
    if sum(x.numel() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)) <= most_whole:
        return args, kwargs
    corner: tuple[tuple[Any, ...], dict[str, Any]] = tree_map(_corner_of, (args, kwargs))
    return corner


def _corner_of(x: Any) -> Any:
    if not isinstance(x, Tensor) or x.ndim < 3:
        return x
    if x.ndim == 3:
        return x[:, :CORNER_ROWS]
    corner = x[..., :CORNER, :CORNER]
    order = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim, torch.contiguous_format)
    kept = order if x.is_contiguous(memory_format=order) else torch.contiguous_format
    return corner.contiguous(memory_format=kept)
