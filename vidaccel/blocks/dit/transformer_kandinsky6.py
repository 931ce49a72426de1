"""diffusers' ``transformers/transformer_kandinsky6.py``: the blocks of Kandinsky 6, of texts, and of video and sound.

As in Kandinsky 5 all between two products is one pass, calculated in float32 from what it reads to what it stores.
Video and sound each attend to themselves and to their text, then to each other, each to what the other was before that
looked at its text.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from diffusers.models.transformers.transformer_kandinsky6 import (
    Kandinsky6Attention,
    Kandinsky6AttnProcessor,
    Kandinsky6FusedTransformerDecoderBlock,
    Kandinsky6TransformerEncoderBlock,
)
from torch import Tensor, nn

from vidaccel.blocks.dit.attention import attend, attention_reason, stock_heads
from vidaccel.blocks.dit.gated_residual import FLOAT32_NORMS, GatedResidualBlock
from vidaccel.blocks.dit.rotary import alike_reason
from vidaccel.blocks.dit.transformer_kandinsky import KANDINSKY_OPS, are_rotations, rope_of
from vidaccel.kernels.attention.qk_norm_rope import HeadNorm, qk_norm_rope
from vidaccel.kernels.norm.gated_residual_norm import Rounding
from vidaccel.kernels.op import REFERENCE, note
from vidaccel.sites.block import CORNER_ROWS, MOST_WHOLE, call_site, fuses
from vidaccel.sites.plain import parameters_reason

__all__ = ["FusedKandinsky6FusedTransformerDecoderBlock", "FusedKandinsky6TransformerEncoderBlock"]

NORMS = "self_attention_norm", "cross_attention_norm", "feed_forward_norm"  # of video, and of sound


class Kandinsky6Block(GatedResidualBlock):
    """What the blocks of a text and of video and sound do alike, on ``[B, S, C]``."""

    rounding: ClassVar[Rounding] = "once"

    def attention(self, attn: Any, x: Tensor, **given: Any) -> Tensor:
        """``attn(x, **given)``, which is how stock code calls it."""
        if reason := attention_reason(attn, Kandinsky6Attention, Kandinsky6AttnProcessor):
            for op in ("qk_norm_rope", "spatial_attention"):
                note(op, REFERENCE, reason)
            out: Tensor = attn(x, **given)
            return out
        context, rope = given.get("encoder_hidden_states", x), given.get("rotary_emb")
        query, key, value = attn.to_query(x), attn.to_key(context), attn.to_value(context)
        query, key = self._normed_and_turned(attn, query, key, given.get("rope_q", rope), given.get("rope_kv", rope))
        mask, fused = given.get("attn_mask"), self.runs("spatial_attention")
        out = attn.out_layer(attend(attn.processor, query, key, value, attn.num_heads, mask=mask, fused=fused))
        return out

    def _normed_and_turned(self, attn: Any, query: Tensor, key: Tensor, *ropes: Tensor | None) -> list[Tensor]:
        """Queries and keys, each by its rotary table ``[S, 1, D/2, 2, 2]`` if it has one."""
        heads, norms = attn.num_heads, (attn.query_norm, attn.key_norm)
        each = list(zip((query, key), norms, ropes, strict=True))
        if reason := self._rope_reason(query, norms, ropes):
            note("qk_norm_rope", REFERENCE, reason)
            return [_turned(stock_heads(norm, x, heads), rope) for x, norm, rope in each]
        return [
            y
            for x, norm, rope in each
            for y in qk_norm_rope(x, None, heads, _head_norm(norm), None if rope is None else rope_of(rope))
        ]

    def _rope_reason(self, query: Tensor, norms: tuple[Any, ...], ropes: tuple[Tensor | None, ...]) -> str | None:
        """Why queries and keys are normed and turned by stock code, or None."""
        if not self.runs("qk_norm_rope"):
            return "it is off, or failed"
        for norm in norms:
            if reason := parameters_reason(norm, nn.RMSNorm, query.device):
                return reason
            if norm.weight is None or norm.weight.dtype != query.dtype:
                return "a norm of queries or keys has no weight, or one of another dtype"
        tables = [rope for rope in ropes if rope is not None]
        if any(table.dtype != torch.float32 for table in tables):
            return "its rotary table is not float32"
        return alike_reason(*tables, alike=are_rotations)

    def norms_reason(self, x: Tensor, given: tuple[Any, ...], norms: tuple[Any, ...]) -> str | None:
        """Why a call with ``given`` texts and timestep embeddings goes to the original forward, or None."""
        if torch.is_autocast_enabled(x.device.type):
            return "autocast is on"
        if x.dtype == torch.float64:
            return FLOAT32_NORMS
        if any(len(other) != len(x) for other in given):  # stock code may broadcast them
            return "its tokens, its texts and its timesteps differ in batch size"
        for norm in norms:
            if reason := parameters_reason(norm, nn.LayerNorm, x.device):
                return reason
        return None


def _head_norm(norm: Any) -> HeadNorm:
    return HeadNorm("rms_head", torch.finfo(torch.float32).eps if norm.eps is None else norm.eps, norm.weight)


def _turned(x: Tensor, rope: Tensor | None) -> Tensor:
    """``[B, S, H, D]`` as rows, turned as stock code does it."""
    if rope is not None:
        pairs = x.reshape(*x.shape[:-1], -1, 1, 2).float()
        x = (rope.float() * pairs).sum(dim=-1).reshape(x.shape).to(x.dtype)
    return x.flatten(2)


@fuses(Kandinsky6TransformerEncoderBlock, KANDINSKY_OPS)
class FusedKandinsky6TransformerEncoderBlock(Kandinsky6Block, Kandinsky6TransformerEncoderBlock):
    """Self-attention and feed-forward of a text."""

    text_modulation: Any
    attn_norm: Any
    attn: Any
    feed_forward_norm: Any
    feed_forward: Any

    def forward(self, x: Tensor, time_embed: Tensor, rope: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return call_site(FusedKandinsky6TransformerEncoderBlock, self, x, time_embed, rope, attn_mask)

    def call_reason(self, x: Tensor, time_embed: Tensor, *args: Any) -> str | None:
        return self.norms_reason(x, (time_embed,), (self.attn_norm, self.feed_forward_norm))

    def path_in_data(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _, _, rope, _ = args
        return alike_reason(rope, alike=are_rotations)

    def corner(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, kwargs  # a text is short

    def fused_forward(self, x: Tensor, time_embed: Tensor, rope: Tensor, attn_mask: Tensor | None) -> Tensor:
        modulation = self.text_modulation(time_embed)[:, None]
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation.chunk(6, dim=-1)
        normed = self.modulate(self.attn_norm, x, scale, shift)
        attended = self.attention(self.attn, normed, rotary_emb=rope, attn_mask=attn_mask)
        x, normed = self.add_norm(x, attended, gate, self.feed_forward_norm, ff_scale, ff_shift)
        return self.add(x, self.feed_forward(normed), ff_gate)


class _Stream(NamedTuple):
    """Video, or sound, behind its self-attention.

    Attributes:
        x: ``[B, S, C]``, without what it found in its text.
        before_text: Its queries for the text; the other stream attends to it.
        from_text: What it found there.
        gate: Of that.
        feed_forward: Shift, scale and gate of the feed-forward.
    """

    x: Tensor
    before_text: Tensor
    from_text: Tensor
    gate: Tensor
    feed_forward: tuple[Tensor, Tensor, Tensor]


@fuses(Kandinsky6FusedTransformerDecoderBlock, KANDINSKY_OPS)
class FusedKandinsky6FusedTransformerDecoderBlock(Kandinsky6Block, Kandinsky6FusedTransformerDecoderBlock):
    """Video, or video and sound: self-attention, attention to the text, to each other, and feed-forward."""

    video_dec_block: Any
    audio_dec_block: Any
    va_cross_attention: Any
    av_cross_attention: Any
    va_modulation: Any
    av_modulation: Any
    va_normalization: Any
    av_normalization: Any

    def forward(
        self,
        vis: Tensor | None,
        aud: Tensor | None,
        text_v: Tensor,
        text_a: Tensor,
        time_embed: tuple[Tensor, Tensor],
        vis_rope: Tensor | None,
        aud_rope: Tensor | None,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        return call_site(
            FusedKandinsky6FusedTransformerDecoderBlock,
            self, vis, aud, text_v, text_a, time_embed, vis_rope, aud_rope, attn_mask,
        )  # fmt: skip

    def call_reason(self, *args: Any) -> str | None:
        vis, aud, text_v, text_a, time_embed, vis_rope, aud_rope, _ = args
        if vis is None:
            return "there is sound alone"
        if vis_rope is None or (aud is not None and aud_rope is None):
            return "its tokens have no rotary table"
        norms = [getattr(self.video_dec_block, name) for name in NORMS]
        given = (text_v, *time_embed)
        if aud is not None:
            norms += [getattr(self.audio_dec_block, name) for name in NORMS]
            norms += [self.va_normalization, self.av_normalization]
            given = (*given, aud, text_a)
        return self.norms_reason(vis, given, tuple(norms))

    def path_in_data(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        *_, vis_rope, aud_rope, _ = args
        return alike_reason(*(rope for rope in (vis_rope, aud_rope) if rope is not None), alike=are_rotations)

    def corner(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        vis, aud, text_v, text_a, time_embed, vis_rope, aud_rope, mask = args
        if vis.numel() > MOST_WHOLE:
            vis, vis_rope = vis[:, :CORNER_ROWS], vis_rope[:CORNER_ROWS]
            if aud is not None:
                aud, aud_rope = aud[:, :CORNER_ROWS], aud_rope[:CORNER_ROWS]
        return (vis, aud, text_v, text_a, time_embed, vis_rope, aud_rope, mask), kwargs

    def fused_forward(
        self,
        vis: Tensor,
        aud: Tensor | None,
        text_v: Tensor,
        text_a: Tensor,
        time_embed: tuple[Tensor, Tensor],
        vis_rope: Tensor,
        aud_rope: Tensor | None,
        attn_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        of_video, of_sound = time_embed
        video = self._to_itself_and_text(self.video_dec_block, vis, of_video, text_v, vis_rope, attn_mask)
        if aud is None or aud_rope is None:
            return self._feed_forward(self.video_dec_block, video.x, video.from_text, video.gate, video), None
        sound = self._to_itself_and_text(self.audio_dec_block, aud, of_sound, text_a, aud_rope, attn_mask)
        (shift, scale, gate), (sound_shift, sound_scale, sound_gate) = self._cross_modulations(of_video, of_sound)
        vis, query = self.add_norm(video.x, video.from_text, video.gate, self.va_normalization, scale, shift)
        aud, sound_query = self.add_norm(
            sound.x, sound.from_text, sound.gate, self.av_normalization, sound_scale, sound_shift
        )
        rope, sound_rope = (vis_rope, aud_rope) if self.ca_rope else (None, None)
        from_sound = self.attention(
            self.va_cross_attention, query, encoder_hidden_states=sound.before_text, rope_q=rope, rope_kv=sound_rope
        )
        from_video = self.attention(
            self.av_cross_attention, sound_query,
            encoder_hidden_states=video.before_text, rope_q=sound_rope, rope_kv=rope,
        )  # fmt: skip
        return (
            self._feed_forward(self.video_dec_block, vis, from_sound, gate, video),
            self._feed_forward(self.audio_dec_block, aud, from_video, sound_gate, sound),
        )

    def _to_itself_and_text(
        self, part: Any, x: Tensor, temb: Tensor, text: Tensor, rope: Tensor, mask: Tensor | None
    ) -> _Stream:
        modulation = part.visual_modulation(temb)[:, None].chunk(9, dim=-1)
        shift, scale, gate, text_shift, text_scale, text_gate, *of_feed_forward = modulation
        normed = self.modulate(part.self_attention_norm, x, scale, shift)
        attended = self.attention(part.self_attention, normed, rotary_emb=rope)
        x, normed = self.add_norm(x, attended, gate, part.cross_attention_norm, text_scale, text_shift)
        from_text = self.attention(part.cross_attention, normed, encoder_hidden_states=text, attn_mask=mask)
        return _Stream(x, normed, from_text, text_gate, tuple(of_feed_forward))

    def _cross_modulations(self, of_video: Tensor, of_sound: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Shift, scale and gate of attention between the streams: of the video, and of the sound."""
        if not self.fix_modulation:
            of_video, of_sound = of_sound, of_video
        video, sound = self.va_modulation(of_video)[:, None], self.av_modulation(of_sound)[:, None]
        if not self.cross_gates:
            return list(video.chunk(3, dim=-1)), list(sound.chunk(3, dim=-1))
        wide, wide_of_sound = self.model_dim, self.model_dim_a
        shift, scale, sound_gate = video.split([wide, wide, wide_of_sound], dim=-1)
        sound_shift, sound_scale, gate = sound.split([wide_of_sound, wide_of_sound, wide], dim=-1)
        return [shift, scale, gate], [sound_shift, sound_scale, sound_gate]

    def _feed_forward(self, part: Any, x: Tensor, branch: Tensor, gate: Tensor, stream: _Stream) -> Tensor:
        """What comes behind the last attention of a stream, whose gated ``branch`` that one is."""
        shift, scale, ff_gate = stream.feed_forward
        x, normed = self.add_norm(x, branch, gate, part.feed_forward_norm, scale, shift)
        return self.add(x, part.feed_forward(normed), ff_gate)
