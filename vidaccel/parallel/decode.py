"""One decode of a VAE on several ranks: its tiles, the samples of its batch, its rows of pixels, or its frames.

How a VAE's ``decode`` cuts latents into tiles, and joins their pixels, is its own business. So it runs twice, on every
rank, both times with a stand-in for its decoder. The first one hears what the decoder is asked for, and answers with
tensors that have no numbers (``meta``). Calls of which one passes on the cache of the one before belong together, and
are a :class:`_Part`. Each part is decoded on one rank; while its GPU does that, the host goes on. Then all parts are
sent to all ranks. The second stand-in hands them out, to be joined as ever: so the bits are those of a single decode.

A decode that is one part is split along its rows of pixels or its frames if the decoder can do that (``layout_for``),
or along its batch. Where ranks would not split a decode alike, each does all of it.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from vidaccel.errors import first_line
from vidaccel.parallel.layout import LatentFrames, PixelRows, spread
from vidaccel.parallel.ranks import Agreement, Ranks

__all__ = ["Decode", "stand_in_of"]

OURS = ("torch", "diffusers", "vidaccel")

Run = Callable[[], Any]
StandIn = Callable[..., Any]

_stand_in: ContextVar[tuple[nn.Module, StandIn | None] | None] = ContextVar("stand_in", default=None)


def stand_in_of(model: nn.Module) -> StandIn | None:
    """What is called in place of ``model`` in this thread, or None."""
    found = _stand_in.get()
    return found[1] if found is not None and found[0] is model else None


@contextmanager
def _standing_in(model: nn.Module, stand_in: StandIn | None) -> Iterator[None]:
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
        asked = _Asked(model, self._ranks)
        over = self._layout(decode, decoder, asked)
        plan = "" if isinstance(over, str) else f"{type(over).__name__} {asked.shapes}"
        plans = self._agreement.all([zlib.crc32(plan.encode())])
        if any(other != plans[0] for other in plans):  # each rank would wait for what the others never send
            over = "the ranks would split it in different ways: their latents, tiling, slicing or layers differ"
        if isinstance(over, str):
            self._count(over)
            return decode()
        if over is not None:
            with spread(over):
                return decode()
        if len(asked.parts) > 1:
            return _joined(decode, decoder, self._sent(asked))
        return _joined(decode, decoder, self._batch_apart(decoder, asked.parts[0].calls[0]))

    def _layout(self, decode: Run, decoder: Any, asked: _Asked) -> LatentFrames | PixelRows | str | None:
        """How the only part of a decode lies over the ranks, or why each decodes all of it.

        None: the parts, or the samples of a batch, are decoded apart. ``asked`` hears what the decoder is asked for.
        """
        if reason := _whole_reason(decoder):
            return reason
        try:
            with _standing_in(decoder, asked):
                decode()
        except Exception as error:
            if asked.decoding:
                raise
            # if an argument is wrong, the decode itself will say so
            return f"its tiles are not known beforehand: {first_line(error)}"
        if not asked.parts:
            return "its decode does not call its decoder"
        if len(asked.parts) > 1:
            return None
        (part,) = asked.parts
        if not hasattr(decoder, "layout_for"):
            return part.batch_reason(self._ranks.size)
        first = part.calls[0]
        over: LatentFrames | PixelRows | str = _foreign_reason(decoder) or decoder.layout_for(
            self._ranks, self._agreement, part.frames, *first.args, **first.kwargs
        )
        return over

    def _sent(self, asked: _Asked) -> list[Tensor]:
        """The pixels of all calls, each part of which one rank has decoded."""
        asked.decode_last()
        mine = {at: [(x.shape, x.dtype) for x in part.pixels] for at, part in enumerate(asked.parts) if part.pixels}
        kinds: dict[int, list[Any]] = {}
        for theirs in self._agreement.objects(mine):
            kinds |= theirs
        pixels: list[Tensor] = []
        for at, part in enumerate(asked.parts):
            shapes, (dtype, *_) = zip(*kinds[at], strict=True)
            frames = [shape[2] for shape in shapes]  # of images: rows
            samples, channels, _, *size = shapes[0]
            if part.pixels:
                whole = torch.cat(part.pixels, dim=2) if len(frames) > 1 else part.pixels[0].contiguous()
                part.pixels = []
            else:
                whole = part.calls[0].sample.new_empty(samples, channels, sum(frames), *size, dtype=dtype)
            self._ranks.send(whole, part.owner)
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
    """Calls of a decoder that belong together.

    Attributes:
        calls: One after the other.
        owner: The rank that decodes it.
        pixels: What it has decoded, call by call.
    """

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.owner = 0
        self.pixels: list[Tensor] = []

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
        if self.calls[0].kwargs.get("num_frames", 1) > 1:
            return "its decoder mixes the frames of a batch, and is not patched"
        if (samples := len(self.calls[0].sample)) < size:
            return f"a batch of {samples} is not split over {size} ranks (enable_tiling() makes tiles, which are)"
        return None

    def decode(self, decoder: nn.Module) -> None:
        cache = None
        for call in self.calls:
            kwargs = call.kwargs
            if isinstance(kwargs.get("conv_cache"), _Call):
                kwargs = {**kwargs, "conv_cache": cache}
            out = decoder(*call.args, **kwargs)
            self.pixels.append(_pixels_of(out))
            cache = out[1] if isinstance(out, tuple) else None


class _Asked:
    """Stands in for a decoder, writes down what it is asked for, and has this rank decode its parts of that.

    Attributes:
        parts: That.
        decoding: Whether a part is being decoded. A decode of a single part is not begun.
    """

    def __init__(self, vae: Any, ranks: Ranks) -> None:
        self.parts: list[_Part] = []
        self.decoding = False
        self._decoder, self._rank, self._work = vae.decoder, ranks.rank, [0] * ranks.size
        self._with_cache = _returns_cache(vae.decoder)
        self._channels = 3 * (getattr(vae.config, "patch_size", None) or 1) ** 2  # what a patch of pixels divides

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = _Call(args, kwargs)
        if not self.parts or not call.follows(self.parts[-1].calls[-1]):
            if self.parts:
                self.decode_last()
            self.parts.append(_Part())
        self.parts[-1].calls.append(call)
        sample = call.sample
        # all that is done with pixels is to cut, blend and join them, whatever their size
        pixels = torch.empty(len(sample), self._channels, *sample.shape[2:], device="meta", dtype=sample.dtype)
        return (pixels, call) if self._with_cache else pixels

    @property
    def shapes(self) -> list[list[tuple[int, ...]]]:
        """Those of the latents of each part, call by call."""
        return [[tuple(call.sample.shape) for call in part.calls] for part in self.parts]

    def decode_last(self) -> None:
        """Decode the last of the parts, on the rank that has the least to do so far."""
        part, work = self.parts[-1], self._work
        part.owner = work.index(min(work))
        work[part.owner] += part.size
        if part.owner == self._rank:
            self.decoding = True
            with _standing_in(self._decoder, None):
                part.decode(self._decoder)
            self.decoding = False


def _joined(decode: Run, decoder: nn.Module, pixels: list[Tensor]) -> Any:
    """What a decode makes of the pixels that its decoder would have returned, call by call."""
    with_cache = _returns_cache(decoder)
    pixels.reverse()

    def hand_out(*args: Any, **kwargs: Any) -> Any:
        return (pixels.pop(), None) if with_cache else pixels.pop()

    with _standing_in(decoder, hand_out):
        return decode()


def _foreign_reason(decoder: nn.Module) -> str | None:
    """Why the frames or pixels of a picture should not be apart, or None: nobody knows what others' layers look at."""
    for layer in decoder.modules():
        if type(layer).__module__.partition(".")[0] not in OURS or "forward" in vars(layer):
            return f"a {type(layer).__name__} of somebody's own, or hooked by somebody, may look at all pixels"
    return None


def _pixels_of(out: Any) -> Tensor:
    pixels: Tensor = out[0] if isinstance(out, tuple) else out
    return pixels


def _returns_cache(decoder: nn.Module) -> bool:
    return "conv_cache" in inspect.signature(type(decoder).forward).parameters


def _whole_reason(decoder: nn.Module) -> str | None:
    if torch.is_grad_enabled():
        return "gradients are enabled (call it under torch.no_grad)"
    if any(getattr(part, "per_channel_scale1", None) is not None for part in decoder.modules()):
        return "its decoder adds noise, which is drawn call by call"
    return None
