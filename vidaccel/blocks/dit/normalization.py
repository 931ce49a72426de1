"""diffusers' ``models/normalization.py``: the modulation that a transformer makes of its timestep.

LTX gives every token a timestep of its own where an image or some frames are given, and there are two or three
different ones. The embedding, and all that the blocks make of it, are made once for each of these
(``modulation_rows.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.normalization import AdaLayerNormSingle
from torch import Tensor

from vidaccel.blocks.dit.modulation_rows import distinct_rows, keep_rows
from vidaccel.sites.block import CORNER_ROWS, FusedBlock, call_site, fuses
from vidaccel.sites.plain import order_reason

__all__ = ["FusedAdaLayerNormSingle", "TimestepModulation"]


class TimestepModulation(FusedBlock):
    """What the classes of diffusers that go by this name do alike: a timestep in, its modulation and embedding out."""

    def call_reason(self, timestep: Tensor, added: Any, batch_size: int | None, dtype: Any) -> str | None:
        if added and any(value is not None for value in added.values()):
            return "it embeds more than a timestep"
        return order_reason(self)

    def corner(self, args: Any, kwargs: Any) -> Any:
        timestep, added, batch_size, dtype = args
        if batch_size is None or len(timestep) <= CORNER_ROWS:
            return args, kwargs
        tokens = timestep.view(batch_size, -1)
        every = max(tokens.shape[1] // CORNER_ROWS, 1)
        return (tokens[:, ::every].flatten(), added, batch_size, dtype), kwargs

    def fused_forward(self, timestep: Tensor, added: Any, batch_size: int | None, dtype: Any) -> tuple[Tensor, Tensor]:
        stock: Any = self.original.forward
        tokens = 1 if batch_size is None else len(timestep) // batch_size
        if batch_size is None or tokens == 1 or _is_recorded(timestep):
            return stock(self, timestep, added, batch_size, dtype)
        distinct, rows = distinct_rows(timestep.view(batch_size, tokens, 1, 1))  # [B, R, 1, 1]
        if distinct.shape[1] == tokens:
            return stock(self, timestep, added, batch_size, dtype)
        modulation, embedding = stock(self, distinct.flatten(), added, batch_size, dtype)  # [B*R, P*C], [B*R, C]
        modulation, embedding = (x.unflatten(0, distinct.shape[:2]) for x in (modulation, embedding))
        of_tokens = _of_tokens(modulation, rows, tokens)  # a row per token, for a block that is not fused
        parts = (-1, embedding.shape[2])  # [B, R, P, C]
        keep_rows(of_tokens.unflatten(2, parts), modulation.unflatten(2, parts), rows)
        return of_tokens.flatten(0, 1), _of_tokens(embedding, rows, tokens).flatten(0, 1)


def _is_recorded(timestep: Tensor) -> bool:
    """Whether a call is traced, or captured as a CUDA graph, and will be made again with other timesteps."""
    if torch.compiler.is_compiling():
        return True
    return timestep.is_cuda and torch.cuda.is_current_stream_capturing()


def _of_tokens(x: Tensor, rows: Tensor | None, tokens: int) -> Tensor:
    return x.expand(-1, tokens, -1).contiguous() if rows is None else x[:, rows]


@fuses(AdaLayerNormSingle, {"modulation_rows": "math-exact"})
class FusedAdaLayerNormSingle(TimestepModulation, AdaLayerNormSingle):
    """Of a timestep for each token, one modulation for each stretch of tokens that share it."""

    def forward(
        self,
        timestep: Tensor,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        batch_size: int | None = None,
        hidden_dtype: torch.dtype | None = None,
    ) -> Any:
        return call_site(FusedAdaLayerNormSingle, self, timestep, added_cond_kwargs, batch_size, hidden_dtype)
