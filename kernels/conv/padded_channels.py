"""A convolution of few channels, padded so that a pixel is aligned in memory.

Channels-last, a pixel of 3 or 4 channels of float16 is 6 or 8 bytes. cuDNN's kernels for tensor cores read 16 bytes at
once; for less it has one that computes an index for every element and is several times as slow. Channels of zeros with
weights of zeros change no sum, and the padded input of so few channels is small beside the output. Fidelity:
math-exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vidaccel.kernels.arguments import require_one_dtype
from vidaccel.kernels.check import Part, cuts, lean
from vidaccel.kernels.op import Costs, Implementation, Op, device_reason, tensors_reason

__all__ = ["PADDED_CHANNELS", "padded_channels", "padded_channels_ref"]

ALIGNMENT = 16  # bytes


def padded_channels_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...]
) -> Tensor:
    """The specification. Pass float64 inputs for gold values."""
    return F.conv2d(x, weight, bias, stride, padding)


def _padded(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...]
) -> Tensor:
    return F.conv2d(_pad_channels(x), _pad_channels(weight), bias, stride, padding)


def _pad_channels(x: Tensor) -> Tensor:
    """``[N, C, H, W]`` with channels of zeros up to a multiple of 16 bytes, channels-last."""
    missing = -x.shape[1] % (ALIGNMENT // x.element_size())
    return F.pad(x.permute(0, 2, 3, 1), (0, missing)).contiguous().permute(0, 3, 1, 2)


def _reason(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> str | None:
    return device_reason(x) or tensors_reason(x, weight, bias)


def _pays(x: Tensor, *others: Any) -> bool:
    return x.shape[1] * x.element_size() % ALIGNMENT != 0


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    return padded_channels_ref(x, weight, bias, *geometry)


def _costs(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...]) -> Costs:
    pixels = x.shape[0] * x.shape[2] * x.shape[3] // (stride[0] * stride[1])
    moved = x.numel() + weight.numel() + pixels * weight.shape[0]
    return Costs(bytes=moved * x.itemsize, flops=2 * pixels * weight.numel())


def _parts(x: Tensor, weight: Tensor, *others: Any) -> Iterator[Part]:
    for images in cuts(x.shape[0], weight.shape[0] * x.shape[2] * x.shape[3], lean(x)):
        yield Part((x[images], weight, *others), lambda outputs, images=images: (outputs[0][images],))  # type: ignore[misc]


def _validate(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> None:
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"padded_channels: x must be [N, C_in, H, W] and weight [C, C_in, kH, kW], "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"padded_channels: bias must be [{len(weight)}], got {tuple(bias.shape)}")
    require_one_dtype("padded_channels", x=x, weight=weight, bias=bias)


PADDED_CHANNELS = Op(
    "padded_channels",
    reference=padded_channels_ref,
    implementations={"padded": Implementation(_padded, _reason, pays=_pays)},
    fake=_fake,
    costs=_costs,
    parts=_parts,
    validate=_validate,
)


def padded_channels(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    *,
    impl: str | None = None,
) -> Tensor:
    """``F.conv2d(x, weight, bias, stride, padding)``.

    Args:
        x: ``[N, C_in, H, W]``, fp16 / bf16 / fp32.
        weight: ``[C, C_in, kH, kW]``.
        bias: ``[C]`` or None.
        stride: Of the two sides.
        padding: With zeros.
        impl: ``"padded"`` or ``"torch"``; None lets the op choose.

    Returns:
        ``[N, C, H', W']``.

    Raises:
        ValueError: The shapes do not fit one another; ``impl`` cannot run here.
        TypeError: A tensor is not floating-point; the dtypes differ, and autocast is off.
    """
    return PADDED_CHANNELS(x, weight, bias, stride, padding, impl=impl)
