"""diffusers' ``models/attention.py``: the spatial and the temporal transformer block of the spatio-temporal UNets.

Exact shortcut, one-token cross-attention: where the context is a single token (SVD's CLIP image embedding) the softmax
over it is 1 whatever the query, so ``attn2(norm2(x), context) == to_out(to_v(context))`` for every pixel, and norm2,
the query, the attention itself and the full-size output projection fall away.

Blocks that look across frames work on ``[B*F, HW, C]``: only their attention is not row by row, and it reads strided.

Where a block ends with its feed-forward and a residual, the two are added in the feed-forward's last product.

Where the context is a text, the queries of all frames that share it are the queries of one attention, and it is
projected once (see ``text_context.py``).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock, FeedForward, TemporalBasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from torch import Tensor, nn

from vidaccel.blocks.unet.attention_processor import (
    FusedAttnProcessor2_0,
    attend,
    attend_projected,
    attention_reason,
    bypassed,
    merged_weights,
    output_layers,
)
from vidaccel.blocks.unet.frames import by_pixels, whole_clip
from vidaccel.blocks.unet.normalization import norms_reason
from vidaccel.blocks.unet.text_context import distinct_rows
from vidaccel.kernels.attention.qkv_projection import qkv_projection
from vidaccel.kernels.attention.spatial_attention import compile_ahead as compile_attention_ahead
from vidaccel.kernels.attention.temporal_attention import compile_ahead as compile_temporal_attention_ahead
from vidaccel.kernels.attention.temporal_attention import temporal_attention
from vidaccel.kernels.ffn.residual_projection import residual_projection
from vidaccel.kernels.norm.add_layer_norm import RowTo, add_layer_norm
from vidaccel.kernels.norm.add_layer_norm import compile_ahead as compile_norm_ahead
from vidaccel.kernels.op import note, runs_triton
from vidaccel.parallel.layout import frames
from vidaccel.sites.block import FusedBlock, call_site, cut_corner, fuses
from vidaccel.sites.memo import once_per_call
from vidaccel.sites.plain import hook_reason, order_reason, parameters_reason, plain_reason

__all__ = [
    "FusedBasicTransformerBlock",
    "FusedTemporalBasicTransformerBlock",
    "FusedTextTransformerBlock",
    "TemporalSelfAttention",
]


def _is_one_token(context: Tensor | None) -> bool:
    return context is not None and context.ndim == 3 and context.shape[1] == 1


def _one_token_attention(attn: Attention, context: Tensor) -> Tensor:
    """What ``attn(anything, context)`` returns for each row of a one-token ``context`` ``[N, 1, D]``: ``[N, 1, C]``."""
    if not torch.compiler.is_compiling():
        bypassed(attn)
    out = attn.to_v(context)
    for layer in output_layers(attn):
        out = layer(out)
    return out / attn.rescale_output_factor if attn.rescale_output_factor != 1.0 else out


@once_per_call
def _shortcut_reason(attn: Any, norm: Any = None) -> str | None:
    """Why ``attn`` does more with its context than weigh its values, or None.

    With the ``norm`` before it, also why that or what makes queries and keys has to be called, or what takes its result
    has to be called for every query.
    """
    if attn is None:
        return "it has no cross-attention"
    if reason := attention_reason(attn):
        return reason
    if attn.residual_connection or attn.norm_cross or attn.spatial_norm is not None or attn.group_norm is not None:
        return "its cross-attention has a norm or residual of its own"
    left_out = () if norm is None else (norm, attn.to_q, attn.to_k, *attn.to_out)
    return next(filter(None, map(hook_reason, left_out)), None)


@once_per_call
def _last_projection(feed_forward: Any, device: torch.device) -> nn.Linear | None:
    """The linear layer that ends ``feed_forward``, if a product of ours may stand for it."""
    if plain_reason(feed_forward, FeedForward):
        return None
    net = feed_forward.net
    if len(net) != 3 or plain_reason(net[1], nn.Dropout) or net[1].training:
        return None
    return None if parameters_reason(net[2], nn.Linear, device, ("weight", "bias")) else net[2]


def _attend_by_pixel(attn: Attention, x: Tensor, num_frames: int, context: Tensor | None = None) -> Tensor:
    """``attn`` over the frames of every pixel the stock way: ``[B*F, HW, C]`` permuted to ``[B*HW, F, C]`` and back."""
    pixels = x.unflatten(0, (-1, num_frames)).transpose(1, 2)  # [B, HW, F, C]
    out = attend(attn, pixels.flatten(0, 1), context).unflatten(0, pixels.shape[:2])
    return out.transpose(1, 2).flatten(0, 1)


class _TransformerBlock(FusedBlock):
    """What the spatial and the temporal blocks share: what is added around a LayerNorm, and attention over frames."""

    def _add_norm(
        self,
        norm: Any,
        x: Tensor,
        residual: Tensor | None = None,
        row: Tensor | None = None,
        position: Tensor | None = None,
        row_to: RowTo = "sum",
    ) -> tuple[Tensor, Tensor]:
        """``z = row + (x + residual)`` and ``norm(z) + position``; `row` is ``[B*F, 1, C]``, `position` ``[F, C]``.

        The row joins the residual or what is normed instead, where ``row_to`` says so, as in ``add_layer_norm``.
        """
        if self.runs("add_layer_norm"):
            weights = norm.weight, norm.bias, norm.eps
            return add_layer_norm(x, *weights, residual=residual, row=row, position=position, row_to=row_to)
        if row is not None and residual is not None and row_to == "residual":
            residual, row = row + residual, None
        x = x if residual is None else x + residual
        summed = x if row is None else row + x
        normed = norm(x if row_to == "stored" else summed)
        if position is not None:
            normed = (normed.unflatten(0, (-1, len(position))) + position[:, None]).flatten(0, 1)
        return (x if row_to == "norm" else summed), normed

    def _compile_norm_ahead(
        self, norm: Any, *, residual: bool = False, row_to: RowTo | None = None, position: bool = False
    ) -> None:
        plain = type(norm) is nn.LayerNorm and type(norm.weight) is nn.Parameter
        if plain and self.runs("add_layer_norm"):
            compile_norm_ahead(norm.weight, residual=residual, row_to=row_to, position=position)

    def _compile_frames_ahead(self, attn: Attention) -> None:
        """For :meth:`_attend_frames`."""
        weight: Any = getattr(attn.to_q, "weight", None)
        if type(weight) is nn.Parameter and self.runs("temporal_attention"):
            compile_temporal_attention_ahead(weight, attn.heads)

    def _norms_reason(self, x: Tensor, *norms: Any) -> str | None:
        return norms_reason(nn.LayerNorm, x, *norms) if self.runs("add_layer_norm") else None

    def _add_feed_forward(self, block: Any, x: Tensor, residual: Tensor) -> Tensor:
        """``z + ff(norm3(z))`` of ``z = x + residual``, ``[N, HW, C]``, with the ``norm3`` and ``ff`` of ``block``."""
        fused = self.runs("add_layer_norm") and self.runs("residual_projection")
        fused = fused and runs_triton("residual_projection", x) and not torch.compiler.is_compiling()
        last = _last_projection(block.ff, x.device) if fused else None
        if last is None or last.weight.dtype != x.dtype:
            hidden_states, normed = self._add_norm(block.norm3, x, residual)
            return block.ff(normed) + hidden_states
        rows = x.reshape(1, -1, x.shape[2]), residual.reshape(1, -1, x.shape[2]), last.bias[None, None].to(x.dtype)
        with_bias, normed = self._add_norm(block.norm3, *rows, row_to="stored")
        return residual_projection(block.ff.net[0](normed.view(x.shape)), last.weight, with_bias.view(x.shape))

    def _attend_frames(self, attn: Attention, hidden_states: Tensor, num_frames: int) -> Tensor:
        """Self-attention over the frames of every pixel of ``[B*F, HW, C]``."""
        return by_pixels(partial(self._attend_own_frames, attn), hidden_states, num_frames)

    def _attend_own_frames(self, attn: Attention, hidden_states: Tensor, num_frames: int) -> Tensor:
        if not self.runs("temporal_attention"):
            return _attend_by_pixel(attn, hidden_states, num_frames)
        if not torch.compiler.is_compiling():
            bypassed(attn)
        weights = merged_weights(attn, hidden_states) if self.runs("qkv_projection") else None
        if weights is None:
            query, key, value = (layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v))
        else:
            query, key, value = qkv_projection(hidden_states, *weights)
        out = temporal_attention(query, key, value, num_frames, attn.heads)
        for layer in output_layers(attn):
            out = layer(out)
        return out / attn.rescale_output_factor if attn.rescale_output_factor != 1.0 else out


def _compile_attention_ahead(attn: Attention) -> None:
    """For the attention of a frame's pixels to one another, if it will be ours."""
    weight: Any = getattr(attn.to_q, "weight", None)
    if type(weight) is nn.Parameter and isinstance(attn.processor, FusedAttnProcessor2_0):
        compile_attention_ahead(weight, attn.heads)


class _SpatialTransformerBlock(_TransformerBlock, BasicTransformerBlock):
    """Self-attention over a frame's pixels, cross-attention to a context, feed-forward; on ``[B*F, HW, C]``."""

    original = BasicTransformerBlock

    @classmethod
    def stands_for(cls, module: nn.Module) -> bool:
        # The blocks that attend over frames are of the same class; they have a second self-attention.
        assert isinstance(module, BasicTransformerBlock)
        return module.attn2 is not None and getattr(module.attn2, "is_cross_attention", True)

    @classmethod
    def left_alone_reason(cls, module: nn.Module) -> str | None:
        assert isinstance(module, BasicTransformerBlock)
        if module.norm_type != "layer_norm" or module.pos_embed is not None or module.only_cross_attention:
            return "it is not a plain LayerNorm block"
        return _shortcut_reason(module.attn2)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: torch.LongTensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: torch.LongTensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        return call_site(
            _SpatialTransformerBlock,
            self,
            hidden_states,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            timestep,
            cross_attention_kwargs,
            class_labels,
            added_cond_kwargs,
        )

    def call_reason(self, hidden_states: Tensor, *args: Any) -> str | None:
        attention_mask, context, context_mask, _, attention_kwargs, *_ = args
        if attention_mask is not None or context_mask is not None:
            return "an attention mask was passed"
        if attention_kwargs:
            return "cross_attention_kwargs were passed"
        if self._chunk_size is not None:
            return "the feed-forward is chunked"
        if isinstance(context, Tensor) and context.shape[0] != hidden_states.shape[0]:
            return "the contexts are not as many as the images"
        return (
            self._context_reason(context)
            or _shortcut_reason(self.attn2)
            or self._norms_reason(hidden_states, self.norm1, self.norm2, self.norm3)
        )

    def _context_reason(self, context: Any) -> str | None:
        raise NotImplementedError

    def fused_forward(self, *args: Any) -> Tensor:
        x, residual, row = self._attend(*args)
        if row is None:
            return self._add_feed_forward(self, x, residual)
        residual, normed = self._add_norm(self.norm3, x, residual, row)
        return self.ff(normed) + residual

    def last_addends(self, *args: Any) -> tuple[Tensor, Tensor]:
        """What the block's result is the sum of: its feed-forward and the residual."""
        residual, normed = self._add_norm(self.norm3, *self._attend(*args))
        return self.ff(normed), residual

    def _attend(
        self, hidden_states: Tensor, attention_mask: None, context: Tensor, *args: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Both attentions; see :meth:`_attend_context`."""
        _, normed = self._add_norm(self.norm1, hidden_states)
        return self._attend_context(attend(self.attn1, normed), hidden_states, context)

    def _attend_context(
        self, attended: Tensor, residual: Tensor, context: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The addends of the residual stream after cross-attention: two, and perhaps a row for each sample."""
        residual, normed = self._add_norm(self.norm2, attended, residual)
        return attend(self.attn2, normed, context), residual, None


@fuses(BasicTransformerBlock, {"one_token_attention": "math-exact", "add_layer_norm": "math-exact"})
class FusedBasicTransformerBlock(_SpatialTransformerBlock):
    """The spatial block of SVD, whose cross-attention to one token is a row per frame."""

    def compile_ahead(self) -> None:
        self._compile_norm_ahead(self.norm1)
        self._compile_norm_ahead(self.norm3, residual=True, row_to="sum")
        _compile_attention_ahead(self.attn1)

    def _context_reason(self, context: Any) -> str | None:
        if not _is_one_token(context):
            return "the context is not one token"
        return _shortcut_reason(self.attn2, self.norm2) if self.runs("one_token_attention") else None

    def _attend_context(
        self, attended: Tensor, residual: Tensor, context: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if not self.runs("one_token_attention"):
            return super()._attend_context(attended, residual, context)
        return attended, residual, _one_token_attention(self.attn2, context)


@fuses(
    BasicTransformerBlock,
    {"text_rows": "math-exact", "add_layer_norm": "math-exact", "residual_projection": "math-exact"},
)
class FusedTextTransformerBlock(_SpatialTransformerBlock):
    """The spatial block of the text-conditioned UNets; a text may have any number of tokens."""

    def compile_ahead(self) -> None:
        self._compile_norm_ahead(self.norm1)
        self._compile_norm_ahead(self.norm2, residual=True)
        self._compile_norm_ahead(self.norm3, residual=True, row_to="stored")
        _compile_attention_ahead(self.attn1)

    def _context_reason(self, context: Any) -> str | None:
        return None if isinstance(context, Tensor) else "no text was passed, or more than text (IP-Adapter)"

    def _attend_context(
        self, attended: Tensor, residual: Tensor, context: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if torch.compiler.is_compiling() or not self.runs("text_rows"):
            return super()._attend_context(attended, residual, context)
        if reason := order_reason(self.attn2):
            note("text_rows", "torch", reason)
            return super()._attend_context(attended, residual, context)
        residual, normed = self._add_norm(self.norm2, attended, residual)
        return self._attend_text(normed, context), residual, None

    def _attend_text(self, normed: Tensor, context: Tensor) -> Tensor:
        """``attn2(normed, context)``, all frames with the same text as the queries of one attention."""
        attn, text = self.attn2, distinct_rows(context)
        query = attn.to_q(normed)
        query = query.view(text.shape[0], -1, query.shape[2])  # [B, F*HW, H*D]
        return attend_projected(attn, query, attn.to_k(text), attn.to_v(text)).view(normed.shape)


@fuses(
    TemporalBasicTransformerBlock,
    {
        "temporal_attention": "math-exact",
        "one_token_attention": "math-exact",
        "add_layer_norm": "math-exact",
        "qkv_projection": "math-exact",
    },
)
class FusedTemporalBasicTransformerBlock(_TransformerBlock, TemporalBasicTransformerBlock):
    """The temporal block of SVD on ``[B*F, HW, C]`` as it comes, without the stock block's two permutes of it.

    The context may come as stock code makes it, ``[B*HW, L, D]``, or once per batch, ``[B, L, D]``, as
    :class:`FusedTransformerSpatioTemporalModel` passes it.
    """

    @classmethod
    def left_alone_reason(cls, module: nn.Module) -> str | None:
        assert isinstance(module, TemporalBasicTransformerBlock)
        if not module.is_res:
            return "its inner width differs from its outer one"
        return _plain_attention_reason(module.attn1)

    def forward(self, hidden_states: Tensor, num_frames: int, encoder_hidden_states: Tensor | None = None) -> Tensor:
        return call_site(FusedTemporalBasicTransformerBlock, self, hidden_states, num_frames, encoder_hidden_states)

    def call_reason(self, hidden_states: Tensor, num_frames: int, context: Tensor | None) -> str | None:
        if self._chunk_size is not None:
            return "the feed-forward is chunked"
        if self.attn2 is not None and context is None:
            return "no context was passed, and its cross-attention is one to itself then"
        if self._takes_shortcut(context) and (reason := _shortcut_reason(self.attn2, self.norm2)):
            return reason
        norms = (self.norm_in, self.norm1, self.norm2 or self.norm3, self.norm3)
        return self._norms_reason(hidden_states, *norms) or order_reason(self)

    @classmethod
    def original_forward(cls, host: Any, hidden_states: Tensor, num_frames: int, context: Tensor | None) -> Tensor:
        pixels, batch = hidden_states.shape[1], hidden_states.shape[0] // num_frames
        if context is not None and context.shape[0] == batch:
            context = context.repeat_interleave(pixels, dim=0)
        out: Tensor = whole_clip(TemporalBasicTransformerBlock, host, hidden_states, num_frames, context)
        return out

    def corner(self, args: Any, kwargs: Any) -> Any:
        hidden_states, num_frames, context = args
        pixels = hidden_states.shape[1]
        corner, _ = cut_corner((hidden_states,), {})  # of the context all tokens
        if context is not None and context.shape[0] != hidden_states.shape[0] // num_frames:  # a row for every pixel
            context = context.unflatten(0, (-1, pixels))[:, : corner[0].shape[1]].flatten(0, 1)
        return (*corner, num_frames, context), kwargs

    def fused_forward(self, hidden_states: Tensor, num_frames: int, context: Tensor | None) -> Tensor:
        _, normed = self._add_norm(self.norm_in, hidden_states)
        hidden_states, normed = self._add_norm(self.norm1, self.ff_in(normed), hidden_states)
        branch, residual = self._attend(hidden_states, normed, num_frames, context)
        return branch + residual

    def compile_ahead(self) -> None:
        self._compile_norm_ahead(self.norm_in, residual=True, row_to="norm")
        self._compile_norm_ahead(self.norm1, residual=True, row_to="residual")
        self._compile_norm_ahead(self.norm3, residual=True, row_to="sum")
        self._compile_norm_ahead(self.norm_in)  # without a fused parent, and when that checks itself
        self._compile_norm_ahead(self.norm1, residual=True)
        self._compile_frames_ahead(self.attn1)

    def last_addends(
        self, addends: tuple[Tensor, Tensor], frame_embedding: Tensor, num_frames: int, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The sum of two ``addends``; and the two addends of the block's result for that sum plus its frame embedding.

        The frame embedding, ``[B*F, 1, C]``, is added where it is read: its sum with the input is never stored.
        """
        x, normed = self._add_norm(self.norm_in, *addends, frame_embedding, row_to="norm")
        hidden_states, normed = self._add_norm(self.norm1, self.ff_in(normed), x, frame_embedding, row_to="residual")
        return x, *self._attend(hidden_states, normed, num_frames, context)

    def _attend(
        self, hidden_states: Tensor, normed: Tensor, num_frames: int, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """From the norm before self-attention on: the feed-forward's result and the residual."""
        attended = self._attend_frames(self.attn1, normed, num_frames)
        hidden_states, normed = self._attend_context(attended, hidden_states, num_frames, context)
        return self.ff(normed), hidden_states

    def _takes_shortcut(self, context: Tensor | None) -> bool:
        wanted = self.attn2 is not None and self.runs("one_token_attention")
        return wanted and _is_one_token(context)

    def _attend_context(
        self, attended: Tensor, residual: Tensor, num_frames: int, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The residual stream after cross-attention, if there is any, and the last norm of it."""
        if self.attn2 is None:
            return self._add_norm(self.norm3, attended, residual)
        assert context is not None
        batch = residual.shape[0] // num_frames
        if not self._takes_shortcut(context):
            residual, normed = self._add_norm(self.norm2, attended, residual)
            if context.shape[0] == batch:  # shared by all frames and pixels, which are queries of one attention then
                queries = normed.view(batch, -1, normed.shape[2])
                attended = attend(self.attn2, queries, context).view_as(normed)
            else:
                attended = _attend_by_pixel(self.attn2, normed, num_frames, context)
            return self._add_norm(self.norm3, attended, residual)
        rows = _one_token_attention(self.attn2, context)
        if rows.shape[0] == batch:
            return self._add_norm(self.norm3, attended, residual, rows.repeat_interleave(num_frames, dim=0))
        clip = (attended + residual).unflatten(0, (batch, num_frames))  # [B, F, HW, C]
        return self._add_norm(self.norm3, (rows.view(batch, 1, -1, clip.shape[3]) + clip).flatten(0, 1))


class TemporalSelfAttention(_TransformerBlock):
    """Mixin for a transformer over frames: it runs its blocks on ``[B*F, HW, C]``, stock code on ``[B*HW, F, C]``.

    Such a block is a BasicTransformerBlock of self-attentions and a feed-forward. AnimateDiff's also adds an
    embedding of the frame's position to what each attention sees. Each attention with its norm is one pass here before
    it, one kernel, and its projections.
    """

    transformer_blocks: Any

    @classmethod
    def left_alone_reason(cls, module: Any) -> str | None:
        return next(filter(None, map(_self_attention_reason, module.transformer_blocks)), None)

    def call_reason(
        self,
        hidden_states: Tensor,
        context: Tensor | None,
        timestep: Tensor | None,
        class_labels: Tensor | None,
        num_frames: int,
        attention_kwargs: dict[str, Any] | None,
    ) -> str | None:
        if context is not None:
            return "a context was passed"
        if attention_kwargs:
            return "cross_attention_kwargs were passed"
        over = frames()
        num_frames = num_frames if over is None else over.total
        reasons = (self._block_reason(block, hidden_states, num_frames) for block in self.transformer_blocks)
        return next(filter(None, reasons), None) or order_reason(self)

    def _block_reason(self, block: Any, x: Tensor, num_frames: int) -> str | None:
        if reason := _self_attention_reason(block):
            return reason
        if block._chunk_size is not None:
            return "the feed-forward is chunked"
        if block.pos_embed is not None and (reason := _positions_reason(block.pos_embed, x, num_frames)):
            return reason
        norms = (block.norm1, block.norm2 if block.attn2 else block.norm3, block.norm3)
        return self._norms_reason(x, *norms)

    def compile_ahead(self) -> None:
        for block in self.transformer_blocks:
            position = block.pos_embed is not None
            self._compile_norm_ahead(block.norm1, position=position)
            if block.attn2 is not None:
                self._compile_norm_ahead(block.norm2, residual=True, position=position)
            self._compile_norm_ahead(block.norm3, residual=True, row_to="stored")
            self._compile_frames_ahead(block.attn1)

    def run_blocks(self, hidden_states: Tensor, num_frames: int) -> Tensor:
        for block in self.transformer_blocks:
            position = None if block.pos_embed is None else block.pos_embed.pe[0, :num_frames]
            _, normed = self._add_norm(block.norm1, hidden_states, position=position)
            attended = self._attend_frames(block.attn1, normed, num_frames)
            if block.attn2 is not None:
                hidden_states, normed = self._add_norm(block.norm2, attended, hidden_states, position=position)
                attended = self._attend_frames(block.attn2, normed, num_frames)
            hidden_states = self._add_feed_forward(block, attended, hidden_states)
        return hidden_states


@once_per_call
def _self_attention_reason(block: Any) -> str | None:
    """Why ``block`` is other than one or two plain self-attentions and a feed-forward, or None."""
    if reason := plain_reason(block, BasicTransformerBlock):
        return reason
    if block.norm_type != "layer_norm":
        return f"its norm is of the kind {block.norm_type!r}"
    attentions = _self_attentions(block)
    if reason := next(filter(None, map(_plain_attention_reason, attentions)), None):
        return reason
    if block.only_cross_attention or any(attn.is_cross_attention for attn in attentions):
        return "it attends to a context"
    return None


@once_per_call
def _plain_attention_reason(attn: Any) -> str | None:
    """Why ``attn`` is more than projections, attention and projection, or None."""
    if reason := attention_reason(attn):
        return reason
    if attn.residual_connection or attn.group_norm is not None or attn.spatial_norm is not None:
        return "its attention has a norm or residual of its own"
    if attn.norm_q is not None or attn.norm_k is not None:
        return "its attention normalises queries or keys"
    return None


def _self_attentions(block: Any) -> tuple[Any, ...]:
    """Two as a rule; the motion modules of SparseCtrl have one."""
    return (block.attn1,) if block.attn2 is None else (block.attn1, block.attn2)


def _positions_reason(embedding: Any, x: Tensor, num_frames: int) -> str | None:
    """Why the table of a positional embedding cannot be added to rows like ``x`` as it is, or None."""
    if reason := plain_reason(embedding, SinusoidalPositionalEmbedding):
        return reason
    table = embedding.pe
    if table.shape[1] < num_frames:
        return f"its positional embedding is for up to {table.shape[1]} frames, got {num_frames}"
    if table.dtype != x.dtype or table.device != x.device:
        return f"its positional embedding is {table.dtype} on {table.device}, its input {x.dtype} on {x.device}"
    return None
