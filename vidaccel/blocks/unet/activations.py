"""diffusers' ``models/activations.py``: the gated GELU of every feed-forward here, in or in one pass after its GEMM."""

from __future__ import annotations

from typing import Any

from diffusers.models.activations import GEGLU
from torch import Tensor, nn

from vidaccel.kernels.ffn.geglu import geglu
from vidaccel.kernels.ffn.linear_geglu import linear_geglu
from vidaccel.sites.parameters import why_unreadable
from vidaccel.sites.site import FusedBlock, fuses

__all__ = ["FusedGEGLU"]


@fuses(GEGLU, {"geglu": "math-exact"})
class FusedGEGLU(FusedBlock, GEGLU):
    """``proj(x)``, then value times GELU of the gate: stock code runs two kernels on strided halves."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.guarded(hidden_states, *args, **kwargs)

    def why_unserved(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> str | None:
        return "deprecated arguments were passed" if args or kwargs else None

    def fused_forward(self, hidden_states: Tensor) -> Tensor:
        if why_unreadable(self.proj, nn.Linear, hidden_states):  # as with LoRA or quantised: only a call of it will do
            return geglu(self.proj(hidden_states))
        return linear_geglu(hidden_states, self.proj.weight, self.proj.bias)
