"""diffusers' ``transformers/transformer_anyflow_far.py``: the block of AnyFlow FAR, which makes a clip chunk by chunk.

Its self-attention, which reads and writes a cache of keys and values and masks blocks of frames, stays diffusers'.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_anyflow_far import (
    AnyFlowAttention,
    AnyFlowCausalAttnProcessor,
    AnyFlowCrossAttnProcessor,
    AnyFlowTransformerBlock,
)
from torch import Tensor

from vidaccel.blocks.dit.step_caches import known_to_step_caches
from vidaccel.blocks.dit.transformer_anyflow import AnyFlowBlock
from vidaccel.blocks.dit.transformer_wan import WAN_OPS, Parts
from vidaccel.sites.block import call_site, fuses

__all__ = ["FusedAnyFlowFARTransformerBlock"]


@known_to_step_caches
@fuses(AnyFlowTransformerBlock, {op: fidelity for op, fidelity in WAN_OPS.items() if op != "qk_norm_rope"})
class FusedAnyFlowFARTransformerBlock(AnyFlowBlock, AnyFlowTransformerBlock):
    """Wan's block around a causal self-attention."""

    parts = Parts(AnyFlowAttention, AnyFlowCausalAttnProcessor, AnyFlowCrossAttnProcessor, RMSNorm, takes_image=False)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Tensor,
        attention_mask: Tensor,
        kv_cache: Any = None,
        kv_cache_flag: Any = None,
    ) -> Tensor:
        return call_site(
            FusedAnyFlowFARTransformerBlock,
            self, hidden_states, encoder_hidden_states, temb, rotary_emb, attention_mask, kv_cache, kv_cache_flag,
        )  # fmt: skip

    def corner(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return None  # its self-attention writes to the cache

    def fused_forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        context: Tensor,
        temb: Tensor,
        rotary_emb: Any,
        mask: Any,
        kv_cache: Any,
        kv_cache_flag: Any,
    ) -> Tensor:
        modulation = self.modulation(temb)
        given = {} if kv_cache is None else {"kv_cache": kv_cache, "kv_cache_flag": kv_cache_flag}
        attended = self.attn1(
            hidden_states=self.modulate(hidden_states, modulation),
            rotary_emb=rotary_emb,
            attention_mask=mask,
            **given,
        )
        return self.rest(hidden_states, attended, context, modulation)
