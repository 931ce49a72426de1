"""The seams between a VAE's tiles, blended whole.

The VAEs of diffusers blend what two tiles have in common line by line: ``blend_v`` and ``blend_h`` take four launches
for each line of pixels, ``blend_t`` for each frame. That is nearly half of all launches of CogVideoX's decode. Here
a seam takes a dozen, and gets the same bits.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vidaccel.sites.rules import MethodStandIn, MethodStandIns
from vidaccel.sites.site import Fidelity

__all__ = ["TileBlends"]

DIMS = {"blend_t": -3, "blend_v": -2, "blend_h": -1}  # the methods, and the dim that each blends along


class _Blend(MethodStandIn):
    def __call__(self, a: Tensor, b: Tensor, blend_extent: int) -> Tensor:
        dim = DIMS[self._name]
        if self.stays_out(_unserved_reason(a, b, dim)):
            blended: Tensor = self.method()(a, b, blend_extent)
            return blended
        self._site.implementations.add("torch")
        extent = min(a.shape[dim], b.shape[dim], blend_extent)
        if extent > 0 and not b.is_meta:
            seam = b.narrow(dim, 0, extent)
            seam.copy_(_blended(a.narrow(dim, a.shape[dim] - extent, extent), seam, dim))
        return b


class TileBlends(MethodStandIns):
    """Blend whole seams."""

    op = "tile_blend"
    fidelity: ClassVar[Fidelity] = "bit-exact"
    stand_ins = dict.fromkeys(DIMS, _Blend)


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
