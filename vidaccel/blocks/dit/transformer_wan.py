"""diffusers' ``transformers/transformer_wan.py``: the block of Wan 2.1 and 2.2.

Stock code goes to float32 and back around every norm, modulation and gate: 133 passes over the tokens of a block, here
18. Everything between two products is one pass: a gated residual with the next norm and its modulation, and the norm
of queries and keys with their rotary embedding.

Wan 2.2 TI2V gives every token a timestep of its own, of which there are one or two different ones. The embedding of the
timestep, and each block's modulation, are made once for each of these.

Other models have copies of this block, made of copies of its parts: they are served by subclasses of
:class:`WanBlock` that say what differs.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanTimeTextImageEmbedding,
    WanTransformerBlock,
)
from torch import Tensor, nn

from vidaccel.blocks.dit.attention import (
    attend,
    attention_reason,
    feed_forward,
    over_heads,
    project,
    qkv,
)
from vidaccel.blocks.dit.modulation_rows import distinct_rows, keep_rows, own_rows, stretches_of
from vidaccel.blocks.dit.padded_text import layers_are_hooked
from vidaccel.blocks.dit.rotary import half_tables
from vidaccel.blocks.dit.step_caches import known_to_step_caches
from vidaccel.kernels.attention.qk_norm_rope import HeadNorm, Rope, qk_norm_rope
from vidaccel.kernels.norm.gated_residual_norm import (
    Norm,
    gated_residual,
    gated_residual_norm,
    norm_modulate,
    rows_of_tokens,
)
from vidaccel.kernels.op import REFERENCE, note
from vidaccel.parallel.layout import all_tokens, own_tokens
from vidaccel.sites.block import CORNER_ROWS, MOST_WHOLE, FusedBlock, call_site, fuses
from vidaccel.sites.plain import order_reason, parameters_reason
from vidaccel.sites.site import Fidelity

__all__ = [
    "WAN_OPS",
    "FusedWanTimeTextImageEmbedding",
    "FusedWanTransformerBlock",
    "Modulation",
    "Parts",
    "WanBlock",
]

TEXT_TOKENS = 512  # of the text encoder; what comes before them is an image
WAN_OPS: dict[str, Fidelity] = {
    "gated_residual_norm": "math-exact",
    "qk_norm_rope": "math-exact",
    "spatial_attention": "math-exact",
    "linear_gelu": "math-exact",
}


class Parts(NamedTuple):
    """What a copy of Wan's block is made of.

    Attributes:
        attention: The class of both attentions.
        processor: That of the first one's processor.
        cross_processor: That of the second one's.
        head_norm: That of the norms of queries and keys.
        takes_image: Whether the second attention attends to an image apart from the text, if it has weights for it.
    """

    attention: type[nn.Module]
    processor: type
    cross_processor: type
    head_norm: type[nn.Module] = nn.RMSNorm
    takes_image: bool = True


class Modulation(NamedTuple):
    """Six times ``[B, R, C]`` in float32, and the row of each token ``[S]`` if R is neither 1 nor S."""

    shift: Tensor
    scale: Tensor
    gate: Tensor
    ff_shift: Tensor
    ff_scale: Tensor
    ff_gate: Tensor
    rows: Tensor | None


class WanBlock(FusedBlock):
    """What is done alike in all blocks made of Wan's parts; a subclass says what is not.

    Its attentions, norms and feed-forward have the names that they have in Wan's block.
    """

    parts: ClassVar[Parts] = Parts(WanAttention, WanAttnProcessor, WanAttnProcessor)
    norm1: Any
    norm2: Any
    norm3: Any
    attn1: Any
    attn2: Any
    ffn: Any
    scale_shift_table: Any

    def call_reason(self, hidden_states: Tensor, context: Tensor, temb: Tensor, *args: Any) -> str | None:
        if temb.ndim not in (3, 4):
            return f"its timestep embedding has {temb.ndim} dimensions"
        if torch.is_autocast_enabled(hidden_states.device.type):
            return "autocast is on"
        if self._takes_image() and context.shape[1] <= TEXT_TOKENS:
            return f"there is no image before the {TEXT_TOKENS} tokens of its text"
        if len(context) != len(hidden_states):  # stock's attention may broadcast them
            return "its text and its video differ in batch size"
        if self.by_token(temb).shape[1] not in (1, all_tokens(hidden_states)):
            return "its timestep embedding has neither one row nor one for each token"
        # a model may go without the second, which nothing modulates
        second = nn.Identity if type(self.norm2) is nn.Identity else FP32LayerNorm
        for norm, kind in ((self.norm1, FP32LayerNorm), (self.norm2, second), (self.norm3, FP32LayerNorm)):
            if reason := parameters_reason(norm, kind, hidden_states.device):
                return reason
        return None

    def spread_reason(
        self, hidden_states: Tensor, context: Tensor, temb: Tensor, rotary_emb: Any, *args: Any
    ) -> str | None:
        return self.self_attention_reason(hidden_states, rotary_emb)

    def corner(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return (args if args[0].numel() <= MOST_WHOLE else self.cut(*args)), kwargs

    def cut(self, x: Tensor, context: Tensor, temb: Tensor, rotary_emb: Any) -> tuple[Any, ...]:
        """The arguments of a call for the first ``CORNER_ROWS`` tokens."""
        return x[:, :CORNER_ROWS], context, first_tokens(temb), tuple(table[:, :CORNER_ROWS] for table in rotary_emb)

    def by_token(self, temb: Tensor) -> Tensor:
        """The embedding of timesteps as ``[B, S, 6, C]``, or ``[B, 1, 6, C]`` if a sample has one."""
        return temb if temb.ndim == 4 else temb[:, None]

    def rope_reason(self, rotary_emb: Any) -> str | None:
        """Why there is no :meth:`rope`, or None."""
        if rotary_emb is None or any(table.dtype != torch.float32 for table in rotary_emb):
            return "its rotary table is not float32"
        return None

    def rope(self, rotary_emb: Any) -> Rope:
        """Of tables ``[1, S, 1, D]``; of this rank's tokens."""
        cos, sin = half_tables(rotary_emb)
        return Rope("pairs", own_tokens(cos, 1), own_tokens(sin, 1))

    def fused_forward(self, hidden_states: Tensor, context: Tensor, temb: Tensor, rotary_emb: Any) -> Tensor:
        modulation = self.modulation(temb)
        normed = self.modulate(hidden_states, modulation)
        return self.rest(hidden_states, self.self_attention(normed, rotary_emb), context, modulation)

    def modulation(self, temb: Tensor) -> Modulation:
        distinct, rows = own_rows(*distinct_rows(self.by_token(temb)))
        shift, scale, gate, ff_shift, ff_scale, ff_gate = (self.scale_shift_table + distinct.float()).unbind(2)
        return Modulation(shift, scale, gate, ff_shift, ff_scale, ff_gate, rows)

    def modulate(self, x: Tensor, modulation: Modulation) -> Tensor:
        """The modulated norm before the first attention."""
        shift, scale, *_, rows = modulation
        if self.runs("gated_residual_norm"):
            return norm_modulate(x, norm_of(self.norm1), scale, shift, rows=rows)
        return _stock_norm(self.norm1, x, scale, shift, rows)

    def add_norm(
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
        # a plain sum of two dtypes has the wider one; the op's has that of x
        if self.runs("gated_residual_norm") and (gate is not None or branch.dtype == x.dtype):
            if type(norm) is nn.Identity:
                z = gated_residual(x, branch, gate, rows=rows)
                return z, z
            z, y = gated_residual_norm(x, branch, gate, norm_of(norm), scale, shift, rows=rows)
            return z, y
        z = x + branch if gate is None else (x.float() + branch * rows_of_tokens(gate, rows)).type_as(x)
        return z, _stock_norm(norm, z, scale, shift, rows)

    def rest(self, x: Tensor, attended: Tensor, context: Tensor, modulation: Modulation, *args: Any) -> Tensor:
        """What comes after the first attention; ``args`` are for the second one."""
        _, _, gate, ff_shift, ff_scale, ff_gate, rows = modulation
        x, normed = self.add_norm(x, attended, gate, rows, self.norm2)
        x, normed = self.add_norm(
            x, self.cross_attention(normed, context, *args), None, rows, self.norm3, ff_scale, ff_shift
        )
        out = feed_forward(self.ffn, normed, fused=self.runs("linear_gelu"))
        if self.runs("gated_residual_norm"):
            return gated_residual(x, out, ff_gate, rows=rows)
        return (x.float() + out.float() * rows_of_tokens(ff_gate, rows)).type_as(x)

    def self_attention(self, x: Tensor, rotary_emb: Any, mask: Any = None, *args: Any) -> Tensor:
        """The first attention; ``args`` are only for a processor that is not the expected one."""
        attn = self.attn1
        if reason := self.self_attention_reason(x, rotary_emb):
            note("qk_norm_rope", REFERENCE, reason)
            note("spatial_attention", REFERENCE, reason)
            return self.call_self_attention(x, rotary_emb, mask, *args)
        query, key, value = qkv(attn, x)
        rounding: Any = "once" if self.parts.head_norm is nn.RMSNorm else "each"
        norm = HeadNorm("rms_all", attn.norm_q.eps, attn.norm_q.weight, attn.norm_k.weight, rounding=rounding)
        query, key = qk_norm_rope(query, key, attn.heads, norm, self.rope(rotary_emb))
        return project(attn, over_heads(partial(self.attend, attn, mask=mask), query, key, value, attn.heads))

    def self_attention_reason(self, x: Tensor, rotary_emb: Any) -> str | None:
        """Why the first attention is called as a module, or None."""
        attn = self.attn1
        if not self.runs("qk_norm_rope"):
            return "qk_norm_rope is off, or failed"
        if reason := attention_reason(attn, self.parts.attention, self.parts.processor):
            return reason
        for norm in (attn.norm_q, attn.norm_k):
            if reason := parameters_reason(norm, self.parts.head_norm, x.device):
                return reason
            if getattr(norm, "bias", None) is not None:
                return "a norm of queries or keys has a bias"
        if attn.norm_q.eps != attn.norm_k.eps:
            return "its norms differ in eps"
        return self.rope_reason(rotary_emb)

    def call_self_attention(self, x: Tensor, rotary_emb: Any, mask: Any, *args: Any) -> Tensor:
        return self.attn1(x, None, mask, rotary_emb, *args)

    def cross_attention(self, x: Tensor, context: Tensor, *args: Any) -> Tensor:
        """The second attention; ``args`` are only for a processor that is not the expected one."""
        attn = self.attn2
        if reason := attention_reason(attn, self.parts.attention, self.parts.cross_processor):
            note("spatial_attention", REFERENCE, reason)
            return self.call_cross_attention(x, context, *args)
        image = None
        if self._takes_image():
            image, context = context.split([context.shape[1] - TEXT_TOKENS, TEXT_TOKENS], dim=1)
        query, key, value = qkv(attn, x, context)
        query, key = attn.norm_q(query), attn.norm_k(key)
        out = self.attend(attn, query, key, value, attn.heads)
        if image is not None:
            out = out + self.attend(attn, query, *_image_keys_values(attn, image), attn.heads)
        return project(attn, out)

    def _takes_image(self) -> bool:
        return self.parts.takes_image and getattr(self.attn2, "add_k_proj", None) is not None

    def call_cross_attention(self, x: Tensor, context: Tensor, *args: Any) -> Tensor:
        return self.attn2(x, context, None, None, *args)

    def attend(self, attn: Any, query: Tensor, key: Tensor, value: Tensor, num_heads: int, mask: Any = None) -> Tensor:
        fused = self.runs("spatial_attention")
        return attend(attn.processor, query, key, value, num_heads, mask=mask, fused=fused)


def first_tokens(temb: Tensor) -> Tensor:
    """``[B, S, 6, C]`` for the first ``CORNER_ROWS`` tokens; ``[B, 6, C]`` is for all of them."""
    return temb[:, :CORNER_ROWS] if temb.ndim == 4 else temb


def norm_of(module: Any) -> Norm:
    """That of a FP32LayerNorm."""
    return Norm("layer", module.eps, module.weight, module.bias)


def _image_keys_values(attn: Any, image: Tensor) -> tuple[Tensor, Tensor]:
    if attn.fused_projections:
        key, value = attn.to_added_kv(image).chunk(2, dim=-1)
    else:
        key, value = attn.add_k_proj(image), attn.add_v_proj(image)
    return attn.norm_added_k(key), value


def _stock_norm(norm: Any, x: Tensor, scale: Tensor | None, shift: Tensor | None, rows: Tensor | None) -> Tensor:
    y = norm(x.float())
    if scale is not None and shift is not None:
        y = y * (1 + rows_of_tokens(scale, rows)) + rows_of_tokens(shift, rows)
    return y.type_as(x)


@known_to_step_caches
@fuses(WanTransformerBlock, WAN_OPS)
class FusedWanTransformerBlock(WanBlock, WanTransformerBlock):
    """Self-attention, cross-attention to text (and an image) and feed-forward, on ``[B, S, C]``."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Tensor) -> Tensor:
        return call_site(FusedWanTransformerBlock, self, hidden_states, encoder_hidden_states, temb, rotary_emb)


@fuses(WanTimeTextImageEmbedding, {"modulation_rows": "math-exact"})
class FusedWanTimeTextImageEmbedding(FusedBlock, WanTimeTextImageEmbedding):
    """The embedding of a timestep for each token, made once for each stretch of tokens that share it."""

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

    def call_reason(self, timestep: Tensor, context: Tensor, image: Any, tokens: int | None) -> str | None:
        return None if tokens is None else order_reason(self)

    def corner(self, args: Any, kwargs: Any) -> Any:
        timestep, context, image, tokens = args
        if tokens is None or tokens <= CORNER_ROWS:
            return args, kwargs
        return (timestep.reshape(-1, tokens)[:, :CORNER_ROWS].flatten(), context, image, CORNER_ROWS), kwargs

    def fused_forward(self, timestep: Tensor, context: Tensor, image: Tensor | None, tokens: int | None) -> Any:
        stock = WanTimeTextImageEmbedding.forward
        if tokens is None:
            return stock(self, timestep, context, image, tokens)
        of_tokens = timestep.reshape(-1, tokens)
        stretches = stretches_of(of_tokens[..., None, None])
        if stretches is None:
            return stock(self, timestep, context, image, tokens)
        starts, rows = stretches
        distinct = of_tokens[:, starts]  # [B, R]
        temb, projected, *texts = stock(self, distinct.flatten(), context, image, len(starts))  # [B, R, C], [B, R, 6C]
        if len(starts) == 1:
            of_all = (x.expand(-1, tokens, -1) for x in (temb, projected))
            # a hook may write to them
            return *(x.contiguous() if layers_are_hooked() else x for x in of_all), *texts
        modulation = projected[:, rows]  # a row per token, for a block that is not fused
        keep_rows(modulation.unflatten(2, (6, -1)), projected.unflatten(2, (6, -1)), rows)
        return temb[:, rows], modulation, *texts
