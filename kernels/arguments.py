"""What ops ask of the dtypes and devices of their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["require_floats", "require_one_dtype"]


def require_floats(op: str, **tensors: Tensor | None) -> None:
    """Raise for tensors, of which the first is there, that are not floating-point or not all on one device."""
    (first, x), *_ = tensors.items()
    assert x is not None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating-point, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} must be on {x.device}, as {first} is, got {tensor.device}")


def require_one_dtype(op: str, **tensors: Tensor | None) -> None:
    """The same, and raise for tensors that PyTorch does not multiply with one another."""
    require_floats(op, **tensors)
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    (first, dtype), *_ = dtypes.items()
    for name, other in dtypes.items():
        if other != dtype and not torch.is_autocast_enabled(next(iter(tensors.values())).device.type):  # type: ignore[union-attr]
            raise TypeError(f"{op}: {name} must be {dtype}, as {first} is, got {other}")
