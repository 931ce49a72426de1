"""Linear layers that share their input, or end in a residual, as one matrix product each.

What counts is the activations' way through memory: at the UNets' upper levels they are far larger than the weights and
than the L2 cache, so three projections of the same rows read them three times, and an addition after a projection
reads two tensors and writes a third. Weights are put together at every call: what is kept would not see a LoRA that is
fused into ``weight.data``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from vidaccel.blocks.unet.normalization import FusedGroupNorm
from vidaccel.kernels.dispatch import Choice, record_choice, runs_triton
from vidaccel.kernels.norm.group_norm_silu import group_norm_and_sum
from vidaccel.sites.parameters import why_not_bypassed, why_unreadable

__all__ = [
    "QKV_PROJECTION",
    "RESIDUAL_PROJECTION",
    "add_projected",
    "last_projection",
    "norm_and_residual",
    "project_together",
]

QKV_PROJECTION = "qkv_projection"
RESIDUAL_PROJECTION = "residual_projection"
ROWS_PER_CHANNEL = 32  # with fewer, the weights' copy costs what the activations' second and third reading does


def project_together(layers: Sequence[Any], x: Tensor) -> tuple[Tensor, ...] | None:
    """``layer(x)`` of each of several linear layers without bias, slices of one product, where that pays; else None."""
    rows = x.numel() // max(x.shape[-1], 1)
    if rows < ROWS_PER_CHANNEL * x.shape[-1] or not _gains(QKV_PROJECTION, x):
        return None
    if any(why_unreadable(layer, nn.Linear, x, with_bias=False) for layer in layers):
        return None
    if any(layer.bias is not None or layer.weight.dtype != x.dtype for layer in layers):
        return None
    record_choice(Choice(QKV_PROJECTION, "merged"))
    together = F.linear(x, torch.cat([layer.weight for layer in layers]))
    return together.split([layer.out_features for layer in layers], dim=-1)


def last_projection(feed_forward: Any, x: Tensor) -> nn.Linear | None:
    """The linear layer that ends ``feed_forward`` on rows like ``x``, if :func:`add_projected` may stand for it."""
    if not _gains(RESIDUAL_PROJECTION, x) or why_not_bypassed(feed_forward, FeedForward):
        return None
    net = feed_forward.net
    if len(net) != 3 or not isinstance(net[1], nn.Dropout) or why_not_bypassed(net[1], nn.Dropout) or net[1].training:
        return None
    last = net[2]
    if why_unreadable(last, nn.Linear, x) or last.weight.dtype != x.dtype:
        return None
    return last


def add_projected(last: nn.Linear | nn.Conv2d, inner: Tensor, with_bias: Tensor) -> Tensor:
    """``last(inner) + residual``, the sum in the product's epilogue; ``with_bias`` is the residual plus last's bias.

    Rows ``[..., K]`` and ``[..., C]``; a convolution is a 1x1 one. ``with_bias`` becomes the result: ``torch.addmm``
    would copy it first.
    """
    record_choice(Choice(RESIDUAL_PROJECTION, "addmm"))
    with_bias.flatten(0, -2).addmm_(inner.flatten(0, -2), last.weight.flatten(1).t())
    return with_bias


def norm_and_residual(norm: Any, image: Tensor, projection: Any) -> tuple[Tensor, Tensor] | None:
    """``norm(image)``, and ``image`` plus the bias of a 1x1 ``projection`` to its width, for :func:`add_projected`.

    None where :func:`add_projected` may not stand for ``projection``, or the norm has to be called.
    """
    if not isinstance(norm, FusedGroupNorm) or not _gains(RESIDUAL_PROJECTION, image):
        return None
    kind = nn.Conv2d if isinstance(projection, nn.Conv2d) else nn.Linear
    if why_unreadable(projection, kind, image) or projection.weight.dtype != image.dtype:
        return None
    if not norm.serves_parent(image):
        return None
    arguments = norm.weight, norm.bias, norm.num_groups, norm.eps, projection.bias
    return norm.run_part(group_norm_and_sum, image, *arguments)


def _gains(op: str, x: Tensor) -> bool:
    """Whether a product of our own making stands for the layers' on ``x``; a compiler has its own ways to fuse."""
    return runs_triton(op, x) and not torch.compiler.is_compiling() and not torch.is_autocast_enabled(x.device.type)
