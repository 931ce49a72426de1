"""A clip whose frames lie on several ranks: what mixes frames gets what it needs of the others.

Each rank runs the UNet, and its ControlNet, on a stretch of the clip's frames. Most layers look at one frame at a time,
and need not know.

* Attention over frames: an all-to-all gives each rank all frames of its share of the pixels, and another one takes the
  result back (:func:`by_pixels`).
* A convolution over frames: a frame from the rank before, and one from the rank behind, while the own ones are
  convolved (:func:`convolve_frames`). What they add to the first and the last frame is a product of its own.
* A norm over frames: each rank's statistics are gathered (:func:`statistics_of_clip`).

Whatever of these has no fused block, or one that does not serve the call, runs on the whole clip: it is gathered
before, and each rank takes its frames of the result (:func:`whole_clip`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar

import torch
from diffusers.models.attention import TemporalBasicTransformerBlock
from diffusers.models.resnet import TemporalConvLayer, TemporalResnetBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel, TransformerTemporalModel
from diffusers.models.unets.unet_i2vgen_xl import I2VGenXLTransformerTemporalEncoder
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from vidaccel.kernels.norm.channel_statistics import ChannelStatistics
from vidaccel.kernels.norm.frame_statistics import frame_statistics
from vidaccel.parallel.layout import Frames as FramesOverRanks
from vidaccel.parallel.layout import frames, spread
from vidaccel.parallel.ranks import Ranks, shares
from vidaccel.sites.block import FusedBlock
from vidaccel.sites.plain import stock_class

__all__ = ["RESIDUALS", "ROWS", "Frames", "by_pixels", "convolve_frames", "statistics_of_clip", "whole_clip"]

ROWS = "rows"  # dimension 0 has the frames of all samples, [B*F, ...]
Where = int | str
RESIDUALS = {"down_block_additional_residuals": ROWS, "mid_block_additional_residual": ROWS}  # a ControlNet's
TEXT = "encoder_hidden_states"

# What mixes frames, and where its arguments have them; the result has them where the first one does. A fused block of
# one of these runs the original through whole_clip.
MIXERS: dict[type[nn.Module], Mapping[str, Where]] = {
    TemporalResnetBlock: {"input_tensor": 2, "temb": 1},
    TemporalConvLayer: {"hidden_states": ROWS},
    TemporalBasicTransformerBlock: {"hidden_states": ROWS},
    TransformerSpatioTemporalModel: {
        "hidden_states": ROWS,
        "encoder_hidden_states": ROWS,
        "image_only_indicator": 1,
    },
    TransformerTemporalModel: {"hidden_states": ROWS},
    AnimateDiffTransformer3D: {"hidden_states": ROWS},
    I2VGenXLTransformerTemporalEncoder: {"hidden_states": 1},
    nn.GroupNorm: {"input": 2},  # of a clip, within one of these
}
_KINDS = tuple(kind for kind in MIXERS if kind is not nn.GroupNorm)


def by_pixels(run: Callable[[Tensor, int], Tensor], rows: Tensor, num_frames: int) -> Tensor:
    """``run(rows, num_frames)`` for what mixes the frames of a pixel, and nothing else, of rows ``[B*F, HW, C]``."""
    over = frames()
    if over is None:
        return run(rows, num_frames)
    x = over.ranks.swap(rows.unflatten(0, (-1, num_frames)), split=2, join=1, total=over.total)
    with spread(None):
        out = run(x.flatten(0, 1), over.total)
    out = out.unflatten(0, (-1, over.total))
    return over.ranks.swap(out, split=1, join=2, total=rows.shape[1]).flatten(0, 1)


def convolve_frames(conv: Any, convolve: Callable[[Tensor], Tensor], clip: Tensor) -> Tensor:
    """``convolve(clip)`` of the whole clip ``[B, C, F, H, W]``, with the weight of ``conv``, of three frames."""
    over = frames()
    if over is None:
        return convolve(clip)
    first, last = (clip.select(2, at).flatten(2).mT for at in (0, -1))  # [B, HW, C]
    arrived = over.ranks.exchange(first, last)
    out = convolve(clip)
    for at, tap, frame in zip((0, -1), (0, 2), arrived(), strict=True):
        if frame is not None:
            edge = out.select(2, at).view(len(out), out.shape[1], -1).mT
            edge.baddbmm_(frame, conv.weight[:, :, tap, 0, 0].T.expand(len(out), -1, -1))
    return out


def statistics_of_clip(clip: Tensor, shift: Tensor | None = None) -> ChannelStatistics | None:
    """Those of ``clip + shift`` on all ranks together, or None where the clip ``[B, C, F, H, W]`` is whole.

    ``shift`` is ``[B, F or 1, C]``.
    """
    over = frames() if clip.ndim == 5 else None
    if over is None:
        return None
    shift = None if shift is None else shift.expand(-1, clip.shape[2], -1)
    found = frame_statistics(clip, shift=shift, most_frames=shares(over.total, over.ranks.size)[0])
    parts = over.ranks.gather(found.parts.unflatten(0, (len(clip), -1)), 1, over.total)
    return found._replace(parts=parts.flatten(0, 1))


def whole_clip(stock: Any, host: Any, *args: Any, **kwargs: Any) -> Any:
    """``stock.forward(host, ...)``, one of :data:`MIXERS`, on the frames of all ranks; of the result, those of this."""
    over = frames()
    if over is None:
        return stock.forward(host, *args, **kwargs)
    where = next(where for kind, where in MIXERS.items() if issubclass(stock, kind))
    given = _signature(stock).bind(host, *args, **kwargs).arguments
    for name, at in where.items():
        if given.get(name) is not None:
            given[name] = _gathered(over, given[name], at)
    if "num_frames" in given:
        given["num_frames"] = over.total
    with spread(None):
        out = stock.forward(**given)
    return tree_map_only(Tensor, partial(_own, over, at=next(iter(where.values()))), out)


@cache
def _signature(stock: Any) -> inspect.Signature:
    return inspect.signature(stock.forward)


def _gathered(over: FramesOverRanks, x: Tensor, at: Where) -> Tensor:
    if isinstance(at, str):
        return _in_memory_order(
            x, lambda rows: over.ranks.gather(rows.unflatten(0, (-1, over.count)), 1, over.total).flatten(0, 1)
        )
    return over.ranks.gather(x, at, over.total)


def _own(over: FramesOverRanks, x: Tensor, at: Where) -> Tensor:
    if isinstance(at, str):
        return _in_memory_order(x, lambda rows: over.ranks.part(rows.unflatten(0, (-1, over.total)), 1).flatten(0, 1))
    return over.ranks.part(x, at)


def _in_memory_order(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """``change(x)`` of rows, with the channels last in memory if those of ``x`` are."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return change(x.movedim(1, -1)).movedim(-1, 1)
    return change(x)


@dataclass(frozen=True)
class Frames:
    """How the clip of a UNet, or of its ControlNet, is spread over ranks; ``SPREAD`` of a family's adapter.

    Attributes:
        dim: Where the result has frames.
        where: The arguments that have frames, or one for all, and where. A text with :data:`ROWS` may also have a row
            per sample. A ``sample`` with :data:`ROWS` is pictures, which have nothing to do with one another.
        first: Modules, children of the UNet, that look at the clip's first frame alone.
    """

    axis: ClassVar = "frames"
    dim: Where
    where: Mapping[str, Where]
    first: tuple[str, ...] = ()

    def reason(self, model: Any, size: int) -> str | None:
        """Why no call of ``model`` can be spread over ``size`` ranks: there is no such reason."""
        return None

    def way(self, ranks: Ranks, count: Callable[[str], None]) -> _FramesWay:
        return _FramesWay(self, ranks, count)


class _FramesWay:
    """The calls of one model, its frames split over ranks."""

    def __init__(self, frames: Frames, ranks: Ranks, count: Callable[[str], None]) -> None:
        self._frames, self._ranks, self._count = frames, ranks, count
        self._text: tuple[Tensor, Any, Tensor] | None = None

    def call(
        self, run: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:  # fmt: skip
        """``run(*args, **kwargs)``, a call of ``model``, of which this rank does its frames."""
        for part in (model, *getattr(model, "nets", ())):  # several ControlNets are one model
            kind: Any = stock_class(part)
            if kind.forward.__module__.partition(".")[0] != "diffusers":
                self._count(f"{kind.__name__} has a forward of its own, which may mix frames")
                return run(*args, **kwargs)
        kind = stock_class(model)
        given: dict[str, Any] = dict(_signature(kind).bind(model, *args, **kwargs).arguments)
        del given[next(iter(given))]  # self
        at, clip = self._frames.where["sample"], given["sample"]
        batch, total = (1, len(clip)) if isinstance(at, str) else (len(clip), clip.shape[at])
        firsts = [getattr(model, name) for name in self._frames.first]
        parts = list(model.modules())
        mixers = [part for part in parts if isinstance(part, _KINDS)]
        reason = self._whole_reason(model, total, [*firsts, *mixers]) or self._frames_reason(given, batch, total)
        if reason := reason or _compiled_reason(parts[1:]):
            self._count(reason)
            return run(*args, **kwargs)
        over = FramesOverRanks(self._ranks, total)
        for name, at in self._frames.where.items():
            cut = self._cut_text if name == TEXT else self._cut
            if name in given:
                given[name] = tree_map_only(Tensor, partial(cut, over, batch, at), given[name])
        classes = {part: _whole_class(stock_class(part)) for part in mixers if not isinstance(part, FusedBlock)}
        classes |= {part: _first_frame_class(stock_class(part)) for part in firsts}
        with spread(over), _of_class(classes):
            out = run(**given)
        return tree_map_only(Tensor, partial(_gathered, over, at=self._frames.dim), out)

    def _whole_reason(self, model: nn.Module, total: int, parts: list[nn.Module]) -> str | None:
        if torch.is_grad_enabled():
            return "gradients are enabled (call it under torch.no_grad)"
        if getattr(model, "is_cache_enabled", False):
            return "a step cache is on, which decides by what it sees of the clip"
        if total < self._ranks.size:
            return f"the clip has fewer frames ({total}) than there are ranks ({self._ranks.size})"
        replaced = next((part for part in parts if "forward" in vars(part)), None)
        if replaced is not None:
            return f"a hook replaced the forward of a {stock_class(replaced).__name__}, which mixes frames"
        return None

    def _frames_reason(self, given: Mapping[str, Any], batch: int, total: int) -> str | None:
        """What has another number of frames: the original raises, where a rank's share may happen to fit."""
        for name, at in self._frames.where.items():
            dim, most = _along(at, batch, total)
            allowed = {1, batch, most} if name == TEXT else {1, most}
            for x in tree_leaves(given.get(name)):
                if isinstance(x, Tensor) and x.ndim and x.shape[dim] not in allowed:
                    return f"{name} has {x.shape[dim]} frames, where the clip has {most}"
        return None

    def _cut(self, over: FramesOverRanks, batch: int, at: Where, x: Tensor) -> Tensor:
        dim, most = _along(at, batch, over.total)
        return _own(over, x, at) if x.ndim and x.shape[dim] == most else x

    def _cut_text(self, over: FramesOverRanks, batch: int, at: Where, x: Tensor) -> Tensor:
        """The same object at every step of a clip: so what is known of it (``text_context.py``) stands."""
        if x.is_inference():
            return self._cut(over, batch, at, x)
        stamp = x.data_ptr(), x._version, x.shape, x.stride(), x.dtype, over.total
        if self._text is None or self._text[1] != stamp:
            self._text = x, stamp, self._cut(over, batch, at, x)  # x, so that its address is nobody else's
        return self._text[2]


def _along(at: Where, batch: int, total: int) -> tuple[int, int]:
    """The dimension that has frames, and how long it is."""
    return (0, batch * total) if isinstance(at, str) else (at, total)


def _compiled_reason(parts: list[nn.Module]) -> str | None:
    for part in parts:
        if part._compiled_call_impl is not None or "_orig_mod" in part._modules:
            return f"a {stock_class(part).__name__} is compiled, and would not see the frames of other ranks"
    return None


@contextmanager
def _of_class(classes: Mapping[nn.Module, type[nn.Module]]) -> Iterator[None]:
    """Modules of other classes inside the ``with`` block: nothing else can let a stock block see the whole clip."""
    before = {part: type(part) for part in classes}
    try:
        for part, kind in classes.items():
            part.__class__ = kind
        yield
    finally:
        for part, kind in before.items():
            part.__class__ = kind


@cache
def _whole_class(kind: Any) -> type[nn.Module]:
    """``kind``, which mixes frames, on the whole clip."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return whole_clip(kind, self, *args, **kwargs)

    return _subclass(kind, forward)


@cache
def _first_frame_class(kind: Any) -> type[nn.Module]:
    """``kind``, which is called with the first frame of what it takes for the clip, with that of the first rank."""

    def forward(self: Any, x: Tensor) -> Any:
        over = frames()
        if over is not None:
            x = over.ranks.gather(x[None], 0, over.ranks.size)[0]
        return kind.forward(self, x)

    return _subclass(kind, forward)


def _subclass(kind: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    """It passes for ``kind``, which it is again after the call."""
    return type(kind.__name__, (kind,), {"forward": forward, "original": kind, "__module__": kind.__module__})
