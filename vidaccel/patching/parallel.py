"""One clip on several GPUs: which axis the ranks of a process group split, and what each call of a model does for it.

The ranks form a mesh of one or two axes: halves of guidance, and frames (UNets) or tokens (transformers). Each axis is
a site of the report. The decodes of a VAE are split over all ranks, whatever the axes are. Before a call, the hosts of
all ranks compare what they are about to do: arguments of the same kind, and the same sites failed; what failed on one,
all switch off.
"""

from __future__ import annotations

import hashlib
import inspect
import struct
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal, Protocol, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from vidaccel.errors import UsageError, nearest
from vidaccel.parallel.decode import UNLIKE, Decode
from vidaccel.parallel.guidance import Guidance, foreign_processors
from vidaccel.parallel.ranks import Agreement, RankError, Ranks, axes_of, join
from vidaccel.patching.families import spread_for
from vidaccel.sites.memo import generation
from vidaccel.sites.plain import hooks_on_all
from vidaccel.sites.rules import patches_of
from vidaccel.sites.site import Site

__all__ = ["Parallel", "ParallelCall", "check_alike", "is_looked_at", "parallel_calls"]

Parallel = Literal["auto", "guidance", "frames", "sequence"]
Run = Callable[..., Any]
MOST_KINDS = 256
LOOKED_AT = {
    axis: f"a hook, or a processor of somebody's own, may look at all {what}"
    for axis, what in (("frames", "frames"), ("sequence", "tokens"), ("decode", "pixels"))
}
PLAIN = (bool, int, float, str, type(None), torch.dtype)


class AxisSite(Site):
    """One axis that the calls of a model are split along.

    Attributes:
        ranks: Along it.
    """

    def __init__(self, path: str, op: str, ranks: Ranks) -> None:
        super().__init__(path, op, "math-exact")
        self.ranks = ranks


class Way(Protocol):
    """What one axis does with a call: ``run`` it with this rank's part of the arguments, and join the results."""

    def call(self, run: Run, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


class ParallelCall:
    """The calls of one model on all ranks.

    Attributes:
        sites: One for each axis, which is passed over while its site is off.
        agreement: Of all ranks.
    """

    def __init__(self, agreement: Agreement) -> None:
        self.sites: list[AxisSite] = []
        self._ways: list[Way] = []
        self.agreement = agreement
        self._kinds: set[int] = set()
        self._failed = self._switched = 0
        self._alike = True
        self._generation = -1

    def add(self, site: AxisSite, way: Way) -> None:
        site.put_in_place(lambda: None)
        self.sites.append(site)
        self._ways.append(way)

    def call(self, run: Run, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], looked_at: bool) -> Any:
        """``run(*args, **kwargs)``, a call of ``model``, split along every axis.

        ``looked_at``: whether somebody's code may look at what is inside the model here, and expects all of it.
        """
        looked_at = self._agree(model, args, kwargs, looked_at)
        for site, way in zip(reversed(self.sites), reversed(self._ways), strict=True):
            if site.on and looked_at and site.op in LOOKED_AT:
                site.fallbacks[LOOKED_AT[site.op]] += 1
            elif site.on and not self._alike:
                site.fallbacks[UNLIKE] += 1
            elif site.on:
                site.implementations.add(f"{site.ranks.size} ranks")
                run = partial(_by, way, run, model)
        return run(*args, **kwargs)

    def model_changed(self) -> None:
        """The model is not what it was in the call before."""
        for way in self._ways:
            if isinstance(way, Guidance):
                way.model_changed()

    def taken_away(self) -> None:
        for site in self.sites:
            site.taken_away()

    def _agree(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], looked_at: bool) -> bool:
        """Whether the model is looked at on any rank."""
        leaves = tree_flatten((args, kwargs))[0]
        settings = torch.is_grad_enabled(), getattr(model, "is_cache_enabled", False), [site.on for site in self.sites]
        kind = _digest((settings, list(map(_described, leaves))))
        values = 0 if kind in self._kinds else _checksum(leaves)  # once: it waits for the GPU
        if self._generation != generation():
            self._generation = generation()
            sites = _sites(model)
            self._failed = _digest(sorted((site.path, site.op) for site in sites if site.state == "failed"))
            self._switched = _digest(sorted((site.path, site.op, site.on) for site in sites))
        facts = self.agreement.all([kind, values, self._failed, self._switched, looked_at])
        kinds, sums, failures, switched, looked = (set(column) for column in zip(*facts, strict=True))
        name = type(model).__name__
        if len(kinds) > 1:
            raise RankError(f"parallel: the ranks call {name} with arguments of different shapes or settings")
        if len(sums) > 1:
            raise RankError(
                f"parallel: the ranks call {name} with different values; give all the same seed, and call "
                "torch.manual_seed where a part draws without a generator"
            )
        self._alike = len(switched) == 1
        if not self._alike and any(site.op != "decode" for site in self.sites):
            # an original forward waits for other things than a fused one
            raise RankError(f"parallel: the ranks call {name} with other sites switched on; switch them alike on all")
        # only now: what was not the same is compared again
        self._kinds = {*self._kinds, kind} if len(self._kinds) < MOST_KINDS else {kind}
        if len(failures) > 1:
            self._fail_alike(model)
        return any(looked)

    def _fail_alike(self, model: nn.Module) -> None:
        mine = {(site.path, site.op): site.reason for site in _sites(model) if site.state == "failed"}
        for rank, theirs in enumerate(self.agreement.objects(mine)):
            for site in _sites(model):
                if (site.path, site.op) in theirs and site.state != "failed":
                    site.fail(f"it failed on rank {rank}: {theirs[site.path, site.op]}")
        self._generation = -1


def parallel_calls(
    pipe: Any, mode: Parallel, models: Mapping[str, nn.Module], vaes: Iterable[str]
) -> dict[str, ParallelCall]:
    """How the calls of each denoiser in ``models``, and the decodes of ``vaes``, are split over all ranks, by name.

    Raises:
        UsageError: There is no process group; the mode is unknown, or neither the model nor the number of ranks
            allows it.
    """
    if mode not in get_args(Parallel):
        raise UsageError(f"parallel={mode!r} is no way to split a clip{nearest(str(mode), get_args(Parallel))}")
    if not models:
        raise UsageError("parallel: there is no denoiser whose calls could be split")
    join(next(next(iter(models.values())).parameters()).device)
    axes = _axes(pipe, mode, models)
    _check_sizes(axes, models)
    agreement = Agreement()
    check_alike(agreement, axes)  # groups of other ranks would wait for one another
    ranks = dict(zip(axes, axes_of(list(axes.values())), strict=True))
    calls = {}
    for name, model in models.items():
        calls[name] = call = ParallelCall(agreement)
        for axis, along in ranks.items():
            site = AxisSite(name, axis, along)
            call.add(site, _way(site, model))
    world = Ranks(next(iter(ranks.values())).group) if len(ranks) == 1 else axes_of([agreement.size])[0]
    for name in vaes:
        calls[name] = call = ParallelCall(agreement)
        site = AxisSite(name, "decode", world)
        call.add(site, Decode(world, agreement, partial(_count, site)))
    return calls


def check_alike(agreement: Agreement, chosen: Any) -> None:
    """Raise on all ranks if what is to be patched, or how clips are split, is not the same on each."""
    if len({digest for (digest,) in agreement.all([_digest(chosen)])}) > 1:
        raise RankError("parallel: the ranks patch with other options, or other models; give all the same")


def _axes(pipe: Any, mode: Parallel, models: Mapping[str, nn.Module]) -> dict[str, int]:
    """The size of each axis, the one whose neighbours talk most last."""
    world = dist.get_world_size()
    if world < 2:
        raise UsageError("parallel: there is one rank; start with torchrun --nproc-per-node 2, or leave parallel out")
    spread = _spread(mode, models)
    if mode == "guidance" and world != 2:
        raise UsageError(f'parallel="guidance" has two halves, and there are {world} ranks; parallel="auto" uses all')
    if mode == "guidance" or (mode == "auto" and world == 2 and is_guided(pipe)):
        return {"guidance": 2}
    if isinstance(spread, UsageError):
        raise spread
    if mode == "auto" and world % 2 == 0 and is_guided(pipe):
        return {"guidance": 2, spread: world // 2}
    return {spread: world}


def _spread(mode: Parallel, models: Mapping[str, nn.Module]) -> str | UsageError:
    """What of these models can be spread over ranks, or why nothing can."""
    kinds = {}
    for name, model in models.items():
        spread = spread_for(model)
        if spread is None:
            return UsageError(f'parallel: {type(model).__name__} can be split by parallel="guidance" alone, on 2 ranks')
        kinds[name] = spread.axis
    axis = next(iter(kinds.values()))
    if mode in ("frames", "sequence") and mode != axis:
        return UsageError(f'parallel="{mode}" does not fit {type(model).__name__}; parallel="{axis}" does')
    return axis


def _check_sizes(axes: Mapping[str, int], models: Mapping[str, nn.Module]) -> None:
    for name, model in models.items():
        spread = spread_for(model)
        size = axes.get(spread.axis) if spread else None
        if size and (reason := spread.reason(model, size)):
            raise UsageError(f"parallel: {name}: {reason}; another number of ranks may do")


def is_guided(pipe: Any) -> bool:
    """Whether a pipeline asks its denoiser twice a step, with the text and without, unless told otherwise."""
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if getattr(getattr(denoiser, "config", None), "guidance_embeds", False):
        return False  # distilled: the scale is an input of the model
    if getattr(pipe, "guider", None) is not None:
        return bool(pipe.guider.num_conditions > 1)
    parameters = inspect.signature(type(pipe).__call__).parameters
    scales = [parameters[name].default for name in ("guidance_scale", "max_guidance_scale") if name in parameters]
    return any(isinstance(scale, int | float) and scale > 1 for scale in scales)


def _way(site: AxisSite, model: nn.Module) -> Way:
    count = partial(_count, site)
    if site.op == "guidance":
        return Guidance(site.ranks, count)
    way: Way = spread_for(model).way(site.ranks, count)
    return way


def _count(site: Site, reason: str) -> None:
    site.fallbacks[reason] += 1


def _by(way: Way, run: Run, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return way.call(run, model, args, kwargs)


def is_looked_at(model: nn.Module) -> bool:
    """Whether a layer has a hook, or a processor that is neither ours nor diffusers'."""
    if hooks_on_all():
        return True
    layers = list(model.modules())[1:]
    if any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers):
        return True
    return next(foreign_processors(model), None) is not None


def _sites(model: nn.Module) -> list[Site]:
    return [site for module in model.modules() for patch in patches_of(module) for site in patch.sites]


def _described(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), str(leaf.dtype)
    return str(leaf) if isinstance(leaf, PLAIN) else type(leaf).__name__


def _digest(value: Any) -> int:
    """63 bits that are the same in every process, which Python's own hash is not."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "little") >> 1


def _checksum(leaves: list[Any]) -> int:
    total = sum(float(x.double().sum()) for x in leaves if isinstance(x, Tensor) and x.numel())
    return int.from_bytes(struct.pack("d", total), "little") >> 1
