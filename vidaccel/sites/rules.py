"""What a family adapter is made of: rules that say which modules of a model get sites, how, and how that is undone.

A rule never changes a top-level model's class and leaves no parameter, buffer or hook behind. What it did to a module
is a :class:`Patch`, kept beside the module, not in it: so a patched model is copied, saved and loaded like any other.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vidaccel.sites.block import SITES, FusedBlock
from vidaccel.sites.memo import plans_changed
from vidaccel.sites.plain import (
    has_own_forward,
    hook_reason,
    is_of_a_library,
    replaced_reason,
    stock_class,
    stock_method,
)
from vidaccel.sites.site import Fidelity, Site, SiteGroup

__all__ = ["ChannelsLastWeights", "MethodStandIn", "MethodStandIns", "Patch", "Rule", "Swap", "patches_of"]

_patches: WeakKeyDictionary[nn.Module, list[Patch]] = WeakKeyDictionary()


@dataclass(eq=False)
class Patch:
    """One rule applied to one module: the sites it made, and what undoing it needs.

    It stays the same object when a later call adds sites, so that its holder can undo them all. What ends a patch or a
    restore in the middle (Ctrl-C) may do so anywhere: so a patch is on record from before its module changes until
    after that is as it was, and whatever of it is done can be undone, also twice.

    Attributes:
        complete: Whether all of it is done, and nothing undone.
    """

    rule: Rule
    sites: list[Site]
    checks: bool
    memo: Any = None
    complete: bool = False

    def put(self, module: nn.Module) -> None:
        """Apply the rule, and let the sites know what to look at."""
        self.memo = self.rule.prepare(module, self.sites, self.checks)
        _patches.setdefault(module, []).append(self)
        this = weakref.ref(module)  # the table of patches must not keep alive what it goes by
        for site in self.sites:
            site.put_in_place(
                partial(_found_in_place, self.rule, this, self.memo), partial(_switch, self.rule, this, self.memo)
            )
        self.rule.apply(module, self.sites, self.memo)
        plans_changed()
        self.complete = True

    def undo(self, module: nn.Module) -> None:
        """Put back what is still as the rule left it; what somebody has changed since stays."""
        self.complete = False
        self.rule.undo(module, self.memo)
        plans_changed()
        for site in self.sites:
            site.taken_away()
        patches = patches_of(module)
        if self in patches:
            patches.remove(self)


def _found_in_place(rule: Rule, this: weakref.ref[nn.Module], memo: Any) -> str | None:
    module = this()
    return "its module is gone" if module is None else rule.in_place(module, memo)


def _switch(rule: Rule, this: weakref.ref[nn.Module], memo: Any, on: bool) -> None:
    if (module := this()) is not None:
        rule.switch(module, memo, on)


def patches_of(module: nn.Module) -> list[Patch]:
    """The patches on this very module (not its children), in the order they were applied."""
    return _patches.get(module, [])


class Rule:
    """Base of all rules. ``ops`` names the ops that a match is a site of, with their fidelity class."""

    @property
    def ops(self) -> Mapping[str, Fidelity]:
        raise NotImplementedError

    def matches(self, path: str, module: Any) -> bool:
        raise NotImplementedError

    def left_alone_reason(self, module: Any) -> str | None:
        """Why a module that matches gets no sites, or None."""
        return hook_reason(module)

    def prepare(self, module: Any, sites: list[Site], checks: bool) -> Any:
        """What :meth:`apply` puts in place, and :meth:`undo` goes by; the module stays as it is."""
        raise NotImplementedError

    def apply(self, module: Any, sites: list[Site], memo: Any) -> None:
        """Change the module."""
        raise NotImplementedError

    def in_place(self, module: Any, memo: Any) -> str | None:
        """What stands where :meth:`apply` put something, or None if that is still there."""
        raise NotImplementedError

    def undo(self, module: Any, memo: Any) -> None:
        """Put back what :meth:`apply` has changed, which may be a part of it, or nothing."""
        raise NotImplementedError

    def switch(self, module: Any, memo: Any, on: bool) -> None:
        """A site of this rule was switched; where a call of a block asks which are on, there is nothing to do."""

    def put(self, module: nn.Module, sites: list[Site], checks: bool) -> Patch:
        """A new patch of ``module`` by this rule."""
        patch = Patch(self, sites, checks)
        patch.put(module)
        return patch


@dataclass(frozen=True)
class Swap(Rule):
    """Give modules of exactly ``fused.original`` the fused class; with ``names``, only those their parent calls so."""

    fused: type[FusedBlock]
    names: tuple[str, ...] = ()

    @property
    def ops(self) -> Mapping[str, Fidelity]:
        return self.fused.ops

    def matches(self, path: str, module: Any) -> bool:
        named = not self.names or path.rpartition(".")[2] in self.names
        ours = stock_class(module) is self.fused.original or isinstance(module, self.fused)
        return named and ours and self.fused.stands_for(module)

    def left_alone_reason(self, module: Any) -> str | None:
        if reason := super().left_alone_reason(module):
            return f"{reason}: patch before turning that on"
        if reason := replaced_reason(self.fused.original):
            return reason
        if stock_class(module) is not self.fused.original:  # as a copy of what was parametrized after it was patched
            return f"it is of a class of its own, derived from {self.fused.original.__name__}"
        return self.fused.left_alone_reason(module)

    def prepare(self, module: Any, sites: list[Site], checks: bool) -> SiteGroup:
        return SiteGroup(sites, checks)

    def apply(self, module: Any, sites: list[Site], memo: SiteGroup) -> None:
        setattr(module, SITES, memo)
        _drop_left_forward(module)
        _replace_class(module, self.fused.original, self.fused)

    def in_place(self, module: Any, memo: SiteGroup) -> str | None:
        runs = type(module).forward is self.fused.forward  # also of a class derived from it, as parametrizations do
        if isinstance(module, self.fused) and runs and vars(module).get(SITES) is memo:
            return None
        return f"its class is {type(module).__name__} now"

    def undo(self, module: Any, memo: SiteGroup) -> None:
        _drop_left_forward(module)
        _replace_class(module, self.fused, self.fused.original)
        if vars(module).get(SITES) is memo:
            delattr(module, SITES)


def _drop_left_forward(module: nn.Module) -> None:
    """Take away the forward of its class that a hook has left on a module: it would hide that of its next class."""
    if not has_own_forward(module):
        vars(module).pop("forward", None)


def _replace_class(module: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> None:
    """Make a module of ``new`` of one of ``old``, or of a class that somebody has derived from that for this module."""
    kind = type(module)
    if kind is old:
        module.__class__ = new
        return
    for derived in kind.__mro__:
        if old in derived.__bases__:
            derived.__bases__ = tuple(new if base is old else base for base in derived.__bases__)


class MethodStandIn:
    """Stands for one method of a module; in a copy of the module, that method itself."""

    def __init__(self, module: nn.Module, name: str, site: Site) -> None:
        self._module = weakref.ref(module)  # which this is an attribute of
        self._name, self._site = name, site
        self._stock = getattr(type(module), name)

    @property
    def module(self) -> Any:
        return self._module()

    def method(self) -> Callable[..., Any]:
        """The module's own."""
        bound: Callable[..., Any] = stock_method(self.module, self._name)
        return bound

    def stays_out(self, reason: str | None) -> bool:
        """Whether the method itself has to run: for a ``reason``, which is counted, or as the site is off."""
        if getattr(type(self.module), self._name) is not self._stock:
            reason = f"somebody replaced its {self._name}"
        if reason and not torch.compiler.is_compiling():
            self._site.fallbacks[reason] += 1
        return bool(reason) or not self._site.runs

    def __reduce__(self) -> Any:
        return stock_method, (self.module, self._name)


@dataclass(frozen=True)
class MethodStandIns(Rule):
    """Put stand-ins in place of methods of a module that are diffusers' own; one site for all of them."""

    op: ClassVar[str]
    fidelity: ClassVar[Fidelity]
    stand_ins: ClassVar[Mapping[str, type[MethodStandIn]]]  # by the names of the methods

    @property
    def ops(self) -> Mapping[str, Fidelity]:
        return {self.op: self.fidelity}

    def matches(self, path: str, module: Any) -> bool:
        return bool(self._names(module))

    def left_alone_reason(self, module: Any) -> str | None:
        for name in self._names(module):
            stock = getattr(type(module), name)
            of_diffusers = str(getattr(stock, "__module__", "")).startswith("diffusers.")
            if getattr(getattr(module, name), "__func__", None) is not stock or not of_diffusers:
                return f"its {name} is not that of diffusers"
        return None

    def prepare(self, module: Any, sites: list[Site], checks: bool) -> dict[str, MethodStandIn]:
        (site,) = sites
        return {name: self.stand_ins[name](module, name, site) for name in self._names(module)}

    def apply(self, module: Any, sites: list[Site], memo: dict[str, MethodStandIn]) -> None:
        vars(module).update(memo)

    def in_place(self, module: Any, memo: dict[str, MethodStandIn]) -> str | None:
        replaced = [name for name, stand_in in memo.items() if vars(module).get(name) is not stand_in]
        return f"its {replaced[0]} was replaced" if replaced else None

    def undo(self, module: Any, memo: dict[str, MethodStandIn]) -> None:
        for name, stand_in in memo.items():
            if vars(module).get(name) is stand_in:
                del vars(module)[name]

    def _names(self, module: Any) -> list[str]:
        return [name for name in self.stand_ins if hasattr(type(module), name)]


@dataclass(frozen=True)
class ChannelsLastWeights(Rule):
    """Store a model's convolution weights channels-last: cuDNN then answers in that order, and reorders no weight.

    One site for the whole model. Weights that are not plain floating-point parameters here (quantised, offloaded) stay.
    """

    owner: type[nn.Module]

    @property
    def ops(self) -> Mapping[str, Fidelity]:
        return {"channels_last": "math-exact"}

    def matches(self, path: str, module: Any) -> bool:
        return isinstance(module, self.owner)

    def left_alone_reason(self, module: Any) -> str | None:
        return None if any(True for _ in _plain_convolutions(module)) else "it has no convolution with a plain weight"

    def prepare(self, module: Any, sites: list[Site], checks: bool) -> list[_Reordered]:
        return []

    def apply(self, module: Any, sites: list[Site], memo: list[_Reordered]) -> None:
        if all(site.on for site in sites):
            self.switch(module, memo, True)
        for site in sites:
            site.implementations.add("torch")

    def switch(self, module: Any, memo: list[_Reordered], on: bool) -> None:
        self.undo(module, memo)
        memo.clear()
        if not on:
            return
        try:
            for convolution in _plain_convolutions(module):
                weight: Tensor = convolution.weight
                with torch.inference_mode(weight.is_inference()):  # which it stays, or will not become
                    reordered = weight.data.contiguous(memory_format=_order_of(convolution))
                    memo.append(_Reordered(convolution, weight.stride(), reordered.stride()))
                    weight.data = reordered
        except BaseException:  # out of memory, in the middle
            self.undo(module, memo)
            raise

    def in_place(self, module: Any, memo: Any) -> str | None:
        return None

    def undo(self, module: Any, memo: list[_Reordered]) -> None:
        there = set(module.modules())
        for convolution, found, left in memo:
            weight = _numbers_of(convolution) if convolution in there else None
            if weight is not None and weight.stride() == left != found:
                with torch.inference_mode(weight.is_inference()):
                    weight.data = torch.empty_strided(
                        weight.shape, found, dtype=weight.dtype, device=weight.device
                    ).copy_(weight.data)  # fmt: skip


class _Reordered(NamedTuple):
    """A convolution, and the strides of its weight: as they were found, and as they were left."""

    convolution: nn.Module
    found: tuple[int, ...]
    left: tuple[int, ...]


def _order_of(convolution: nn.Module) -> torch.memory_format:
    return torch.channels_last_3d if isinstance(convolution, nn.Conv3d) else torch.channels_last


def _plain_convolutions(model: nn.Module) -> Iterator[Any]:
    """Those below ``model``, but for what somebody's own layer has, which may read weights as they lie (as DoRA's)."""
    for module in model.children():
        if not is_of_a_library(stock_class(module).__module__):
            continue
        if isinstance(module, (nn.Conv2d, nn.Conv3d)) and _is_plain(module.weight) and _is_here(module.weight):
            yield module
        yield from _plain_convolutions(module)


def _is_plain(weight: Any) -> bool:
    return type(weight) is nn.Parameter and weight.is_floating_point()


def _is_here(weight: Tensor) -> bool:
    return not weight.is_meta and weight.numel() > 0  # of one that another process or a disk has, nothing may be left


def _numbers_of(convolution: Any) -> Tensor | None:
    """The tensor that has the numbers of a plain weight; while accelerate offloads it, one in a table of its hook."""
    weight: Tensor = convolution.weight
    if not _is_plain(weight):
        return None
    if weight.is_meta:
        table = getattr(vars(convolution).get("_hf_hook"), "weights_map", None)
        return None if table is None else table["weight"]
    return weight
