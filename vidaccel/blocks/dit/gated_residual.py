"""Gated residuals with LayerNorms between them, in one pass each.

HunyuanVideo, CogVideoX and Cosmos store the gated branch, the sum, the norm, ``1 + scale``, the product and the sum of
the modulation one after the other, and that is where each of them is rounded. Kandinsky calculates in float32 from what
it reads to what it stores.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from vidaccel.kernels.norm.gated_residual_norm import (
    Norm,
    Rounding,
    gated_residual,
    gated_residual_norm,
    norm_modulate,
    rows_of_tokens,
)
from vidaccel.sites.block import FusedBlock

__all__ = ["FLOAT32_NORMS", "GatedResidualBlock", "fuses_sum", "norm_heads"]

FLOAT32_NORMS = "its norms are calculated in float32, and its tokens are float64"


class GatedResidualBlock(FusedBlock):
    """A block with a site of ``gated_residual_norm``.

    Everywhere here ``x`` and ``branch`` are ``[B, S, C]``, ``gate``, ``scale`` and ``shift`` ``[B, R, C]``, and
    ``rows`` ``[S]`` is the row that each token takes; None: R is 1, or each token has its own. ``norm`` is a plain
    LayerNorm.
    """

    rounding: ClassVar[Rounding] = "each"

    def modulate(
        self, norm: Any, x: Tensor, scale: Tensor | None, shift: Tensor | None, rows: Tensor | None = None
    ) -> Tensor:
        """``norm(x) * (1 + scale) + shift``."""
        if self.runs("gated_residual_norm"):
            return norm_modulate(x, _layer_norm(norm), scale, shift, rows=rows, rounding=self.rounding)
        y: Tensor = norm(self._wide(x))
        if scale is not None and shift is not None:
            y = y * (1 + self._wide(rows_of_tokens(scale, rows))) + self._wide(rows_of_tokens(shift, rows))
        return y.type_as(x)

    def add_norm(
        self,
        x: Tensor,
        branch: Tensor,
        gate: Tensor | None,
        norm: Any,
        scale: Tensor | None,
        shift: Tensor | None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``z = x + gate * branch`` and its modulated norm; without a gate, ``x + branch``."""
        if fuses_sum(self, x, branch):
            z, y = gated_residual_norm(
                x, branch, gate, _layer_norm(norm), scale, shift, rows=rows, rounding=self.rounding
            )
            return z, y
        z = self.add(x, branch, gate, rows)
        return z, self.modulate(norm, z, scale, shift, rows)

    def add(self, x: Tensor, branch: Tensor, gate: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """``x + gate * branch``."""
        if fuses_sum(self, x, branch):
            return gated_residual(x, branch, gate, rows=rows, rounding=self.rounding)
        branch = self._wide(branch)
        z = self._wide(x) + (branch if gate is None else branch * self._wide(rows_of_tokens(gate, rows)))
        return z.type_as(x) if self.rounding == "once" else z

    def _wide(self, x: Tensor) -> Tensor:
        return x.float() if self.rounding == "once" else x


def fuses_sum(block: FusedBlock, x: Tensor, branch: Tensor) -> bool:
    """Whether the op is to add ``branch`` to ``x``: stock's sum of two dtypes has the wider, the op's has that of x."""
    return block.runs("gated_residual_norm") and branch.dtype == x.dtype


def norm_heads(norm: Any, x: Tensor, num_heads: int) -> Tensor:
    """Each head of ``x`` ``[B, S, H*D]`` by a plain RMSNorm with a weight ``[D]``, calculated in float32, rounded once.

    For the queries of a cross-attention, whose keys are others, and few.
    """
    heads = x.unflatten(2, (num_heads, -1)).flatten(1, 2)  # [B, S*H, D]
    eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
    return norm_modulate(heads, Norm("rms", eps, norm.weight)).view(x.shape)


def _layer_norm(norm: Any) -> Norm:
    return Norm("layer", norm.eps, norm.weight, norm.bias)
