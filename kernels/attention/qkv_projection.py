"""Queries, keys and values of the same rows as one matrix product.

    q, k, v = x @ Wq.T, x @ Wk.T, x @ Wv.T

What counts is the activations' way through memory: at the UNets' upper levels they are far larger than the weights and
than the L2 cache, and three products read them three times. The weights are put together at every call: what is kept
would not see a LoRA that is fused into ``weight.data``. The three are slices of one result. Fidelity: math-exact (a
wider product may be summed in another order).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vidaccel.kernels.arguments import require_one_dtype
from vidaccel.kernels.check import Part, row_parts
from vidaccel.kernels.op import Costs, Implementation, Op, device_reason

__all__ = ["QKV_PROJECTION", "qkv_projection", "qkv_projection_ref"]

ROWS_PER_CHANNEL = 32  # with fewer, the weights' copy costs what the activations' second and third reading does


def qkv_projection_ref(x: Tensor, to_q: Tensor, to_k: Tensor, to_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The specification. Pass float64 inputs for gold values."""
    query, key, value = (F.linear(x, weight) for weight in (to_q, to_k, to_v))
    return query, key, value


def _merged(x: Tensor, to_q: Tensor, to_k: Tensor, to_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    together = F.linear(x, torch.cat([to_q, to_k, to_v]))
    query, key, value = together.split([to_q.shape[0], to_k.shape[0], to_v.shape[0]], dim=-1)
    return query, key, value


def _reason(x: Tensor, *weights: Tensor) -> str | None:
    if reason := device_reason(x):  # on a CPU there is nothing to gain
        return reason
    if torch.is_autocast_enabled(x.device.type) or any(weight.dtype != x.dtype for weight in weights):
        return "x and the weights differ in dtype"
    return None


def _pays(x: Tensor, *weights: Tensor) -> bool:
    return x.numel() >= ROWS_PER_CHANNEL * x.shape[-1] ** 2


def _fake(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights)


def _costs(x: Tensor, *weights: Tensor) -> Costs:
    wide = sum(weight.shape[0] for weight in weights)
    rows = math.prod(x.shape[:-1])
    moved = x.numel() + rows * wide + wide * x.shape[-1]
    return Costs(bytes=moved * x.itemsize, flops=2 * x.numel() * wide)


def _parts(x: Tensor, *weights: Tensor) -> Iterator[Part]:
    for rows, of in row_parts(x):
        yield Part((rows, *weights), of)


def _validate(x: Tensor, to_q: Tensor, to_k: Tensor, to_v: Tensor) -> None:
    for weight in (to_q, to_k, to_v):
        if weight.ndim != 2 or weight.shape[1:] != x.shape[-1:]:
            raise ValueError(
                f"qkv_projection: weights must be [N, K] of x [..., K], got {tuple(weight.shape)} and {tuple(x.shape)}"
            )
    require_one_dtype("qkv_projection", x=x, to_q=to_q, to_k=to_k, to_v=to_v)


QKV_PROJECTION = Op(
    "qkv_projection",
    reference=qkv_projection_ref,
    implementations={"merged": Implementation(_merged, _reason, pays=_pays)},
    fake=_fake,
    costs=_costs,
    parts=_parts,
    validate=_validate,
)


def qkv_projection(
    x: Tensor, to_q: Tensor, to_k: Tensor, to_v: Tensor, *, impl: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``F.linear(x, to_q)``, ``F.linear(x, to_k)`` and ``F.linear(x, to_v)``.

    Args:
        x: ``[..., K]``.
        to_q: ``[N, K]``.
        to_k: ``[M, K]``.
        to_v: ``[M, K]``.
        impl: ``"merged"`` or ``"torch"``; None lets the op choose.

    Returns:
        ``[..., N]``, ``[..., M]`` and ``[..., M]``; perhaps slices of one tensor.

    Raises:
        ValueError: The shapes do not fit one another; ``impl`` cannot run here.
        TypeError: A tensor is not floating-point; the dtypes differ, and autocast is off.
    """
    return QKV_PROJECTION(x, to_q, to_k, to_v, impl=impl)
