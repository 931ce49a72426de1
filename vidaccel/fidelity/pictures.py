"""Two clips and their difference as small pictures that a page can hold: WebP, in base64."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from skimage.measure import block_reduce

__all__ = ["Pictures", "pictures_of"]

MOST_FRAMES, MOST_WIDTH = 96, 480
LOSSLESS_PIXELS = 2**20  # of a whole clip: what is small can be kept exactly
_QUALITY = 80
_VISIBLE = 64.0  # levels out of 255 that the difference of the worst frame is brought to
_MOST_AMPLIFIED = 64


@dataclass(frozen=True)
class Pictures:
    """Every ``stride``-th frame, at 1 / ``reduction`` of its size, exact if ``lossless``.

    The differences are absolute, times ``amplification``; a reduced one shows the largest of its pixels.
    """

    stride: int
    reduction: int
    lossless: bool
    amplification: int
    first: tuple[str, ...]
    second: tuple[str, ...]
    difference: tuple[str, ...]


def pictures_of(
    pairs: Iterable[tuple[np.ndarray, np.ndarray]], frames: int, height: int, width: int, worst_psnr_db: float
) -> Pictures:
    """Pictures of pairs of frames ``[H, W, 3]`` uint8, read one at a time; at most a few megabytes of them."""
    stride = math.ceil(frames / MOST_FRAMES)
    lossless = frames * height * width <= LOSSLESS_PIXELS
    reduction = 1 if lossless else math.ceil(width / MOST_WIDTH)
    amplification = _amplification(worst_psnr_db)
    columns: tuple[list[str], ...] = ([], [], [])
    for i, (a, b) in enumerate(pairs):
        if i % stride == 0:
            difference = np.abs(a.astype(np.int16) - b) * amplification
            difference = block_reduce(difference, (reduction, reduction, 1), np.max).clip(0, 255).astype(np.uint8)
            reduced = (Image.fromarray(frame).reduce(reduction) for frame in (a, b))
            for column, image in zip(columns, (*reduced, Image.fromarray(difference)), strict=True):
                column.append(_webp(image, lossless))
    return Pictures(stride, reduction, lossless, amplification, *map(tuple, columns))


def _amplification(worst_psnr_db: float) -> int:
    """The power of two that makes the worst frame's difference visible."""
    if not math.isfinite(worst_psnr_db):
        return _MOST_AMPLIFIED if worst_psnr_db > 0 else 1
    rms = 255 * 10 ** (-worst_psnr_db / 20)
    return int(min(_MOST_AMPLIFIED, max(1, 2 ** math.floor(math.log2(_VISIBLE / rms)))))


def _webp(image: Image.Image, lossless: bool) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=lossless, quality=_QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()
