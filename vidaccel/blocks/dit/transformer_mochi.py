"""diffusers' ``transformers/transformer_mochi.py``: the block of Mochi, of two streams.

Stock code copies queries, keys and values of each sample to leave out the padding of its text, and asks the GPU twice
per block how long that is. Here the text is cut once to the longest of the batch, and each sample attends to a view of
its valid tokens (``padded_text.py``). Everything between two products is one pass: the norm of a branch, its gate, the
residual, the next norm and its scale; the norm of queries and keys with their rotary embedding, which writes the joint
ones of video and text.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import groupby
from typing import Any

import torch
from diffusers.models.attention_processor import MochiAttention, MochiAttnProcessor2_0
from diffusers.models.normalization import MochiRMSNorm, RMSNorm
from diffusers.models.transformers.transformer_mochi import (
    MochiLayerNormContinuous,
    MochiModulatedRMSNorm,
    MochiRMSNormZero,
    MochiTransformerBlock,
)
from torch import Tensor, nn

from vidaccel.blocks.dit.attention import attention_reason, gated_feed_forward, over_heads, project, stock_heads
from vidaccel.blocks.dit.gated_residual import FLOAT32_NORMS, fuses_sum
from vidaccel.blocks.dit.padded_text import padded, valid_lengths
from vidaccel.blocks.dit.step_caches import known_to_step_caches
from vidaccel.kernels.attention.qk_norm_rope import HeadNorm, Rope, SecondStream, qk_norm_rope
from vidaccel.kernels.attention.spatial_attention import spatial_attention
from vidaccel.kernels.norm.gated_residual_norm import Norm, gated_residual, gated_residual_norm, norm_modulate
from vidaccel.kernels.op import REFERENCE, note
from vidaccel.parallel.layout import own_tokens
from vidaccel.sites.block import CORNER_ROWS, MOST_WHOLE, FusedBlock, call_site, fuses
from vidaccel.sites.plain import parameters_reason, plain_reason
from vidaccel.sites.site import Fidelity

__all__ = ["MOCHI_OPS", "FusedMochiTransformerBlock"]

MOCHI_OPS: dict[str, Fidelity] = {
    "padded_text": "math-exact",
    "gated_residual_norm": "math-exact",
    "qk_norm_rope": "math-exact",
    "spatial_attention": "math-exact",
    "swiglu": "math-exact",
}

Lengths = tuple[int, ...]  # valid tokens of each text
Rotary = tuple[Tensor, Tensor]  # cos and sin [S, H, D/2] float32


@known_to_step_caches
@fuses(MochiTransformerBlock, MOCHI_OPS)
class FusedMochiTransformerBlock(FusedBlock, MochiTransformerBlock):
    """Joint attention and feed-forwards of video ``[B, S, C]`` and text ``[B, T, C']``, the video first."""

    norm1: Any
    norm2: Any
    norm3: Any
    norm4: Any
    norm1_context: Any
    norm2_context: Any
    norm3_context: Any
    norm4_context: Any
    attn1: Any
    ff: Any
    ff_context: Any

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        encoder_attention_mask: Tensor,
        image_rotary_emb: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return call_site(
            FusedMochiTransformerBlock,
            self, hidden_states, encoder_hidden_states, temb, encoder_attention_mask, image_rotary_emb,
        )  # fmt: skip

    def call_reason(self, x: Tensor, text: Tensor, temb: Tensor, mask: Tensor, *args: Any) -> str | None:
        if torch.is_autocast_enabled(x.device.type):
            return "autocast is on"
        if x.dtype == torch.float64:
            return FLOAT32_NORMS
        if not x.dtype == text.dtype == temb.dtype:
            return "video, text and timestep embedding differ in dtype"
        if not len(x) == len(text) == len(temb):  # stock code may broadcast them
            return "video, text and timestep embedding differ in batch size"
        if mask.shape != text.shape[:2]:
            return "the mask of its text is not [B, T]"
        for norm, kind in self._norms():
            if reason := plain_reason(norm, kind) or plain_reason(norm.norm, _normed_by(kind)):
                return reason
        return None

    def _norms(self) -> Iterator[tuple[Any, type[nn.Module]]]:
        yield self.norm1, MochiRMSNormZero
        modulated = [self.norm2, self.norm3, self.norm4]
        if self.context_pre_only:
            yield self.norm1_context, MochiLayerNormContinuous
            modulated.append(self.norm1_context.norm)
        else:
            yield self.norm1_context, MochiRMSNormZero
            modulated += [self.norm2_context, self.norm3_context, self.norm4_context]
        for norm in modulated:
            yield norm, MochiModulatedRMSNorm

    def spread_reason(self, x: Tensor, text: Tensor, temb: Tensor, mask: Tensor, *args: Any) -> str | None:
        lengths = self._lengths(mask)
        return lengths if isinstance(lengths, str) else None

    def path_in_data(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _, text, _, mask, *_ = args
        return valid_lengths(mask) if self.runs("padded_text") and mask.shape == text.shape[:2] else None

    def comparable(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """No more of the text than the longest, for what stands behind it is neither alike nor of any use."""
        x, text, temb, mask, rotary = args
        if not isinstance(lengths := valid_lengths(mask), str):
            text, mask = (t[:, : _longest(lengths)] for t in (text, mask))
        return (x, text, temb, mask, rotary), kwargs

    def corner(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        (x, text, temb, mask, rotary), kwargs = self.comparable(args, kwargs)
        if x.numel() > MOST_WHOLE:
            x, text, mask = (t[:, :CORNER_ROWS] for t in (x, text, mask))
            rotary = None if rotary is None else tuple(table[:CORNER_ROWS] for table in rotary)
        return (x, text, temb, mask, rotary), kwargs

    def fused_forward(
        self, x: Tensor, encoder_hidden_states: Tensor, temb: Tensor, mask: Tensor, rotary: Rotary | None
    ) -> tuple[Tensor, Tensor]:
        text, lengths = self._without_padding(encoder_hidden_states, mask)
        scale, gate, ff_scale, ff_gate = _modulation(self.norm1, temb)
        of_text = _modulation(self.norm1_context, temb)
        normed = self._modulate(x, self.norm1.norm, scale)
        text_norm = self.norm1_context.norm
        text_normed = self._modulate(text, text_norm.norm if self.context_pre_only else text_norm, of_text[0])
        attended, text_attended = self._attention(normed, text_normed, mask, lengths, rotary)
        x, normed = self._add_norm(x, attended, self.norm2, gate, self.norm3, ff_scale)
        x = self._add(x, self._feed_forward(self.ff, normed), self.norm4, ff_gate)
        if self.context_pre_only:
            return x, encoder_hidden_states
        _, gate, ff_scale, ff_gate = of_text
        text, normed = self._add_norm(text, text_attended, self.norm2_context, gate, self.norm3_context, ff_scale)
        text = self._add(text, self._feed_forward(self.ff_context, normed), self.norm4_context, ff_gate)
        return x, padded(text, encoder_hidden_states.shape[1])

    def _modulate(self, x: Tensor, norm: Any, scale: Tensor) -> Tensor:
        """``norm(x) * (1 + scale)``."""
        if self.runs("gated_residual_norm"):
            return norm_modulate(x, _rms_norm(norm), scale)
        return _stock_norm(norm, x, 1 + scale.float())

    def _add_norm(
        self, x: Tensor, branch: Tensor, branch_norm: Any, gate: Tensor, norm: Any, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``z = x + tanh(gate) * branch_norm(branch)`` and its modulated norm."""
        if fuses_sum(self, x, branch):
            eps = branch_norm.norm.eps
            z, y = gated_residual_norm(x, branch, gate.tanh(), _rms_norm(norm.norm), scale, branch_eps=eps)
            return z, y
        z = self._add(x, branch, branch_norm, gate)
        return z, self._modulate(z, norm.norm, scale)

    def _add(self, x: Tensor, branch: Tensor, branch_norm: Any, gate: Tensor) -> Tensor:
        """``x + tanh(gate) * branch_norm(branch)``."""
        if fuses_sum(self, x, branch):
            return gated_residual(x, branch, gate.tanh(), branch_eps=branch_norm.norm.eps)
        return x + _stock_norm(branch_norm.norm, branch, gate.tanh())

    def _feed_forward(self, ff: Any, x: Tensor) -> Tensor:
        return gated_feed_forward(ff, x, fused=self.runs("swiglu"))

    def _without_padding(self, text: Tensor, mask: Tensor) -> tuple[Tensor, Lengths | None]:
        """The text up to the longest of the batch, and how long each is; None: attention has to be called."""
        if torch.compiler.is_compiling():
            return text, None
        lengths = self._lengths(mask)
        if not isinstance(lengths, str):
            return text[:, : _longest(lengths)], lengths
        for op in ("padded_text", "qk_norm_rope", "spatial_attention"):
            note(op, REFERENCE, lengths)
        return text, None

    def _lengths(self, mask: Tensor) -> Lengths | str:
        """How long each text is, or why attention has to be called."""
        if reason := attention_reason(self.attn1, MochiAttention, MochiAttnProcessor2_0):
            return reason
        return valid_lengths(mask) if self.runs("padded_text") else "padded_text is off, or failed"

    def _attention(
        self, x: Tensor, text: Tensor, mask: Tensor, lengths: Lengths | None, rotary: Rotary | None
    ) -> tuple[Tensor, Tensor]:
        attn, tokens = self.attn1, x.shape[1]
        if lengths is None:
            out: tuple[Tensor, Tensor] = attn(
                hidden_states=x, encoder_hidden_states=text, image_rotary_emb=rotary, attention_mask=mask
            )
            return out
        query, key, value = self._joint(x, text, rotary)
        attend = partial(self._attend, lengths=lengths)
        joint = over_heads(attend, query, key, value, attn.heads, behind=text.shape[1])
        # in one piece: of several samples apart, the product would leave the bias to a pass of its own
        video, text = joint[:, :tokens].contiguous(), joint[:, tokens:]
        return project(attn, video), text if self.context_pre_only else attn.to_add_out(text)

    def _joint(self, x: Tensor, text: Tensor, rotary: Rotary | None) -> list[Tensor]:
        """Queries, keys and values ``[B, S + T, H*D]``."""
        attn = self.attn1
        rotary = None if rotary is None else (own_tokens(rotary[0], 0), own_tokens(rotary[1], 0))
        query, key, value = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        second = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
        if reason := self._rope_reason(x, rotary):
            note("qk_norm_rope", REFERENCE, reason)
            return _stock_joint(attn, (query, key, value), second, rotary)
        norm = HeadNorm("rms_head", attn.norm_q.eps, attn.norm_q.weight, attn.norm_k.weight)
        added = norm._replace(weight_q=attn.norm_added_q.weight, weight_k=attn.norm_added_k.weight)
        rope = None if rotary is None else Rope("pairs", rotary[0][None], rotary[1][None])
        return qk_norm_rope(query, key, attn.heads, norm, rope, v=value, second=SecondStream(*second, added))

    def _rope_reason(self, x: Tensor, rotary: Rotary | None) -> str | None:
        """Why queries and keys are normed and turned by stock code, or None."""
        if not self.runs("qk_norm_rope"):
            return "it is off, or failed"
        if rotary is not None and any(table.dtype != torch.float32 for table in rotary):
            return "its rotary table is not float32"
        attn = self.attn1
        norms = attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k
        for norm in norms:
            if reason := parameters_reason(norm, MochiRMSNorm, x.device):
                return reason
        return "its norms differ in eps" if len({norm.eps for norm in norms}) > 1 else None

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, heads: int, *, lengths: Lengths) -> Tensor:
        """``[B, S + T, H*D]``, zero behind the valid tokens of each text."""
        # stock code asks PyTorch for its attention, whatever backend of diffusers somebody has chosen
        impl = None if self.runs("spatial_attention") else REFERENCE
        tokens = query.shape[1] - _longest(lengths)
        if set(lengths) == {_longest(lengths)}:
            return spatial_attention(query, key, value, heads, impl=impl)
        out = torch.empty_like(query)
        for length, group in groupby(range(len(lengths)), lengths.__getitem__):
            samples = list(group)
            rows, valid = slice(samples[0], samples[-1] + 1), slice(tokens + length)
            q, k, v = (t[rows, valid] for t in (query, key, value))
            out[rows, valid] = spatial_attention(q, k, v, heads, impl=impl)
            out[rows, tokens + length :] = 0
        return out


def _longest(lengths: Lengths) -> int:
    return max(lengths) or 1  # no kernel takes a stream of no tokens


def _normed_by(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of ``kind().norm``."""
    return MochiModulatedRMSNorm if kind is MochiLayerNormContinuous else RMSNorm


def _modulation(norm: Any, temb: Tensor) -> tuple[Tensor, ...]:
    """The scale of a norm, the gate of attention, scale and gate of the feed-forward, ``[B, 1, C]``; or the first."""
    if isinstance(norm, MochiLayerNormContinuous):
        return (norm.linear_1(norm.silu(temb))[:, None],)
    return norm.linear(norm.silu(temb))[:, None].chunk(4, dim=2)


def _rms_norm(norm: Any) -> Norm:
    return Norm("rms", norm.eps)


def _stock_norm(norm: Any, x: Tensor, scale: Tensor) -> Tensor:
    return (norm(x.float()) * scale).to(x.dtype)


def _stock_joint(
    attn: Any, first: tuple[Tensor, ...], second: tuple[Tensor, ...], rotary: Rotary | None
) -> list[Tensor]:
    norms = (attn.norm_q, attn.norm_added_q), (attn.norm_k, attn.norm_added_k)
    joint = [
        torch.cat(
            [_turned(stock_heads(norm, x, attn.heads), rotary), stock_heads(added, y, attn.heads)], dim=1
        ).flatten(2)
        for (norm, added), x, y in zip(norms, first, second, strict=False)
    ]
    return [*joint, torch.cat([first[2], second[2]], dim=1)]


def _turned(x: Tensor, rotary: Rotary | None) -> Tensor:
    """``[B, S, H, D]``, neighbouring channels turned by an angle of each token and head."""
    if rotary is None:
        return x
    cos, sin = rotary
    a, b = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack([(a * cos - b * sin).to(x.dtype), (a * sin + b * cos).to(x.dtype)], dim=-1).flatten(-2)
