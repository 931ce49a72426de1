"""One decode of a VAE on several ranks: its tiles, the samples of its batch, its rows of pixels, or its frames.

What it asks its decoder for is heard beforehand (``asked.py``). Each part of that is decoded on one rank; while its GPU
does that, the host goes on. Then all parts are sent to all ranks, and joined on each: so the bits are those of a single
decode, tile by tile.

A decode that is one part is split along its rows of pixels or its frames if the decoder can do that (``layout_for``),
or along its batch. Where ranks would not split a decode alike, each does all of it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from vidaccel.errors import first_line
from vidaccel.parallel.asked import Asked, Call, Part, Run, joined, noise_reason, pixels_of, standing_in
from vidaccel.parallel.layout import LatentFrames, PixelRows, spread
from vidaccel.parallel.ranks import Agreement, Ranks

__all__ = ["UNLIKE", "Decode"]

OURS = ("torch", "diffusers", "vidaccel")
UNLIKE = "the ranks would split it in different ways: their latents, tiling, slicing or layers differ"


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
        asked = _Shared(model, self._ranks)
        over = self._layout(decode, decoder, asked)
        plan = "" if isinstance(over, str) else f"{type(over).__name__} {asked.shapes}"
        plans = self._agreement.all([zlib.crc32(plan.encode())])
        if any(other != plans[0] for other in plans):  # each rank would wait for what the others never send
            over = UNLIKE
        if isinstance(over, str):
            self._count(over)
            return decode()
        if over is not None:
            with spread(over):
                return decode()
        if len(asked.parts) > 1:
            return joined(decode, model, self._sent(asked))
        return joined(decode, model, self._batch_apart(decoder, asked.parts[0].calls[0]))

    def _layout(self, decode: Run, decoder: Any, asked: _Shared) -> LatentFrames | PixelRows | str | None:
        """How the only part of a decode lies over the ranks, or why each decodes all of it.

        None: the parts, or the samples of a batch, are decoded apart. ``asked`` hears what the decoder is asked for.
        """
        if reason := _whole_reason(decoder):
            return reason
        try:
            with standing_in({decoder: asked}):
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

    def _sent(self, asked: _Shared) -> list[Tensor]:
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

    def _batch_apart(self, decoder: nn.Module, call: Call) -> list[Tensor]:
        """The pixels of a call, each rank having decoded its share of the samples."""
        samples = len(call.sample)

        def own(x: Tensor) -> Tensor:
            return self._ranks.part(x, 0) if x.ndim and len(x) == samples else x

        args, kwargs = tree_map_only(Tensor, own, (call.args, call.kwargs))
        return [self._ranks.gather(pixels_of(decoder(*args, **kwargs)), 0, samples)]


class _OfOneRank(Part):
    """A part, and the rank that decodes it."""

    def __init__(self, calls: list[Call], owner: int) -> None:
        super().__init__(calls)
        self.owner = owner

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


class _Shared(Asked):
    """Has this rank decode its share of what it hears.

    Attributes:
        decoding: Whether a part is being decoded. A decode of a single part is not begun.
    """

    parts: list[_OfOneRank]  # type: ignore[assignment]

    def __init__(self, vae: Any, ranks: Ranks) -> None:
        super().__init__(vae)
        self.decoding = False
        self._decoder, self._rank, self._work = vae.decoder, ranks.rank, [0] * ranks.size

    def begin(self, call: Call) -> None:
        if self.parts:
            self.decode_last()
        self.parts.append(_OfOneRank([call], 0))

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
            with standing_in({self._decoder: None}):
                part.decode(self._decoder)
            self.decoding = False


def _foreign_reason(decoder: nn.Module) -> str | None:
    """Why the frames or pixels of a picture should not be apart, or None: nobody knows what others' layers look at."""
    for layer in decoder.modules():
        if type(layer).__module__.partition(".")[0] not in OURS or "forward" in vars(layer):
            return f"a {type(layer).__name__} of somebody's own, or hooked by somebody, may look at all pixels"
    return None


def _whole_reason(decoder: nn.Module) -> str | None:
    if torch.is_grad_enabled():
        return "gradients are enabled (call it under torch.no_grad)"
    return noise_reason(decoder)
