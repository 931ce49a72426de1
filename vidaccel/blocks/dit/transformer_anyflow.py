"""diffusers' ``transformers/transformer_anyflow.py``: the block of AnyFlow, Wan's with other attentions.

Stock code turns queries and keys as complex numbers of float64, and rounds what comes out to their dtype; here they
turn in float32. Their norm is diffusers', which rounds before it multiplies by its weight. Every token has its row of
the modulation, made once for each stretch of tokens with equal ones.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_anyflow import (
    AnyFlowAttention,
    AnyFlowAttnProcessor,
    AnyFlowCrossAttnProcessor,
    AnyFlowTransformerBlock,
)
from torch import Tensor

from vidaccel.blocks.dit.step_caches import known_to_step_caches
from vidaccel.blocks.dit.transformer_wan import WAN_OPS, Parts, WanBlock, first_tokens
from vidaccel.kernels.attention.qk_norm_rope import Rope
from vidaccel.parallel.layout import own_tokens
from vidaccel.sites.block import CORNER_ROWS, call_site, fuses
from vidaccel.sites.memo import once_in_call

__all__ = ["AnyFlowBlock", "FusedAnyFlowTransformerBlock"]


class AnyFlowBlock(WanBlock):
    """What AnyFlow's two copies of its block do alike."""

    def call_reason(self, hidden_states: Tensor, context: Tensor, temb: Tensor, *args: Any) -> str | None:
        if temb.ndim != 4:
            return f"its timestep embedding has {temb.ndim} dimensions"
        return super().call_reason(hidden_states, context, temb, *args)

    def call_cross_attention(self, x: Tensor, context: Tensor, *args: Any) -> Tensor:
        return self.attn2(hidden_states=x, encoder_hidden_states=context)


@known_to_step_caches
@fuses(AnyFlowTransformerBlock, WAN_OPS)
class FusedAnyFlowTransformerBlock(AnyFlowBlock, AnyFlowTransformerBlock):
    """Wan's block; ``rotary_emb`` holds complex numbers ``[1, 1, S, D/2]``, the same for queries and keys."""

    parts = Parts(AnyFlowAttention, AnyFlowAttnProcessor, AnyFlowCrossAttnProcessor, RMSNorm, takes_image=False)

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
            FusedAnyFlowTransformerBlock,
            self, hidden_states, encoder_hidden_states, temb, rotary_emb, attention_mask, kv_cache, kv_cache_flag,
        )  # fmt: skip

    def call_reason(self, hidden_states: Tensor, context: Tensor, temb: Tensor, *args: Any) -> str | None:
        _, mask, kv_cache, _ = args
        if mask is not None or kv_cache is not None:
            return "it has a mask, or a cache of keys and values"
        return super().call_reason(hidden_states, context, temb, *args)

    def cut(self, x: Tensor, context: Tensor, temb: Tensor, rotary_emb: Any, *args: Any) -> tuple[Any, ...]:
        angles = rotary_emb["query"][:, :, :CORNER_ROWS]
        return x[:, :CORNER_ROWS], context, first_tokens(temb), {"query": angles, "key": angles}, *args

    def rope_reason(self, rotary_emb: Any) -> str | None:
        if rotary_emb is None or rotary_emb["query"] is not rotary_emb["key"]:
            return "its queries and keys do not turn alike"
        return None if rotary_emb["query"].is_complex() else "its rotary table is not complex"

    def rope(self, rotary_emb: Any) -> Rope:
        angles = rotary_emb["query"]
        cos, sin = once_in_call("cos and sin", angles, lambda: _tables(angles))
        return Rope("pairs", own_tokens(cos, 1), own_tokens(sin, 1))

    def call_self_attention(self, x: Tensor, rotary_emb: Any, mask: Any, *args: Any) -> Tensor:
        return self.attn1(hidden_states=x, rotary_emb=rotary_emb, attention_mask=mask)

    def fused_forward(
        self, hidden_states: Tensor, context: Tensor, temb: Tensor, rotary_emb: Any, *args: Any
    ) -> Tensor:
        return super().fused_forward(hidden_states, context, temb, rotary_emb)


def _tables(angles: Tensor) -> tuple[Tensor, Tensor]:
    """``[1, S, 1, D/2]`` each, float32."""
    angles = angles.transpose(1, 2)
    return angles.real.float().contiguous(), angles.imag.float().contiguous()
