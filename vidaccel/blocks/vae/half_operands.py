"""Float32 VAEs: which convolutions may take float16 numbers where stock's take TF32.

Both have 10 bits behind the point, and tensor cores add up both in float32; float16 has twice the rate, and half the
bytes. What it lacks is range. A convolution behind an RMS norm (and SiLU, which enlarges nothing) reads pixels no
longer than ``sqrt(C) * max|gamma|``, so no number of its output is larger than ``sqrt(taps * C) * max|gamma|`` times
the norm of that channel's weight (Cauchy and Schwarz), plus the bias, whatever the clip is. That is worked out anew for
each decode, which waits for it once: nothing tells of a weight that was written through ``.data``. Float16 outputs are
rounded once more than stock's, so the error grows a little; tests hold it to twice stock's.

The clip between the blocks has no such bound. Where it is convolved, it is multiplied by a power of two first
(:func:`scale_to_fit`), which goes by its largest number: that stays on the GPU, nothing waits for it. Float16 keeps all
bits of numbers down to about a millionth of the largest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vidaccel.kernels import settings

__all__ = ["float16_convolutions", "largest_pixel", "scale_to_fit", "takes_tf32"]

LARGEST = 32752.0  # half of what float16 holds: its own roundings are on top
LEAST_WEIGHT, LEAST_GAMMA = 2.0**-13, 2.0**-8  # root mean square, and largest: else float16 has fewer bits left


def takes_tf32(clip: Tensor) -> bool:
    """Whether stock's convolutions would cut ``clip`` to TF32."""
    return clip.is_cuda and clip.dtype == torch.float32 and settings.tf32_convolutions()


@torch.no_grad()
def largest_pixel(gamma: Tensor) -> Tensor:
    """``[1]``, float32: no pixel behind an RMS norm of this ``gamma``, and SiLU, is longer."""
    return (gamma.abs().amax().float() * gamma.numel() ** 0.5).view(1)


@torch.no_grad()
def float16_convolutions(normed: Sequence[tuple[Tensor, Any]]) -> dict[int, Tensor]:
    """The positions in ``normed`` of convolutions whose operands and outputs float16 holds, and the largest of these.

    Args:
        normed: ``gamma`` of an RMS norm, and the convolution that reads it, with a ``weight`` ``[C', C, ...]`` and a
            ``bias``, which may be part of the output.
    """
    bounds = torch.stack([_bounds(gamma, conv.weight, conv.bias) for gamma, conv in normed])
    return {at: bounds[at, 0] for at, bound in enumerate(bounds.tolist()) if _fits(*bound)}


@torch.no_grad()
def scale_to_fit(clip: Tensor, added: Tensor, convolutions: Sequence[Any]) -> Tensor:
    """The power of two that a sum is to be multiplied by, so that float16 holds it and what convolutions make of it.

    Args:
        clip: One addend.
        added: The largest number that the other may have, of no dimensions.
        convolutions: Each reads what the one before makes, or the sum. No number of its output is larger than the
            largest that it reads times the sum of the absolute weights of its channel, plus its bias.

    Returns:
        ``[1]``, float32, on the device of ``clip``.
    """
    largest = torch.linalg.vector_norm(clip.flatten(), torch.inf, dtype=torch.float32) + added
    for conv in convolutions:
        gain = conv.weight.flatten(1).abs().sum(dim=1).amax()
        largest = torch.maximum(largest, largest * gain + conv.bias.abs().amax())
    exponent = torch.floor(torch.log2(LARGEST / largest)).clamp(-100.0, 100.0)
    return torch.exp2(exponent).nan_to_num(1.0).view(1)


def _bounds(gamma: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The largest output and operand; the root mean square of the weight; the largest of gamma."""
    rows, largest = weight.flatten(1).float(), gamma.abs().amax().float()
    norms = torch.linalg.vector_norm(rows, dim=1)
    output = norms.amax() * rows.shape[1] ** 0.5 * largest + bias.abs().amax()
    operand = torch.maximum(rows.abs().amax(), gamma.numel() ** 0.5 * largest)
    return torch.stack([torch.maximum(output, operand), norms.norm() / rows.numel() ** 0.5, largest])


def _fits(largest: float, weight: float, gamma: float) -> bool:
    return largest <= LARGEST and weight >= LEAST_WEIGHT and gamma >= LEAST_GAMMA  # no NaN does
