"""SSIM as FFmpeg's ``ssim`` filter computes it, by that filter.

Wang, Bovik, Sheikh and Simoncelli (IEEE TIP 13(4), 2004, https://doi.org/10.1109/TIP.2003.819861) with windows of 8x8
pixels, four pixels apart, K1 = 0.01, K2 = 0.03; the mean over windows and over red, green and blue. Neither
scikit-image nor torchmetrics takes windows of an even width, and with 7 pixels SSIM is up to 0.02 away from FFmpeg's.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

import imageio_ffmpeg
import numpy as np

from vidaccel.errors import UsageError, first_line

__all__ = ["FfmpegSsim"]

_WINDOW = 8
_FILTER = (
    "format=gbrp,split[upper][lower];[upper]crop=iw:ih/2:0:0:exact=1[a];[lower]crop=iw:ih/2:0:ih/2:exact=1[b];"
    "[a][b]ssim=stats_file=ssim.txt"
)


class FfmpegSsim:
    """Takes pairs of frames one at a time; a context manager, after whose end ``frames`` has a value for each pair.

    Both frames of a pair go through one pipe, the second below the first; so a clip of any length needs no memory.

    Raises:
        UsageError: FFmpeg does not start, or ends before it has seen all frames.
    """

    def __init__(self, height: int, width: int) -> None:
        if min(height, width) < _WINDOW:
            raise ValueError(f"ssim: frames must be at least {_WINDOW}x{_WINDOW} pixels, got {height}x{width}")
        self.frames = np.empty(0)
        self._folder = tempfile.TemporaryDirectory(prefix="vidaccel-")
        arguments = ["-v", "quiet", "-f", "rawvideo", "-pix_fmt", "rgb24", "-video_size", f"{width}x{2 * height}"]
        arguments += ["-i", "pipe:0", "-filter_complex", _FILTER, "-f", "null", "-"]
        try:
            command = [imageio_ffmpeg.get_ffmpeg_exe(), *arguments]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=self._folder.name)
        except (OSError, RuntimeError) as error:
            self._folder.cleanup()
            raise _no_ffmpeg(first_line(error)) from error

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        """Compare two frames ``[H, W, 3]`` uint8."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(np.concatenate([a, b]).tobytes())
        except BrokenPipeError as error:
            raise _no_ffmpeg("it has ended") from error

    def __enter__(self) -> FfmpegSsim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._folder:
            self._process.communicate()
            if error is None:
                written = Path(self._folder.name, "ssim.txt")
                if (code := self._process.returncode) or not written.exists():
                    raise _no_ffmpeg(f"it has ended with exit code {code}")
                lines = written.read_text().splitlines()
                self.frames = np.array([float(re.findall(r"All:(\S+)", line)[0]) for line in lines])


def _no_ffmpeg(reason: str) -> UsageError:
    return UsageError(f"SSIM needs ffmpeg: {reason}; install ffmpeg, or set IMAGEIO_FFMPEG_EXE to it")
