"""Activations whose channels, dim 1, are innermost in memory: ``[N, S, C]`` to a kernel, whatever the spatial dims."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["channels_last", "empty_channels_last"]

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def channels_last(x: Tensor) -> Tensor:
    """``x`` ``[N, C, *spatial]``, 3-D to 5-D, in this order of memory: itself if it has it, else a copy."""
    if x.ndim == 3:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.contiguous(memory_format=_FORMATS[x.ndim])


def empty_channels_last(x: Tensor) -> Tensor:
    """An uninitialised tensor like ``x`` ``[N, C, *spatial]``, in this order of memory."""
    if x.ndim == 3:
        return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    return torch.empty_like(x, memory_format=_FORMATS[x.ndim])
