"""A 1x1 convolution of two images' channels joined, without joining them.

    y = W @ [x; skip] = W[:, :C] @ x + W[:, C:] @ skip

A UNet concatenates its activations with a skip connection, which reads and writes both once more. Here either half of
the weight multiplies its own tensor, and the second product adds to the first's result, which is rounded in between.
Channels-last memory. Fidelity: math-exact.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vidaccel.kernels import settings
from vidaccel.kernels.arguments import require_one_dtype
from vidaccel.kernels.check import Part, cuts, lean
from vidaccel.kernels.op import Costs, Implementation, Op, device_reason, tensors_reason

__all__ = ["JOINED_PROJECTION", "joined_projection", "joined_projection_ref", "joining_pays"]


def joined_projection_ref(x: Tensor, skip: Tensor, weight: Tensor) -> Tensor:
    """The specification. Pass float64 inputs for gold values."""
    return F.conv2d(torch.cat([x, skip], dim=1), weight)


def _two_products(x: Tensor, skip: Tensor, weight: Tensor) -> Tensor:
    for_x, for_skip = weight.flatten(1).split([x.shape[1], skip.shape[1]], dim=1)  # views
    rows = F.linear(_rows(x), for_x)
    rows.addmm_(_rows(skip), for_skip.t())
    samples, _, *image = x.shape
    return rows.unflatten(0, (samples, *image)).permute(0, 3, 1, 2)


def _rows(image: Tensor) -> Tensor:
    """``[N, C, H, W]`` as ``[N*H*W, C]``: a view of a channels-last image."""
    return image.permute(0, 2, 3, 1).flatten(0, 2)


def _reason(x: Tensor, skip: Tensor, weight: Tensor) -> str | None:
    if reason := device_reason(x) or tensors_reason(x, skip, weight):
        return reason
    if not x.dtype == skip.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type):
        return "x, skip and weight differ in dtype"
    return None


def joining_pays(x: Tensor, *others: Tensor) -> bool:
    """Whether a product is as fast as a convolution: with TF32 in both or none."""
    return not x.is_cuda or x.dtype != torch.float32 or settings.tf32_products() or not settings.tf32_convolutions()


def _fake(x: Tensor, skip: Tensor, weight: Tensor) -> Tensor:
    samples, _, height, width = x.shape
    return x.new_empty((samples, height, width, weight.shape[0])).permute(0, 3, 1, 2)


def _costs(x: Tensor, skip: Tensor, weight: Tensor) -> Costs:
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    moved = x.numel() + skip.numel() + weight.numel() + pixels * weight.shape[0]
    return Costs(bytes=moved * x.itemsize, flops=2 * pixels * weight.numel())


def _parts(x: Tensor, skip: Tensor, weight: Tensor) -> Iterator[Part]:
    for images in cuts(x.shape[0], weight.shape[1] * x.shape[2] * x.shape[3], lean(x)):
        yield Part((x[images], skip[images], weight), lambda outputs, images=images: (outputs[0][images],))  # type: ignore[misc]


def _validate(x: Tensor, skip: Tensor, weight: Tensor) -> None:
    fit = x.ndim == skip.ndim == 4 and x.shape[:1] == skip.shape[:1] and x.shape[2:] == skip.shape[2:]
    if not fit or weight.shape[1:] != (x.shape[1] + skip.shape[1], 1, 1):
        raise ValueError(
            f"joined_projection: x and skip must be images of one size, weight [C, C_x + C_skip, 1, 1], "
            f"got {tuple(x.shape)}, {tuple(skip.shape)} and {tuple(weight.shape)}"
        )
    require_one_dtype("joined_projection", x=x, skip=skip, weight=weight)


JOINED_PROJECTION = Op(
    "joined_projection",
    reference=joined_projection_ref,
    implementations={"in place": Implementation(_two_products, _reason, pays=joining_pays)},
    fake=_fake,
    costs=_costs,
    parts=_parts,
    validate=_validate,
)


def joined_projection(x: Tensor, skip: Tensor, weight: Tensor, *, impl: str | None = None) -> Tensor:
    """``F.conv2d(torch.cat([x, skip], dim=1), weight)`` for a 1x1 ``weight``.

    Args:
        x: ``[N, C_x, H, W]``, fp16 / bf16 / fp32, channels-last best.
        skip: ``[N, C_skip, H, W]``, as ``x``.
        weight: ``[C, C_x + C_skip, 1, 1]``, as ``x``.
        impl: ``"in place"`` or ``"torch"``; None lets the op choose.

    Returns:
        ``[N, C, H, W]``.

    Raises:
        ValueError: The shapes do not fit one another; ``impl`` cannot run here.
        TypeError: A tensor is not floating-point; the dtypes differ, and autocast is off.
    """
    return JOINED_PROJECTION(x, skip, weight, impl=impl)
