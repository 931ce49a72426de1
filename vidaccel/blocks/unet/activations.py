"""diffusers' ``models/activations.py``: the gated GELU of every feed-forward here, in or in one pass after its GEMM."""

from __future__ import annotations

from typing import Any

from diffusers.models.activations import GEGLU
from torch import Tensor, nn

from vidaccel.kernels.ffn.geglu import geglu
from vidaccel.kernels.ffn.linear_geglu import compile_ahead, linear_geglu
from vidaccel.sites.block import FusedBlock, call_site, fuses
from vidaccel.sites.plain import readable_reason

__all__ = ["FusedGEGLU"]


@fuses(GEGLU, {"geglu": "math-exact", "linear_geglu": "math-exact"})
class FusedGEGLU(FusedBlock, GEGLU):
    """``proj(x)``, then value times GELU of the gate: stock code runs two kernels on strided halves."""

    def compile_ahead(self) -> None:
        if type(getattr(self.proj, "weight", None)) is nn.Parameter and self.runs("linear_geglu"):
            compile_ahead(self.proj.weight)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return call_site(FusedGEGLU, self, hidden_states, *args, **kwargs)

    def call_reason(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> str | None:
        return "deprecated arguments were passed" if args or kwargs else None

    def fused_forward(self, hidden_states: Tensor) -> Tensor:
        if not self.runs("linear_geglu") or readable_reason(self.proj, nn.Linear, hidden_states):
            value_and_gate = self.proj(hidden_states)  # as with LoRA or quantised: only a call of it will do
            return geglu(value_and_gate) if self.runs("geglu") else self._gated(value_and_gate)
        return linear_geglu(hidden_states, self.proj.weight, self.proj.bias)

    def _gated(self, value_and_gate: Tensor) -> Tensor:
        value, gate = value_and_gate.chunk(2, dim=-1)
        return value * self.gelu(gate)
