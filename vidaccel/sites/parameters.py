"""The one place that decides whether a kernel may read a child module's parameters instead of calling the child.

LoRA, quantisation, layerwise casting and offload all change what ``child.weight`` is outside the child's own forward:
a wrapped child keeps its base weight, a quantised one an integer tensor, an offloaded one an empty tensor.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["has_hook", "why_not_bypassed", "why_unreadable"]


def has_hook(module: nn.Module) -> bool:
    """Whether somebody replaced this instance's forward (offload and casting hooks do)."""
    return "forward" in module.__dict__ or "_hf_hook" in module.__dict__


def why_not_bypassed(child: nn.Module, expected: type[nn.Module]) -> str | None:
    """Why doing what an ``expected`` does is not what a call of ``child`` would do, or None if it is."""
    if not isinstance(child, expected):
        return f"a {expected.__name__} was replaced by {type(child).__name__}"
    if has_hook(child):
        return f"a hook replaced the forward of a {expected.__name__} (offload or casting)"
    if child._forward_hooks or child._forward_pre_hooks:
        return f"a {expected.__name__} has forward hooks, which only a call of it runs"
    return None


def why_unreadable(child: nn.Module, expected: type[nn.Module], x: Tensor, *, with_bias: bool = True) -> str | None:
    """Why ``child.weight`` and ``child.bias`` are not what ``child(x)`` would use, or None if they are.

    Without ``with_bias`` a child that has no bias will do.
    """
    if reason := why_not_bypassed(child, expected):
        return reason
    for parameter in (child.weight, child.bias):
        if parameter is None and not with_bias:
            continue
        if type(parameter) is not nn.Parameter:
            return f"a {expected.__name__} has no plain weight and bias"
        if parameter.device != x.device:
            return f"a {expected.__name__} is on {parameter.device}, its input on {x.device}"
    return None
