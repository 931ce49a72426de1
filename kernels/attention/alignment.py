"""Rows that PyTorch's fused attention computes right: they start at multiples of 16 bytes.

From others cuDNN's attention returns nonsense without a word (of the size of the result; PyTorch 2.11, H100), flash
attention faults, memory-efficient attention raises. ``F.scaled_dot_product_attention`` asks none of them about it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["aligned_rows"]


def aligned_rows(x: Tensor) -> Tensor:
    """``x`` ``[B, S, C]``, or a copy of it if it is on a GPU and its rows do not start at multiples of 16 bytes."""
    if not x.is_cuda:
        return x
    steps = (x.stride(0) | x.stride(1)) * x.itemsize
    if not torch.compiler.is_compiling():  # Dynamo knows no addresses
        steps |= x.data_ptr()
    return x.clone(memory_format=torch.contiguous_format) if steps % 16 else x
