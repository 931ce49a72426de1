"""diffusers' ``transformers/transformer_helios.py``: the block of Helios, Wan's with a history before the clip.

Tokens are those of earlier frames and then ``original_context_length`` of the clip itself. Every token has its row of
the modulation, but there are only two different ones: the history's and the clip's. A model with
``guidance_cross_attn`` lets only the clip attend to the text.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_helios import (
    HeliosAttention,
    HeliosAttnProcessor,
    HeliosTransformerBlock,
)
from torch import Tensor

from vidaccel.blocks.dit.step_caches import known_to_step_caches
from vidaccel.blocks.dit.transformer_wan import WAN_OPS, Parts, WanBlock
from vidaccel.kernels.attention.qk_norm_rope import Rope
from vidaccel.parallel.layout import all_tokens, own_tokens, tokens_before
from vidaccel.sites.block import CORNER_ROWS, call_site, fuses
from vidaccel.sites.memo import once_in_call

__all__ = ["FusedHeliosTransformerBlock"]


@known_to_step_caches
@fuses(HeliosTransformerBlock, WAN_OPS)
class FusedHeliosTransformerBlock(WanBlock, HeliosTransformerBlock):
    """Wan's block; ``rotary_emb`` is ``[B, S, 2 D]``, cosines and then sines, every angle twice."""

    parts = Parts(HeliosAttention, HeliosAttnProcessor, HeliosAttnProcessor, takes_image=False)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Tensor,
        original_context_length: int | None = None,
    ) -> Tensor:
        return call_site(
            FusedHeliosTransformerBlock,
            self, hidden_states, encoder_hidden_states, temb, rotary_emb, original_context_length,
        )  # fmt: skip

    def cut(  # type: ignore[override]
        self, x: Tensor, context: Tensor, temb: Tensor, rotary_emb: Tensor, clip_tokens: int
    ) -> tuple[Any, ...]:
        """As many tokens of the history as of the clip, from where they meet."""
        border = x.shape[1] - clip_tokens
        tokens = slice(max(border - CORNER_ROWS // 2, 0), border + CORNER_ROWS // 2)
        temb = temb[:, tokens] if temb.ndim == 4 else temb
        x = x[:, tokens]
        return x, context, temb, rotary_emb[:, tokens], min(clip_tokens, CORNER_ROWS // 2)

    def rope_reason(self, rotary_emb: Tensor) -> str | None:
        return None if rotary_emb.dtype == torch.float32 else "its rotary table is not float32"

    def rope(self, rotary_emb: Tensor) -> Rope:
        cos, sin = once_in_call("cos and sin", rotary_emb, lambda: _half_tables(rotary_emb))
        return Rope("pairs", own_tokens(cos, 1), own_tokens(sin, 1))

    def self_attention_reason(self, x: Tensor, rotary_emb: Tensor) -> str | None:
        if reason := super().self_attention_reason(x, rotary_emb):
            return reason
        return "it amplifies the keys of its history" if self.attn1.is_amplify_history else None

    def cross_attention(self, x: Tensor, context: Tensor, clip_tokens: int) -> Tensor:
        if not self.guidance_cross_attn:
            return super().cross_attention(x, context, clip_tokens)
        history = all_tokens(x) - clip_tokens - tokens_before()
        history = min(max(history, 0), x.shape[1])
        return F.pad(super().cross_attention(x[:, history:], context, clip_tokens), (0, 0, history, 0))

    def fused_forward(  # type: ignore[override]
        self, hidden_states: Tensor, context: Tensor, temb: Tensor, rotary_emb: Tensor, clip_tokens: int
    ) -> Tensor:
        modulation = self.modulation(temb)
        normed = self.modulate(hidden_states, modulation)
        attended = self.self_attention(normed, rotary_emb, None, clip_tokens)
        return self.rest(hidden_states, attended, context, modulation, clip_tokens)


def _half_tables(rotary_emb: Tensor) -> tuple[Tensor, Tensor]:
    """``[B, S, 1, D/2]`` each, every angle once."""
    cos, sin = rotary_emb[:, :, None].chunk(2, dim=-1)
    return cos[..., 0::2].contiguous(), sin[..., 1::2].contiguous()
