"""What a convolution reads around a clip: frames in front and behind, and a border of pixels.

A convolution over ``[B, F, H, W, C]`` that is to keep the size needs them around its input. Eager makes them by
``F.pad`` or ``torch.cat``, each a pass over the clip. The ops that write a convolution's input write them with it:
their grid walks the pixels of the padded clip, and each pixel is computed from the one that it is a copy of
(:func:`padded_source`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["NO_PADDING", "Padding", "pad_clip", "padded_source", "require_padding"]

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
def padded_source(
    target, rows, before, frames, height, width,
    BORDER: tl.constexpr, FRAME_MODE: tl.constexpr, PIXEL_MODE: tl.constexpr, HAS_HALO: tl.constexpr,
):  # fmt: skip
    """Where the pixels ``target`` of padded clips, ``rows`` pixels each, are copied from.

    Returns:
        The sample; the pixel within its clip, or within its halo where ``front`` holds and there is a halo; ``front``,
        whether the target is in front of the clip; ``there``, whether it is copied at all, not zero; ``inner``, whether
        it is a pixel of the clip itself, of which there is one for each.
    """
    sample = target // rows
    rest = target - sample * rows
    area = height * width
    if BORDER == 0 and FRAME_MODE == "zeros":  # one division instead of two
        pixel = rest - before * area
        front = pixel < 0
        inner = (pixel >= 0) & (pixel < frames * area)
        there = inner | front if HAS_HALO else inner
        pixel = tl.where(front, rest, pixel)
    else:
        padded_width = width + 2 * BORDER
        plane = (height + 2 * BORDER) * padded_width
        frame = rest // plane
        pixel = rest - frame * plane
        front = frame < before
        inner = (frame >= before) & (frame < before + frames)
        there = inner | front if HAS_HALO else inner
        if FRAME_MODE == "replicate":
            there = tl.full(target.shape, 1, tl.int1)
        clip_frame = tl.minimum(tl.maximum(frame - before, 0), frames - 1)
        frame = tl.where(front, frame, clip_frame) if HAS_HALO else clip_frame
        if BORDER > 0:
            y = pixel // padded_width
            x = pixel - y * padded_width - BORDER
            y = y - BORDER
            within = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            inner = inner & within
            if PIXEL_MODE == "replicate":
                y = tl.minimum(tl.maximum(y, 0), height - 1)
                x = tl.minimum(tl.maximum(x, 0), width - 1)
            elif PIXEL_MODE == "reflect":
                y = height - 1 - tl.abs(height - 1 - tl.abs(y))
                x = width - 1 - tl.abs(width - 1 - tl.abs(x))
            else:
                there = there & within
            pixel = y * width + x
        pixel = frame * area + pixel
    return sample, pixel, front, there, inner
