"""One decode of a VAE on several ranks: its tiles, the samples of its batch, or its frames.

How a VAE's ``decode`` cuts latents into tiles, and joins their pixels, is its own business. So it runs twice, on every
rank, both times with a stand-in for its decoder. The first one writes down what the decoder is asked for, and answers
with tensors that have no numbers (``meta``). Calls of which one passes on the cache of the one before belong together,
and are a :class:`_Part`. Each part is decoded on one rank, and sent to all others. The second stand-in hands out what
was decoded, to be joined as ever: so the bits are those of a single decode.

A decode that is one part is split along its frames if the decoder can do that (``layout_for``), or along its batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from vidaccel.errors import first_line
from vidaccel.parallel.layout import spread
from vidaccel.parallel.ranks import Agreement, Ranks

__all__ = ["Decode", "stand_in_of"]

Run = Callable[[], Any]
StandIn = Callable[..., Any]

_stand_in: ContextVar[tuple[nn.Module, StandIn] | None] = ContextVar("stand_in", default=None)


def stand_in_of(model: nn.Module) -> StandIn | None:
    """What is called in place of ``model`` in this thread, or None."""
    found = _stand_in.get()
    return found[1] if found is not None and found[0] is model else None


@contextmanager
def _standing_in(model: nn.Module, stand_in: StandIn) -> Iterator[None]:
    token = _stand_in.set((model, stand_in))
    try:
        yield
    finally:
        _stand_in.reset(token)


class Decode:
    """The decodes of one VAE, split over ranks.

    Args:
        ranks: All that there are.
        agreement: Of the same.
        count: Told the reason of every decode that each rank runs whole.
    """

    def __init__(self, ranks: Ranks, agreement: Agreement, count: Callable[[str], None]) -> None:
        self._ranks, self._agreement, self._count = ranks, agreement, count

    def call(self, run: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``run(*args, **kwargs)``, a decode of ``model``."""
        decode, decoder = partial(run, *args, **kwargs), model.decoder
        if reason := _whole_reason(decoder):
            return self._whole(decode, reason)
        asked = _Asked(model)
        try:
            with _standing_in(decoder, asked):
                decode()
        except Exception as error:  # if an argument is wrong, the decode itself will say so
            return self._whole(decode, f"its tiles are not known beforehand: {first_line(error)}")
        if len(asked.parts) != 1:
            return _joined(decode, decoder, self._parts_apart(decoder, asked.parts))
        (part,) = asked.parts
        if not hasattr(decoder, "layout_for"):
            if reason := part.batch_reason(self._ranks.size):
                return self._whole(decode, reason)
            return _joined(decode, decoder, self._batch_apart(decoder, part.calls[0]))
        first = part.calls[0]
        over = decoder.layout_for(self._ranks, self._agreement, part.frames, *first.args, **first.kwargs)
        if isinstance(over, str):
            return self._whole(decode, over)
        with spread(over):
            return decode()

    def _whole(self, decode: Run, reason: str) -> Any:
        self._count(reason)
        return decode()

    def _parts_apart(self, decoder: nn.Module, parts: Sequence[_Part]) -> list[Tensor]:
        """The pixels of all calls, each part decoded on one rank."""
        owners = _owners([part.size for part in parts], self._ranks.size)
        mine = [at for at, owner in enumerate(owners) if owner == self._ranks.rank]
        made = {at: parts[at].decoded(decoder) for at in mine}
        kinds: dict[int, list[Any]] = {}
        for theirs in self._agreement.objects({at: [(x.shape, x.dtype) for x in made[at]] for at in mine}):
            kinds |= theirs
        pixels: list[Tensor] = []
        for at, (part, owner) in enumerate(zip(parts, owners, strict=True)):
            shapes, (dtype, *_) = zip(*kinds[at], strict=True)
            frames = [shape[2] for shape in shapes]  # of images: rows
            samples, channels, _, *size = shapes[0]
            if at in made:
                pieces = made.pop(at)
                whole = torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0].contiguous()
            else:
                whole = part.calls[0].sample.new_empty(samples, channels, sum(frames), *size, dtype=dtype)
            self._ranks.send(whole, owner)
            pixels += whole.split(frames, dim=2)
        return pixels

    def _batch_apart(self, decoder: nn.Module, call: _Call) -> list[Tensor]:
        """The pixels of a call, each rank having decoded its share of the samples."""
        samples = len(call.sample)

        def own(x: Tensor) -> Tensor:
            return self._ranks.part(x, 0) if x.ndim and len(x) == samples else x

        args, kwargs = tree_map_only(Tensor, own, (call.args, call.kwargs))
        return [self._ranks.gather(_pixels_of(decoder(*args, **kwargs)), 0, samples)]


class _Call:
    """A call of a decoder."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs

    @property
    def sample(self) -> Tensor:
        """The latents."""
        sample: Tensor = next(x for x in (*self.args, *self.kwargs.values()) if isinstance(x, Tensor))
        return sample

    def follows(self, other: _Call) -> bool:
        """Whether it is given what ``other`` has left."""
        cache = self.kwargs.get("feat_cache")
        if cache is not None:
            return cache is other.kwargs.get("feat_cache")
        return self.kwargs.get("conv_cache") is other


class _Part:
    """Calls of a decoder that belong together."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []

    @property
    def size(self) -> int:
        return sum(call.sample.numel() for call in self.calls)

    @property
    def frames(self) -> int:
        """How many latent frames it has, if they are videos."""
        return sum(call.sample.shape[2] for call in self.calls)

    def batch_reason(self, size: int) -> str | None:
        """Why its samples cannot be decoded on so many ranks, or None."""
        if len(self.calls) > 1:
            return "a clip that is decoded piece by piece is not split (enable_tiling() makes tiles, which are)"
        if (samples := len(self.calls[0].sample)) < size:
            return f"a batch of {samples} is not split over {size} ranks (enable_tiling() makes tiles, which are)"
        return None

    def decoded(self, decoder: nn.Module) -> list[Tensor]:
        """The pixels of its calls."""
        pixels, cache = [], None
        for call in self.calls:
            kwargs = call.kwargs
            if isinstance(kwargs.get("conv_cache"), _Call):
                kwargs = {**kwargs, "conv_cache": cache}
            out = decoder(*call.args, **kwargs)
            pixels.append(_pixels_of(out))
            cache = out[1] if isinstance(out, tuple) else None
        return pixels


class _Asked:
    """Stands in for a decoder, and writes down what it is asked for.

    Attributes:
        parts: That.
    """

    def __init__(self, vae: Any) -> None:
        self.parts: list[_Part] = []
        self._with_cache = _returns_cache(vae.decoder)
        self._channels = 3 * (getattr(vae.config, "patch_size", None) or 1) ** 2  # what a patch of pixels divides

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = _Call(args, kwargs)
        if not self.parts or not call.follows(self.parts[-1].calls[-1]):
            self.parts.append(_Part())
        self.parts[-1].calls.append(call)
        sample = call.sample
        # all that is done with pixels is to cut, blend and join them, whatever their size
        pixels = torch.empty(len(sample), self._channels, *sample.shape[2:], device="meta", dtype=sample.dtype)
        return (pixels, call) if self._with_cache else pixels


def _joined(decode: Run, decoder: nn.Module, pixels: list[Tensor]) -> Any:
    """What a decode makes of the pixels that its decoder would have returned, call by call."""
    with_cache = _returns_cache(decoder)
    pixels.reverse()

    def hand_out(*args: Any, **kwargs: Any) -> Any:
        return (pixels.pop(), None) if with_cache else pixels.pop()

    with _standing_in(decoder, hand_out):
        return decode()


def _owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """Which rank decodes each part: the one that has the least to do so far."""
    work, owners = [0] * ranks, []
    for size in sizes:
        owners.append(work.index(min(work)))
        work[owners[-1]] += size
    return owners


def _pixels_of(out: Any) -> Tensor:
    pixels: Tensor = out[0] if isinstance(out, tuple) else out
    return pixels


def _returns_cache(decoder: nn.Module) -> bool:
    return "conv_cache" in inspect.signature(type(decoder).forward).parameters


def _whole_reason(decoder: nn.Module) -> str | None:
    if torch.is_grad_enabled():
        return "gradients are enabled (call it under torch.no_grad)"
    if decoder._forward_hooks or decoder._forward_pre_hooks:
        return "its decoder has forward hooks, which may look at all of its calls"
    if any(getattr(part, "per_channel_scale1", None) is not None for part in decoder.modules()):
        return "its decoder adds noise, which is drawn call by call"
    return None
