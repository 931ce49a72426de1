"""SwiGLU's product of value and SiLU of gate: what ``geglu.py`` does, with another activation.

    y[..., d] = x[..., d] * silu(x[..., D + d]),   silu(g) = g / (1 + exp(-g))

Rows of ``2 D`` numbers, value before gate, as in diffusers' ``SwiGLU`` (Shazeer 2020, https://arxiv.org/abs/2002.05202).
Computed in float32; the SiLU is rounded to the input dtype before the product, where eager PyTorch stores it.
Fidelity: math-exact. Bound by memory.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vidaccel.kernels.ffn.geglu import gated_op

__all__ = ["SWIGLU", "swiglu", "swiglu_ref"]


def swiglu_ref(x: Tensor) -> Tensor:
    """The specification. Pass a float64 input for gold values."""
    value, gate = x.chunk(2, dim=-1)
    return (value * F.silu(gate)).contiguous()


SWIGLU = gated_op("swiglu", "silu", swiglu_ref)


def swiglu(x: Tensor, *, impl: str | None = None) -> Tensor:
    """``value * F.silu(gate)`` with ``value, gate = x.chunk(2, dim=-1)``.

    Args:
        x: ``[..., 2 * D]``, fp16 / bf16 / fp32; made contiguous if it is not.
        impl: ``"triton"`` or ``"torch"``; None lets the op choose.

    Returns:
        ``[..., D]`` in ``x.dtype``, contiguous.

    Raises:
        ValueError: The last dim of ``x`` is odd or missing; ``impl`` cannot run here.
        TypeError: ``x`` is not floating-point.
    """
    return SWIGLU(x, impl=impl)
