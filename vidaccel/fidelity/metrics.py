"""PSNR, SSIM and flicker of two clips, frame by frame, in float64.

    psnr = 10 log10(1 / mean((a - b)^2))
    ssim = mean over pixels and channels of
           (2 mu_a mu_b + c1) (2 cov_ab + c2) / ((mu_a^2 + mu_b^2 + c1) (var_a + var_b + c2))

SSIM is that of Wang, Bovik, Sheikh and Simoncelli (IEEE TIP 13(4), 2004, https://doi.org/10.1109/TIP.2003.819861): an
11x11 Gaussian window with sigma 1.5, population statistics, K1 = 0.01, K2 = 0.03, and only windows that lie wholly
inside the frame. Both are scikit-image's. Flicker is the PSNR of what changes from each frame to the next: a clip may
be near the other in every frame and still tremble.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

__all__ = ["Likeness", "Scores", "flicker_psnr", "likeness", "psnr", "relative_error", "ssim"]

_WINDOW = 11  # what scikit-image makes of sigma 1.5


@dataclass(frozen=True)
class Scores:
    """One value for each frame, ``[F]``; infinite where two frames are equal, NaN where one is not finite."""

    frames: np.ndarray

    @property
    def mean(self) -> float:
        """Over the frames with a finite value; infinite if every frame is equal."""
        differing = self.frames[self.frames != np.inf]
        return float(differing.mean()) if differing.size else float("inf")

    @property
    def worst_frame(self) -> int:
        """The first that is not finite in one of the clips, else the one of the lowest value."""
        return int(np.argmin(np.nan_to_num(self.frames, nan=-np.inf, posinf=np.inf)))

    @property
    def minimum(self) -> float:
        return float(self.frames[self.worst_frame])

    def summary(self) -> dict[str, Any]:
        """Plain types."""
        return {
            "mean": self.mean,
            "minimum": self.minimum,
            "worst_frame": self.worst_frame,
            "frames": self.frames.tolist(),
        }


@dataclass(frozen=True)
class Likeness:
    """How near two clips of one shape are; ``flicker_psnr_db`` has F - 1 values, and is None for a single frame."""

    bit_identical: bool
    psnr_db: Scores
    ssim: Scores
    flicker_psnr_db: Scores | None

    def summary(self) -> dict[str, Any]:
        """Plain types."""
        return {
            "bit_identical": self.bit_identical,
            "psnr_db": self.psnr_db.summary(),
            "ssim": self.ssim.summary(),
            "flicker_psnr_db": self.flicker_psnr_db and self.flicker_psnr_db.summary(),
        }


def likeness(a: ArrayLike, b: ArrayLike) -> Likeness:
    """Every metric of two clips ``[F, H, W, C]``, floats in 0..1.

    Raises:
        ValueError: the shapes differ, are not ``[F, H, W, C]``, or a frame is smaller than the window of SSIM.
    """
    a, b = _clips("likeness", a, b)
    flicker = Scores(flicker_psnr(a, b)) if len(a) > 1 else None
    return Likeness(bool(np.array_equal(a, b)), Scores(psnr(a, b)), Scores(ssim(a, b)), flicker)


def psnr(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Peak signal-to-noise ratio of every frame, in dB.

    Args:
        a: ``[F, H, W, C]`` floats in 0..1.
        b: As ``a``.

    Returns:
        ``[F]`` float64; ``inf`` where two frames are equal, ``nan`` where one is not finite.

    Raises:
        ValueError: the shapes differ or are not ``[F, H, W, C]``.
    """
    a, b = _clips("psnr", a, b)
    return _by_frame(_psnr_of_frame, a, b)


def flicker_psnr(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """:func:`psnr` of the differences between each frame and the next, ``[F - 1]`` in dB, with the peak of a frame."""
    a, b = _clips("flicker_psnr", a, b)
    return _by_frame(_psnr_of_frame, *(np.diff(clip.astype(np.float64), axis=0) for clip in (a, b)))


def ssim(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Structural similarity of every frame, averaged over its pixels and channels.

    Args:
        a: ``[F, H, W, C]`` floats in 0..1, at least 11x11 pixels.
        b: As ``a``.

    Returns:
        ``[F]`` float64; 1 where two frames are equal.

    Raises:
        ValueError: the shapes differ, are not ``[F, H, W, C]``, or a frame is smaller than the window.
    """
    a, b = _clips("ssim", a, b)
    if min(a.shape[1:3]) < _WINDOW:
        raise ValueError(f"ssim: frames must be at least {_WINDOW}x{_WINDOW} pixels, got {a.shape[1]}x{a.shape[2]}")
    return _by_frame(_ssim_of_frame, a, b)


def relative_error(output: Tensor, expected: Tensor) -> float:
    """``|output - expected| / |expected|`` in the L2 norm, of tensors of any one shape."""
    expected = expected.double()
    return float(torch.linalg.vector_norm(output - expected) / torch.linalg.vector_norm(expected))


def _clips(metric: str, a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a), np.asarray(b)
    if a.ndim != 4 or a.shape != b.shape:
        raise ValueError(f"{metric}: expected two clips [F, H, W, C] of one shape, got {a.shape} and {b.shape}")
    return a, b


def _by_frame(metric: Callable[[np.ndarray, np.ndarray], float], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    def of_frame(x: np.ndarray, y: np.ndarray) -> float:
        with np.errstate(divide="ignore"):  # of equal frames; a thread has its own
            return metric(x.astype(np.float64), y.astype(np.float64))

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # SciPy's filters let others run
        return np.array(list(threads.map(of_frame, a, b)))


def _psnr_of_frame(a: np.ndarray, b: np.ndarray) -> float:
    return peak_signal_noise_ratio(a, b, data_range=1)


def _ssim_of_frame(a: np.ndarray, b: np.ndarray) -> float:
    if np.array_equal(a, b):
        return 1.0
    return structural_similarity(
        a, b, channel_axis=-1, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
