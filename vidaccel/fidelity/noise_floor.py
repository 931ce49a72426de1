"""Changes of equal maths: how far two right results are apart on this machine, with this model, in this dtype.

Each control is the unpatched pipeline with one thing done another way that rounds elsewhere and means the same: every
layer's output rounded once more, another attention backend, the two halves of classifier-free guidance in calls of
their own, convolutions in channels-last memory, ``torch.compile``; on a CPU also another number of threads, and
PyTorch's own kernels in place of oneDNN's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from vidaccel.errors import UsageError, nearest
from vidaccel.fidelity.metrics import Likeness
from vidaccel.patching.families import unwrapped
from vidaccel.sites.rules import ChannelsLastWeights

__all__ = ["Control", "EqualMaths", "LeftOut", "controls_for"]

_Change = Callable[[], AbstractContextManager[Any]]
_ROUNDINGS = {torch.float32: 4, torch.float64: 4}  # of one layer's sums
_ON_GPU = {
    "efficient attention": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN attention": SDPBackend.CUDNN_ATTENTION,
    "flash attention": SDPBackend.FLASH_ATTENTION,
    "math attention": SDPBackend.MATH,
}


@dataclass(frozen=True)
class EqualMaths:
    """One change of equal maths; ``applied()`` is a context manager that makes it and undoes it."""

    name: str
    applied: _Change


@dataclass(frozen=True)
class Control:
    """A clip of equal maths beside the reference."""

    control: str
    clip: Likeness
    latents_relative_error: float | None


@dataclass(frozen=True)
class LeftOut:
    """A control that does not apply, or a part of the check that could not run, and why."""

    control: str
    reason: str


def controls_for(
    denoisers: Mapping[str, nn.Module],
    vae: Any,
    device: torch.device,
    *,
    wanted: Sequence[str] | None,
    compile: bool,
) -> list[EqualMaths]:
    """The controls that can be tried on ``device``, or those of them that are ``wanted``.

    Raises:
        UsageError: ``wanted`` names one that there is not.
    """
    models = [*denoisers.values(), *([vae] if isinstance(vae, nn.Module) else [])]
    found = {name: EqualMaths(name, applied) for name, applied in _all(denoisers, models, device, compile)}
    if wanted is None:
        return list(found.values())
    for name in wanted:
        if name not in found:
            raise UsageError(f"controls: there is no {name!r}{nearest(name, found)}")
    return [found[name] for name in wanted]


def _all(
    denoisers: Mapping[str, nn.Module], models: list[nn.Module], device: torch.device, compile: bool
) -> Iterator[tuple[str, _Change]]:
    attention = _attention_on_gpu() if device.type == "cuda" else _attention_on_cpu()
    yield "other roundings", partial(_other_roundings, models)  # all layers; the others change some
    yield next(attention)  # one of each kind first: a floor that takes long is cut short
    yield "channels-last convolutions", partial(_channels_last, models)
    yield "halves of the batch apart", partial(_forwards, denoisers, _halves)
    yield from attention
    if device.type == "cpu":
        threads = 1 if torch.get_num_threads() > 1 else 2
        yield f"{threads} CPU thread{'s' if threads > 1 else ''}", partial(_threads, threads)
        yield "no oneDNN", _without_onednn
    if compile:
        yield "torch.compile", partial(_forwards, denoisers, torch.compile)


def _attention_on_gpu() -> Iterator[tuple[str, _Change]]:
    for name, backend in _ON_GPU.items():
        # where it cannot serve a call, the next of the list does
        order = [backend, *(other for other in _ON_GPU.values() if other is not backend)]
        yield name, partial(sdpa_kernel, order, set_priority=True)


def _attention_on_cpu() -> Iterator[tuple[str, _Change]]:
    yield "math attention", partial(sdpa_kernel, SDPBackend.MATH)


@contextmanager
def _other_roundings(models: list[nn.Module]) -> Iterator[None]:
    """Move what each layer returns by up to half its relative precision, and round again; in float32 by four times it.

    That is as far as two right kernels are apart that keep one rounding less, or add up in another order: in float32,
    where sums are no more precise than results, a long one is off by some roundings.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def rounded_again(layer: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        if not isinstance(out, Tensor) or not out.is_floating_point() or any(out is x for x in args):
            return out
        if out.device not in generators:
            generators[out.device] = torch.Generator(out.device).manual_seed(0)
        noise = torch.rand(out.shape, generator=generators[out.device], device=out.device, dtype=out.dtype)
        return out.addcmul(out, noise.sub_(0.5), value=_ROUNDINGS.get(out.dtype, 1) * torch.finfo(out.dtype).eps)

    with ExitStack() as hooks:
        for model in models:
            for layer in unwrapped(model).modules():
                if not any(True for _ in layer.children()):
                    hooks.callback(layer.register_forward_hook(rounded_again).remove)
        yield


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _without_onednn() -> Iterator[None]:
    flags: Any = torch.backends.mkldnn
    before = flags.enabled
    flags.enabled = False
    try:
        yield
    finally:
        flags.enabled = before


@contextmanager
def _channels_last(models: list[nn.Module]) -> Iterator[None]:
    with ExitStack() as undo:
        for model in map(unwrapped, models):
            rule = ChannelsLastWeights(type(model))
            reordered: list[Any] = []
            undo.callback(rule.undo, model, reordered)
            rule.switch(model, reordered, True)
        yield


@contextmanager
def _forwards(models: Mapping[str, nn.Module], change: Callable[[Any], Any]) -> Iterator[None]:
    """Replace the forwards of ``models`` by what ``change`` makes of them."""
    with ExitStack() as undo:
        for model in models.values():
            own: Any = vars(model)
            if "forward" in own:  # an offload hook's
                undo.callback(own.__setitem__, "forward", own["forward"])
            else:
                undo.callback(own.pop, "forward")
            own["forward"] = change(model.forward)
        yield


def _halves(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` called once for each half of the batch, which the first tensor tells the size of."""

    def by_halves(*args: Any, **kwargs: Any) -> Any:
        first = next((x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim > 2), None)
        if first is None or first.shape[0] % 2:
            return forward(*args, **kwargs)
        sizes = {first.shape[0], *(first.shape[0] * first.shape[dim] for dim in (1, 2))}

        def half(i: int) -> Any:
            def cut(x: Any) -> Any:
                whole = isinstance(x, Tensor) and x.ndim > 0 and x.shape[0] in sizes
                return x.chunk(2)[i] if whole else x

            given, named = tree_map(cut, (args, kwargs))
            return forward(*given, **named)

        parts = half(0), half(1)
        return tree_map(lambda x, y: torch.cat([x, y]) if isinstance(x, Tensor) else x, *parts)

    return by_halves
