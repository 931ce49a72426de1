"""diffusers' ``transformers/transformer_skyreels_v2.py``: the block of SkyReels-V2, a copy of Wan's.

In diffusion forcing each latent frame has its own timestep, and every block its modulation of every token; here it is
made once for each frame. A model with blocks of frames that attend to earlier ones only has a mask of all tokens by all
tokens; here each block of frames attends to those before it, without a mask.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_skyreels_v2 import (
    SkyReelsV2Attention,
    SkyReelsV2AttnProcessor,
    SkyReelsV2TransformerBlock,
)
from torch import Tensor

from vidaccel.blocks.dit.causal_mask import attended_prefixes
from vidaccel.blocks.dit.step_caches import known_to_step_caches
from vidaccel.blocks.dit.transformer_wan import WAN_OPS, Parts, WanBlock
from vidaccel.sites.block import CORNER_ROWS, call_site, fuses

__all__ = ["FusedSkyReelsV2TransformerBlock"]


@known_to_step_caches
@fuses(SkyReelsV2TransformerBlock, WAN_OPS)
class FusedSkyReelsV2TransformerBlock(WanBlock, SkyReelsV2TransformerBlock):
    """Wan's block; the embedding of timesteps is ``[B, 6, C]`` or, in diffusion forcing, ``[B, 6, S, C]``."""

    parts = Parts(SkyReelsV2Attention, SkyReelsV2AttnProcessor, SkyReelsV2AttnProcessor)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Tensor,
        attention_mask: Tensor,
    ) -> Tensor:
        return call_site(
            FusedSkyReelsV2TransformerBlock,
            self, hidden_states, encoder_hidden_states, temb, rotary_emb, attention_mask,
        )  # fmt: skip

    def by_token(self, temb: Tensor) -> Tensor:
        return super().by_token(temb.transpose(1, 2) if temb.ndim == 4 else temb)

    def cut(self, x: Tensor, context: Tensor, temb: Tensor, rotary_emb: Any, mask: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        x, context, _, tables = super().cut(x, context, temb, rotary_emb)
        temb = temb[:, :, :CORNER_ROWS] if temb.ndim == 4 else temb
        return x, context, temb, tables, None if mask is None else mask[..., :CORNER_ROWS, :CORNER_ROWS]

    def attend(
        self, attn: Any, query: Tensor, key: Tensor, value: Tensor, num_heads: int, mask: Tensor | None = None
    ) -> Tensor:
        attend = super().attend
        if mask is None or not self.runs("spatial_attention") or (prefixes := attended_prefixes(mask)) is None:
            return attend(attn, query, key, value, num_heads, mask)
        return torch.cat(
            [attend(attn, query[:, queries], key[:, :n], value[:, :n], num_heads) for queries, n in prefixes], dim=1
        )

    def fused_forward(  # type: ignore[override]
        self, hidden_states: Tensor, context: Tensor, temb: Tensor, rotary_emb: Any, mask: Tensor | None
    ) -> Tensor:
        modulation = self.modulation(temb)
        normed = self.modulate(hidden_states, modulation)
        return self.rest(hidden_states, self.self_attention(normed, rotary_emb, mask), context, modulation)
