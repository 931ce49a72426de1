"""Frames of clips that are there already, one at a time: films, animations, folders of pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageSequence

from vidaccel.clips.video import as_rgb, read_image
from vidaccel.errors import UsageError, first_line

__all__ = ["frame_pairs", "read_frames"]

_PILLOW = (".gif", ".webp", ".png", ".apng", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")  # the rest is FFmpeg's


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """The frames of a file or of a folder of pictures, each ``[H, W, 3]`` uint8.

    Pictures are read as :func:`read_image` reads them, whether they are files of a folder or frames of one file. A
    folder's pictures come in the order of the numbers in their names: ``2.png`` before ``10.png``. Of a film every
    stored frame counts once, whatever its duration.

    Raises:
        UsageError: there is no such clip, it cannot be read, or its frames differ in size.
    """
    if not path.exists():
        raise UsageError(f"no such clip: {path}")
    shape = None
    for i, frame in enumerate(_frames_of_folder(path) if path.is_dir() else _frames_of_file(path)):
        if frame.shape != (shape := shape or frame.shape):
            raise UsageError(f"{path}: frame {i} is {_size(frame)}, those before are {shape[1]}x{shape[0]}")
        yield frame
    if shape is None:
        raise UsageError(f"{path} has no frames")


def frame_pairs(a: Path, b: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Frame after frame of two clips.

    Raises:
        UsageError: one cannot be read, or they differ in size or in their number of frames.
    """
    counts = [0, 0]
    for pair in zip_longest(read_frames(a), read_frames(b)):
        for i, frame in enumerate(pair):
            counts[i] += frame is not None
        x, y = pair
        if x is None or y is None:
            continue  # the longer one is counted to its end
        if x.shape != y.shape:
            raise UsageError(f"{a} is {_size(x)} pixels, {b} {_size(y)}; only clips of one size can be compared")
        yield x, y
    if counts[0] != counts[1]:
        raise UsageError(f"{a} has {counts[0]} frames, {b} {counts[1]}; only clips of one length can be compared")


def _size(frame: np.ndarray) -> str:
    return f"{frame.shape[1]}x{frame.shape[0]}"


def _frames_of_folder(folder: Path) -> Iterator[np.ndarray]:
    files = [file for file in folder.iterdir() if not file.name.startswith(".")]
    for file in sorted(files, key=_by_number):
        yield np.asarray(read_image(file))


def _by_number(file: Path) -> list[tuple[int, str]]:
    """``frame-10.png`` as frame-, 10, .png."""
    parts = re.split(r"(\d+)", file.name)
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts]


def _frames_of_file(file: Path) -> Iterator[np.ndarray]:
    try:
        if file.suffix.lower() in _PILLOW:
            with Image.open(file) as image:
                for frame in ImageSequence.Iterator(image):
                    yield np.asarray(as_rgb(frame, str(file)))
        else:
            yield from iio.imiter(file, plugin="FFMPEG", output_params=["-fps_mode", "passthrough"])
    except UsageError:
        raise
    except Exception as error:  # a broken file can raise anything
        raise UsageError(f"cannot read the clip {file}: {first_line(error)}") from error
