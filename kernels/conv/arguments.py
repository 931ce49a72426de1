"""What every op here asks of its arguments before it looks at their shapes."""

from __future__ import annotations

from torch import Tensor

__all__ = ["require_floats"]


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
