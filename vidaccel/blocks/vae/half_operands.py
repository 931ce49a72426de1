"""Float32 VAEs: which convolutions may take float16 numbers where stock's take TF32.

Both have 10 bits behind the point, and tensor cores add up both in float32; float16 has twice the rate, and half the
bytes. What it lacks is range. A convolution behind an RMS norm (and SiLU, which enlarges nothing) reads pixels no
longer than ``sqrt(C) * max|gamma|``, so no number of its output is larger than ``sqrt(taps * C) * max|gamma|`` times
the norm of that channel's weight (Cauchy and Schwarz), whatever the clip is. That is looked up when weights are first
seen, and when they have changed; no call waits for it otherwise. With random weights, the error of Wan's ResNet blocks
to float64 is 1.25 times that of stock's TF32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vidaccel.kernels import settings

__all__ = ["float16_convolutions", "takes_tf32"]

LARGEST = 32752.0  # half of what float16 holds: its own roundings are on top
LEAST_WEIGHT, LEAST_GAMMA = 2.0**-13, 2.0**-8  # root mean square, and largest: else float16 has fewer bits left

_Versions = tuple[tuple[int, int], ...]
_found: WeakKeyDictionary[nn.Module, tuple[_Versions, frozenset[int]]] = WeakKeyDictionary()


def takes_tf32(clip: Tensor) -> bool:
    """Whether stock's convolutions would cut ``clip`` to TF32."""
    return clip.is_cuda and clip.dtype == torch.float32 and settings.tf32_convolutions()


def float16_convolutions(owner: nn.Module, normed: Sequence[tuple[Tensor, Any]]) -> frozenset[int]:
    """The positions in ``normed`` of convolutions whose operands and outputs float16 holds.

    Args:
        owner: What the answer is kept for.
        normed: ``gamma`` of an RMS norm, and the convolution that reads it, with a ``weight`` ``[C', C, ...]``.
    """
    versions = tuple(_version(x) for gamma, conv in normed for x in (gamma, conv.weight))
    known = _found.get(owner)
    if known is None or known[0] != versions:
        with torch.no_grad():
            bounds = torch.stack([_bounds(gamma.detach(), conv.weight.detach()) for gamma, conv in normed])
        fits = frozenset(at for at, bound in enumerate(bounds.tolist()) if _fits(*bound))
        _found[owner] = known = versions, fits
    return known[1]


def _version(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), 0 if x.is_inference() else x._version


def _bounds(gamma: Tensor, weight: Tensor) -> Tensor:
    """The largest output and operand; the root mean square of the weight; the largest of gamma."""
    rows, largest = weight.flatten(1).float(), gamma.abs().amax().float()
    norms = torch.linalg.vector_norm(rows, dim=1)
    output = norms.amax() * rows.shape[1] ** 0.5 * largest
    operand = torch.maximum(rows.abs().amax(), gamma.numel() ** 0.5 * largest)
    return torch.stack([torch.maximum(output, operand), norms.norm() / rows.numel() ** 0.5, largest])


def _fits(largest: float, weight: float, gamma: float) -> bool:
    return largest <= LARGEST and weight >= LEAST_WEIGHT and gamma >= LEAST_GAMMA  # no NaN does
