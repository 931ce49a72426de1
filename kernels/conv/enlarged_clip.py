"""Where the pixels of a clip that is twice as high and wide lie in what it is made of.

Cells: what a convolution of the small images leaves that makes all four pixels of a cell at once (``upsample_conv``).
``cells[n, p, q, 2 r + s]`` is pixel ``(2 p - 1 + r, 2 q - 1 + s)`` of image n; half of the cells at the edges is of no
pixel.

Shortcut: every number of a small clip serves several pixels and channels of the large one, as diffusers' ``DupUp3D``
has it. With ``t`` frames to a frame and ``C'`` channels of the small clip,

    large[b, t f + i, 2 h + j, 2 w + k, c] = small[b, f, h, w, (4 t c + 4 i + 2 j + k) C' // (4 t C)]

and the first ``skip`` frames are left out.

An op that reads either needs no pass that puts the pixels into place: it reads them where they are.
"""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["cells_of_rows", "enlarged", "pixel_in_cells", "pixel_in_shortcut", "rows_of_cells", "small_frames"]


def rows_of_cells(cells: Tensor) -> Tensor:
    """``[..., H / 2 + 1, W / 2 + 1, 4, C]`` as ``[..., H, W, C]``."""
    by_line = cells.unflatten(-2, (2, 2)).transpose(-4, -3)  # [..., H / 2 + 1, 2, W / 2 + 1, 2, C]
    return by_line.flatten(-3, -2).flatten(-4, -3)[..., 1:-1, 1:-1, :]


def cells_of_rows(rows: Tensor) -> Tensor:
    """The other way round; zeros where cells at the edges are of no pixel."""
    padded = F.pad(rows, (0, 0, 1, 1, 1, 1))
    by_line = padded.unflatten(-2, (-1, 2)).unflatten(-4, (-1, 2))  # [..., H / 2 + 1, 2, W / 2 + 1, 2, C]
    return by_line.transpose(-4, -3).flatten(-3, -2).contiguous()


def enlarged(small: Tensor, channels: int, frames: int, factor_t: int, skip: int) -> Tensor:
    """``[B, F', H / 2, W / 2, C']`` as ``[B, F, H, W, C]``: the specification."""
    repeated = small.repeat_interleave(4 * factor_t * channels // small.shape[-1], -1)
    cells = repeated.unflatten(-1, (channels, factor_t, 2, 2))
    cells = cells.permute(0, 1, 5, 2, 6, 3, 7, 4)  # [B, F', t, H / 2, 2, W / 2, 2, C]
    return cells.flatten(5, 6).flatten(3, 4).flatten(1, 2)[:, skip : skip + frames]


def small_frames(small: Tensor, frames: slice, factor_t: int, skip: int) -> tuple[Tensor, int]:
    """What some frames of the large clip are made of; how many of the first that it makes are left out."""
    start, stop = frames.start + skip, frames.stop + skip
    return small[:, start // factor_t : triton.cdiv(stop, factor_t)], start % factor_t


@triton.jit
def pixel_in_cells(image, row, column, height, width):
    """Where pixel ``(row, column)`` of ``image`` lies: in pixels from the first number of the cells."""
    cell = (image * (height // 2 + 1) + (row + 1) // 2) * (width // 2 + 1) + (column + 1) // 2
    return cell * 4 + (row + 1) % 2 * 2 + (column + 1) % 2


@triton.jit
def pixel_in_shortcut(
    sample, frame, row, column, small_frames, height, width, skip, FACTOR_T: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """Which pixel of the small clip serves that of the large one, and which of ``STEP`` channels that serve a cell."""
    frame += skip
    small_image = sample.to(tl.int64) * small_frames + frame // FACTOR_T
    pixel = (small_image * (height // 2) + row // 2) * (width // 2) + column // 2
    place = (frame % FACTOR_T * 2 + row % 2) * 2 + column % 2
    return pixel, place * STEP // (4 * FACTOR_T)
