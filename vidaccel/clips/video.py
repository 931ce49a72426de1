"""Images in, clips out: reading and fitting an image, and the labelled side-by-side clip.

Clips are float arrays ``[F, H, W, C]`` in 0..1; only files hold 8-bit values.
"""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from vidaccel.clips.encoding import encode
from vidaccel.errors import UsageError

__all__ = ["as_rgb", "fit_image", "read_image", "side_by_side", "write_clip"]

logger = logging.getLogger(__name__)

_LABELLED_WIDTH = 360  # pixels that a label needs to be read with ease; smaller clips are enlarged
_MARGIN = 8
_BACKGROUND, _INK = (24, 24, 27), (244, 244, 245)


def read_image(path: str | Path) -> Image.Image:
    """An image file as 8-bit RGB: upright as its EXIF data says, the first of several frames, on white where it is
    transparent. The last two are told as warnings.

    Raises:
        UsageError: it cannot be read, or nobody can say which of its values are black and white.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise UsageError(
                f"cannot read the image {path}: {'Is a directory' if Path(path).is_dir() else 'not a file'}"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # what is far too large is an error
            with Image.open(path) as image:
                frames = getattr(image, "n_frames", 1)
                if frames > 1 and image.format != "MPO":  # a photograph and its preview
                    _warn_once(f"{path} has {frames} frames: the first is used")
                return as_rgb(image, str(path))
    except UnidentifiedImageError:
        raise UsageError(f"{path} is not an image") from None
    except UsageError:
        raise
    except Exception as error:  # a broken file can raise anything
        raise UsageError(f"cannot read the image {path}: {getattr(error, 'strerror', None) or error}") from None


def as_rgb(image: Image.Image, name: str) -> Image.Image:
    """The frame that an opened file is at, as :func:`read_image` has it.

    Raises:
        UsageError: nobody can say which of its values are black and white.
    """
    grey16 = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    image = ImageOps.exif_transpose(image)
    if grey16:
        image = Image.fromarray(((np.asarray(image).astype(np.int64) * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "I":
        raise UsageError(f"{name} has 32-bit grey values, of which none stands for white; save it with 8 or 16 bits")
    elif image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):
            found = f"got {values.min():.4g} to {values.max():.4g}"
            raise UsageError(f"{name}: float pixels must be from 0 (black) to 1 (white), {found}; save it with 8 bits")
        image = Image.fromarray(to_uint8(values))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    if image.getchannel("A").getextrema() != (255, 255):
        _warn_once(f"{name} is transparent in places: it is laid on white")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


@functools.lru_cache(maxsize=1000)
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def fit_image(image: Image.Image, width: int, height: int) -> Image.Image:
    """``image`` at ``width`` x ``height``; what another aspect ratio leaves no room for is cut off at the edges."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def write_clip(clip: np.ndarray, path: Path, fps: float) -> None:
    """Write ``clip`` in the format of ``path``'s suffix; without a suffix, as a folder of PNG frames.

    Raises:
        OSError: it cannot be written, or what was written is not what is read back.
    """
    encode(to_uint8(clip), path, fps)


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
