"""diffusers' ``transformers/cogvideox_transformer_3d.py``: the block of CogVideoX, on text and video together.

Stock code norms and modulates the two streams one by one, joins them for attention and for the feed-forward, and splits
them behind each: 95 passes over the tokens of a block. Here they stay in one buffer, the text first, from block to
block (``joint_streams.py``), and everything between two products is one pass, in which each token takes the modulation
of its stream: 16 passes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import CogVideoXLayerNormZero
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import Tensor, nn

from vidaccel.blocks.dit.attention import (
    CROSS_ATTENTION,
    attention_reason,
    feed_forward,
    over_heads,
    project,
)
from vidaccel.blocks.dit.gated_residual import GatedResidualBlock
from vidaccel.blocks.dit.joint_streams import joined
from vidaccel.blocks.dit.rotary import alike_reason, half_tables
from vidaccel.blocks.dit.step_caches import known_to_step_caches
from vidaccel.kernels.attention.qk_norm_rope import HeadNorm, Rope, qk_norm_rope
from vidaccel.kernels.attention.spatial_attention import spatial_attention
from vidaccel.kernels.op import REFERENCE, note, one_or
from vidaccel.parallel.layout import all_tokens, own_tokens
from vidaccel.sites.block import CORNER_ROWS, MOST_WHOLE, call_site, fuses
from vidaccel.sites.memo import once_in_call
from vidaccel.sites.plain import parameters_reason, plain_reason
from vidaccel.sites.site import Fidelity

__all__ = ["COGVIDEOX_OPS", "FusedCogVideoXBlock", "JointBlock"]

COGVIDEOX_OPS: dict[str, Fidelity] = {
    "gated_residual_norm": "math-exact",
    "qk_norm_rope": "math-exact",
    "spatial_attention": "math-exact",
    "linear_gelu": "math-exact",
}

Rotary = tuple[Tensor, Tensor]  # cos and sin [S, D] float32, of the tokens of the video, every value twice


class JointBlock(GatedResidualBlock):
    """What the blocks of CogVideoX and ConsisID do alike: video ``[B, S, C]`` and text ``[B, T, C]``."""

    norm1: Any
    norm2: Any
    attn1: Any
    ff: Any

    def call_reason(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, *args: Any) -> str | None:
        if torch.is_autocast_enabled(hidden_states.device.type):
            return "autocast is on"
        if not hidden_states.dtype == encoder_hidden_states.dtype == temb.dtype:
            return "video, text and timestep embedding differ in dtype"
        batch = len(hidden_states)
        if len(encoder_hidden_states) != batch or not one_or(batch, len(temb)):  # stock code may broadcast them
            return "video, text and timestep embedding differ in batch size"
        for norm in (self.norm1, self.norm2):
            if reason := plain_reason(norm, CogVideoXLayerNormZero):
                return reason
            if reason := parameters_reason(norm.norm, nn.LayerNorm, hidden_states.device):
                return reason
        return None

    def spread_reason(
        self, video: Tensor, text: Tensor, temb: Tensor, rotary: Any, attention_kwargs: Any = None
    ) -> str | None:
        return _foreign_reason(self.attn1, attention_kwargs or {}) or self._rope_reason(video, rotary)

    def path_in_data(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _, _, _, rotary, *_ = args
        return alike_reason(*(rotary or ()), given=True)

    def corner(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        video, text, temb, rotary, *others = args
        if video.numel() <= MOST_WHOLE:
            return args, kwargs
        if any(others):  # a mask of all tokens, perhaps
            return None
        rotary = None if rotary is None else tuple(table[:CORNER_ROWS] for table in rotary)
        return (video[:, :CORNER_ROWS], text[:, :CORNER_ROWS], temb, rotary, *others), kwargs

    def fused_forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary | None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        tokens = encoder_hidden_states.shape[1]
        x = joined(encoder_hidden_states, hidden_states)
        rows = _streams(x, tokens, temb)
        shift, scale, gate = _modulation(self.norm1, temb)
        ff_shift, ff_scale, ff_gate = _modulation(self.norm2, temb)
        normed = self.modulate(self.norm1.norm, x, scale, shift, rows)
        attended = self._attention(normed, tokens, image_rotary_emb, attention_kwargs or {})
        x, normed = self.add_norm(x, attended, gate, self.norm2.norm, ff_scale, ff_shift, rows)
        x = self.add(x, feed_forward(self.ff, normed, fused=self.runs("linear_gelu")), ff_gate, rows)
        text, video = x.split([tokens, x.shape[1] - tokens], dim=1)
        return video, text

    def _attention(self, x: Tensor, tokens: int, rotary: Rotary | None, attention_kwargs: dict[str, Any]) -> Tensor:
        """``[B, T + S, C]`` of ``x`` ``[B, T + S, C]``, of which the first ``tokens`` are text."""
        attn = self.attn1
        if reason := _foreign_reason(attn, attention_kwargs):
            note("qk_norm_rope", REFERENCE, reason)
            note("spatial_attention", REFERENCE, reason)
            text, video = x.split([tokens, x.shape[1] - tokens], dim=1)
            video, text = attn(
                hidden_states=video, encoder_hidden_states=text, image_rotary_emb=rotary, **attention_kwargs
            )
            return joined(text, video)
        query, key, value = _qkv(attn, x)
        query, key = self._normed_and_turned(query, key, tokens, rotary)
        # stock code asks PyTorch for its attention, whatever backend of diffusers somebody has chosen
        impl = None if self.runs("spatial_attention") else REFERENCE
        attention = partial(spatial_attention, impl=impl)
        return project(attn, over_heads(attention, query, key, value, attn.heads, before=tokens))

    def _normed_and_turned(
        self, query: Tensor, key: Tensor, tokens: int, rotary: Rotary | None
    ) -> tuple[Tensor, Tensor]:
        attn = self.attn1
        if reason := self._rope_reason(query, rotary, tokens):
            note("qk_norm_rope", REFERENCE, reason)
            pairs = (attn.norm_q, query), (attn.norm_k, key)
            query, key = (_stock_norm_rope(norm, x, attn.heads, tokens, rotary) for norm, x in pairs)
            return query, key
        rope = None
        if rotary is not None:
            cos, sin = (own_tokens(table, 0) for table in half_tables(rotary))
            rope = Rope("pairs", cos[None, :, None], sin[None, :, None], start=tokens)
        query, key = qk_norm_rope(query, key, attn.heads, _head_norm(attn), rope)
        return query, key

    def _rope_reason(self, x: Tensor, rotary: Rotary | None, text: int = 0) -> str | None:
        """Why queries and keys are normed and turned by stock code, or None; the first tokens of ``x`` are ``text``."""
        if not self.runs("qk_norm_rope"):
            return "it is off, or failed"
        if rotary is not None and any(t.dtype != torch.float32 or t.device != x.device for t in rotary):
            return "its rotary table is not float32, or on another device"
        angles = all_tokens(x[:, text:]), x.shape[2] // self.attn1.heads
        if rotary is not None and any(t.shape != angles for t in rotary):  # stock code may broadcast it
            return "its rotary table has not one row for each token"
        norms = self.attn1.norm_q, self.attn1.norm_k
        for norm in norms:
            if reason := parameters_reason(norm, nn.LayerNorm, x.device):
                return reason
        if norms[0].eps != norms[1].eps:
            return "its norms differ in eps"
        return alike_reason(*(rotary or ()), given=True)


def _foreign_reason(attn: Any, attention_kwargs: dict[str, Any]) -> str | None:
    """Why an attention has to be called, or None."""
    if attention_kwargs:
        return f"its attention takes {', '.join(attention_kwargs)}"
    if attn.is_cross_attention:
        return CROSS_ATTENTION
    fused = type(attn.processor) is FusedCogVideoXAttnProcessor2_0
    return attention_reason(attn, Attention, FusedCogVideoXAttnProcessor2_0 if fused else CogVideoXAttnProcessor2_0)


def _streams(x: Tensor, tokens: int, temb: Tensor) -> Tensor:
    """``[T + S]`` int32, the row of the modulation for each token of ``x``: 1 for the text, 0 for the video."""

    def make() -> Tensor:
        return (torch.arange(x.shape[1], device=x.device) < tokens).to(torch.int32)

    return once_in_call(f"streams of {x.shape[1]} tokens, {tokens} of text", temb, make)


def _modulation(norm: Any, temb: Tensor) -> tuple[Tensor, ...]:
    """Shift, scale and gate, ``[B, 2, C]`` each: the first row for the video, the second for the text."""
    return norm.linear(norm.silu(temb)).unflatten(1, (2, 3, -1)).unbind(2)


def _qkv(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # not attn.fused_projections, which stays where unfuse_qkv_projections() has put other processors in place
    if type(attn.processor) is FusedCogVideoXAttnProcessor2_0:
        query, key, value = attn.to_qkv(x).chunk(3, dim=-1)
        return query, key, value
    return attn.to_q(x), attn.to_k(x), attn.to_v(x)


def _head_norm(attn: Any) -> HeadNorm:
    q, k = attn.norm_q, attn.norm_k
    return HeadNorm("layer_head", q.eps, q.weight, k.weight, q.bias, k.bias)


def _stock_norm_rope(norm: Any, x: Tensor, num_heads: int, tokens: int, rotary: Rotary | None) -> Tensor:
    heads = x.unflatten(2, (num_heads, -1))
    if norm is not None:
        heads = norm(heads.transpose(1, 2)).transpose(1, 2)  # [B, H, S, D] as stock gives it: it may be hooked
    if rotary is not None:
        turned: Any = apply_rotary_emb(heads[:, tokens:], rotary, sequence_dim=1)  # type: ignore[arg-type]
        heads = torch.cat([heads[:, :tokens], turned], dim=1)
    return heads.flatten(2)


@known_to_step_caches
@fuses(CogVideoXBlock, COGVIDEOX_OPS)
class FusedCogVideoXBlock(JointBlock, CogVideoXBlock):
    """Attention and feed-forward over text and video, each stream modulated by its own part of the timestep."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        return call_site(
            FusedCogVideoXBlock,
            self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, attention_kwargs,
        )  # fmt: skip
