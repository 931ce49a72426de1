"""The seams between a VAE's tiles, blended whole.

The VAEs of diffusers blend what two tiles have in common line by line: ``blend_v`` and ``blend_h`` take four launches
for each line of pixels, ``blend_t`` for each frame. That is nearly half of all launches of CogVideoX's decode. Here
a seam takes a dozen, and gets the same bits.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vidaccel.sites.plain import stock_method
from vidaccel.sites.rules import Rule
from vidaccel.sites.site import Fidelity, Site

__all__ = ["TileBlends"]

DIMS = {"blend_t": -3, "blend_v": -2, "blend_h": -1}  # the methods, and the dim that each blends along


@dataclass(frozen=True)
class TileBlends(Rule):
    """Put blends of whole seams in place of a VAE's ``blend_*`` methods; one site for all of them."""

    @property
    def ops(self) -> Mapping[str, Fidelity]:
        return {"tile_blend": "bit-exact"}

    def matches(self, path: str, module: Any) -> bool:
        return bool(_names(module))

    def left_alone_reason(self, module: Any) -> str | None:
        for name in _names(module):
            stock = getattr(type(module), name)
            if getattr(getattr(module, name), "__func__", None) is not stock or not _is_of_diffusers(stock):
                return f"its {name} is not that of diffusers"
        return None

    def apply(self, module: Any, sites: list[Site], checks: bool) -> dict[str, _Blend]:
        (site,) = sites
        blends = {name: _Blend(module, name, site) for name in _names(module)}
        vars(module).update(blends)
        return blends

    def in_place(self, module: Any, memo: dict[str, _Blend]) -> str | None:
        replaced = [name for name, blend in memo.items() if vars(module).get(name) is not blend]
        return f"its {replaced[0]} was replaced" if replaced else None

    def undo(self, module: Any, memo: dict[str, _Blend]) -> None:
        for name, blend in memo.items():
            if vars(module).get(name) is blend:
                del vars(module)[name]


def _names(module: Any) -> list[str]:
    return [name for name in DIMS if hasattr(type(module), name)]


def _is_of_diffusers(method: Any) -> bool:
    return str(getattr(method, "__module__", "")).startswith("diffusers.")


class _Blend:
    """Stands for one method of a VAE; in a copy of the VAE, that method itself."""

    def __init__(self, vae: nn.Module, name: str, site: Site) -> None:
        self._vae = weakref.ref(vae)  # which this is an attribute of
        self._name, self._dim, self._site = name, DIMS[name], site
        self._stock = getattr(type(vae), name)

    def __call__(self, a: Tensor, b: Tensor, blend_extent: int) -> Tensor:
        stock = getattr(type(self._vae()), self._name)
        reason = _unserved_reason(a, b, self._dim) if stock is self._stock else f"somebody replaced its {self._name}"
        if reason or not self._site.runs:
            if reason and not torch.compiler.is_compiling():
                self._site.fallbacks[reason] += 1
            blended: Tensor = stock(self._vae(), a, b, blend_extent)
            return blended
        self._site.implementations.add("torch")
        extent = min(a.shape[self._dim], b.shape[self._dim], blend_extent)
        if extent > 0:
            seam = b.narrow(self._dim, 0, extent)
            seam.copy_(_blended(a.narrow(self._dim, a.shape[self._dim] - extent, extent), seam, self._dim))
        return b

    def __reduce__(self) -> Any:
        return stock_method, (self._vae(), self._name)


def _unserved_reason(a: Tensor, b: Tensor, dim: int) -> str | None:
    """Why stock code has to blend these tiles, or None."""
    if a is b or a.dtype != b.dtype or not b.is_floating_point():
        return "the tiles are one, or not of one float dtype"
    if a.ndim != b.ndim or any(
        x != y for i, (x, y) in enumerate(zip(a.shape, b.shape, strict=True)) if i - b.ndim != dim
    ):
        return "the tiles differ in more than what is blended"
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return "gradients are being recorded"
    return None


def _blended(before: Tensor, after: Tensor, dim: int) -> Tensor:
    """``before * (1 - i / n) + after * (i / n)`` of n lines along ``dim``, rounded where stock code stores it.

    It multiplies by Python's floats, which PyTorch rounds to the dtype that it multiplies in.
    """
    lines = after.shape[dim]
    wide = torch.promote_types(after.dtype, torch.float32)
    at = torch.arange(lines, dtype=torch.float64, device=after.device)
    at = (at / torch.full_like(at, lines)).view(-1, *(1,) * (-1 - dim))  # by a number CUDA would multiply with 1 / n
    return (before * (1 - at).to(wide)).to(after.dtype) + (after * at.to(wide)).to(after.dtype)
