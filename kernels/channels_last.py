"""Activations whose channels, dim 1, are innermost in memory: ``[N, S, C]`` to a kernel, whatever the spatial dims."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["channels_last", "channels_last_strides", "empty_channels_last"]

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def channels_last(x: Tensor) -> Tensor:
    """``x`` ``[N, C, *spatial]``, 3-D to 5-D, in this order of memory: itself if it has it, else a copy."""
    if x.ndim == 3:
        rows = x.transpose(1, 2)
        return x if rows.is_contiguous() else rows.contiguous().transpose(1, 2)
    return x.contiguous(memory_format=_FORMATS[x.ndim])


def channels_last_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a tensor of this ``[N, C, *spatial]`` shape in this order of memory."""
    strides, stride = [1], shape[1]
    for size in reversed(shape[2:]):
        strides.insert(1, stride)
        stride *= size
    return stride, *strides


def empty_channels_last(x: Tensor, channels: int | None = None) -> Tensor:
    """An uninitialised tensor like ``x`` ``[N, C, *spatial]``, in this order of memory; ``channels`` stand for C."""
    shape = (x.shape[0], x.shape[1] if channels is None else channels, *x.shape[2:])
    return x.new_empty_strided(shape, channels_last_strides(shape))
