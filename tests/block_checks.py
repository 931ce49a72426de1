"""What tests of a single fused block share: putting it in place of an original, and telling how far apart two are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vidaccel.sites.block import FusedBlock
from vidaccel.sites.rules import Swap
from vidaccel.sites.site import Site

__all__ = ["OfPyTorch", "all_fused", "frozen", "fused", "relative_error", "tensor_of"]


class OfPyTorch:
    """A test's own function that passes for PyTorch's: where somebody replaced one of those, blocks are stock's."""

    __module__ = "torch.nn.functional"

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)


def frozen(module: nn.Module) -> nn.Module:
    """``module`` for inference, with no parameter left at 0 or 1, where code that forgets it would still pass."""
    for parameter in module.parameters():
        noise = torch.randn_like(parameter)
        parameter.data += 0.1 * noise if parameter.ndim == 1 or not parameter.any() else 0
    return module.eval().requires_grad_(False)


@contextmanager
def fused(
    module: nn.Module, fused_class: type[FusedBlock], ops: Collection[str] | None = None
) -> Iterator[dict[str, Site]]:
    """``module`` as ``fused_class`` with ``ops`` (None: all) inside the ``with`` block; yields its sites by op."""
    rule = Swap(fused_class)
    assert rule.matches("block", module) and rule.left_alone_reason(module) is None
    sites = [Site("block", op, fidelity) for op, fidelity in rule.ops.items() if ops is None or op in ops]
    patch = rule.put(module, sites, checks=True)
    try:
        yield {site.op: site for site in sites}
    finally:
        patch.undo(module)


@contextmanager
def all_fused(module: nn.Module, *fused_classes: type[FusedBlock]) -> Iterator[list[Site]]:
    """``module`` and all below it, fused where one of ``fused_classes`` is for it; yields the sites of all."""
    sites: list[Site] = []
    with ExitStack() as stack:
        for path, part in list(module.named_modules()):
            for fused_class in fused_classes:
                if Swap(fused_class).matches(path, part):
                    sites += stack.enter_context(fused(part, fused_class)).values()
        yield sites


def tensor_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def relative_error(out: Tensor, expected: Tensor) -> float:
    assert out.shape == expected.shape and out.dtype == expected.dtype
    return float((out - expected).norm() / expected.norm())
