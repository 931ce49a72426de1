"""Two streams of tokens, one behind the other in one buffer: blocks that work on both at once need no ``torch.cat``.

A block takes its streams as two tensors, and hands them on as two. Where these are views of one buffer, the next block
finds that out from where they lie, and takes the buffer as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["joined"]


def joined(first: Tensor, second: Tensor) -> Tensor:
    """``torch.cat([first, second], dim=1)`` of ``[B, T, C]`` and ``[B, S, C]``; a view where they lie like that."""
    if torch.compiler.is_compiling() or not _lies_behind(first, second):
        return torch.cat([first, second], dim=1)  # Inductor sees through a cat of a split
    batch, tokens, channels = first.shape
    return first.as_strided((batch, tokens + second.shape[1], channels), first.stride())


def _lies_behind(first: Tensor, second: Tensor) -> bool:
    if not type(first) is type(second) is Tensor or first.dtype != second.dtype:
        return False
    if first.stride() != second.stride() or len(first) != len(second) or first.shape[2] != second.shape[2]:
        return False
    if second.storage_offset() != first.storage_offset() + first.shape[1] * first.stride(1):
        return False
    place = first.untyped_storage().data_ptr()
    return place != 0 and place == second.untyped_storage().data_ptr()  # 0: on the meta device
