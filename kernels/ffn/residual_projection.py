"""A linear layer that ends in a residual, the sum in the product's epilogue.

    y = x @ W.T + with_bias,    with_bias = residual + bias

An addition after a product reads two tensors and writes a third; cuBLAS adds one matrix on its way, so the residual
comes with the layer's bias in it (``add_layer_norm`` and ``group_norm_and_sum`` write it so). ``with_bias`` becomes the
result: ``torch.addmm`` would copy it first. The bias joins the residual before the product, where eager rounds product
plus bias first. Fidelity: math-exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vidaccel.kernels.arguments import require_floats, require_one_dtype
from vidaccel.kernels.check import Part, row_parts
from vidaccel.kernels.op import Costs, Implementation, Op, device_reason

__all__ = ["RESIDUAL_PROJECTION", "residual_projection", "residual_projection_ref"]


def residual_projection_ref(x: Tensor, weight: Tensor, with_bias: Tensor) -> Tensor:
    """The specification. Pass float64 inputs for gold values."""
    return F.linear(x, weight) + with_bias


def _addmm(x: Tensor, weight: Tensor, with_bias: Tensor) -> Tensor:
    _rows(with_bias).addmm_(_rows(x), weight.t())
    return with_bias


def _rows(x: Tensor) -> Tensor:
    """``x`` ``[..., C]`` as ``[R, C]``, also where one of them is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _reason(x: Tensor, weight: Tensor, with_bias: Tensor) -> str | None:
    if reason := device_reason(x):  # on a CPU there is nothing to gain
        return reason
    if not with_bias.is_contiguous():  # its rows would be a copy, and the sum lost with that
        return "the sum is made in the memory of with_bias, which is not contiguous"
    if torch.is_autocast_enabled(x.device.type) or not x.dtype == weight.dtype == with_bias.dtype:
        return "x, weight and with_bias differ in dtype"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, with_bias)):
        return "it writes to its input, which gradients may need"
    return None


def _costs(x: Tensor, weight: Tensor, with_bias: Tensor) -> Costs:
    moved = x.numel() + weight.numel() + 2 * with_bias.numel()
    return Costs(bytes=moved * x.itemsize, flops=2 * x.numel() * weight.shape[0])


def _parts(x: Tensor, weight: Tensor, with_bias: Tensor) -> Iterator[Part]:
    for rows, of in row_parts(x):
        yield Part((rows, weight, *of((with_bias,))), of)


def _validate(x: Tensor, weight: Tensor, with_bias: Tensor) -> None:
    if weight.shape != (*with_bias.shape[-1:], *x.shape[-1:]) or x.shape[:-1] != with_bias.shape[:-1]:
        raise ValueError(
            f"residual_projection: x must be [..., K], weight [C, K], with_bias [..., C], "
            f"got {tuple(x.shape)}, {tuple(weight.shape)}, {tuple(with_bias.shape)}"
        )
    require_one_dtype("residual_projection", x=x, weight=weight)
    require_floats("residual_projection", x=x, with_bias=with_bias)


RESIDUAL_PROJECTION = Op(
    "residual_projection",
    reference=residual_projection_ref,
    implementations={"addmm": Implementation(_addmm, _reason)},
    fake=lambda x, weight, with_bias: torch.empty_like(with_bias),
    costs=_costs,
    parts=_parts,
    validate=_validate,
    overwrites=2,
)


def residual_projection(x: Tensor, weight: Tensor, with_bias: Tensor, *, impl: str | None = None) -> Tensor:
    """``F.linear(x, weight) + with_bias``; ``with_bias`` is not needed any more, and may become the result.

    Args:
        x: ``[..., K]``.
        weight: ``[C, K]``.
        with_bias: ``[..., C]``; ``"addmm"`` takes a contiguous one.
        impl: ``"addmm"`` or ``"torch"``; None lets the op choose.

    Returns:
        ``[..., C]``.

    Raises:
        ValueError: The shapes do not fit one another; ``impl`` cannot run here.
        TypeError: A tensor is not floating-point; x and the weight have not one dtype.
    """
    return RESIDUAL_PROJECTION(x, weight, with_bias, impl=impl)
