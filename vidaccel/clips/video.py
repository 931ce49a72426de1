"""Images in, clips out: reading, fitting, writing through imageio, and the labelled side-by-side clip.

Clips are float arrays ``[F, H, W, C]`` in 0..1; only files hold 8-bit values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from vidaccel.errors import UsageError

__all__ = ["FRAME_PATTERN", "SUFFIXES", "fit_image", "read_image", "side_by_side", "write_clip"]

SUFFIXES = (".mp4", ".gif", ".webp")
FRAME_PATTERN = "frame-*.png"
_LABELLED_WIDTH = 360  # pixels that a label needs to be read with ease; smaller clips are enlarged
_MARGIN = 8
_BACKGROUND, _INK = (24, 24, 27), (244, 244, 245)


def read_image(path: str | Path) -> Image.Image:
    """An image file as RGB, turned upright as its EXIF data says."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        raise UsageError(f"{path} is not an image") from None
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot read the image {path}: {reason}") from None


def fit_image(image: Image.Image, width: int, height: int) -> Image.Image:
    """``image`` at ``width`` x ``height``; what another aspect ratio leaves no room for is cut off at the edges."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def write_clip(clip: np.ndarray, path: Path, fps: int) -> None:
    """Write ``clip`` in the format of ``path``'s suffix; without a suffix, as a folder of PNG frames."""
    frames = to_uint8(clip)
    suffix = path.suffix.lower()
    if suffix == ".mp4":
        # yuv420p is what every player shows; crf 12 is hard to tell from the original. Even sides will do: imageio's
        # own default would resize the clip to multiples of 16.
        encoding: dict[str, Any] = {"codec": "libx264", "pixelformat": "yuv420p", "output_params": ["-crf", "12"]}
        iio.imwrite(path, frames, plugin="FFMPEG", fps=fps, quality=None, macro_block_size=2, **encoding)
    elif suffix == ".gif":
        iio.imwrite(path, frames, plugin="pillow", duration=1000 / fps, loop=0)
    elif suffix == ".webp":
        iio.imwrite(path, frames, plugin="pillow", duration=round(1000 / fps), loop=0, quality=90)
    else:
        path.mkdir()
        for i, frame in enumerate(frames):
            iio.imwrite(path / FRAME_PATTERN.replace("*", f"{i:04d}"), frame)


def to_uint8(clip: np.ndarray) -> np.ndarray:
    """Rounded to the nearest of 256 levels."""
    return (clip.clip(0, 1) * 255).round().astype(np.uint8)


def side_by_side(clips: Sequence[np.ndarray], labels: Sequence[str]) -> np.ndarray:
    """One clip with ``clips`` next to each other, each under its label; small ones are enlarged pixel by pixel."""
    frames, height, width, channels = clips[0].shape
    scale = math.ceil(_LABELLED_WIDTH / width)
    banners = [_banner(label, width * scale) for label in labels]
    banner_height = banners[0].shape[0]

    columns = len(clips) * (width * scale + _MARGIN) + _MARGIN
    rows = banner_height + height * scale + _MARGIN
    # even sides, which yuv420p needs
    canvas = np.empty((frames, rows + rows % 2, columns + columns % 2, channels), np.float32)
    canvas[:] = np.asarray(_BACKGROUND, np.float32) / 255
    for i, (clip, banner) in enumerate(zip(clips, banners, strict=True)):
        left = _MARGIN + i * (width * scale + _MARGIN)
        span = slice(left, left + width * scale)
        canvas[:, :banner_height, span] = banner
        canvas[:, banner_height : banner_height + height * scale, span] = clip.repeat(scale, 1).repeat(scale, 2)
    return canvas


def _banner(label: str, width: int) -> np.ndarray:
    """``label`` in the middle of a strip, as large as ``width`` allows: ``[H, width, 3]`` floats."""
    size = width / 18
    size *= min(1.0, 0.96 * width / max(1.0, ImageFont.load_default(size).getlength(label)))
    strip = Image.new("RGB", (width, width // 9), _BACKGROUND)
    centre = (width / 2, strip.height / 2)
    ImageDraw.Draw(strip).text(centre, label, _INK, ImageFont.load_default(size), anchor="mm")
    return np.asarray(strip, np.float32) / 255
