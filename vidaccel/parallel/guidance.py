"""Classifier-free guidance on two ranks: one runs the denoiser with the text, the other one without.

Where a pipeline asks for both at once, as two halves of a batch, each rank runs its half. Where it asks for one after
the other (Wan, HunyuanVideo 1.5), the second call of a step differs from the first in its text alone, and both texts
are those of the step before: so from the second step on, one rank runs the first call, and the other one what the
second call will be. Should another call come instead, it is run as ever.

Either way the results are gathered once a step, and both ranks have both.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from vidaccel.parallel.ranks import Ranks

__all__ = ["Guidance", "foreign_processors", "processors"]

Run = Callable[..., Any]
POSITIONS = ("rotary", "rope", "indices")  # what an argument is called that is the same for every sample
# What may have a row for each frame of each sample; anything else with more rows than samples is not understood.
OF_FRAMES = (
    "encoder_hidden_states",
    "added_cond_kwargs",
    "down_block_additional_residuals",
    "mid_block_additional_residual",
)
UNEXPECTED = "the call was not the second half of guidance that was expected"
CHANGED = "the model changed between the halves of guidance"
UNPAIRED = "it is not known what the other half will be: both do not get the same latents, or there is no guidance"


class Guidance:
    """The calls of one denoiser, split over two ranks.

    Args:
        ranks: The two.
        count: Told the reason of every call that both run whole.
    """

    def __init__(self, ranks: Ranks, count: Callable[[str], None]) -> None:
        self._ranks, self._count = ranks, count
        self._pairs = _Pairs()
        self._unpaired = 0  # calls in a row; of a clip's first step, two are
        self._parts: dict[str, tuple[list[Any], Any]] = {}  # by name: an argument of the call before, and the own half

    def call(self, run: Run, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``run(*args, **kwargs)``, a call of ``model``, of which this rank does its half."""
        call = _Call.of(model, args, kwargs)
        if reason := _whole_reason(model) or call.cache_reason():
            return self._whole(run, call, reason)
        if call.batch % self._ranks.size:
            return self._pair(run, call)
        if reason := call.split_reason() or _mixing_reason(model):
            return self._whole(run, call, reason)
        return self._gathered(call.with_given(self._own(call)).run(run))

    def model_changed(self) -> None:
        """What the second call of a pair would have returned, it may return no more."""
        if self._pairs.drop():
            self._count(CHANGED)

    def _own(self, call: _Call) -> dict[str, Any]:
        """The arguments for this rank's samples; what has one row, or none, is for all.

        Of what is the same as in the call before (the text), so is the half: blocks know it again.
        """
        batch = call.batch

        def half(x: Tensor) -> Tensor:
            return self._ranks.part(x, 0) if x.ndim and len(x) % batch == 0 else x

        own: dict[str, Any] = {}
        for name, value in call.given.items():
            before = self._parts.get(name)
            if before is not None and _same(before[0], value):
                own[name] = before[1]
            else:
                own[name] = value if is_whole(name) else tree_map_only(Tensor, half, value)
        self._parts = {name: (_kept(value), own[name]) for name, value in call.given.items()}
        return own

    def _whole(self, run: Run, call: _Call, reason: str) -> Any:
        self._count(reason)
        return call.run(run)

    def _gathered(self, out: Any) -> Any:
        """The samples of both ranks."""
        return tree_map_only(Tensor, lambda x: self._ranks.gather(x, 0, len(x) * self._ranks.size), out)

    def _pair(self, run: Run, call: _Call) -> Any:
        """The result of ``call``, with that of the call behind it if it is known what that will be."""
        found, out = self._pairs.take(call)
        if found:
            return out
        if self._pairs.missed:
            self._count(UNEXPECTED)
        second = self._pairs.behind(call)
        if second is None:
            self._unpaired += 1
            if self._unpaired > 2:
                self._count(UNPAIRED)
            self._pairs.learn(call)
            return call.run(run)
        self._unpaired = 0
        out = self._gathered((call, second)[self._ranks.rank].run(run))
        outs = [tree_map_only(Tensor, partial(_half, rank), out) for rank in range(2)]
        self._pairs.keep(second, outs[1])
        return outs[0]


def is_whole(name: str) -> bool:
    """Whether an argument is a table of positions."""
    return any(word in name for word in POSITIONS)


def processors(model: nn.Module) -> Iterator[Any]:
    """Those of a model's attentions; one that is a module lies among the children."""
    for layer in model.modules():
        processor = vars(layer).get("processor") or layer._modules.get("processor")
        if processor is not None:
            yield processor


def foreign_processors(model: nn.Module) -> Iterator[Any]:
    """Those that are neither ours nor diffusers'."""
    return (x for x in processors(model) if type(x).__module__.partition(".")[0] not in ("diffusers", "vidaccel"))


def _mixing_reason(model: nn.Module) -> str | None:
    """Why the samples of a batch cannot be apart, or None: those of PAG, and who knows which, read several of them."""
    perturbed = (x for x in processors(model) if type(x).__name__.startswith("PAG"))
    for processor in (*perturbed, *foreign_processors(model)):
        return f"a {type(processor).__name__} may look at both halves of guidance"
    return None


def _half(number: int, x: Tensor) -> Tensor:
    return x.chunk(2)[number]


class _Call(NamedTuple):
    """The arguments of a call, as they were given."""

    names: tuple[str, ...]  # of those given by position
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        return cls(tuple(names[: len(args)]), args, kwargs)

    @property
    def given(self) -> dict[str, Any]:
        return {**dict(zip(self.names, self.args, strict=True)), **self.kwargs}

    @property
    def batch(self) -> int:
        """How many samples there are: the first argument, or the first tensor, has them first."""
        first = next((x for x in self.given.values() if isinstance(x, Tensor) and x.ndim), None)
        return 1 if first is None else len(first)

    def run(self, run: Run) -> Any:
        return run(*self.args, **self.kwargs)

    def with_given(self, given: dict[str, Any]) -> _Call:
        return _Call(self.names, tuple(given[name] for name in self.names), {name: given[name] for name in self.kwargs})

    def cache_reason(self) -> str | None:
        """Why no other rank can run the call, or None: what it writes to a cache (AnyFlow FAR's), later calls read."""
        for name, value in self.given.items():
            if "cache" in name and any(isinstance(x, Tensor) for x in tree_flatten(value)[0]):
                return f"{name} is to have what the call leaves to later ones"
        return None

    def split_reason(self) -> str | None:
        """Why the samples of a batch cannot be told apart, or None."""
        batch = self.batch
        for name, value in self.given.items():
            for x in tree_flatten(value)[0]:
                if not isinstance(x, Tensor) or is_whole(name) or x.ndim == 0 or len(x) in (1, batch):
                    continue
                if name not in OF_FRAMES or len(x) % batch:
                    return f"{name} has {len(x)} rows, where the batch has {batch}"
        return None


class _Kept(NamedTuple):
    """A tensor and how often it had been written to."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, x: Any) -> Any:
        return cls(x, x._version) if isinstance(x, Tensor) and not x.is_inference() else x

    def is_still(self, other: Any) -> bool:
        return other is self.tensor and other._version == self.version


def _kept(value: Any) -> list[Any]:
    """The leaves of an argument, to be compared with those of a later call."""
    leaves, structure = tree_flatten(value)
    return [structure, *map(_Kept.of, leaves)]


def _same(kept: list[Any], value: Any) -> bool:
    """Whether ``value`` is what was kept: the very same tensors, unchanged since."""
    leaves, structure = tree_flatten(value)
    if len(kept) != len(leaves) + 1 or structure != kept[0]:
        return False
    return all(map(_same_leaf, kept[1:], leaves))


def _same_leaf(old: Any, new: Any) -> bool:
    if isinstance(old, _Kept):
        return old.is_still(new)
    # an inference tensor does not tell when it is written to
    return type(old) is type(new) and not isinstance(old, Tensor) and bool(old == new)


class _Pairs:
    """What one call tells of the one behind it.

    Attributes:
        missed: Whether the call last asked for was to be another one.
    """

    def __init__(self) -> None:
        self.missed = False
        self._before: dict[str, list[Any]] | None = None  # the arguments of the call before
        self._first: dict[str, list[Any]] | None = None  # those in which the first of a pair differs from the second
        self._second: dict[str, Any] = {}  # the same of the second
        self._second_kept: dict[str, list[Any]] = {}
        self._ready: tuple[dict[str, list[Any]], Any] | None = None

    def take(self, call: _Call) -> tuple[bool, Any]:
        """Whether the result of ``call`` is there already, and the result."""
        ready, self._ready = self._ready, None
        self.missed = ready is not None and not _all_same(ready[0], call.given)
        if ready is None or self.missed:
            return False, None
        return True, ready[1]

    def drop(self) -> bool:
        """Let the call behind be run when it comes; whether its result was there already."""
        ready, self._ready = self._ready, None
        return ready is not None

    def behind(self, call: _Call) -> _Call | None:
        """The call that comes behind ``call``, if it is the first of a pair."""
        given = call.given
        first = self._first
        if first is None or not all(name in given and _same(kept, given[name]) for name, kept in first.items()):
            return None
        if not _all_same(self._second_kept, self._second):
            return None  # somebody has written to them
        return call.with_given({**given, **self._second})

    def learn(self, call: _Call) -> None:
        """Compare ``call`` with the one before it, which may be the first of a pair."""
        given = call.given
        before, self._before = self._before, {name: _kept(value) for name, value in given.items()}
        if before is None or before.keys() != given.keys():
            return
        other = [name for name in given if not _same(before[name], given[name])]
        first_name = next(iter(given))
        if other and first_name not in other:  # the same latents
            self._first = {name: before[name] for name in other}
            self._second = {name: given[name] for name in other}
            self._second_kept = {name: self._before[name] for name in other}
            self._before = None

    def keep(self, call: _Call, out: Any) -> None:
        self._ready = {name: _kept(value) for name, value in call.given.items()}, out


def _all_same(kept: dict[str, list[Any]], given: dict[str, Any]) -> bool:
    return kept.keys() == given.keys() and all(_same(kept[name], value) for name, value in given.items())


def _whole_reason(model: nn.Module) -> str | None:
    if torch.is_grad_enabled():
        return "gradients are enabled (call it under torch.no_grad)"
    if getattr(model, "is_cache_enabled", False):
        return "a step cache is on, which looks at all samples of a step, one call after the other"
    return None
