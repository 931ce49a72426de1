"""diffusers' ``transformers/transformer_kandinsky.py``: the blocks of Kandinsky 5, of its text and of its video.

Stock code goes to float32 and back around every norm, modulation, gate and rotary embedding. Here everything between
two products is one pass, which rounds where stock code stores. The rotary embedding is rounded to bfloat16 there,
whatever the model is in: fused in bfloat16, else left to the attention.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers.models.transformers.transformer_kandinsky import (
    Kandinsky5Attention,
    Kandinsky5AttnProcessor,
    Kandinsky5TransformerDecoderBlock,
    Kandinsky5TransformerEncoderBlock,
)
from torch import Tensor, nn

from vidaccel.blocks.dit.attention import attend, attention_reason
from vidaccel.blocks.dit.gated_residual import FLOAT32_NORMS, GatedResidualBlock, norm_heads
from vidaccel.blocks.dit.rotary import alike_reason
from vidaccel.blocks.dit.step_caches import known_to_step_caches
from vidaccel.kernels.attention.qk_norm_rope import HeadNorm, Rope, qk_norm_rope
from vidaccel.kernels.norm.gated_residual_norm import Rounding
from vidaccel.kernels.op import REFERENCE, note
from vidaccel.sites.block import CORNER_ROWS, MOST_WHOLE, call_site, fuses
from vidaccel.sites.memo import once_in_call
from vidaccel.sites.plain import parameters_reason
from vidaccel.sites.site import Fidelity

__all__ = [
    "KANDINSKY_OPS",
    "FusedKandinsky5TransformerDecoderBlock",
    "FusedKandinsky5TransformerEncoderBlock",
    "are_rotations",
    "rope_of",
]

KANDINSKY_OPS: dict[str, Fidelity] = {
    "gated_residual_norm": "math-exact",
    "qk_norm_rope": "math-exact",
    "spatial_attention": "math-exact",
}


class KandinskyBlock(GatedResidualBlock):
    """What the blocks of text and of video do alike, on ``[B, S, C]``."""

    rounding: ClassVar[Rounding] = "once"
    norms: ClassVar[tuple[str, ...]]

    self_attention_norm: Any
    self_attention: Any
    feed_forward_norm: Any
    feed_forward: Any

    def path_in_data(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        (rope,) = (x for x in args if isinstance(x, Tensor) and x.ndim > 3)
        return alike_reason(rope, alike=are_rotations)

    def corner(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, *others, rope = args
        if x.numel() <= MOST_WHOLE:
            return args, kwargs
        return (x[:, :CORNER_ROWS], *others, rope[:, :CORNER_ROWS]), kwargs

    def call_reason(self, x: Tensor, *args: Any) -> str | None:
        if torch.is_autocast_enabled(x.device.type):
            return "autocast is on"
        if x.dtype == torch.float64:
            return FLOAT32_NORMS
        given = [t for t in args if isinstance(t, Tensor) and t.ndim <= 3]  # text and timestep embedding, not the rope
        if any(len(t) != len(x) for t in given):  # stock code may broadcast them
            return "its text, its video and its timesteps differ in batch size"
        for name in self.norms:
            if reason := parameters_reason(getattr(self, name), nn.LayerNorm, x.device):
                return reason
        return None

    def attend_to_itself(self, x: Tensor, rope: Tensor, sparse_params: dict[str, Any] | None = None) -> Tensor:
        attn = self.self_attention
        if reason := self._self_attention_reason(x, rope, sparse_params):
            for op in ("qk_norm_rope", "spatial_attention"):
                note(op, REFERENCE, reason)
            out: Tensor = attn(x, rotary_emb=rope, sparse_params=sparse_params)
            return out
        query, key, value = attn.to_query(x), attn.to_key(x), attn.to_value(x)
        q, k = attn.query_norm, attn.key_norm
        eps = torch.finfo(torch.float32).eps if q.eps is None else q.eps
        norm = HeadNorm("rms_head", eps, q.weight, k.weight)
        query, key = qk_norm_rope(query, key, attn.num_heads, norm, rope_of(rope))
        return self.attend(attn, query, key, value)

    def _self_attention_reason(self, x: Tensor, rope: Tensor, sparse_params: Any) -> str | None:
        """Why self-attention has to be called, or None."""
        attn = self.self_attention
        if not self.runs("qk_norm_rope"):
            return "qk_norm_rope is off, or failed"
        if sparse_params is not None:
            return "its attention is sparse"
        if reason := attention_reason(attn, Kandinsky5Attention, Kandinsky5AttnProcessor):
            return reason
        if x.dtype != torch.bfloat16 or rope.dtype != torch.float32:
            return "its rotary embedding is rounded to bfloat16, or its table is not float32"
        for norm in (attn.query_norm, attn.key_norm):
            if reason := parameters_reason(norm, nn.RMSNorm, x.device):
                return reason
        if attn.query_norm.eps != attn.key_norm.eps:
            return "its norms differ in eps"
        return alike_reason(rope, alike=are_rotations)

    def attend(self, attn: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        fused = self.runs("spatial_attention")
        out: Tensor = attn.out_layer(attend(attn.processor, query, key, value, attn.num_heads, fused=fused))
        return out


def are_rotations(rope: Tensor) -> bool:
    cos, sin = rope[..., 0, 0], rope[..., 1, 0]
    return torch.equal(rope[..., 1, 1], cos) and torch.equal(rope[..., 0, 1], -sin)


def rope_of(rope: Tensor) -> Rope:
    """The rotary embedding of ``[B, S, 1, D/2, 2, 2]``, or of ``[S, 1, D/2, 2, 2]`` for all samples: rotations.

    Its sines and cosines are taken once in a call.
    """
    cos = once_in_call("cosines", rope, lambda: rope[..., 0, 0].contiguous())
    sin = once_in_call("sines", rope, lambda: rope[..., 1, 0].contiguous())
    return Rope("pairs", cos, sin) if cos.ndim == 4 else Rope("pairs", cos[None], sin[None])


def _normed(norm: Any, x: Tensor, num_heads: int) -> Tensor:
    """``[B, S, H*D]``, as stock code norms its heads."""
    heads = x.unflatten(2, (num_heads, -1))
    normed: Tensor = norm(heads.float())
    return normed.type_as(x).flatten(2)


@fuses(Kandinsky5TransformerEncoderBlock, KANDINSKY_OPS)
class FusedKandinsky5TransformerEncoderBlock(KandinskyBlock, Kandinsky5TransformerEncoderBlock):
    """Self-attention and feed-forward of the text."""

    norms: ClassVar[tuple[str, ...]] = ("self_attention_norm", "feed_forward_norm")

    text_modulation: Any

    def forward(self, x: Tensor, time_embed: Tensor, rope: Tensor) -> Tensor:
        return call_site(FusedKandinsky5TransformerEncoderBlock, self, x, time_embed, rope)

    def fused_forward(self, x: Tensor, time_embed: Tensor, rope: Tensor) -> Tensor:
        modulation = self.text_modulation(time_embed)[:, None]
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation.chunk(6, dim=-1)
        normed = self.modulate(self.self_attention_norm, x, scale, shift)
        attended = self.attend_to_itself(normed, rope)
        x, normed = self.add_norm(x, attended, gate, self.feed_forward_norm, ff_scale, ff_shift)
        return self.add(x, self.feed_forward(normed), ff_gate)


@known_to_step_caches
@fuses(Kandinsky5TransformerDecoderBlock, KANDINSKY_OPS)
class FusedKandinsky5TransformerDecoderBlock(KandinskyBlock, Kandinsky5TransformerDecoderBlock):
    """Self-attention of the video, cross-attention to the text, and feed-forward."""

    norms: ClassVar[tuple[str, ...]] = ("self_attention_norm", "cross_attention_norm", "feed_forward_norm")

    visual_modulation: Any
    cross_attention_norm: Any
    cross_attention: Any

    def forward(
        self, visual_embed: Tensor, text_embed: Tensor, time_embed: Tensor, rope: Tensor, sparse_params: Any
    ) -> Tensor:
        return call_site(
            FusedKandinsky5TransformerDecoderBlock, self, visual_embed, text_embed, time_embed, rope, sparse_params
        )

    def corner(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        *of_tokens, sparse_params = args
        if args[0].numel() > MOST_WHOLE and sparse_params is not None:  # a mask of all tokens
            return None
        corner, _ = super().corner(tuple(of_tokens), kwargs)
        return (*corner, sparse_params), kwargs

    def fused_forward(
        self, x: Tensor, text_embed: Tensor, time_embed: Tensor, rope: Tensor, sparse_params: dict[str, Any] | None
    ) -> Tensor:
        modulation = self.visual_modulation(time_embed)[:, None].chunk(9, dim=-1)
        shift, scale, gate, cross_shift, cross_scale, cross_gate, ff_shift, ff_scale, ff_gate = modulation
        normed = self.modulate(self.self_attention_norm, x, scale, shift)
        attended = self.attend_to_itself(normed, rope, sparse_params)
        x, normed = self.add_norm(x, attended, gate, self.cross_attention_norm, cross_scale, cross_shift)
        attended = self._attend_to_text(normed, text_embed)
        x, normed = self.add_norm(x, attended, cross_gate, self.feed_forward_norm, ff_scale, ff_shift)
        return self.add(x, self.feed_forward(normed), ff_gate)

    def _attend_to_text(self, x: Tensor, text: Tensor) -> Tensor:
        attn = self.cross_attention
        if attention_reason(attn, Kandinsky5Attention, Kandinsky5AttnProcessor):
            out: Tensor = attn(x, encoder_hidden_states=text)
            return out
        query, key, value = attn.to_query(x), attn.to_key(text), attn.to_value(text)
        if self.runs("gated_residual_norm") and not parameters_reason(attn.query_norm, nn.RMSNorm, x.device):
            query = norm_heads(attn.query_norm, query, attn.num_heads)
        else:
            query = _normed(attn.query_norm, query, attn.num_heads)
        return self.attend(attn, query, _normed(attn.key_norm, key, attn.num_heads), value)
