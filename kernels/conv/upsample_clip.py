"""Nearest-neighbour upsampling of a clip by 2 and the causal 3 x 3 x 3 convolution after it, taps merged.

    y = conv3x3x3(pad(nearest(x))) + bias

Pictures become twice as high and wide, and frames two, but for the first of the clip; frames and pixels around the
upsampled clip are repeated. Of three neighbours along a dimension that is doubled, two are the same pixel of ``x``:
their weights can be added beforehand (``upsample_conv`` does so for images). Along each such dimension, position p of
``x`` with one pixel more around it, which stands for ``x[p - 1]`` and ``x[p]``, makes two results:

    2 p - 1 = (w0 + w1) x[p - 1] + w2 x[p]            2 p = w0 x[p - 1] + (w1 + w2) x[p]

and the first of them is left out where it lies in front of the clip. All results of a position are the output channels
of one convolution of 2 x 2 x 2 taps instead of 27, or 3 x 2 x 2 where time is not doubled; ``pixel_shuffle`` puts them
in place and adds the bias.

Weights are added in float32 at every call (``merged_taps``) and rounded to the dtype of ``x`` once, which is one
rounding more per product than eager has. Fidelity: math-exact. Bound by the convolution, which cuDNN runs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vidaccel.kernels.conv.merged_taps import merged_taps
from vidaccel.kernels.conv.padded_clip import Padding, pad_clip
from vidaccel.kernels.conv.pixel_shuffle import pixel_shuffle

__all__ = ["upsample_clip", "upsample_clip_padding", "upsample_clip_ref"]

_CAUSAL = Padding(before=2, border=1, frame_mode="replicate", pixel_mode="replicate")


def upsample_clip_ref(x: Tensor, weight: Tensor, bias: Tensor, *, factor_t: int) -> Tensor:
    """The specification, of a clip ``[B, F, H, W, C]`` without padding."""
    frames, height, width = (torch.arange(size, device=x.device) for size in x.shape[1:4])
    if factor_t == 2:
        frames = frames.repeat_interleave(2)[1:]
    large = x[:, frames][:, :, height.repeat_interleave(2)][:, :, :, width.repeat_interleave(2)]
    y = F.conv3d(pad_clip(large, None, _CAUSAL).permute(0, 4, 1, 2, 3), weight)
    return (y + bias.to(x.dtype).view(-1, 1, 1, 1)).permute(0, 2, 3, 4, 1).contiguous()


def upsample_clip_padding(factor_t: int) -> Padding:
    """What :func:`upsample_clip` reads around a clip."""
    return _CAUSAL._replace(before=1 if factor_t == 2 else 2)


def upsample_clip(
    padded: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    factor_t: int,
    shuffle: Callable[..., Tensor] = pixel_shuffle,
) -> Tensor:
    """The convolution of the upsampled clip.

    Args:
        padded: ``[B, before + F, H + 2, W + 2, C]``, the clip with what :func:`upsample_clip_padding` tells, any float
            dtype.
        weight: ``[C', C, 3, 3, 3]`` in that dtype.
        bias: ``[C']``.
        factor_t: Frames that a frame becomes, but for the first: 1 or 2.
        shuffle: What puts the pixels in place: ``pixel_shuffle`` or its reference.

    Returns:
        ``[B, 1 + factor_t * (F - 1), 2 * H, 2 * W, C']``, contiguous.
    """
    made = F.conv3d(padded.permute(0, 4, 1, 2, 3), merged_taps(weight, factor_t=factor_t)).permute(0, 2, 3, 4, 1)
    repeated = bias.repeat(4 * factor_t)
    return shuffle(made, repeated, cell=(factor_t, 2, 2), drop=factor_t - 1, crop=1)
