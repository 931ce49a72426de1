"""What a convolution reads around a clip: frames in front and behind, and a border of pixels.

A convolution over ``[B, F, H, W, C]`` that is to keep the size needs them around its input. Eager makes them by
``F.pad`` or ``torch.cat``, each a pass over the clip. The ops that write a convolution's input write them with it:
their grid walks the pixels of the padded clip, and each pixel is computed from the one that it is a copy of
(:func:`padded_lines`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["NO_PADDING", "Padding", "pad_clip", "padded_lines", "padded_pixel", "padded_tiles", "require_padding"]

FRAME_MODES = ("zeros", "replicate")
PIXEL_MODES = ("zeros", "replicate", "reflect")


class Padding(NamedTuple):
    """What lies around a clip. Its fields are arguments of the ops that write it.

    Attributes:
        before: Frames in front; where a halo is given, it takes their place.
        after: Frames behind.
        border: Pixels at each side of the height and of the width.
        frame_mode: ``"zeros"``, or ``"replicate"``: the first and the last frame are repeated.
        pixel_mode: ``"zeros"``, ``"replicate"`` or ``"reflect"``, as of ``F.pad``. Holds for a halo too.
    """

    before: int = 0
    after: int = 0
    border: int = 0
    frame_mode: str = "zeros"
    pixel_mode: str = "zeros"

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """That of a clip ``[B, F, H, W, C]`` with its padding."""
        samples, frames, height, width, channels = shape
        edges = 2 * self.border
        return samples, self.before + frames + self.after, height + edges, width + edges, channels

    def inner(self, padded: Tensor) -> Tensor:
        """The view of ``padded`` that is the clip itself."""
        _, frames, height, width, _ = padded.shape
        border = self.border
        return padded[:, self.before : frames - self.after, border : height - border, border : width - border]

    def reads_twice(self) -> bool:
        """Whether a pixel of the clip is copied into the padding, and read more than once for it."""
        frames = self.frame_mode == "replicate" and self.before + self.after > 0
        return frames or (self.pixel_mode != "zeros" and self.border > 0)


NO_PADDING = Padding()


def pad_clip(rows: Tensor, halo: Tensor | None, padding: Padding) -> Tensor:
    """The specification: ``rows`` ``[B, F, H, W, C]``, ``halo`` ``[B, before, H, W, C]`` or None."""
    before, after, border, frame_mode, pixel_mode = padding
    clip = [rows]
    if before:
        clip.insert(0, _repeated(rows[:, :1], before, frame_mode) if halo is None else halo)
    if after:
        clip.append(_repeated(rows[:, -1:], after, frame_mode))
    padded = torch.cat(clip, dim=1) if len(clip) > 1 else rows
    if border:
        images = padded.flatten(0, 1).permute(0, 3, 1, 2)
        images = F.pad(images, (border,) * 4, mode="constant" if pixel_mode == "zeros" else pixel_mode)
        padded = images.permute(0, 2, 3, 1).reshape(padding.shape(rows.shape))
    return padded.contiguous()


def _repeated(frame: Tensor, times: int, mode: str) -> Tensor:
    samples, _, *pixels = frame.shape
    if mode == "zeros":
        return frame.new_zeros(samples, times, *pixels)
    return frame.expand(samples, times, *pixels)


def require_padding(op: str, shape: Sequence[int], padding: Padding, halo: Tensor | None) -> None:
    """Raise if a clip of ``shape`` ``[B, F, H, W, C]`` cannot have this padding, or ``halo`` does not fit it."""
    samples, frames, height, width, channels = shape
    before, after, border, frame_mode, pixel_mode = padding
    for name, count in (("before", before), ("after", after), ("border", border)):
        if count < 0:
            raise ValueError(f"{op}: {name} must not be negative, got {count}")
    if frame_mode not in FRAME_MODES:
        raise ValueError(f"{op}: frame_mode must be one of {', '.join(FRAME_MODES)}, got {frame_mode!r}")
    if pixel_mode not in PIXEL_MODES:
        raise ValueError(f"{op}: pixel_mode must be one of {', '.join(PIXEL_MODES)}, got {pixel_mode!r}")
    if frame_mode == "replicate" and not frames and before + after:
        raise ValueError(f"{op}: there is no frame to repeat (x is {tuple(shape)})")
    least = {"zeros": 0, "replicate": 1, "reflect": border + 1}[pixel_mode]
    if border and min(height, width) < least:
        raise ValueError(
            f"{op}: a border of {border} by {pixel_mode} needs pictures of {least} x {least} pixels or more, "
            f"got {height} x {width}"
        )
    expected = samples, before, height, width, channels
    if halo is not None and halo.shape != expected:
        raise ValueError(f"{op}: halo must be {expected}, got {tuple(halo.shape)}")


@triton.jit
def _copied_from(y, x, height, width, PIXEL_MODE: tl.constexpr):
    """Where the pixels of a frame and of its border are copied from, and which are the frame's own."""
    in_picture = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    if PIXEL_MODE == "replicate":
        y = tl.minimum(tl.maximum(y, 0), height - 1)
        x = tl.minimum(tl.maximum(x, 0), width - 1)
    elif PIXEL_MODE == "reflect":
        y = height - 1 - tl.abs(height - 1 - tl.abs(y))
        x = width - 1 - tl.abs(width - 1 - tl.abs(x))
    return y, x, in_picture


@triton.jit
def padded_pixel(target, height, width, BORDER: tl.constexpr, PIXEL_MODE: tl.constexpr):
    """Which pixel of a frame the pixels ``target`` of the padded frame are copied from, and which are its own."""
    padded_width = width + 2 * BORDER
    line = target // padded_width
    column = target - line * padded_width
    y, x, in_picture = _copied_from(line - BORDER, column - BORDER, height, width, PIXEL_MODE)
    return y * width + x, in_picture


@triton.jit
def padded_lines(
    tile, before, frames, padded_frames, height, width,
    BORDER: tl.constexpr, FRAME_MODE: tl.constexpr, PIXEL_MODE: tl.constexpr, HAS_HALO: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Where the pixels of a tile of padded clips are copied from.

    A tile lies in one line: a row of pixels, or a whole frame where the clip has no border. So all but the place within
    the line is one number for the tile, and costs next to nothing.

    Returns:
        The sample; the frame of the clip; the pixel within the frame; the pixel within all clips, or all halos where
        ``front`` holds; ``front``, whether the tile is in the halo; ``there``, whether a pixel is copied at all, not
        zero; ``inner``, whether it is a pixel of the clip itself, of which there is one for each; the pixel within all
        padded clips; ``within``, whether it is in the line.
    """
    line_width = height * width if BORDER == 0 else width + 2 * BORDER
    line_tiles = tl.cdiv(line_width, BLOCK_M)
    line = tile // line_tiles
    x = (tile - line * line_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    plane = line
    y = 0
    if BORDER > 0:
        padded_height = height + 2 * BORDER
        plane = line // padded_height
        y = line - plane * padded_height - BORDER
    target = line.to(tl.int64) * line_width + x
    within = x < line_width
    sample = plane // padded_frames
    frame = plane - sample * padded_frames - before
    in_clip = (frame >= 0) & (frame < frames)
    front = HAS_HALO & (frame < 0)
    there = within & (in_clip | front | (FRAME_MODE == "replicate"))
    inner = within & in_clip
    if BORDER > 0:
        y, x, in_picture = _copied_from(y, x - BORDER, height, width, PIXEL_MODE)
        inner = inner & in_picture
        if PIXEL_MODE == "zeros":
            there = there & in_picture
        line_width = width
    of_halo = sample.to(tl.int64) * before + frame + before
    frame = tl.minimum(tl.maximum(frame, 0), frames - 1)
    of_clip = sample.to(tl.int64) * frames + frame
    place = y * line_width + x
    pixel = tl.where(front, of_halo, of_clip) * (height * width) + place
    return sample, frame, place, pixel, front, there, inner, target, within


@triton.jit
def padded_tiles(samples, padded_frames, height, width, BORDER: tl.constexpr, BLOCK_M: tl.constexpr):
    """How many tiles :func:`padded_lines` is to be asked for."""
    if BORDER == 0:
        return samples * padded_frames * tl.cdiv(height * width, BLOCK_M)
    else:
        return samples * padded_frames * (height + 2 * BORDER) * tl.cdiv(width + 2 * BORDER, BLOCK_M)
