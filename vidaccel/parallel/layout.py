"""How the clip of the call under way lies over ranks: the one object that blocks ask.

Blocks that mix what is spread (frames, tokens) ask :func:`layout`; all others see a smaller clip and need not know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from vidaccel.kernels.context import while_set
from vidaccel.parallel.ranks import Agreement, Ranks, copy_wide, shares

__all__ = [
    "Frames",
    "LatentFrames",
    "Layout",
    "PixelRows",
    "Tokens",
    "all_tokens",
    "frames",
    "latent_frames",
    "layout",
    "own_tokens",
    "pixel_rows",
    "spread",
    "tokens",
    "tokens_before",
]


class Layout:
    """Frames or tokens over ranks: each has a stretch of them, one after the other.

    Attributes:
        ranks: Over whom.
        total: How many there are on all ranks together.
    """

    def __init__(self, ranks: Ranks, total: int = 0) -> None:
        self.ranks, self.total = ranks, total

    @property
    def own(self) -> slice:
        """Those of this rank."""
        return self.ranks.own(self.total)

    @property
    def count(self) -> int:
        """How many this rank has."""
        return self.own.stop - self.own.start


class Frames(Layout):
    """The frames of a UNet's clip."""


class _Decoded(Layout):
    """What a VAE decodes: it gets all latents on every rank, and returns all pixels."""

    def __init__(self, ranks: Ranks, total: int, agreement: Agreement) -> None:
        super().__init__(ranks, total)
        self._agreement = agreement

    def least(self, value: int) -> int:
        """The smallest ``value`` that a rank has."""
        return min(theirs for (theirs,) in self._agreement.all([value]))


class LatentFrames(_Decoded):
    """Batches of latent frames that a causal VAE decodes: each convolution looks back at frames of the rank before.

    Args:
        ranks: Over whom.
        total: How many batches there are, each of as many frames as a convolution looks back at, or more.
        agreement: Of the same ranks.
    """

    @classmethod
    def reason(cls, ranks: Ranks, total: int) -> str | None:
        """Why so many cannot be spread, or None."""
        return f"{total} batches of latent frames are too few for {ranks.size} ranks" if total < ranks.size else None

    def stretches(self, start: int, end: int) -> list[tuple[int, int]]:
        """Where each rank's stretch of these batches begins and ends; if they are too few, the first rank has all."""
        size, lengths = self.ranks.size, shares(end - start, self.ranks.size)
        if not lengths[-1]:
            lengths = [end - start] + [0] * (size - 1)
        ends = [start + sum(lengths[: rank + 1]) for rank in range(size)]
        return list(zip([start, *ends], ends, strict=False))


class PixelRows(_Decoded):
    """The rows of the pictures that a VAE decodes; each row of latents becomes several, as many at any one layer.

    A rank has the same stretch of all pictures: a convolution needs a row of the rank above and one of that below,
    however long the clip is.

    Args:
        ranks: Over whom, from top to bottom.
        total: How many rows the latents have.
        agreement: Of the same ranks.
    """

    @classmethod
    def reason(cls, ranks: Ranks, total: int) -> str | None:
        """Why so many cannot be spread, or None."""
        return f"{total} rows of latents are too few for {ranks.size} ranks" if total < ranks.size else None

    @property
    def counts(self) -> list[int]:
        """How many each rank has, the first ones at most one more than the others."""
        return shares(self.total, self.ranks.size)

    def part(self, x: Tensor, dim: int) -> Tensor:
        """This rank's share of ``x``, whose dimension ``dim`` is all rows, a view."""
        of_one, own = x.shape[dim] // self.total, self.own
        return x.narrow(dim, own.start * of_one, self.count * of_one)

    def largest_part(self, x: Tensor, dim: int) -> Tensor:
        """The share of the rank that has most: what all ranks are to reckon with."""
        return x.narrow(dim, 0, self.counts[0] * (x.shape[dim] // self.total))

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """All of what each rank has a share of, along the dimension ``dim`` of rows."""
        of_one = x.shape[dim] // self.count
        return self.ranks.gather(x, dim, self.total * of_one, [count * of_one for count in self.counts])


class Tokens(Layout):
    """The tokens of a transformer's video, from the first of its ``blocks`` to the last one.

    Texts, tables of positions and embeddings of timesteps are whole on every rank. A block's first argument, and its
    first output, are the tokens ``[B, S, C]``.

    Args:
        ranks: Over whom.
        blocks: Those, in their order.
        count: Told why the tokens of a call are whole on every rank after all.
    """

    def __init__(self, ranks: Ranks, blocks: Sequence[nn.Module], count: Callable[[str], None]) -> None:
        super().__init__(ranks)
        self._count = count
        self._first, self._last = blocks[0], blocks[-1]
        self._blocks = set(map(id, blocks))

    def holds(self, block: Any) -> bool:
        """Whether ``block`` is one of those whose tokens are spread."""
        return id(block) in self._blocks

    def too_few(self, block: Any, x: Tensor) -> bool:
        """Whether the first block is given fewer tokens than there are ranks: then nothing of this call is spread."""
        if block is not self._first or x.shape[1] >= self.ranks.size:
            return False
        self._count(f"the clip has fewer tokens ({x.shape[1]}) than there are ranks ({self.ranks.size})")
        _layout.set(None)  # until the call ends, and with it its spread()
        return True

    def enter(self, block: Any, x: Tensor) -> Tensor:
        """The tokens that this rank's ``block`` works on."""
        if block is not self._first:
            return x
        self.total = x.shape[1]
        return self.ranks.part(x, 1)

    def leave(self, block: Any, out: Any) -> Any:
        """What ``block`` returns: behind the last one all tokens are on every rank."""
        return _with_first(out, self._whole) if block is self._last else out

    def run_whole(self, forward: Callable[..., Any], block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A forward that knows nothing of ranks: on all tokens, of whose outputs each rank keeps its own."""
        x = self._whole(x)
        with spread(None):
            out = forward(block, x, *args, **kwargs)
        return _with_first(out, lambda x: self.ranks.part(x, 1))

    def to_heads(self, *given: Tensor, before: int = 0, behind: int = 0) -> list[Tensor]:
        """From own tokens and all heads ``[B, S, H*D]`` to all tokens and own heads, for attention.

        The first ``before`` and the last ``behind`` tokens are those of a text, which every rank has. While one tensor
        is sent, the next one is made ready.
        """
        begun = [self._begin_to_heads(x, before, behind) for x in given]
        for _, work in begun:
            work.wait()
        return [out for out, _ in begun]

    def _begin_to_heads(self, x: Tensor, before: int, behind: int) -> tuple[Tensor, Any]:
        ranks, end = self.ranks, x.shape[1] - behind
        batch, _, channels = x.shape
        own = channels // ranks.size
        send = x.new_empty(ranks.size, end - before, batch, own)
        copy_wide(send, x[:, before:end].unflatten(2, (ranks.size, own)).permute(2, 1, 0, 3))
        out = x.new_empty(before + self.total + behind, batch, own)
        of_token = batch * own
        from_each = [tokens * of_token for tokens in shares(self.total, ranks.size)]
        received = out[before : before + self.total].view(-1)
        work = ranks.begin_all_to_all(received, send.view(-1), from_each, [send[0].numel()] * ranks.size)
        out = out.transpose(0, 1)
        out[:, :before] = ranks.part(x[:, :before], 2)
        out[:, before + self.total :] = ranks.part(x[:, end:], 2)
        return out, work

    def to_tokens(self, x: Tensor, channels: int, before: int, behind: int) -> Tensor:
        """The way back, to ``[B, S, channels]``."""
        ranks, end = self.ranks, x.shape[1] - behind
        batch, _, own = x.shape
        send = x[:, before:end].transpose(0, 1).reshape(-1)
        here, of_token = self.count, batch * own
        received = send.new_empty(ranks.size * here * of_token)
        to_each = [tokens * of_token for tokens in shares(self.total, ranks.size)]
        work = ranks.begin_all_to_all(received, send, [here * of_token] * ranks.size, to_each)
        out = x.new_empty(batch, before + here + behind, channels)
        if before or behind:
            text = ranks.gather(torch.cat([x[:, :before], x[:, end:]], dim=1), 2, channels)
            out[:, :before], out[:, before + here :] = text[:, :before], text[:, before:]
        work.wait()
        video = out[:, before : before + here].unflatten(2, (ranks.size, own))
        copy_wide(video, received.view(ranks.size, here, batch, own).permute(2, 1, 0, 3))
        return out

    def _whole(self, x: Tensor) -> Tensor:
        return self.ranks.gather(x, 1, self.total)


def _with_first(out: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)


_layout: ContextVar[Layout | None] = ContextVar("layout", default=None)


def layout() -> Layout | None:
    """The layout of the call under way in this thread, or None; Dynamo sees none."""
    return None if torch.compiler.is_compiling() else _layout.get()


def frames() -> Frames | None:
    """The same if frames are spread."""
    found = layout()
    return found if isinstance(found, Frames) else None


def latent_frames() -> LatentFrames | None:
    """The same if latent frames are spread."""
    found = layout()
    return found if isinstance(found, LatentFrames) else None


def pixel_rows() -> PixelRows | None:
    """The same if the rows of pictures are spread."""
    found = layout()
    return found if isinstance(found, PixelRows) else None


def tokens() -> Tokens | None:
    """The same if tokens are spread."""
    found = layout()
    return found if isinstance(found, Tokens) else None


def all_tokens(x: Tensor) -> int:
    """How many tokens a video has of which ``x`` ``[B, S, C]`` are those of this rank."""
    over = tokens()
    return x.shape[1] if over is None else over.total


def tokens_before() -> int:
    """How many tokens of a video are on the ranks before this one."""
    over = tokens()
    return 0 if over is None else over.own.start


def own_tokens(x: Tensor, dim: int) -> Tensor:
    """Of ``x``, which has all tokens of a video along ``dim``, those of this rank; a view."""
    over = tokens()
    return x if over is None else x.narrow(dim, over.own.start, over.count)


def spread(over: Layout | None) -> AbstractContextManager[object]:
    """Let ``over`` be the layout inside the ``with`` block."""
    return while_set(_layout, over)
