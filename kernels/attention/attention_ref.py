"""PyTorch's attention, for references: what it says, without what it takes to get ready."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attention_ref"]

PLANNED_FLOPS = 1e12  # from which on cuDNN's faster kernel makes up for its plan


def attention_ref(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """``F.scaled_dot_product_attention(q, k, v, scale=scale)`` of ``[B, H, S, D]``.

    On a Hopper GPU that is cuDNN's, which builds a plan for each shape: 50 ms (cuDNN 9, H200). A check cuts a call into
    parts, whose shapes nothing else has, so small ones are left to FlashAttention-2, which needs none.
    """
    if _needs_no_plan(q, k, v):
        return torch.ops.aten._scaled_dot_product_flash_attention.default(q, k, v, scale=scale)[0]
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def _needs_no_plan(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if torch.compiler.is_compiling() or not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    if q.shape[-1] % 8 or 4 * q.numel() * k.shape[-2] > PLANNED_FLOPS:
        return False
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)  # type: ignore[call-arg, arg-type]
    return torch.backends.cuda.can_use_flash_attention(params, False)
