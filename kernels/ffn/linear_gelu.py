"""A linear layer and GELU behind it: the first half of a video transformer's feed-forward.

    y = gelu(x @ W.T + bias)

* ``addmm``: cuBLASLt's epilogue adds the bias and takes GELU of the float32 sum, so that the widest activation of the
  model is written once instead of written, read and written. Its GELU is the tanh approximation, which is what nearly
  all video transformers use.
* ``torch``: the two steps; for the exact GELU always.

Fidelity: math-exact; eager rounds the sum before GELU, the epilogue does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vidaccel.kernels.arguments import require_one_dtype
from vidaccel.kernels.check import Part, row_parts
from vidaccel.kernels.op import Costs, Implementation, Op, scaled

__all__ = ["LINEAR_GELU", "linear_gelu", "linear_gelu_ref"]


def linear_gelu_ref(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """The specification. Pass float64 inputs for gold values."""
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


def _addmm(x: Tensor, weight: Tensor, bias: Tensor, approximate: str) -> Tensor:
    y = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return y.view(*x.shape[:-1], len(weight))


def _reason(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> str | None:
    if not x.is_cuda or torch.version.hip is not None:
        return "the epilogue is cuBLASLt's, which needs an NVIDIA GPU"
    if approximate != "tanh":
        return "the epilogue's GELU is the tanh approximation"
    if bias is None:
        return "the epilogue needs a bias"
    if torch.is_autocast_enabled(x.device.type) or not x.dtype == weight.dtype == bias.dtype:
        return "x, weight and bias differ in dtype"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"it is for float16 and bfloat16, x is {x.dtype}"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias)):
        return "it has no backward pass (call it under torch.no_grad)"
    return None


def _costs(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Costs:
    rows = math.prod(x.shape[:-1])
    moved = x.numel() + weight.numel() + rows * len(weight)
    return Costs(bytes=moved * x.itemsize, flops=2 * x.numel() * len(weight))


def _parts(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Iterator[Part]:
    for rows, of in row_parts(x, max(weight.shape)):
        yield Part((rows, weight, bias, approximate), of)


def _validate(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> None:
    if x.ndim < 2 or weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"linear_gelu: x must be [..., K], weight [N, K], got {tuple(x.shape)}, {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear_gelu: bias must be [{len(weight)}], got {tuple(bias.shape)}")
    require_one_dtype("linear_gelu", x=x, weight=weight, bias=bias)
    if approximate not in ("tanh", "none"):
        raise ValueError(f"linear_gelu: approximate must be 'tanh' or 'none', got {approximate!r}")


LINEAR_GELU = Op(
    "linear_gelu",
    reference=linear_gelu_ref,
    implementations={"addmm": Implementation(_addmm, _reason)},
    fake=lambda x, weight, bias, approximate: x.new_empty(*x.shape[:-1], len(weight)),
    costs=_costs,
    parts=_parts,
    validate=_validate,
    small=scaled(0),  # x
)


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, approximate: str = "tanh", impl: str | None = None
) -> Tensor:
    """``F.gelu(F.linear(x, weight, bias), approximate=approximate)``.

    Args:
        x: ``[..., K]``.
        weight: ``[N, K]``.
        bias: ``[N]`` or None.
        approximate: ``"tanh"`` or ``"none"``, as of ``F.gelu``.
        impl: ``"addmm"`` or ``"torch"``; None lets the op choose.

    Returns:
        ``[..., N]``.

    Raises:
        ValueError: The shapes do not fit one another; ``impl`` cannot run here.
        TypeError: A tensor is not floating-point; the dtypes differ, and autocast is off.
    """
    return LINEAR_GELU(x, weight, bias, approximate, impl=impl)
