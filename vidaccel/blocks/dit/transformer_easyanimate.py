"""diffusers' ``transformers/transformer_easyanimate.py``: EasyAnimate's block, of two streams or of one.

Text and video share their norms, but not what modulates them. In a block of two streams each has projections of its
own, and the norm of queries and keys with the rotary embedding writes the joint ones; in a block of one they share
those, and only attention joins them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_easyanimate import (
    EasyAnimateAttnProcessor2_0,
    EasyAnimateLayerNormZero,
    EasyAnimateTransformerBlock,
)
from torch import Tensor, nn

from vidaccel.blocks.dit.attention import (
    CROSS_ATTENTION,
    attention_reason,
    feed_forward,
    over_heads,
    project,
)
from vidaccel.blocks.dit.gated_residual import FLOAT32_NORMS, GatedResidualBlock
from vidaccel.blocks.dit.rotary import alike_reason, half_tables
from vidaccel.kernels.attention.qk_norm_rope import HeadNorm, Rope, SecondStream, qk_norm_rope
from vidaccel.kernels.attention.spatial_attention import spatial_attention
from vidaccel.kernels.op import REFERENCE, note
from vidaccel.parallel.layout import own_tokens
from vidaccel.sites.block import CORNER_ROWS, MOST_WHOLE, call_site, fuses
from vidaccel.sites.memo import once_in_call
from vidaccel.sites.plain import parameters_reason, plain_reason
from vidaccel.sites.site import Fidelity

__all__ = ["EASYANIMATE_OPS", "FusedEasyAnimateTransformerBlock"]

EASYANIMATE_OPS: dict[str, Fidelity] = {
    "gated_residual_norm": "math-exact",
    "qk_norm_rope": "math-exact",
    "spatial_attention": "math-exact",
    "linear_gelu": "math-exact",
}

Rotary = tuple[Tensor, Tensor]  # cos and sin [S, D] float32, of the tokens of the video, every value twice
Modulation = tuple[Tensor, ...]  # shift, scale and gate of a stream, [B, 1, C]


@fuses(EasyAnimateTransformerBlock, EASYANIMATE_OPS)
class FusedEasyAnimateTransformerBlock(GatedResidualBlock, EasyAnimateTransformerBlock):
    """Joint attention and feed-forwards of video ``[B, S, C]`` and text ``[B, T, C]``."""

    norm1: Any
    norm2: Any
    norm3: Any
    attn1: Any
    ff: Any
    txt_ff: Any

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        return call_site(
            FusedEasyAnimateTransformerBlock, self, hidden_states, encoder_hidden_states, temb, image_rotary_emb
        )

    def call_reason(self, x: Tensor, text: Tensor, temb: Tensor, *args: Any) -> str | None:
        if torch.is_autocast_enabled(x.device.type):
            return "autocast is on"
        if not x.dtype == text.dtype == temb.dtype:
            return "video, text and timestep embedding differ in dtype"
        if not len(x) == len(text) == len(temb):  # stock code may broadcast them
            return "video, text and timestep embedding differ in batch size"
        for norm in (self.norm1, self.norm2):
            if reason := plain_reason(norm, EasyAnimateLayerNormZero):
                return reason
            kind = FP32LayerNorm if isinstance(norm.norm, FP32LayerNorm) else nn.LayerNorm
            if kind is FP32LayerNorm and x.dtype == torch.float64:
                return FLOAT32_NORMS
            if reason := parameters_reason(norm.norm, kind, x.device):
                return reason
        return None

    def spread_reason(self, x: Tensor, text: Tensor, temb: Tensor, rotary: Rotary | None) -> str | None:
        return self._attention_reason(x, rotary)

    def path_in_data(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        *_, rotary = args
        return alike_reason(*(rotary or ()))

    def corner(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, text, temb, rotary = args
        if x.numel() <= MOST_WHOLE:
            return args, kwargs
        rotary = None if rotary is None else tuple(table[:CORNER_ROWS] for table in rotary)
        return (x[:, :CORNER_ROWS], text[:, :CORNER_ROWS], temb, rotary), kwargs

    def fused_forward(self, x: Tensor, text: Tensor, temb: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        of_video, of_text = _modulations(self.norm1, temb)
        ff_of_video, ff_of_text = _modulations(self.norm2, temb)
        normed, text_normed = self._into_attention(x, of_video), self._into_attention(text, of_text)
        attended, text_attended = self._attention(normed, text_normed, rotary)
        x = self._behind_attention(x, attended, of_video, ff_of_video, self.ff)
        text = self._behind_attention(text, text_attended, of_text, ff_of_text, self.txt_ff or self.ff)
        return x, text

    def _into_attention(self, x: Tensor, modulation: Modulation) -> Tensor:
        shift, scale, _ = modulation
        return self.modulate(self.norm1.norm, x, scale, shift)

    def _behind_attention(self, x: Tensor, attended: Tensor, first: Modulation, second: Modulation, ff: Any) -> Tensor:
        shift, scale, gate = second
        x, normed = self.add_norm(x, attended, first[2], self.norm2.norm, scale, shift)
        branch = feed_forward(ff, normed, fused=self.runs("linear_gelu"))
        return self.add(x, branch if self.norm3 is None else self.norm3(branch), gate)

    def _attention(self, x: Tensor, text: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        attn, tokens = self.attn1, text.shape[1]
        if reason := self._attention_reason(x, rotary):
            for op in ("qk_norm_rope", "spatial_attention"):
                note(op, REFERENCE, reason)
            out: tuple[Tensor, Tensor] = attn(
                hidden_states=x, encoder_hidden_states=text, image_rotary_emb=rotary
            )  # fmt: skip
            return out
        query, key, value = self._joint(x, text, rotary)
        # stock code asks PyTorch for its attention, whatever backend of diffusers somebody has chosen
        impl = None if self.runs("spatial_attention") else REFERENCE
        joint = over_heads(partial(spatial_attention, impl=impl), query, key, value, attn.heads, before=tokens)
        text = joint[:, :tokens]
        return project(attn, joint[:, tokens:]), text if attn.add_q_proj is None else attn.to_add_out(text)

    def _attention_reason(self, x: Tensor, rotary: Rotary | None) -> str | None:
        """Why attention has to be called, or None."""
        attn = self.attn1
        if not self.runs("qk_norm_rope"):
            return "qk_norm_rope is off, or failed"
        if reason := attention_reason(attn, Attention, EasyAnimateAttnProcessor2_0):
            return reason
        if attn.is_cross_attention:
            return CROSS_ATTENTION
        if rotary is not None and any(table.dtype != torch.float32 for table in rotary):
            return "its rotary table is not float32"
        added = () if attn.add_q_proj is None else (attn.norm_added_q, attn.norm_added_k)
        norms = attn.norm_q, attn.norm_k, *added
        for norm in norms:
            if reason := parameters_reason(norm, nn.LayerNorm, x.device):
                return reason
        if len({norm.eps for norm in norms}) > 1:
            return "its norms differ in eps"
        return alike_reason(*(rotary or ()))

    def _joint(self, x: Tensor, text: Tensor, rotary: Rotary | None) -> list[Tensor]:
        """Queries, keys and values ``[B, T + S, H*D]``."""
        attn, norm = self.attn1, _head_norm(self.attn1.norm_q, self.attn1.norm_k)
        if attn.add_q_proj is None:
            x = torch.cat([text, x], dim=1)
            query, key, value = attn.to_q(x), attn.to_k(x), attn.to_v(x)
            return [*qk_norm_rope(query, key, attn.heads, norm, _rope(rotary, text.shape[1], x.device)), value]
        query, key, value = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        of_text = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
        second = SecondStream(*of_text, _head_norm(attn.norm_added_q, attn.norm_added_k), first=True)
        return qk_norm_rope(query, key, attn.heads, norm, _rope(rotary, 0, x.device), v=value, second=second)


def _modulations(norm: Any, temb: Tensor) -> tuple[Modulation, Modulation]:
    """Those of the video and of the text."""
    parts = norm.linear(norm.silu(temb))[:, None].chunk(6, dim=2)
    return parts[:3], parts[3:]


def _head_norm(q: Any, k: Any) -> HeadNorm:
    return HeadNorm("layer_head", q.eps, q.weight, k.weight, q.bias, k.bias)


def _rope(rotary: Rotary | None, start: int, device: torch.device) -> Rope | None:
    """The tables, which stock code makes on the CPU and brings over in every block, are brought over once in a call."""
    if rotary is None:
        return None
    cos, sin = (own_tokens(table, 0) for table in half_tables((_here(rotary[0], device), _here(rotary[1], device))))
    return Rope("pairs", cos[None, :, None], sin[None, :, None], start=start)


def _here(table: Tensor, device: torch.device) -> Tensor:
    return once_in_call(f"on {device}", table, partial(table.to, device))
