"""diffusers' ``transformers/transformer_ltx.py``: the block of LTX-Video, and its rotary table.

Stock code makes some 70 passes over the tokens of a block, here 17: everything between two products is one pass, a
gated residual with the next norm and its modulation, and the norm of queries and keys with their rotary embedding. Each
step of a modulation is rounded where stock code stores it.

The rotary table holds every angle twice, and every sample has its own, equal to that of the others. Here all samples
share one, which is halved once in a call.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_ltx import (
    LTXAttention,
    LTXVideoAttnProcessor,
    LTXVideoRotaryPosEmbed,
    LTXVideoTransformerBlock,
)
from torch import Tensor, nn

from vidaccel.blocks.dit.attention import attend_to_all, attention_reason, feed_forward, project
from vidaccel.blocks.dit.gated_residual import fuses_sum
from vidaccel.blocks.dit.modulation_rows import distinct_rows, own_rows
from vidaccel.blocks.dit.padded_text import layers_are_hooked
from vidaccel.blocks.dit.rotary import alike_reason
from vidaccel.blocks.dit.step_caches import known_to_step_caches
from vidaccel.blocks.dit.text_attention import Lengths, attend_to_text, valid_lengths
from vidaccel.kernels.attention.qk_norm_rope import HeadNorm, Rope, qk_norm_rope
from vidaccel.kernels.norm.gated_residual_norm import Norm, gated_residual, gated_residual_norm, norm_modulate
from vidaccel.kernels.op import REFERENCE, note
from vidaccel.parallel.layout import all_tokens, own_tokens
from vidaccel.sites.block import CORNER_ROWS, MOST_WHOLE, FusedBlock, call_site, fuses
from vidaccel.sites.memo import once_in_call
from vidaccel.sites.plain import parameters_reason
from vidaccel.sites.site import Fidelity

__all__ = [
    "LTX_OPS",
    "FusedLTXVideoRotaryPosEmbed",
    "FusedLTXVideoTransformerBlock",
    "LTXBlock",
    "Modulation",
    "Tables",
    "first_tokens",
    "head_norm",
    "modulations",
    "paired_rope",
]

LTX_OPS: dict[str, Fidelity] = {
    "gated_residual_norm": "math-exact",
    "qk_norm_rope": "math-exact",
    "spatial_attention": "math-exact",
    "linear_gelu": "math-exact",
    "padded_text": "math-exact",
}

Tables = tuple[Tensor, Tensor]  # cos and sin, float32


class Modulation(NamedTuple):
    """A scale, a shift or a gate.

    Attributes:
        values: ``[B, R, C]``.
        rows: ``[S]`` int32, the row of each token. None: R is 1, or S and each token has its own.
    """

    values: Tensor
    rows: Tensor | None

    def of_tokens(self) -> Tensor:
        """``[B, 1 or S, C]``."""
        return self.values if self.rows is None else self.values[:, self.rows]


def modulations(table: Tensor, temb: Tensor, *, whole: bool = False) -> list[Modulation]:
    """The P parts of ``table + temb``, of ``[P, C]`` and ``[B, 1 or S, P*C]``.

    They are for this rank's tokens, or for all if those are ``whole`` on every rank.
    """
    distinct, rows = _distinct(table, temb)
    if not whole:
        distinct, rows = own_rows(distinct, rows)
    return [Modulation(values, rows) for values in (table + distinct).unbind(2)]


def _distinct(table: Tensor, temb: Tensor) -> tuple[Tensor, Tensor | None]:
    """The rows ``[B, R, P, C]`` of ``temb`` that differ, and which of them each token takes."""
    return distinct_rows(temb.unflatten(2, (len(table), -1)))


def together(*given: Modulation | None) -> tuple[list[Tensor | None], Tensor | None]:
    """The values of all ``given``, such that the same rows do for all of them."""
    rows = {id(m.rows): m.rows for m in given if m is not None and m.rows is not None}
    if not rows:
        return [None if m is None else m.values for m in given], None
    each_its_own = any(m is not None and m.rows is None and m.values.shape[1] > 1 for m in given)
    if len(rows) > 1 or each_its_own:
        return [None if m is None else m.of_tokens() for m in given], None
    (shared,) = rows.values()
    count = max(m.values.shape[1] for m in given if m is not None)
    return [None if m is None else m.values.expand(-1, count, -1) for m in given], shared


def paired_rope(tables: Tables | None, num_heads: int, *, whole: bool = False) -> Rope | None:
    """The rotary embedding by tables ``[B, S, H*D]``, which hold every angle twice; they are halved once in a call.

    It is for this rank's tokens, or for all if those are ``whole`` on every rank.
    """
    if tables is None:
        return None
    cos, sin = (once_in_call("half", table, partial(_half, table)) for table in tables)
    if not whole:
        cos, sin = own_tokens(cos, 1), own_tokens(sin, 1)
    return Rope("pairs", cos.unflatten(2, (num_heads, -1)), sin.unflatten(2, (num_heads, -1)))


def _half(table: Tensor) -> Tensor:
    table = table[:1] if table.stride(0) == 0 else table
    return table[..., 0::2].contiguous()


def head_norm(norm_q: Any, norm_k: Any) -> HeadNorm:
    """Those of two ``torch.nn.RMSNorm`` across heads."""
    return HeadNorm("rms_all", norm_q.eps, norm_q.weight, norm_k.weight)


def first_tokens(x: Tensor, tokens: int) -> Tensor:
    """``[B, S, C]`` for the first tokens; ``[B, 1, C]`` is for all of them."""
    return x[:, :tokens] if x.shape[1] > 1 else x


class LTXBlock(FusedBlock):
    """What the blocks of LTX-Video and of LTX-2 do alike."""

    def blocks_reason(self, norms: list[Any], modulated: list[tuple[Tensor, int, Tensor, Tensor]]) -> str | None:
        """Why a call goes to the original forward, or None.

        Args:
            norms: That are fused with what is around them.
            modulated: Tokens, how many they are on all ranks, the table and the embedding that they are modulated by.
        """
        x = modulated[0][0]
        if torch.is_autocast_enabled(x.device.type):
            return "autocast is on"
        for tokens, count, table, temb in modulated:
            if temb.ndim != 3 or temb.shape[1] not in (1, count):
                return "its timestep embedding is not [B, 1 or S, P*C]"
            if not tokens.dtype == table.dtype == temb.dtype:
                return "tokens and timestep embedding differ in dtype"
        for norm in norms:
            if reason := parameters_reason(norm, RMSNorm, x.device):
                return reason
            if norm.bias is not None:
                return "one of its RMSNorms has a bias"
            if norm.weight is not None and norm.weight.dtype != x.dtype:  # to which stock code rounds, or not at all
                return "one of its RMSNorms has a weight of another dtype"
        return None

    def angles_reason(self, *tables: Tables | None) -> str | None:
        """Why these do not hold every angle twice, as :func:`paired_rope` expects them, or None."""
        return alike_reason(*(table for pair in tables if pair is not None for table in pair))

    def path_of(self, masked: list[tuple[Tensor | None, Tensor]], *modulated: tuple[Tensor, Tensor]) -> Any:
        """What the values of a call decide: lengths of texts, and how many timesteps the tokens have between them.

        Args:
            masked: Masks of texts, and these.
            modulated: Tables, and the embeddings that they are added to.
        """
        lengths = valid_lengths(*masked) if self.runs("padded_text") else None
        rows = tuple(_distinct(table, temb)[0].shape[1] for table, temb in modulated if temb.ndim == 3)
        return lengths, rows

    def lengths_of(self, *masked: tuple[Tensor | None, Tensor]) -> list[Lengths]:
        """How many tokens of each text are valid, where its mask may go."""
        if not self.runs("padded_text"):
            return [None] * len(masked)
        found = valid_lengths(*masked)
        for reason in {answer for answer in found if isinstance(answer, str)}:
            note("padded_text", REFERENCE, reason)
        return [None if isinstance(answer, str) else answer for answer in found]

    def modulate(self, x: Tensor, norm: Any, scale: Modulation | None, shift: Modulation | None) -> Tensor:
        """``norm(x) * (1 + scale) + shift``."""
        if self.runs("gated_residual_norm"):
            (scale_, shift_), rows = together(scale, shift)
            return norm_modulate(x, norm_of(norm), scale_, shift_, rows=rows, rounding="each")
        return _modulated(norm(x), scale, shift)

    def add_norm(
        self,
        x: Tensor,
        branch: Tensor,
        gate: Modulation | None,
        norm: Any,
        scale: Modulation | None,
        shift: Modulation | None,
        *second: Modulation,
    ) -> list[Tensor]:
        """``z = x + gate * branch``, its modulated norm, and that norm modulated by a ``second`` scale and shift."""
        if fuses_sum(self, x, branch):
            (gate_, scale_, shift_, *second_), rows = together(gate, scale, shift, *second)
            more: Any = tuple(second_) or None
            return gated_residual_norm(
                x, branch, gate_, norm_of(norm), scale_, shift_, second=more, rows=rows, rounding="each"
            )  # fmt: skip
        z = self.add(x, branch, gate)
        normed = norm(z)
        return [z, _modulated(normed, scale, shift), *([_modulated(normed, *second)] if second else [])]

    def add(self, x: Tensor, branch: Tensor, gate: Modulation | None) -> Tensor:
        """``x + gate * branch``."""
        if fuses_sum(self, x, branch):
            (gate_,), rows = together(gate)
            return gated_residual(x, branch, gate_, rows=rows, rounding="each")
        return x + (branch if gate is None else branch * gate.of_tokens())

    def rope_reason(self, x: Tensor, tables: Tables | None, *norms: Any) -> str | None:
        """Why an attention is called, and does its norms and its rotary embedding itself, or None."""
        if not self.runs("qk_norm_rope"):
            return "qk_norm_rope is off, or failed"
        if tables is not None and any(table.dtype != torch.float32 for table in tables):
            return "its rotary table is not float32"
        for norm in norms:
            if reason := parameters_reason(norm, nn.RMSNorm, x.device):
                return reason
        return "its norms differ in eps" if len({norm.eps for norm in norms}) > 1 else None

    def note_called(self, op: str, reason: str) -> None:
        """An attention was called, which does ``op`` and all that comes with it by itself."""
        for left_to_it in (op, "spatial_attention"):
            note(left_to_it, REFERENCE, reason)

    def attend_to_text(self, attn: Any, x: Tensor, text: Tensor, mask: Tensor | None, lengths: Lengths) -> Tensor:
        """``[B, S, H*D]`` of ``x`` ``[B, S, C]`` and a text ``[B, T, C']``, before the last projection."""
        query, key, value = attn.to_q(x), attn.to_k(text), attn.to_v(text)
        query, key = attn.norm_q(query), attn.norm_k(key)
        fused = self.runs("spatial_attention")
        return attend_to_text(attn, query, key, value, mask, lengths, fused=fused)


def norm_of(module: Any) -> Norm:
    """That of diffusers' ``RMSNorm``."""
    return Norm("rms", module.eps, module.weight)


def _modulated(x: Tensor, scale: Modulation | None, shift: Modulation | None) -> Tensor:
    return x if scale is None or shift is None else x * (1 + scale.of_tokens()) + shift.of_tokens()


@known_to_step_caches
@fuses(LTXVideoTransformerBlock, LTX_OPS)
class FusedLTXVideoTransformerBlock(LTXBlock, LTXVideoTransformerBlock):
    """Self-attention, cross-attention to a text, and feed-forward, on ``[B, S, C]``."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Tables | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        return call_site(
            FusedLTXVideoTransformerBlock,
            self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, encoder_attention_mask,
        )  # fmt: skip

    def call_reason(self, hidden_states: Tensor, context: Tensor, temb: Tensor, *args: Any) -> str | None:
        modulated = hidden_states, all_tokens(hidden_states), self.scale_shift_table, temb
        return self.blocks_reason([self.norm1, self.norm2], [modulated])

    def spread_reason(
        self, x: Tensor, context: Tensor, temb: Tensor, tables: Tables | None, mask: Tensor | None
    ) -> str | None:
        return self._self_attention_reason(x, tables)

    def path_in_data(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _, context, temb, tables, mask = args
        return self.path_of([(mask, context)], (self.scale_shift_table, temb)), self.angles_reason(tables)

    def corner(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, context, temb, tables, mask = args
        if x.numel() <= MOST_WHOLE:
            return args, kwargs
        tables = None if tables is None else tuple(table[:, :CORNER_ROWS] for table in tables)
        return (x[:, :CORNER_ROWS], context, first_tokens(temb, CORNER_ROWS), tables, mask), kwargs

    def fused_forward(
        self, x: Tensor, context: Tensor, temb: Tensor, tables: Tables | None, mask: Tensor | None
    ) -> Tensor:
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulations(self.scale_shift_table, temb)
        attended = self._self_attention(self.modulate(x, self.norm1, scale, shift), tables)
        x = self.add(x, attended, gate)
        attended = self._cross_attention(x, context, mask)
        x, normed = self.add_norm(x, attended, None, self.norm2, ff_scale, ff_shift)
        return self.add(x, feed_forward(self.ff, normed, fused=self.runs("linear_gelu")), ff_gate)

    def _self_attention(self, x: Tensor, tables: Tables | None) -> Tensor:
        attn: Any = self.attn1
        if reason := self._self_attention_reason(x, tables):
            self.note_called("qk_norm_rope", reason)
            return attn(hidden_states=x, encoder_hidden_states=None, image_rotary_emb=tables)
        query, key, value = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        rope = paired_rope(tables, attn.heads)
        query, key = qk_norm_rope(query, key, attn.heads, head_norm(attn.norm_q, attn.norm_k), rope)
        fused = self.runs("spatial_attention")
        return project(attn, attend_to_all(attn.processor, query, key, value, attn.heads, fused=fused))

    def _self_attention_reason(self, x: Tensor, tables: Tables | None) -> str | None:
        attn: Any = self.attn1
        reason = attention_reason(attn, LTXAttention, LTXVideoAttnProcessor)
        return reason or self.rope_reason(x, tables, attn.norm_q, attn.norm_k) or self.angles_reason(tables)

    def _cross_attention(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        attn: Any = self.attn2
        if reason := attention_reason(attn, LTXAttention, LTXVideoAttnProcessor):
            self.note_called("padded_text", reason)
            return attn(x, encoder_hidden_states=context, image_rotary_emb=None, attention_mask=mask)
        (lengths,) = self.lengths_of((mask, context))
        return project(attn, self.attend_to_text(attn, x, context, mask, lengths))


@fuses(LTXVideoRotaryPosEmbed, {"rotary_table": "bit-exact"})
class FusedLTXVideoRotaryPosEmbed(FusedBlock, LTXVideoRotaryPosEmbed):
    """A rotary table ``[B, S, C]``, made for one sample, where the samples have the same coordinates."""

    def forward(
        self,
        hidden_states: Tensor,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        rope_interpolation_scale: Any = None,
        video_coords: Tensor | None = None,
    ) -> Tables:
        return call_site(
            FusedLTXVideoRotaryPosEmbed,
            self, hidden_states, num_frames, height, width, rope_interpolation_scale, video_coords,
        )  # fmt: skip

    def corner(self, args: Any, kwargs: Any) -> Any:
        hidden_states, _, _, _, scale, video_coords = args
        video_coords = None if video_coords is None else video_coords[:, :, :CORNER_ROWS]
        return (hidden_states, 2, 3, 4, scale, video_coords), kwargs

    def fused_forward(self, hidden_states: Tensor, *args: Any) -> Tables:
        *_, video_coords = args
        if video_coords is not None:
            return LTXVideoRotaryPosEmbed.forward(self, hidden_states, *args)
        tables = LTXVideoRotaryPosEmbed.forward(self, hidden_states[:1], *args)
        cos, sin = (table.expand(len(hidden_states), -1, -1) for table in tables)
        return (cos.contiguous(), sin.contiguous()) if layers_are_hooked() else (cos, sin)  # a hook may write to them
