"""diffusers' ``transformers/transformer_cosmos.py``: the block of Cosmos 1, 2 and 2.5, and of their ControlNet.

Everything between two products is one pass: a gated residual with the next norm and its modulation, the positional
embedding that some models add before each block, and the norm of queries and keys with their rotary embedding.

Where the first frames are given, stock code gives every token a timestep of its own, and makes the modulation of three
norms per block for each of them. There are two different ones, so that two are made (``modulation_rows.py``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_cosmos import (
    CosmosAdaLayerNormZero,
    CosmosAttnProcessor2_0,
    CosmosTransformerBlock,
)
from torch import Tensor, nn

from vidaccel.blocks.dit.attention import attend, attend_to_all, attention_reason, project
from vidaccel.blocks.dit.gated_residual import GatedResidualBlock, norm_heads
from vidaccel.blocks.dit.modulation_rows import own_rows, stretches_of
from vidaccel.blocks.dit.padded_text import layers_are_hooked
from vidaccel.blocks.dit.rotary import alike_reason, halves_alike
from vidaccel.kernels.attention.qk_norm_rope import HeadNorm, Rope, qk_norm_rope
from vidaccel.kernels.op import REFERENCE, note, one_or
from vidaccel.parallel.layout import all_tokens, own_tokens
from vidaccel.sites.block import CORNER_ROWS, MOST_WHOLE, call_site, fuses
from vidaccel.sites.memo import once_in_call
from vidaccel.sites.plain import order_reason, parameters_reason, plain_reason
from vidaccel.sites.site import Fidelity

__all__ = ["COSMOS_OPS", "FusedCosmosTransformerBlock"]

COSMOS_OPS: dict[str, Fidelity] = {
    "modulation_rows": "math-exact",
    "gated_residual_norm": "math-exact",
    "qk_norm_rope": "math-exact",
    "spatial_attention": "math-exact",
}

Rotary = tuple[Tensor, Tensor]  # cos and sin [S, D] float32, the second half of the channels as the first


class _Timesteps(NamedTuple):
    """What the modulations of a call are made of.

    Attributes:
        embedded: ``[B, R, C]``, or ``[B, C]`` as stock code has it where R is 1.
        added: ``[B, R, 3 C]``, or ``[B, 3 C]``, added to each modulation, or None.
        rows: ``[S]`` int32, the row of each token; None: R is 1, or each token has its own.
    """

    embedded: Tensor
    added: Tensor | None
    rows: Tensor | None


@fuses(CosmosTransformerBlock, COSMOS_OPS)
class FusedCosmosTransformerBlock(GatedResidualBlock, CosmosTransformerBlock):
    """Self-attention, cross-attention to text (and an image) and feed-forward, on ``[B, S, C]``."""

    norm1: Any
    norm2: Any
    norm3: Any
    attn1: Any
    attn2: Any
    ff: Any
    before_proj: Any
    after_proj: Any

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple[Tensor | None, Tensor | None] | None,
        embedded_timestep: Tensor,
        temb: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
        extra_pos_emb: Tensor | None = None,
        attention_mask: Tensor | None = None,
        controlnet_residual: Tensor | None = None,
        latents: Tensor | None = None,
        block_idx: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return call_site(
            FusedCosmosTransformerBlock,
            self, hidden_states, encoder_hidden_states, embedded_timestep, temb, image_rotary_emb, extra_pos_emb,
            attention_mask, controlnet_residual, latents, block_idx,
        )  # fmt: skip

    def call_reason(
        self, x: Tensor, context: Any, embedded_timestep: Tensor, temb: Tensor | None, *args: Any
    ) -> str | None:
        if torch.is_autocast_enabled(x.device.type):
            return "autocast is on"
        if any(t.dtype != x.dtype for t in (embedded_timestep, temb) if t is not None):
            return "tokens and timestep embedding differ in dtype"
        if isinstance(context, Tensor) and len(context) != len(x):  # stock's attention may broadcast them
            return "its text and its video differ in batch size"
        if not all(_fits(t, x) for t in (embedded_timestep, temb) if t is not None):  # the same
            return "its video and its timestep embedding differ in size"
        for norm in (self.norm1, self.norm2, self.norm3):
            if reason := plain_reason(norm, CosmosAdaLayerNormZero):
                return reason
            if reason := parameters_reason(norm.norm, nn.LayerNorm, x.device):
                return reason
        return None

    def spread_reason(
        self, x: Tensor, context: Any, embedded_timestep: Tensor, temb: Any, rotary: Rotary | None, *args: Any
    ) -> str | None:
        return self._self_attention_reason(x, rotary)

    def path_in_data(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _, _, embedded_timestep, temb, rotary, *_ = args
        return self._timesteps(embedded_timestep, temb).embedded.shape[1], _angles_reason(rotary)

    def corner(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, context, *timesteps, rotary, extra_pos_emb, mask, residual, latents, block_idx = args
        if x.numel() <= MOST_WHOLE:
            return args, kwargs
        x, extra_pos_emb, residual, latents, *timesteps = (
            t if t is None or t.ndim == 2 else t[:, :CORNER_ROWS]
            for t in (x, extra_pos_emb, residual, latents, *timesteps)
        )
        rotary = None if rotary is None else tuple(table[:CORNER_ROWS] for table in rotary)
        return (x, context, *timesteps, rotary, extra_pos_emb, mask, residual, latents, block_idx), kwargs

    def fused_forward(
        self,
        x: Tensor,
        context: Any,
        embedded_timestep: Tensor,
        temb: Tensor | None,
        rotary: Rotary | None,
        extra_pos_emb: Tensor | None,
        mask: Any,
        controlnet_residual: Tensor | None,
        latents: Tensor | None,
        block_idx: int | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if self.before_proj is not None:
            x = self.before_proj(x) + latents
        timesteps = _own(self._timesteps(embedded_timestep, temb))
        rows = timesteps.rows
        shift, scale, gate = _modulation(self.norm1, timesteps)
        if extra_pos_emb is None:
            normed = self.modulate(self.norm1.norm, x, scale, shift, rows)
        else:
            x, normed = self.add_norm(x, own_tokens(extra_pos_emb, 1), None, self.norm1.norm, scale, shift, rows)
        attended = self._self_attention(normed, rotary)
        shift, scale, cross_gate = _modulation(self.norm2, timesteps)
        x, normed = self.add_norm(x, attended, gate, self.norm2.norm, scale, shift, rows)
        attended = self._cross_attention(normed, context, mask)
        shift, scale, gate = _modulation(self.norm3, timesteps)
        x, normed = self.add_norm(x, attended, cross_gate, self.norm3.norm, scale, shift, rows)
        x = self.add(x, self.ff(normed), gate, rows)
        if controlnet_residual is not None:
            x += own_tokens(controlnet_residual, 1)
        return x if self.after_proj is None else (x, self.after_proj(x))

    def _timesteps(self, embedded: Tensor, added: Tensor | None) -> _Timesteps:
        of_tokens = embedded.ndim == 3 and (added is None or added.shape[:2] == embedded.shape[:2])
        if not of_tokens or not self.runs("modulation_rows"):
            return _Timesteps(embedded, added, None)
        if reason := self._order_reason():
            note("modulation_rows", REFERENCE, reason)
            return _Timesteps(embedded, added, None)
        # what is added is kept with the answer: its id is nobody else's for as long
        name = f"distinct timesteps beside {id(added)}"
        return once_in_call(name, embedded, lambda: (added, _distinct(embedded, added)))[1]

    def _order_reason(self) -> str | None:
        """Why tokens with the same embedding may be modulated in other ways, or None."""
        if layers_are_hooked():
            return "a layer has forward hooks, or a forward of its own, which may tell rows apart"
        return next(filter(None, map(order_reason, (self.norm1, self.norm2, self.norm3))), None)

    def _self_attention(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        attn = self.attn1
        if reason := self._self_attention_reason(x, rotary):
            for op in ("qk_norm_rope", "spatial_attention"):
                note(op, REFERENCE, reason)
            out: Tensor = attn(x, image_rotary_emb=rotary)
            return out
        query, key, value = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        norm = HeadNorm("rms_head", attn.norm_q.eps, attn.norm_q.weight, attn.norm_k.weight, rounding="each")
        query, key = qk_norm_rope(query, key, attn.heads, norm, _rope(rotary))
        fused = self.runs("spatial_attention")
        return project(attn, attend_to_all(attn.processor, query, key, value, attn.heads, fused=fused))

    def _self_attention_reason(self, x: Tensor, rotary: Rotary | None) -> str | None:
        """Why self-attention has to be called, or None."""
        attn = self.attn1
        if not self.runs("qk_norm_rope"):
            return "qk_norm_rope is off, or failed"
        if reason := attention_reason(attn, Attention, CosmosAttnProcessor2_0):
            return reason
        if rotary is not None and any(table.dtype != torch.float32 for table in rotary):
            return "its rotary table is not float32"
        if reason := _norm_reason(attn.norm_q, x) or _norm_reason(attn.norm_k, x):
            return reason
        if attn.norm_q.eps != attn.norm_k.eps:
            return "its norms differ in eps"
        return _angles_reason(rotary)

    def _cross_attention(self, x: Tensor, context: Any, mask: Any) -> Tensor:
        attn = self.attn2
        if not isinstance(context, Tensor) or attention_reason(attn, Attention, CosmosAttnProcessor2_0):
            out: Tensor = attn(x, encoder_hidden_states=context, attention_mask=mask)
            return out
        query, key, value = attn.to_q(x), attn.to_k(context), attn.to_v(context)
        query, key = self._normed(attn, attn.norm_q, query), _stock_norm(attn, attn.norm_k, key)
        fused = self.runs("spatial_attention")
        return project(attn, attend(attn.processor, query, key, value, attn.heads, mask=mask, fused=fused))

    def _normed(self, attn: Any, norm: Any, x: Tensor) -> Tensor:
        """Each head of the queries ``[B, S, H*D]`` normed; rounded once, stock code does so twice."""
        if not self.runs("gated_residual_norm") or _norm_reason(norm, x):
            return _stock_norm(attn, norm, x)
        return norm_heads(norm, x, attn.heads)


def _fits(timesteps: Tensor, x: Tensor) -> bool:
    """Whether ``timesteps`` are ``[B, C]`` or ``[B, S, C]``, of as many samples and tokens as ``x``, or of one."""
    batch, *tokens, _ = timesteps.shape
    return one_or(len(x), batch) and all(one_or(all_tokens(x), size) for size in tokens)


def _distinct(embedded: Tensor, added: Tensor | None) -> _Timesteps:
    """Of ``[B, S, C]`` and ``[B, S, 3 C]``, the rows of which either differs from the one before."""
    parts = [embedded[:, :, None]]
    if added is not None:  # by a layer of the user's own, it may be another for tokens of one timestep
        parts.append(added.unflatten(2, (3, -1)))
    stretches = stretches_of(*parts)
    if stretches is None:
        return _Timesteps(embedded, added, None)
    rows = stretches.rows if len(stretches.starts) > 1 else None
    return _Timesteps(embedded[:, stretches.starts], None if added is None else added[:, stretches.starts], rows)


def _own(timesteps: _Timesteps) -> _Timesteps:
    """Those of this rank's tokens."""
    if timesteps.embedded.ndim == 2:
        return timesteps
    embedded, rows = own_rows(timesteps.embedded, timesteps.rows)
    added = None if timesteps.added is None else own_rows(timesteps.added, timesteps.rows)[0]
    return _Timesteps(embedded, added, rows)


def _modulation(norm: Any, timesteps: _Timesteps) -> tuple[Tensor, ...]:
    """Shift, scale and gate, ``[B, R, C]`` each."""
    values = norm.linear_2(norm.linear_1(norm.activation(timesteps.embedded)))
    values = values if timesteps.added is None else values + timesteps.added
    return (values[:, None] if values.ndim == 2 else values).chunk(3, dim=-1)


def _norm_reason(norm: Any, x: Tensor) -> str | None:
    """Why no kernel may norm heads of ``x`` for a module, or None."""
    if reason := parameters_reason(norm, RMSNorm, x.device):
        return reason
    if norm.weight is None or norm.weight.dtype != x.dtype or norm.bias is not None:
        return "a norm of queries or keys has a bias, no weight, or one of another dtype"
    return None


def _stock_norm(attn: Any, norm: Any, x: Tensor) -> Tensor:
    # [B, H, S, D] as stock gives it: it may be hooked
    normed: Tensor = norm(x.unflatten(2, (attn.heads, -1)).transpose(1, 2))
    return normed.transpose(1, 2).flatten(2)


def _angles_reason(rotary: Rotary | None) -> str | None:
    return alike_reason(*(rotary or ()), alike=halves_alike)


def _rope(rotary: Rotary | None) -> Rope | None:
    if rotary is None:
        return None
    cos, sin = (own_tokens(table, 0)[None, :, None, : table.shape[1] // 2] for table in rotary)
    return Rope("halves", cos, sin)
