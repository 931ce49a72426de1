"""diffusers' ``transformers/transformer_wan.py``: the block of Wan 2.1 and 2.2.

Stock code goes to float32 and back around every norm, modulation and gate: 133 passes over the tokens of a block, here
18. Everything between two products is one pass: a gated residual with the next norm and its modulation, and the norm
of queries and keys with their rotary embedding.

Wan 2.2 TI2V gives every token a timestep of its own, of which there are one or two different ones. The embedding of the
timestep, and each block's modulation, are made once for each of these.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanTimeTextImageEmbedding,
    WanTransformerBlock,
)
from torch import Tensor, nn

from vidaccel.blocks.dit.attention import attend, attention_reason, feed_forward, parameters_reason, qkv
from vidaccel.blocks.dit.step_caches import known_to_step_caches
from vidaccel.kernels.attention.qk_norm_rope import HeadNorm, Rope, qk_norm_rope
from vidaccel.kernels.norm.gated_residual_norm import (
    NO_NORM,
    Norm,
    gated_residual,
    gated_residual_norm,
    norm_modulate,
)
from vidaccel.kernels.op import note
from vidaccel.sites.block import CORNER_ROWS, MOST_WHOLE, FusedBlock, call_site, fuses
from vidaccel.sites.memo import held, once_in_call

__all__ = ["FusedWanTimeTextImageEmbedding", "FusedWanTransformerBlock"]

TEXT_TOKENS = 512  # of the text encoder; what comes before them is an image
MOST_ROWS = 8  # different timesteps in a call, from which on each token keeps its own


class _Rows(NamedTuple):
    """What the tokens of a call have in common: few different timesteps."""

    of_tokens: Tensor  # [B, S, 6 C], as the blocks get it but for its shape
    distinct: Tensor  # [1, R, 6, C]
    rows: Tensor  # [S] int32


def modulation_of(table: Tensor, temb: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """The six ``[B, R, C]`` of ``table + temb`` in float32, and the row of each token if they are not one or S."""
    rows = None
    if temb.ndim == 3:
        temb = temb[:, None]  # [B, 1, 6, C]
    elif temb.stride(1) == 0:
        temb = temb[:, :1]
    elif (shared := _shared_rows(temb)) is not None:
        temb, rows = shared.distinct, shared.rows
    return list((table + temb.float()).unbind(2)), rows


def _shared_rows(temb: Tensor) -> _Rows | None:
    memo = held()
    shared: _Rows | None = None if memo is None else memo.of_call.get("timestep rows")
    if shared is None or shared.of_tokens.shape[:2] != temb.shape[:2]:
        return None
    return shared if shared.of_tokens.data_ptr() == temb.data_ptr() else None


def half_tables(rotary_emb: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Wan's tables ``[1, S, 1, D]``, which hold every angle twice, as ``[1, S, 1, D/2]``; made once in a call."""
    cos, sin = rotary_emb
    return (
        once_in_call("cos", cos, lambda: cos[..., 0::2].contiguous()),
        once_in_call("sin", sin, lambda: sin[..., 1::2].contiguous()),
    )


def norm_of(module: Any) -> Norm:
    """A FP32LayerNorm, or the Identity in its place."""
    return NO_NORM if type(module) is nn.Identity else Norm("layer", module.eps, module.weight, module.bias)


class WanBlock(FusedBlock):
    """What is done alike in all blocks made of Wan's parts."""

    norm1: Any
    norm2: Any
    norm3: Any
    attn1: Any
    attn2: Any
    ffn: Any
    scale_shift_table: Any

    def call_reason(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any, *args: Any
    ) -> str | None:
        if temb.ndim not in (3, 4):
            return f"its timestep embedding has {temb.ndim} dimensions"
        if torch.is_autocast_enabled(hidden_states.device.type):
            return "autocast is on"
        for norm in (self.norm1, self.norm2, self.norm3):
            if type(norm) is not nn.Identity and (
                reason := parameters_reason(norm, FP32LayerNorm, hidden_states.device)
            ):
                return reason
        return None

    def corner(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden_states, context, temb, rotary_emb = args
        if hidden_states.numel() <= MOST_WHOLE:
            return args, kwargs
        temb = temb[:, :CORNER_ROWS] if temb.ndim == 4 else temb
        tables = tuple(table[:, :CORNER_ROWS] for table in rotary_emb)
        return (hidden_states[:, :CORNER_ROWS], context, temb, tables), kwargs

    def fused_forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: tuple[Tensor, Tensor]
    ) -> Tensor:
        x = hidden_states
        (shift, scale, gate, ff_shift, ff_scale, ff_gate), rows = modulation_of(self.scale_shift_table, temb)
        normed = self._modulate(x, scale, shift, rows)
        attended = self._self_attention(normed, rotary_emb)
        x, normed = self._add_norm(x, attended, gate, rows, self.norm2)
        attended = self._cross_attention(normed, encoder_hidden_states)
        x, normed = self._add_norm(x, attended, None, rows, self.norm3, ff_scale, ff_shift)
        out = feed_forward(self.ffn, normed, fused=self.runs("linear_gelu"))
        if self.runs("gated_residual_norm"):
            return gated_residual(x, out, ff_gate, rows=rows)
        return (x.float() + out.float() * _of_tokens(ff_gate, rows)).type_as(x)

    def _modulate(self, x: Tensor, scale: Tensor, shift: Tensor, rows: Tensor | None) -> Tensor:
        if self.runs("gated_residual_norm"):
            return norm_modulate(x, norm_of(self.norm1), scale, shift, rows=rows)
        return _stock_norm(self.norm1, x, scale, shift, rows)

    def _add_norm(
        self,
        x: Tensor,
        branch: Tensor,
        gate: Tensor | None,
        rows: Tensor | None,
        norm: Any,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``z = x + gate * branch`` and its modulated norm."""
        if self.runs("gated_residual_norm"):
            if type(norm) is nn.Identity:
                z = gated_residual(x, branch, gate, rows=rows)
                return z, z
            z, y = gated_residual_norm(x, branch, gate, norm_of(norm), scale, shift, rows=rows)
            return z, y
        z = x + branch if gate is None else (x.float() + branch * _of_tokens(gate, rows)).type_as(x)
        return z, _stock_norm(norm, z, scale, shift, rows)

    def _self_attention(self, x: Tensor, rotary_emb: tuple[Tensor, Tensor]) -> Tensor:
        if reason := self._attention_reason(self.attn1, rotary_emb):
            note("qk_norm_rope", "torch", reason)
            return self.attn1(x, None, None, rotary_emb)
        return self._attend_to_itself(self.attn1, x, rotary_emb)

    def _attend_to_itself(self, attn: Any, x: Tensor, rotary_emb: tuple[Tensor, Tensor]) -> Tensor:
        query, key, value = qkv(attn, x)
        norm = HeadNorm("rms_all", attn.norm_q.eps, attn.norm_q.weight, attn.norm_k.weight)
        query, key = qk_norm_rope(query, key, attn.heads, norm, Rope("pairs", *half_tables(rotary_emb)))
        return _project(attn, self._attend(attn, query, key, value))

    def _attend(self, attn: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(attn.processor, query, key, value, attn.heads, fused=self.runs("spatial_attention"))

    def _cross_attention(self, x: Tensor, context: Tensor) -> Tensor:
        attn = self.attn2
        if attention_reason(attn, WanAttention, WanAttnProcessor):
            return attn(x, context, None, None)
        image = None
        if attn.add_k_proj is not None:
            image, context = context.split([context.shape[1] - TEXT_TOKENS, TEXT_TOKENS], dim=1)
        query, key, value = qkv(attn, x, context)
        query, key = attn.norm_q(query), attn.norm_k(key)
        out = self._attend(attn, query, key, value)
        if image is not None:
            out = out + self._attend(attn, query, *_image_keys_values(attn, image))
        return _project(attn, out)

    def _attention_reason(self, attn: Any, rotary_emb: Any) -> str | None:
        if not self.runs("qk_norm_rope"):
            return "it is off, or failed"
        if reason := attention_reason(attn, WanAttention, WanAttnProcessor):
            return reason
        if rotary_emb is None or any(table.dtype != torch.float32 for table in rotary_emb):
            return "its rotary table is not float32"
        device = rotary_emb[0].device
        for norm in (attn.norm_q, attn.norm_k):
            if reason := parameters_reason(norm, nn.RMSNorm, device):
                return reason
        return None


def _project(attn: Any, out: Tensor) -> Tensor:
    for layer in attn.to_out:
        out = layer(out)
    return out


def _image_keys_values(attn: Any, image: Tensor) -> tuple[Tensor, Tensor]:
    if attn.fused_projections:
        key, value = attn.to_added_kv(image).chunk(2, dim=-1)
    else:
        key, value = attn.add_k_proj(image), attn.add_v_proj(image)
    return attn.norm_added_k(key), value


def _of_tokens(modulation: Tensor, rows: Tensor | None) -> Tensor:
    return modulation if rows is None else modulation[:, rows]


def _stock_norm(norm: Any, x: Tensor, scale: Tensor | None, shift: Tensor | None, rows: Tensor | None) -> Tensor:
    y = norm(x.float())
    if scale is not None and shift is not None:
        y = y * (1 + _of_tokens(scale, rows)) + _of_tokens(shift, rows)
    return y.type_as(x)


@known_to_step_caches
@fuses(
    WanTransformerBlock,
    {
        "gated_residual_norm": "math-exact",
        "qk_norm_rope": "math-exact",
        "spatial_attention": "math-exact",
        "linear_gelu": "math-exact",
    },
)
class FusedWanTransformerBlock(WanBlock, WanTransformerBlock):
    """Self-attention, cross-attention to text (and an image) and feed-forward, on ``[B, S, C]``."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Tensor) -> Tensor:
        return call_site(FusedWanTransformerBlock, self, hidden_states, encoder_hidden_states, temb, rotary_emb)


@fuses(WanTimeTextImageEmbedding, {"modulation_rows": "math-exact"})
class FusedWanTimeTextImageEmbedding(FusedBlock, WanTimeTextImageEmbedding):
    """The embedding of a timestep for each token, made once for each different one."""

    def forward(
        self,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        timestep_seq_len: int | None = None,
    ) -> Any:
        return call_site(
            FusedWanTimeTextImageEmbedding,
            self, timestep, encoder_hidden_states, encoder_hidden_states_image, timestep_seq_len,
        )  # fmt: skip

    def corner(self, args: Any, kwargs: Any) -> Any:
        return args, kwargs

    def fused_forward(self, timestep: Tensor, context: Tensor, image: Tensor | None, tokens: int | None) -> Any:
        stock = WanTimeTextImageEmbedding.forward
        if tokens is None or torch.compiler.is_compiling():
            return stock(self, timestep, context, image, tokens)
        distinct, inverse = timestep.unique(return_inverse=True)  # one wait for the GPU in a call
        if len(distinct) > MOST_ROWS:
            return stock(self, timestep, context, image, tokens)
        inverse = inverse.view(-1, tokens)
        temb, projected, *texts = stock(self, distinct, context, image, len(distinct))  # [1, R, C], [1, R, 6C]
        if len(distinct) == 1:
            return *(x.expand(len(inverse), tokens, -1) for x in (temb, projected)), *texts
        of_tokens = projected[0, inverse]  # for whoever looks at it
        memo = held()
        if memo is not None and len(inverse) == 1:
            shared = _Rows(of_tokens, projected.unflatten(2, (6, -1)), inverse[0].to(torch.int32))
            memo.of_call["timestep rows"] = shared
        return temb[0, inverse], of_tokens, *texts
