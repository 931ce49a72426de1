"""PSNR and SSIM of two clips, frame by frame, in float64.

    psnr = 10 log10(1 / mean((a - b)^2))
    ssim = mean over pixels and channels of
           (2 mu_a mu_b + c1) (2 cov_ab + c2) / ((mu_a^2 + mu_b^2 + c1) (var_a + var_b + c2))

SSIM is that of Wang, Bovik, Sheikh and Simoncelli (IEEE TIP 13(4), 2004, https://doi.org/10.1109/TIP.2003.819861): an
11x11 Gaussian window with sigma 1.5, population statistics, K1 = 0.01, K2 = 0.03, and only windows that lie wholly
inside the frame. It agrees to 1e-12 with scikit-image's ``structural_similarity(..., gaussian_weights=True, sigma=1.5,
use_sample_covariance=False, data_range=1)``.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

__all__ = ["psnr", "relative_error", "ssim"]

_WINDOW = 11
_SIGMA = 1.5
_C1 = 0.01**2
_C2 = 0.03**2


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
    mean_squared = np.array([np.mean((x.astype(np.float64) - y) ** 2) for x, y in zip(a, b, strict=True)])
    with np.errstate(divide="ignore"):
        return -10.0 * np.log10(mean_squared)


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
    return np.array([_ssim_of_frame(_planes(x), _planes(y)) for x, y in zip(a, b, strict=True)])


def relative_error(output: Tensor, expected: Tensor) -> float:
    """``|output - expected| / |expected|`` in the L2 norm, of tensors of any one shape."""
    expected = expected.double()
    return float(torch.linalg.vector_norm(output - expected) / torch.linalg.vector_norm(expected))


def _clips(metric: str, a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a), np.asarray(b)
    if a.ndim != 4 or a.shape != b.shape:
        raise ValueError(f"{metric}: expected two clips [F, H, W, C] of one shape, got {a.shape} and {b.shape}")
    return a, b


def _planes(frame: np.ndarray) -> Tensor:
    """``[H, W, C]`` to ``[C, 1, H, W]``: each channel is an image of its own."""
    return torch.from_numpy(np.ascontiguousarray(frame.transpose(2, 0, 1), dtype=np.float64))[:, None]


def _ssim_of_frame(a: Tensor, b: Tensor) -> float:
    mean_a, mean_b = _blur(a), _blur(b)
    variance_a = _blur(a * a) - mean_a**2
    variance_b = _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
    contrast_structure = (2 * covariance + _C2) / (variance_a + variance_b + _C2)
    return (luminance * contrast_structure).mean().item()


def _blur(planes: Tensor) -> Tensor:
    """Gaussian mean over every window inside the frame, as two one-dimensional passes."""
    offsets = torch.arange(_WINDOW, dtype=planes.dtype) - _WINDOW // 2
    weights = torch.exp(-0.5 * (offsets / _SIGMA) ** 2)
    weights /= weights.sum()
    rows = F.conv2d(planes, weights.view(1, 1, _WINDOW, 1))
    return F.conv2d(rows, weights.view(1, 1, 1, _WINDOW))
