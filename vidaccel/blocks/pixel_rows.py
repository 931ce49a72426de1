"""A decode whose pictures lie on several ranks: each has a stretch of the rows of all frames.

A convolution needs one row of the rank above and one of that below. They are sent while the own rows are convolved,
with zeros where they belong, and what they add to the first and the last row is a small convolution of its own
(:func:`convolve_rows`, :func:`upsampled_by_rows`). A norm over whole pictures gathers the statistics of each rank's
rows (:func:`statistics_of_pictures`). All else that a decoder does to pixels looks at one of them, and need not know;
convolutions over time are such, too. A block that is not fused, or does not serve the call, gets whole pictures
(:func:`whole_pictures`).

That sends far less than frames would (a frame has hundreds of rows, and a convolution over frames needs one or two),
and no rank waits for the one before it.

Fidelity: math-exact. The first and the last row are rounded once before what the neighbour adds, and once after.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vidaccel.kernels.norm.channel_statistics import ChannelStatistics
from vidaccel.kernels.norm.frame_statistics import frame_statistics
from vidaccel.parallel.layout import PixelRows, pixel_rows, spread

__all__ = ["convolve_rows", "statistics_of_pictures", "upsampled_by_rows", "upsampled_cells_by_rows", "whole_pictures"]

Convolve = Callable[[Tensor], Tensor]


def convolve_rows(conv: Any, convolve: Convolve, x: Tensor) -> Tensor:
    """``convolve(x)``, a convolution by the weight of ``conv``, with zeros around each picture and stride 1.

    Args:
        conv: Its weight is ``[C', C, 3, 3]``, or ``[C', C, T, 3, 3]`` without zeros in time; or of one row of taps.
        convolve: Takes ``x``; what it returns is written to.
        x: ``[N, C, H, W]`` or ``[N, C, F, H, W]``.
    """
    over = pixel_rows()
    if over is None or conv.weight.shape[-2] == 1:
        return convolve(x)
    return _with_neighbours(over, conv.weight, convolve, x)


def upsampled_by_rows(weight: Tensor, upsample: Convolve, x: Tensor) -> Tensor:
    """``upsample(x)``: a new tensor, twice as high and wide and convolved by ``weight``.

    Args:
        weight: ``[C', C, 3, 3]``.
        upsample: Takes ``x``.
        x: ``[N, C, H, W]``.
    """
    over = pixel_rows()
    if over is None:
        return upsample(x)
    return _with_neighbours(over, weight, upsample, x, times=2)


def upsampled_cells_by_rows(weight: Tensor, upsample: Convolve, x: Tensor) -> Tensor:
    """The same as cells ``[N, H + 1, W + 1, 4, C']``, see ``enlarged_clip.py``."""
    over = pixel_rows()
    if over is None:
        return upsample(x)
    wait = _neighbours(over, x, times=2)
    cells = upsample(x)
    for row, added in _additions(weight, wait()):
        line = F.pad(added.squeeze(2).mT, (0, 0, 1, 1)).unflatten(1, (-1, 2))  # [N, W + 1, 2, C']
        pair = slice(2, 4) if row == 0 else slice(0, 2)  # a lower pixel of the first cells, an upper one of the last
        cells[:, row, :, pair] += line
    return cells


def _with_neighbours(over: PixelRows, weight: Tensor, convolve: Convolve, x: Tensor, times: int = 1) -> Tensor:
    """``convolve(x)``, and what the rows above and below add to its first and last row."""
    wait = _neighbours(over, x, times)
    out = convolve(x)
    for row, added in _additions(weight, wait()):
        out.narrow(-2, row % out.shape[-2], 1).add_(added)
    return out


def _neighbours(over: PixelRows, x: Tensor, times: int) -> Callable[[], tuple[Tensor | None, Tensor | None]]:
    """Begin to send the first and the last row; what is returned waits for the rows above and below, or None.

    Each of their pixels stands there ``times`` times.
    """
    rows = x.movedim(1, -1)  # [N, H, W, C]: as they lie in memory
    arrived = over.ranks.exchange(rows.narrow(-3, 0, 1), rows.narrow(-3, x.shape[-2] - 1, 1))

    def wait() -> tuple[Tensor | None, Tensor | None]:
        above, below = (None if row is None else _widened(row.movedim(-1, 1), times) for row in arrived())
        return above, below

    return wait


def _widened(row: Tensor, times: int) -> Tensor:
    return row if times == 1 else row.repeat_interleave(times, -1)


def _additions(weight: Tensor, rows: tuple[Tensor | None, Tensor | None]) -> list[tuple[int, Tensor]]:
    """Which row, 0 or -1, the rows above and below add to, and what."""
    convolve: Any = F.conv2d if weight.ndim == 4 else F.conv3d
    padding = (*(0 for _ in weight.shape[2:-1]), weight.shape[-1] // 2)
    found = []
    for row, theirs in zip((0, -1), rows, strict=True):
        if theirs is not None:
            taps = weight.narrow(-2, row % weight.shape[-2], 1).to(theirs.dtype)
            found.append((row, convolve(theirs, taps, None, padding=padding)))
    return found


def statistics_of_pictures(
    x: Tensor, shift: Tensor | None, given: ChannelStatistics | None
) -> ChannelStatistics | None:
    """Those of ``x + shift`` on all ranks together, or what is ``given`` where pictures are whole.

    Args:
        x: ``[N, C, H, W]`` or ``[N, C, F, H, W]``, each sample of which is normalised as a whole.
        shift: ``[N, 1, C]``, or for frames ``[N, F or 1, C]``.
        given: Those of this rank's ``x + shift``, if they are known.
    """
    over = pixel_rows()
    if over is None:
        return given
    samples, even = len(x), len(set(over.counts)) == 1
    if given is None or not even:  # segments are of the same size on all ranks: a latent row each
        given = _statistics_by_rows(over, x, shift)
    by_sample = given.parts.unflatten(0, (samples, -1))
    if even:
        parts = over.ranks.gather_parts(by_sample).transpose(0, 1).flatten(1, 2)
    else:
        segments = [count * by_sample.shape[1] // over.count for count in over.counts]
        parts = over.ranks.gather(by_sample, 1, sum(segments), segments)
    return given._replace(parts=parts.flatten(0, 1))


def _statistics_by_rows(over: PixelRows, x: Tensor, shift: Tensor | None) -> ChannelStatistics:
    clip = x if x.ndim == 5 else x.unsqueeze(2)
    frames, rows = clip.shape[2], over.count
    if shift is not None and shift.shape[1] == 1:
        shift = shift.expand(-1, frames * rows, -1)
    elif shift is not None:
        shift = shift.repeat_interleave(rows, 1)
    segments = clip.unflatten(3, (rows, -1)).flatten(2, 3)  # [N, C, F * latent rows, rows of pixels, W]
    return frame_statistics(segments, shift=shift, most_frames=frames * max(over.counts))


def whole_pictures(forward: Callable[..., Tensor], host: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``forward(host, x, ...)`` on the rows of all ranks; of the result, those of this one."""
    over = pixel_rows()
    if over is None:
        return forward(host, x, *args, **kwargs)
    whole = over.gather(x, x.ndim - 2)
    with spread(None):
        out = forward(host, whole, *args, **kwargs)
    return over.part(out, out.ndim - 2)
