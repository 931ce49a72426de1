"""diffusers' ``transformers/transformer_hunyuan_video.py``: HunyuanVideo's blocks of two streams, and of one.

Text is padded, and attention hides that behind a mask, which costs it more than half of its speed: see
``padded_text.py``. Everything between two products is one pass: a gated residual with the next norm and its modulation,
and the norm of queries and keys with their rotary embedding, which writes the joint ones of video and text. A block of
one stream multiplies attention and feed-forward by their parts of the last weight, instead of joining the two first.

The blocks for ``token_replace`` modulate the tokens of the first frame, which holds the image, by a timestep of zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle, RMSNorm
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoAttnProcessor2_0,
    HunyuanVideoSingleTransformerBlock,
    HunyuanVideoTokenReplaceAdaLayerNormZero,
    HunyuanVideoTokenReplaceAdaLayerNormZeroSingle,
    HunyuanVideoTokenReplaceSingleTransformerBlock,
    HunyuanVideoTokenReplaceTransformerBlock,
    HunyuanVideoTransformerBlock,
)
from torch import Tensor, nn

from vidaccel.blocks.dit.attention import attend_to_all, attention_reason, feed_forward, stock_heads
from vidaccel.blocks.dit.gated_residual import GatedResidualBlock
from vidaccel.blocks.dit.padded_text import cut_padding, padded, valid_length
from vidaccel.blocks.dit.rotary import alike_reason, half_tables
from vidaccel.blocks.dit.step_caches import known_to_step_caches
from vidaccel.kernels.attention.qk_norm_rope import HeadNorm, Rope, SecondStream, qk_norm_rope
from vidaccel.kernels.ffn.linear_gelu import linear_gelu
from vidaccel.kernels.ffn.residual_projection import residual_projection
from vidaccel.kernels.op import note, one_or
from vidaccel.parallel.layout import all_tokens, own_tokens, tokens_before
from vidaccel.sites.block import CORNER_ROWS, MOST_WHOLE, call_site, fuses
from vidaccel.sites.memo import once_in_call
from vidaccel.sites.plain import parameters_reason, plain_reason, readable_reason
from vidaccel.sites.site import Fidelity

__all__ = [
    "ONE_STREAM_OPS",
    "TWO_STREAM_OPS",
    "FusedHunyuanVideoSingleTransformerBlock",
    "FusedHunyuanVideoTokenReplaceSingleTransformerBlock",
    "FusedHunyuanVideoTokenReplaceTransformerBlock",
    "FusedHunyuanVideoTransformerBlock",
    "HunyuanBlock",
    "OneStreamBlock",
    "Rotary",
    "TwoStreamBlock",
    "rope_of",
    "turned_rows",
]

TWO_STREAM_OPS: dict[str, Fidelity] = {
    "padded_text": "math-exact",
    "gated_residual_norm": "math-exact",
    "qk_norm_rope": "math-exact",
    "spatial_attention": "math-exact",
    "linear_gelu": "math-exact",
}
ONE_STREAM_OPS: dict[str, Fidelity] = {**TWO_STREAM_OPS, "residual_projection": "math-exact"}

Rotary = tuple[Tensor, Tensor]  # cos and sin [S, D] float32, of the tokens of the video, every value twice
Modulation = tuple[tuple[Tensor, ...], Tensor | None]  # [B, R, C] each, and the row of each token if R is not 1


class HunyuanBlock(GatedResidualBlock):
    """What blocks of two streams and of one do alike: video ``[B, S, C]``, text ``[B, T, C]``, the video first."""

    attention: ClassVar[type[nn.Module]] = Attention
    attention_processor: ClassVar[type] = HunyuanVideoAttnProcessor2_0
    head_norms: ClassVar[type[nn.Module]] = RMSNorm
    adaptive_norms: ClassVar[dict[str, type[nn.Module]]]
    norms: ClassVar[tuple[str, ...]] = ()

    attn: Any

    def call_reason(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, attention_mask: Any, *args: Any
    ) -> str | None:
        if torch.is_autocast_enabled(hidden_states.device.type):
            return "autocast is on"
        if not hidden_states.dtype == encoder_hidden_states.dtype == temb.dtype:
            return "video, text and timestep embedding differ in dtype"
        if not len(hidden_states) == len(encoder_hidden_states) == len(temb):  # stock code broadcasts them
            return "video, text and timestep embedding differ in batch size"
        if reason := self.mask_reason(hidden_states, encoder_hidden_states, attention_mask):
            return reason
        for name, kind in self.adaptive_norms.items():
            if reason := plain_reason(getattr(self, name), kind):
                return reason
        for norm in self._layer_norms():
            if reason := parameters_reason(norm, nn.LayerNorm, hidden_states.device):
                return reason
        return None

    def _layer_norms(self) -> Iterator[Any]:
        for name in self.adaptive_norms:
            yield getattr(self, name).norm
        for name in self.norms:
            yield getattr(self, name)

    def mask_reason(self, x: Tensor, text: Tensor, mask: Tensor | None) -> str | None:
        """Why the mask of a call is none of keys, or None."""
        keys = all_tokens(x) + text.shape[1]
        if mask is None:
            return None
        if mask.shape[1:] == (1, 1, keys) and one_or(len(x), len(mask)) and mask.dtype == torch.bool:
            return None
        return "its attention mask is not [B, 1, 1, S + T] of booleans"

    def tokens_before_text(self, x: Tensor) -> int:
        """How many keys of a call's mask stand before those of the text."""
        return all_tokens(x)

    def key_mask(self, x: Tensor, mask: Tensor) -> Tensor:
        """The mask of a call as attention takes it, ``[B, 1, 1, S + T]``; what padding attends to does not matter."""
        return mask

    def mask_of_ones(self, text: Tensor) -> Tensor | None:
        """A mask for a call where all of ``text`` is valid."""
        return None

    def spread_reason(self, x: Tensor, text: Tensor, temb: Tensor, mask: Tensor | None, *args: Any) -> str | None:
        if reason := self.foreign_reason() or self.mask_reason(x, text, mask):
            return reason
        if mask is None:
            return None
        length = valid_length(mask, self.tokens_before_text(x)) if self.runs("padded_text") else "padded_text is off"
        return None if isinstance(length, int) else f"{length}, and attention keeps its mask"

    def path_in_data(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, text, _, mask, freqs_cis, *_ = args
        angles = alike_reason(*(freqs_cis or ()))
        if not self.runs("padded_text") or self.mask_reason(x, text, mask) or mask is None:
            return angles
        return valid_length(mask, self.tokens_before_text(x)), angles

    def comparable(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """No padding, for what stands there is neither alike nor of any use."""
        x, text, temb, mask, *others = args
        if mask is None or not isinstance(length := valid_length(mask, self.tokens_before_text(x)), int):
            return args, kwargs
        text = text[:, :length]
        return (x, text, temb, self.mask_of_ones(text), *others), kwargs

    def corner(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        (x, text, temb, _, freqs_cis, *others), kwargs = self.comparable(args, kwargs)
        if x.numel() > MOST_WHOLE:
            x, text = x[:, :CORNER_ROWS], text[:, :CORNER_ROWS]
            freqs_cis = None if freqs_cis is None else tuple(table[:CORNER_ROWS] for table in freqs_cis)
            others = [min(other, CORNER_ROWS // 2) if isinstance(other, int) else other for other in others]
        return (x, text, temb, self.mask_of_ones(text), freqs_cis, *others), kwargs

    def without_padding(self, x: Tensor, text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The text to work on, and the mask that attention needs then."""
        if reason := self.foreign_reason():
            for op in ("padded_text", "qk_norm_rope"):
                note(op, "torch", reason)
            return text, mask  # as somebody else's attention expects them
        if mask is None:
            return text, None
        cut = cut_padding(self, text, mask, self.tokens_before_text(x))
        return (text, self.key_mask(x, mask)) if cut is None else (cut, None)

    def foreign_reason(self) -> str | None:
        """Why attention has to be called, or None."""
        return attention_reason(self.attn, self.attention, self.attention_processor)

    def modulation(self, norm: Any, x: Tensor, temb: Tensor, *others: Any) -> Modulation:
        """What an AdaLayerNormZero makes of the timestep for the tokens of ``x``: shift, scale, gate, and so on."""
        return norm.linear(norm.silu(temb))[:, None].split(x.shape[2], dim=2), None

    def rope_reason(self, x: Tensor, freqs_cis: Rotary | None, *norms: Any) -> str | None:
        """Why queries and keys are normed and turned by modules, or None."""
        if not self.runs("qk_norm_rope"):
            return "it is off, or failed"
        if freqs_cis is None or any(table.dtype != torch.float32 for table in freqs_cis):
            return "its rotary table is not float32"
        for norm in norms:
            if reason := parameters_reason(norm, self.head_norms, x.device):
                return reason
            if norm.weight is None or norm.weight.dtype != x.dtype or getattr(norm, "bias", None) is not None:
                return "a norm of queries or keys has a bias, no weight, or one of another dtype"
        if len({norm.eps for norm in norms}) > 1:
            return "its norms differ in eps"
        return alike_reason(*freqs_cis)

    def head_norm(self, norm_q: Any, norm_k: Any) -> HeadNorm:
        return HeadNorm("rms_head", norm_q.eps, norm_q.weight, norm_k.weight, rounding="each")

    def beside_attention(self, attended: Tensor, text: Tensor, mask: Tensor | None, *others: Any) -> Tensor | None:
        """What is added to what the tokens of the video ``attended``; ``text`` as it went into attention."""
        return None

    def attend(self, qkv: Sequence[Tensor], tokens: int, mask: Tensor | None) -> Tensor:
        """Of queries, keys and values ``[B, S + T, H*D]``, of which the first ``tokens`` are those of the video."""
        query, key, value = qkv
        attn, fused = self.attn, self.runs("spatial_attention")
        text = query.shape[1] - tokens
        return attend_to_all(attn.processor, query, key, value, attn.heads, mask=mask, fused=fused, behind=text)


def own_tables(freqs_cis: Rotary | None) -> Rotary | None:
    """The rotary table of this rank's tokens."""
    if freqs_cis is None:
        return None
    cos, sin = (once_in_call("own tokens", table, partial(own_tokens, table, 0)) for table in freqs_cis)
    return cos, sin


def rope_of(freqs_cis: Rotary, still: int = 0) -> Rope:
    """The rotary embedding of the video's tokens, and of as many more that do not turn."""
    cos, sin = half_tables(freqs_cis)
    if still:  # an angle of zero: x * 1 - y * 0 has the bits of x
        cos = once_in_call(f"cos, {still} still", freqs_cis[0], lambda: F.pad(cos, (0, 0, 0, still), value=1.0))
        sin = once_in_call(f"sin, {still} still", freqs_cis[1], lambda: F.pad(sin, (0, 0, 0, still)))
    return Rope("pairs", cos[None, :, None], sin[None, :, None])


def turned_rows(x: Tensor, freqs_cis: Rotary | None, tokens: int) -> Tensor:
    """``[B, S + T, H, D]``, of which the first ``tokens`` turn, as rows."""
    if freqs_cis is None:
        return x.flatten(2)
    turned: Any = apply_rotary_emb(x[:, :tokens], freqs_cis, sequence_dim=1)  # type: ignore[arg-type]
    return torch.cat([turned, x[:, tokens:]], dim=1).flatten(2)


def _rows_of_modulation(token_replace_emb: Tensor, num_tokens: int, tokens: int) -> Tensor:
    """``[tokens]`` int32: 0 for the ``num_tokens`` of the first frame, 1 behind them; made once in a call."""

    def make() -> Tensor:
        return (torch.arange(tokens, device=token_replace_emb.device) >= num_tokens).to(torch.int32)

    return once_in_call(f"rows of {tokens} tokens, {num_tokens} replaced", token_replace_emb, make)


class TwoStreamBlock(HunyuanBlock):
    """Joint attention and feed-forwards of video and text, each with weights of its own."""

    adaptive_norms: ClassVar[dict[str, type[nn.Module]]] = {
        "norm1": AdaLayerNormZero,
        "norm1_context": AdaLayerNormZero,
    }
    norms: ClassVar[tuple[str, ...]] = ("norm2", "norm2_context")

    norm1: Any
    norm1_context: Any
    norm2: Any
    norm2_context: Any
    ff: Any
    ff_context: Any

    def fused_forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None,
        freqs_cis: Rotary | None,
        *others: Any,
    ) -> tuple[Tensor, Tensor]:
        x = hidden_states
        text, mask = self.without_padding(x, encoder_hidden_states, attention_mask)
        of_video = self.modulation(self.norm1, x, temb, *others)
        of_text = HunyuanBlock.modulation(self, self.norm1_context, text, temb)
        normed = self._into_attention(self.norm1, x, of_video)
        text_normed = self._into_attention(self.norm1_context, text, of_text)
        attended, text_attended = self._attention(normed, text_normed, mask, freqs_cis)
        beside = self.beside_attention(attended, text_normed, mask, freqs_cis, *others)
        x = self._behind_attention(x, attended, beside, of_video, self.norm2, self.ff)
        text = self._behind_attention(text, text_attended, None, of_text, self.norm2_context, self.ff_context)
        return x, padded(text, encoder_hidden_states.shape[1])

    def _into_attention(self, norm: Any, x: Tensor, modulation: Modulation) -> Tensor:
        (shift, scale, *_), rows = modulation
        return self.modulate(norm.norm, x, scale, shift, rows)

    def _behind_attention(
        self, x: Tensor, attended: Tensor, beside: Tensor | None, modulation: Modulation, norm: Any, ff: Any
    ) -> Tensor:
        (_, _, gate, shift, scale, ff_gate), rows = modulation
        if beside is None:
            x, normed = self.add_norm(x, attended, gate, norm, scale, shift, rows)
        else:
            x, normed = self.add_norm(self.add(x, attended, gate, rows), beside, None, norm, scale, shift, rows)
        return self.add(x, feed_forward(ff, normed, fused=self.runs("linear_gelu")), ff_gate, rows)

    def _attention(
        self, x: Tensor, text: Tensor, mask: Tensor | None, freqs_cis: Rotary | None
    ) -> tuple[Tensor, Tensor]:
        attn, tokens = self.attn, x.shape[1]
        if self.foreign_reason():
            out: tuple[Tensor, Tensor] = attn(
                hidden_states=x, encoder_hidden_states=text, attention_mask=mask, image_rotary_emb=freqs_cis
            )
            return out
        joint = self.attend(self._joint(x, text, own_tables(freqs_cis)), tokens, mask)
        return attn.to_out[1](attn.to_out[0](joint[:, :tokens])), attn.to_add_out(joint[:, tokens:])

    def _joint(self, x: Tensor, text: Tensor, freqs_cis: Rotary | None) -> list[Tensor]:
        """Queries, keys and values ``[B, S + T, H*D]``."""
        attn = self.attn
        query, key, value = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        second = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
        norms = attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k
        if reason := self.rope_reason(x, freqs_cis, *norms):
            note("qk_norm_rope", "torch", reason)
            return self._stock_joint((query, key, value), second, freqs_cis)
        assert freqs_cis is not None
        norm = self.head_norm(attn.norm_q, attn.norm_k)
        added = self.head_norm(attn.norm_added_q, attn.norm_added_k)
        return qk_norm_rope(
            query, key, attn.heads, norm, rope_of(freqs_cis), v=value, second=SecondStream(*second, added)
        )  # fmt: skip

    def _stock_joint(
        self, first: tuple[Tensor, ...], second: tuple[Tensor, ...], freqs_cis: Rotary | None
    ) -> list[Tensor]:
        attn, tokens = self.attn, first[0].shape[1]
        norms = (attn.norm_q, attn.norm_added_q), (attn.norm_k, attn.norm_added_k), (None, None)
        query, key, value = (
            torch.cat([stock_heads(norm, x, attn.heads), stock_heads(added, y, attn.heads)], dim=1)
            for (norm, added), x, y in zip(norms, first, second, strict=True)
        )
        return [turned_rows(query, freqs_cis, tokens), turned_rows(key, freqs_cis, tokens), value.flatten(2)]


class OneStreamBlock(HunyuanBlock):
    """Attention and feed-forward side by side, over video and text with the same weights."""

    adaptive_norms: ClassVar[dict[str, type[nn.Module]]] = {"norm": AdaLayerNormZeroSingle}

    norm: Any
    proj_mlp: Any
    act_mlp: Any
    proj_out: Any

    def fused_forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None,
        freqs_cis: Rotary | None,
        *others: Any,
    ) -> tuple[Tensor, Tensor]:
        tokens = hidden_states.shape[1]
        text, mask = self.without_padding(hidden_states, encoder_hidden_states, attention_mask)
        x = torch.cat([hidden_states, text], dim=1)
        (shift, scale, gate), rows = self.modulation(self.norm, x, temb, *others)
        normed = self.modulate(self.norm.norm, x, scale, shift, rows)
        attended = self._attention(normed, tokens, mask, freqs_cis)
        of_video = attended[:, :tokens]
        beside = self.beside_attention(of_video, normed[:, tokens:], mask, freqs_cis, *others)
        if beside is not None:
            of_video += beside
        x = self.add(x, self._project(attended, self._feed_forward(normed)), gate, rows)
        return x[:, :tokens], padded(x[:, tokens:], encoder_hidden_states.shape[1])

    def _attention(self, x: Tensor, tokens: int, mask: Tensor | None, freqs_cis: Rotary | None) -> Tensor:
        if self.foreign_reason():
            return torch.cat(
                self.attn(
                    hidden_states=x[:, :tokens],
                    encoder_hidden_states=x[:, tokens:],
                    attention_mask=mask,
                    image_rotary_emb=freqs_cis,
                ),
                dim=1,
            )
        return self.attend(self._qkv(x, tokens, own_tables(freqs_cis)), tokens, mask)

    def _qkv(self, x: Tensor, tokens: int, freqs_cis: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        attn = self.attn
        query, key, value = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        if reason := self.rope_reason(x, freqs_cis, attn.norm_q, attn.norm_k):
            note("qk_norm_rope", "torch", reason)
            query, key = stock_heads(attn.norm_q, query, attn.heads), stock_heads(attn.norm_k, key, attn.heads)
            return turned_rows(query, freqs_cis, tokens), turned_rows(key, freqs_cis, tokens), value
        assert freqs_cis is not None
        norm, rope = self.head_norm(attn.norm_q, attn.norm_k), rope_of(freqs_cis, x.shape[1] - tokens)
        query, key = qk_norm_rope(query, key, attn.heads, norm, rope)
        return query, key, value

    def _feed_forward(self, x: Tensor) -> Tensor:
        """The wide activation ``[B, S + T, 4 C]``."""
        first, act = self.proj_mlp, self.act_mlp
        if not self.runs("linear_gelu") or readable_reason(first, nn.Linear, x) or plain_reason(act, nn.GELU):
            out: Tensor = act(first(x))
            return out
        return linear_gelu(x, first.weight, first.bias, approximate=act.approximate)

    def _project(self, attended: Tensor, wide: Tensor) -> Tensor:
        """``proj_out`` of both, side by side: ``[B, S + T, C]``."""
        last, channels = self.proj_out, attended.shape[2]
        if not self.runs("residual_projection") or readable_reason(last, nn.Linear, wide):
            out: Tensor = last(torch.cat([attended, wide], dim=2))
            return out
        with_bias = F.linear(wide, last.weight[:, channels:], last.bias)
        return residual_projection(attended, last.weight[:, :channels], with_bias)


class TokenReplaceBlock(HunyuanBlock):
    """Of a video whose first frame is given: its tokens are modulated by a timestep of zero."""

    def modulation(self, norm: Any, x: Tensor, temb: Tensor, *token_replace: Any) -> Modulation:
        token_replace_emb, num_tokens = token_replace
        of_rows = torch.stack([norm.linear(norm.silu(emb)) for emb in (token_replace_emb, temb)], dim=1)
        rows = _rows_of_modulation(token_replace_emb, num_tokens - tokens_before(), x.shape[1])
        return of_rows.split(x.shape[2], dim=2), rows


@known_to_step_caches
@fuses(HunyuanVideoTransformerBlock, TWO_STREAM_OPS)
class FusedHunyuanVideoTransformerBlock(TwoStreamBlock, HunyuanVideoTransformerBlock):
    """Two streams, video and text."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        freqs_cis: tuple[Tensor, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        return call_site(
            FusedHunyuanVideoTransformerBlock,
            self, hidden_states, encoder_hidden_states, temb, attention_mask, freqs_cis,
        )  # fmt: skip


@known_to_step_caches
@fuses(HunyuanVideoSingleTransformerBlock, ONE_STREAM_OPS)
class FusedHunyuanVideoSingleTransformerBlock(OneStreamBlock, HunyuanVideoSingleTransformerBlock):
    """One stream of video and text."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        return call_site(
            FusedHunyuanVideoSingleTransformerBlock,
            self, hidden_states, encoder_hidden_states, temb, attention_mask, image_rotary_emb,
        )  # fmt: skip


@known_to_step_caches
@fuses(HunyuanVideoTokenReplaceTransformerBlock, TWO_STREAM_OPS)
class FusedHunyuanVideoTokenReplaceTransformerBlock(
    TokenReplaceBlock, TwoStreamBlock, HunyuanVideoTokenReplaceTransformerBlock
):
    """Two streams, the first frame given."""

    adaptive_norms: ClassVar[dict[str, type[nn.Module]]] = {
        "norm1": HunyuanVideoTokenReplaceAdaLayerNormZero,
        "norm1_context": AdaLayerNormZero,
    }

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        freqs_cis: tuple[Tensor, Tensor] | None = None,
        token_replace_emb: Any = None,
        num_tokens: Any = None,
    ) -> tuple[Tensor, Tensor]:
        return call_site(
            FusedHunyuanVideoTokenReplaceTransformerBlock,
            self, hidden_states, encoder_hidden_states, temb, attention_mask, freqs_cis, token_replace_emb, num_tokens,
        )  # fmt: skip


@known_to_step_caches
@fuses(HunyuanVideoTokenReplaceSingleTransformerBlock, ONE_STREAM_OPS)
class FusedHunyuanVideoTokenReplaceSingleTransformerBlock(
    TokenReplaceBlock, OneStreamBlock, HunyuanVideoTokenReplaceSingleTransformerBlock
):
    """One stream, the first frame given."""

    adaptive_norms: ClassVar[dict[str, type[nn.Module]]] = {"norm": HunyuanVideoTokenReplaceAdaLayerNormZeroSingle}

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        token_replace_emb: Any = None,
        num_tokens: Any = None,
    ) -> tuple[Tensor, Tensor]:
        return call_site(
            FusedHunyuanVideoTokenReplaceSingleTransformerBlock,
            self, hidden_states, encoder_hidden_states, temb, attention_mask, image_rotary_emb,
            token_replace_emb, num_tokens,
        )  # fmt: skip
