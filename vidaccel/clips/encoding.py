"""Frames as a file: what each format can hold, how it is written, and that it reads back as it was meant.

Frames are 8-bit RGB arrays ``[F, H, W, 3]``. A format's own clock may be coarser than the frame rate: then the delays
of frames alternate, so that the clip as a whole lasts as long as it should.
"""

from __future__ import annotations

import functools
import itertools
import subprocess
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

__all__ = ["SUFFIXES", "encode", "frames_in", "unwritable_reason"]

SUFFIXES = (".mp4", ".gif", ".webp")
_FASTEST = {".mp4": 1000, ".gif": 50, ".webp": 90}  # frames a second; of images browsers show what is faster at 10
_TICK = {".gif": 10, ".webp": 1}  # milliseconds: what a delay is a multiple of
_OPTIONS: dict[str, dict[str, Any]] = {".gif": {}, ".webp": {"quality": 90}}


def unwritable_reason(suffix: str, fps: float) -> str | None:
    """Why no clip of ``fps`` frames a second can be written in the format of ``suffix`` here, or None."""
    suffix = suffix.lower()
    if suffix not in ("", *SUFFIXES):
        return f"cannot write {suffix}; use {', '.join(SUFFIXES)}, or no suffix for a folder of PNG frames"
    if fps > _FASTEST.get(suffix, fps):
        most = f"{suffix[1:]} shows {_FASTEST[suffix]} frames a second at most, got {fps:g}"
        return f"{most}; lower --fps, or write another format"
    if suffix == ".webp" and not features.check("webp"):
        return "the installed Pillow cannot write WebP; use .mp4 or .gif"
    return _ffmpeg_reason() if suffix == ".mp4" else None


def encode(frames: np.ndarray, path: Path, fps: float) -> None:
    """Write ``frames`` in the format of ``path``'s suffix, without one as a folder of PNG files, and read them again.

    Raises:
        OSError: they cannot be written, or something else is read back.
    """
    suffix = path.suffix.lower()
    if suffix == ".mp4":
        _write_mp4(frames, path, fps)
        _check_mp4(frames, path)
    elif suffix in _TICK:
        _write_animation(frames, path, _delays(len(frames), fps, _TICK[suffix]))
    else:
        _write_folder(frames, path)


def frames_in(folder: Path) -> list[Path]:
    """The frames that :func:`encode` has written into ``folder``, in order."""
    return sorted(path for path in folder.glob("frame-*.png") if path.stem.removeprefix("frame-").isdecimal())


def _delays(count: int, fps: float, tick: int) -> list[int]:
    """Milliseconds that each frame is shown, in multiples of ``tick``: each ends as near to its time as can be."""
    ends = [int(Fraction(1000 * i, tick) / Fraction(fps) + Fraction(1, 2)) for i in range(count + 1)]
    return [tick * (end - start) for start, end in itertools.pairwise(ends)]


def _write_animation(frames: np.ndarray, path: Path, delays: list[int]) -> None:
    first, *others = [Image.fromarray(frame) for frame in frames]
    options = _OPTIONS[path.suffix.lower()]
    first.save(path, save_all=True, append_images=others, duration=delays, loop=0, **options)
    shown = 0  # of frames that are alike only the first is kept, and shown for longer
    with Image.open(path) as image:
        count = getattr(image, "n_frames", 1)
        for i in range(count):
            image.seek(i)
            image.load()
            shown += int(image.info.get("duration", 0))
        timed = count > 1 or (others and image.format == "GIF")  # a WebP of a single frame knows no time
        if image.size != first.size or (timed and shown != sum(delays)):
            raise OSError(f"what was written reads back as {image.size}, {shown} ms long")


def _write_folder(frames: np.ndarray, path: Path) -> None:
    path.mkdir()
    for i, frame in enumerate(frames):
        file = path / f"frame-{i:04d}.png"
        Image.fromarray(frame).save(file)
        with Image.open(file) as image:
            if not np.array_equal(np.asarray(image), frame):
                raise OSError(f"{file.name} reads back as another image")


def _write_mp4(frames: np.ndarray, path: Path, fps: float) -> None:
    height, width = frames.shape[1:3]
    rate = str(Fraction(fps).limit_denominator())
    given = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", rate)
    # yuv420p, which has even sides, is what every player shows; crf 12 is hard to tell from the original
    even = ("-vf", "scale=ceil(iw/2)*2:ceil(ih/2)*2")
    wanted = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "12")
    _run_ffmpeg("-y", *given, "-i", "pipe:0", *even, *wanted, _url(path), frames=frames)


def _check_mp4(frames: np.ndarray, path: Path) -> None:
    """Decode every frame: the muxer ``framecrc`` prints a line for each."""
    try:
        lines = _run_ffmpeg("-i", _url(path), "-f", "framecrc", "pipe:1").splitlines()
    except OSError as error:
        raise OSError(f"what was written cannot be read: {error}") from error
    count = sum(not line.startswith("#") for line in lines)
    height, width = (side + side % 2 for side in frames.shape[1:3])
    if count != len(frames) or f"#dimensions 0: {width}x{height}" not in lines:
        raise OSError(f"what was written reads back as {count} frames, not as {len(frames)} of {width}x{height}")


def _url(path: Path) -> str:
    return f"file:{path}"  # or a name with a colon would be taken for a protocol


def _run_ffmpeg(*arguments: str, frames: np.ndarray | None = None) -> str:
    """What it prints; what it says of an error goes into ours."""
    pixels = b"" if frames is None else np.ascontiguousarray(frames).data.cast("B")
    done = subprocess.run([_ffmpeg(), "-v", "error", *arguments], input=pixels, capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().split("\n")
        raise OSError(f"ffmpeg failed with exit code {done.returncode}: {said[-1]}")
    return done.stdout.decode(errors="replace")


def _ffmpeg() -> str:
    import imageio_ffmpeg

    try:
        program: str = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise OSError("there is no ffmpeg") from error
    return program


def _ffmpeg_reason() -> str | None:
    try:
        reason = _h264_reason(_ffmpeg())
    except OSError as error:
        reason = error.strerror or str(error)
    return f"mp4 needs ffmpeg: {reason}; install ffmpeg, or set IMAGEIO_FFMPEG_EXE to it" if reason else None


@functools.lru_cache(maxsize=8)
def _h264_reason(program: str) -> str | None:
    done = subprocess.run([program, "-hide_banner", "-encoders"], stdin=subprocess.DEVNULL, capture_output=True)
    return None if b"libx264" in done.stdout else f"{program} has no encoder libx264"
