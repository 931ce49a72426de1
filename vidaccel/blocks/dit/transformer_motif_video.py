"""diffusers' ``transformers/transformer_motif_video.py``: Motif-Video's blocks of two streams, and of one.

They are HunyuanVideo's (``transformer_hunyuan_video.py``) with heads normed by PyTorch's RMSNorm, which rounds once,
and, in most, a second attention of what the video has attended to to the text alone: the tokens of a start image, which
stand before those of the text, are left out.
"""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers.models.transformers.transformer_motif_video import (
    MotifVideoAttention,
    MotifVideoAttnProcessor2_0,
    MotifVideoCrossAttention,
    MotifVideoCrossAttnProcessor2_0,
    MotifVideoSingleTransformerBlock,
    MotifVideoTransformerBlock,
)
from torch import Tensor, nn

from vidaccel.blocks.dit.attention import attend, attention_reason, project, stock_heads
from vidaccel.blocks.dit.step_caches import known_to_step_caches
from vidaccel.blocks.dit.transformer_hunyuan_video import (
    ONE_STREAM_OPS,
    TWO_STREAM_OPS,
    HunyuanBlock,
    OneStreamBlock,
    Rotary,
    TwoStreamBlock,
    rope_of,
    turned_rows,
)
from vidaccel.kernels.attention.qk_norm_rope import HeadNorm, qk_norm_rope
from vidaccel.kernels.op import REFERENCE, note
from vidaccel.sites.block import call_site, fuses

__all__ = ["FusedMotifVideoSingleTransformerBlock", "FusedMotifVideoTransformerBlock"]


class MotifBlock(HunyuanBlock):
    """What both kinds of blocks have of their own."""

    attention: ClassVar[type[nn.Module]] = MotifVideoAttention
    attention_processor: ClassVar[type] = MotifVideoAttnProcessor2_0
    head_norms: ClassVar[type[nn.Module]] = nn.RMSNorm

    cross_attn: Any

    def call_reason(self, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any) -> str | None:
        *_, image_tokens = args
        if encoder_hidden_states.shape[1] <= image_tokens:
            return "no text stands behind the tokens of the image"
        return super().call_reason(hidden_states, encoder_hidden_states, *args)

    def foreign_reason(self) -> str | None:
        if reason := super().foreign_reason():
            return reason
        if self.cross_attn is None:
            return None
        return attention_reason(self.cross_attn, MotifVideoCrossAttention, MotifVideoCrossAttnProcessor2_0)

    def head_norm(self, norm_q: Any, norm_k: Any) -> HeadNorm:
        return HeadNorm("rms_head", norm_q.eps, norm_q.weight, norm_k.weight)

    def beside_attention(self, attended: Tensor, text: Tensor, mask: Tensor | None, *others: Any) -> Tensor | None:
        """What the video finds in the text, its queries made of what it has ``attended`` to."""
        freqs_cis, image_tokens = others
        attn = self.cross_attn
        if attn is None:
            return None
        if self.foreign_reason():
            out: Tensor = attn(
                hidden_states=attended, encoder_hidden_states=text, attention_mask=mask,
                image_rotary_emb=freqs_cis, image_embed_seq_len=image_tokens,
            )  # fmt: skip
            return out
        mask = None if mask is None else mask[..., image_tokens - text.shape[1] :]
        text = text[:, image_tokens:]
        query, key = self._to_text(attended, text, freqs_cis)
        fused = self.runs("spatial_attention")
        return project(attn, attend(attn.processor, query, key, attn.to_v(text), attn.heads, mask=mask, fused=fused))

    def _to_text(self, x: Tensor, text: Tensor, freqs_cis: Rotary | None) -> tuple[Tensor, Tensor]:
        """Queries of the video, which turn, and keys of the text, which do not."""
        attn = self.cross_attn
        query, key = attn.to_q(x), attn.to_k(text)
        if reason := self.rope_reason(x, freqs_cis, attn.norm_q, attn.norm_k):
            note("qk_norm_rope", REFERENCE, reason)
            query, key = stock_heads(attn.norm_q, query, attn.heads), stock_heads(attn.norm_k, key, attn.heads)
            return turned_rows(query, freqs_cis, x.shape[1]), key.flatten(2)
        assert freqs_cis is not None
        norm = self.head_norm(attn.norm_q, attn.norm_k)
        (query,) = qk_norm_rope(query, None, attn.heads, norm._replace(weight_k=None), rope_of(freqs_cis))
        (key,) = qk_norm_rope(key, None, attn.heads, norm._replace(weight_q=norm.weight_k, weight_k=None))
        return query, key


@known_to_step_caches
@fuses(MotifVideoTransformerBlock, TWO_STREAM_OPS)
class FusedMotifVideoTransformerBlock(MotifBlock, TwoStreamBlock, MotifVideoTransformerBlock):
    """Two streams, video and text."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        image_embed_seq_len: int = 0,
    ) -> tuple[Tensor, Tensor]:
        return call_site(
            FusedMotifVideoTransformerBlock,
            self, hidden_states, encoder_hidden_states, temb, attention_mask, image_rotary_emb, image_embed_seq_len,
        )  # fmt: skip


@known_to_step_caches
@fuses(MotifVideoSingleTransformerBlock, ONE_STREAM_OPS)
class FusedMotifVideoSingleTransformerBlock(MotifBlock, OneStreamBlock, MotifVideoSingleTransformerBlock):
    """One stream of video and text; in decoder blocks, of the video and what the blocks before have made of it."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        image_embed_seq_len: int = 0,
    ) -> Any:  # diffusers says that it is a tensor; it is two
        return call_site(
            FusedMotifVideoSingleTransformerBlock,
            self, hidden_states, encoder_hidden_states, temb, attention_mask, image_rotary_emb, image_embed_seq_len,
        )  # fmt: skip
