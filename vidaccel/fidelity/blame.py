"""Which site is at fault: every fused block beside the original one, on the inputs that it really gets.

A recorded call is made again with the sites in place. Whenever it comes to a fused block, there are two questions.

* Is each op right? It is held against its reference on its very tensors (``kernels/check.py``), and once more on the
  same tensors made small, where a wrong epsilon shows, or a lost bias. Where it is wrong, the reference's goes on.
* Is what lies between the ops right? The fused forward is held against the original one, with every block below going
  its original way. What may be apart is twice what the original is off from a higher precision, and some roundings.

What goes on from a block is the original's result, so that a fault is seen where it is and nowhere else: two at once
are two. A site that is found at fault fails, as at first sight, and the original code runs there from then on.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from tqdm import tqdm

from vidaccel.environment import free_memory
from vidaccel.errors import first_line
from vidaccel.fidelity.take import Call, run_again, tensors_of
from vidaccel.kernels.check import CHAIN, LOSSY, Distance, Problem, distance, perturbing
from vidaccel.kernels.op import listening
from vidaccel.kernels.settings import Fidelity
from vidaccel.patching.families import unwrapped
from vidaccel.patching.model_call import uncompiled
from vidaccel.patching.report import PatchReport
from vidaccel.sites.block import (
    CHANGES_ARGUMENTS,
    Host,
    going,
    original_of,
    original_way,
    put_back,
    unserved_reason,
    with_copies,
)
from vidaccel.sites.memo import watching
from vidaccel.sites.plain import subtree_reason
from vidaccel.sites.site import Site, SiteGroup

__all__ = ["Blame", "Inspection", "failed_already", "inspect", "switched"]

CHAIN_OF_HALVES = (
    8  # units in the last place of 16 bits: no block's own roundings, its children's apart, were seen above 2
)


@dataclass(frozen=True)
class Blame:
    """A site, held against the original code on its own real inputs.

    Attributes:
        path: Of its module.
        op: What it fuses; several joined by ``+``, where they are right together or cannot be told apart.
        fidelity: Its class.
        error: The largest, beside its budget, that was seen.
        budget: What that error may be.
        ratio: ``error / budget``: above 1 the site is at fault.
        detail: What was off, in words.
        skip: What to give ``patch_pipeline(skip=...)`` to leave it out.
    """

    path: str
    op: str
    fidelity: str
    error: float
    budget: float
    ratio: float
    detail: str
    skip: str


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found.

    Attributes:
        sites: The worst first.
        left_out: Paths that could not be looked at, and why.
    """

    sites: tuple[Blame, ...]
    left_out: dict[str, str]

    @property
    def faults(self) -> list[Blame]:
        """The sites that are over their budget."""
        return [site for site in self.sites if site.ratio > 1]


def inspect(
    pipe: Any, report: PatchReport, calls: Sequence[Call], *, progress: bool, allow: Fidelity = "math-exact"
) -> Inspection:
    """Hold every site of ``report`` that ``calls`` of the patched ``pipe`` come to against the original code.

    Sites that are found at fault fail, and are back to the original code. ``allow`` is that of the patch, for a model
    that is compiled.
    """
    inspector = _Inspector()
    before = set(_failed(report))
    for call in tqdm(calls, desc="sites", leave=False, disable=not progress):
        try:
            with watching(inspector.look), uncompiled(unwrapped(getattr(pipe, call.of)), allow):
                run_again(pipe, call, eagerly=True)
        except torch.OutOfMemoryError:
            inspector.left_out[call.of] = "out of memory"
            free_memory()
    faults = [_fault(site) for site in _failed(report) if site not in before]
    sites = sorted([*inspector.within_budget(), *faults], key=lambda one: -one.ratio)
    return Inspection(tuple(sites), inspector.left_out)


def switched(report: PatchReport, right: Callable[[], float], *, progress: bool) -> list[Blame]:
    """The sites without one of which the pipeline is right: for a fault that no block alone shows.

    ``right`` is asked with sites off; it returns an error relative to its budget.
    """
    active = [site for site in report.sites if site.state == "active"]
    before = right()
    found = []
    for op in tqdm(sorted({site.op for site in active}), desc="sites", leave=False, disable=not progress):
        of_op = [site for site in active if site.op == op]
        with _without(*of_op):
            if right() > 1:
                continue
        for site in of_op:
            with _without(site):
                helped = right() <= 1
            if helped:
                found.append(site)
        break
    apart = Distance("a call of its model", before, 1.0)
    return [_blame(site.path, site.op, site.fidelity, apart, _ALONE, f"{site.path}:{site.op}") for site in found]


_ALONE = "its model is right without it, though its block alone is not wrong"


def failed_already(report: PatchReport) -> list[Blame]:
    """The sites that failed before anybody looked: at first sight."""
    return [_fault(site) for site in _failed(report)]


def _failed(report: PatchReport) -> list[Site]:
    return [site for site in report.sites if site.state == "failed"]


def _fault(site: Site) -> Blame:
    apart = getattr(site.reason, "distance", None) or Distance(site.reason, math.inf, 1.0)
    return _blame(site.path, site.op, site.fidelity, apart, site.reason, f"{site.path}:{site.op}")


def _blame(path: str, op: str, fidelity: str, apart: Distance, detail: str, skip: str) -> Blame:
    return Blame(path, op, fidelity, apart.error, apart.budget, apart.ratio, detail, skip)


class _Inspector:
    def __init__(self) -> None:
        self._worst: dict[SiteGroup, Distance] = {}
        self.left_out: dict[str, str] = {}

    def within_budget(self) -> Iterator[Blame]:
        """The blocks that were right."""
        for sites, apart in self._worst.items():
            running = [site for site in sites.sites.values() if site.runs]
            if running and apart.ratio <= 1:
                ops = "+".join(site.op for site in running)
                yield _blame(sites.paths, ops, running[0].fidelity, apart, str(apart), sites.paths)

    def look(self, kind: type[Host], host: Any, sites: SiteGroup, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of ``host``; what its original forward returns, laid out as the fused one lays it out."""
        if unserved_reason(host, sites, args, kwargs):
            return kind.original_forward(host, *args, **kwargs)
        if reason := _repeat_reason(host, args, kwargs):
            self.left_out[sites.paths] = reason
            return host.fused_forward(*args, **kwargs)
        alike, alike_kwargs = host.comparable(args, kwargs)
        call = _HostCall(kind, host, sites, *_copies((alike, alike_kwargs)))
        expected = call.original()
        try:
            given = with_copies(alike, alike_kwargs)
            with listening(checks=True, probes=True) as events:
                found = host.fused_forward(*alike, **alike_kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # in a clip the original would run, and the report would count it
            self.left_out[sites.paths] = first_line(error)
            return original_way(kind, host, sites, args, kwargs)
        sites.hear(events)
        if put_back(given):
            sites.fail(CHANGES_ARGUMENTS)
        else:
            self._judge(call, found, expected)
        return _laid_out(expected, found) if alike is args else original_way(kind, host, sites, args, kwargs)

    def _judge(self, call: _HostCall, found: Any, expected: Any) -> None:
        apart, sites = call.distance(found, expected), call.sites
        golds: _Golds = ()
        if apart.ratio > 1:  # by roundings alone: a higher precision may excuse it
            try:
                golds = call.gold(expected)
            except Exception as error:
                self.left_out[sites.paths] = f"no higher precision to compare with: {first_line(error)}"
                return
            apart = call.distance(found, expected, golds)
        if sites not in self._worst or apart.ratio > self._worst[sites].ratio:
            self._worst[sites] = apart
        if apart.ratio > 1:
            for site in call.at_fault(expected, golds):
                site.fail(Problem(f"{apart}, beside the original block", apart))


_Golds = Sequence[Sequence[Tensor]]  # outputs in a higher precision, and those of slightly other numbers


@dataclass(frozen=True)
class _HostCall:
    """A call of a block, to be made again one way or the other."""

    kind: type[Host]
    host: Any
    sites: SiteGroup
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def original(self) -> Any:
        args, kwargs = _copies((self.args, self.kwargs))
        with going(original_way):
            return self.kind.original_forward(self.host, *args, **kwargs)

    def fused(self) -> Any:
        args, kwargs = _copies((self.args, self.kwargs))
        with going(original_way), listening():
            return self.host.fused_forward(*args, **kwargs)

    def gold(self, expected: Any) -> _Golds:
        """What the original gives in a higher precision; and, in float64, of slightly other numbers."""
        halves = any(x.dtype.itemsize == 2 for x in tensors_of(expected))
        changes = (_in(torch.float32),) if halves else (_in(torch.float64), perturbing())
        with _without_tf32():
            return [self._original_of(change) for change in changes]

    def _original_of(self, change: Callable[[Any], Any]) -> list[Tensor]:
        args, kwargs = _copies((self.args, self.kwargs))
        return tensors_of(original_of(self.kind, self.host, change, args, kwargs))

    def distance(self, found: Any, expected: Any, golds: _Golds = ()) -> Distance:
        """Of the output that is worst beside its budget."""
        mine, theirs = tensors_of(found), tensors_of(expected)
        if [(x.shape, x.dtype) for x in mine] != [(x.shape, x.dtype) for x in theirs]:
            return Distance("the shape or the dtype of an output", math.inf, 1.0)
        apart = Distance("no output", 0.0, 1.0)
        gold, moved = [*golds, *[[None] * len(mine)] * 2][:2]
        for x, y, right, other in zip(mine, theirs, gold, moved, strict=True):
            chain = CHAIN_OF_HALVES if y.dtype.itemsize == 2 else CHAIN
            apart = max(apart, distance(x, y, right, other, chain), key=lambda one: one.ratio)
        lossy = any(site.runs and site.fidelity == "lossy" for site in self.sites.sites.values())
        return apart._replace(budget=LOSSY * apart.budget) if lossy else apart

    def at_fault(self, expected: Any, golds: _Golds) -> list[Site]:
        """The site without which the block is right; all of them, if there is none such."""
        running = [site for site in self.sites.sites.values() if site.runs]
        for site in running if len(running) > 1 else ():
            with _without(site):
                if not unserved_reason(self.host, self.sites, self.args, self.kwargs) and self._right(expected, golds):
                    return [site]
        return running

    def _right(self, expected: Any, golds: _Golds) -> bool:
        try:
            return self.distance(self.fused(), expected, golds).ratio <= 1
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a block need not run without one of its sites when called in the middle
            return False


@contextmanager
def _without(*sites: Site) -> Iterator[None]:
    for site in sites:
        site.on = False
    try:
        yield
    finally:
        for site in sites:
            site.on = True


@contextmanager
def _without_tf32() -> Iterator[None]:
    flags: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]  # type: ignore[attr-defined]
    before = [flag.fp32_precision for flag in flags]
    try:
        for flag in flags:
            flag.fp32_precision = "ieee"
        yield
    finally:
        for flag, precision in zip(flags, before, strict=True):
            flag.fp32_precision = precision


_PLAIN = (Tensor, int, float, bool, str, torch.dtype, torch.device)


def _in(dtype: torch.dtype) -> Callable[[Any], Any]:
    return lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def _repeat_reason(host: Host, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why a call of ``host`` cannot be made twice, or None."""
    for value in (*args, *kwargs.values()):
        for leaf in tree_leaves(value):
            ours = type(leaf).__module__.startswith(("vidaccel.", "torch.nn.", "diffusers.models."))
            if leaf is None or isinstance(leaf, _PLAIN) or (ours and not isinstance(value, list | dict)):
                continue
            return f"its call takes a {type(leaf).__name__}, which it may write into"
    if host.corner(args, kwargs) is None:
        return "it writes into a cache, or takes random numbers"
    return subtree_reason(host.module_of(args))


def _copies(tree: Any) -> Any:
    """``tree`` with containers and objects of its own, for a call that may write into them; with the same tensors."""
    return tree_map(lambda x: copy.copy(x) if type(x).__module__.startswith("vidaccel.") else x, tree)


def _laid_out(expected: Any, found: Any) -> Any:
    """``expected`` in the memory order of ``found``, which the fused code of later blocks may go by."""
    leaves, structure = tree_flatten(expected)
    others, other_structure = tree_flatten(found)
    if structure != other_structure:
        return expected
    return tree_unflatten([_laid_out_tensor(*pair) for pair in zip(leaves, others, strict=True)], structure)


def _laid_out_tensor(expected: Any, found: Any) -> Any:
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor) or expected.shape != found.shape:
        return expected
    return torch.empty_like(found).copy_(expected)
