"""Gated residuals with LayerNorms between them: what blocks that round each step do alike.

HunyuanVideo, CogVideoX and Cosmos store the gated branch, the sum, the norm, ``1 + scale``, the product and the sum of
the modulation one after the other, and that is where each of them is rounded.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vidaccel.kernels.norm.gated_residual_norm import Norm, gated_residual, gated_residual_norm, norm_modulate
from vidaccel.sites.block import FusedBlock

__all__ = ["GatedResidualBlock"]


class GatedResidualBlock(FusedBlock):
    """A block with a site of ``gated_residual_norm``.

    Everywhere here ``x`` and ``branch`` are ``[B, S, C]``, ``gate``, ``scale`` and ``shift`` ``[B, R, C]``, and
    ``rows`` ``[S]`` is the row that each token takes; None: R is 1, or each token has its own. ``norm`` is a plain
    ``nn.LayerNorm``.
    """

    def modulate(
        self, norm: Any, x: Tensor, scale: Tensor | None, shift: Tensor | None, rows: Tensor | None = None
    ) -> Tensor:
        """``norm(x) * (1 + scale) + shift``."""
        if self.runs("gated_residual_norm"):
            return norm_modulate(x, _layer_norm(norm), scale, shift, rows=rows, rounding="each")
        y: Tensor = norm(x)
        if scale is None or shift is None:
            return y
        return y * (1 + _of_tokens(scale, rows)) + _of_tokens(shift, rows)

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
        if self._fuses_sum(x, branch):
            z, y = gated_residual_norm(
                x, branch, gate, _layer_norm(norm), scale, shift, rows=rows, rounding="each"
            )  # fmt: skip
            return z, y
        z = self.add(x, branch, gate, rows)
        return z, self.modulate(norm, z, scale, shift, rows)

    def add(self, x: Tensor, branch: Tensor, gate: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """``x + gate * branch``."""
        if self._fuses_sum(x, branch):
            return gated_residual(x, branch, gate, rows=rows, rounding="each")
        return x + (branch if gate is None else branch * _of_tokens(gate, rows))

    def _fuses_sum(self, x: Tensor, branch: Tensor) -> bool:
        # stock code's sum of two dtypes has the wider one, the op's has that of x
        return self.runs("gated_residual_norm") and branch.dtype == x.dtype


def _layer_norm(norm: Any) -> Norm:
    return Norm("layer", norm.eps, norm.weight, norm.bias)


def _of_tokens(modulation: Tensor, rows: Tensor | None) -> Tensor:
    return modulation if rows is None else modulation[:, rows]
