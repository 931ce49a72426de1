"""diffusers' ``models/attention_processor.py``: the stock attention by the fastest kernel, without its last pass.

``AttnProcessor2_0`` ends with ``hidden_states / rescale_output_factor``, a kernel that reads and writes the whole
tensor to divide it by 1.0 in every model here (``unit_division``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from vidaccel.kernels.attention.qkv_projection import qkv_projection
from vidaccel.kernels.attention.spatial_attention import spatial_attention
from vidaccel.kernels.op import overheard
from vidaccel.sites.block import SITES, Host, call_site
from vidaccel.sites.memo import once_per_call
from vidaccel.sites.plain import parameters_reason, plain_reason, replaced_attention_reason, replaced_reason
from vidaccel.sites.rules import Rule
from vidaccel.sites.site import Fidelity, Site, SiteGroup

__all__ = [
    "FusedAttnProcessor2_0",
    "Processor",
    "attend",
    "attend_projected",
    "attention_reason",
    "bypassed",
    "merged_weights",
    "output_layers",
]


class FusedAttnProcessor2_0(Host, AttnProcessor2_0):
    """Self- or cross-attention without a mask, by the ops whose sites it has.

    diffusers makes processors anew without arguments, and copies them: such a one has no sites, and does what stock
    attention does. It passes for its stock class, which diffusers looks for by name (``set_default_attn_processor``).
    """

    original = AttnProcessor2_0
    _attention_backend = None
    _parallel_config = None

    def __init__(self, sites: SiteGroup | None = None) -> None:
        super().__init__()
        if sites is not None:
            setattr(self, SITES, sites)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return AttnProcessor2_0

    def __reduce_ex__(self, protocol: Any) -> Any:
        return AttnProcessor2_0, ()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        return call_site(
            FusedAttnProcessor2_0,
            self, attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs,
        )  # fmt: skip

    @classmethod
    def original_forward(cls, host: Any, *args: Any, **kwargs: Any) -> Tensor:
        return AttnProcessor2_0.__call__(host, *args, **kwargs)

    def module_of(self, args: tuple[Any, ...]) -> nn.Module:
        module: nn.Module = args[0]
        return module

    def call_reason(
        self,
        attn: Attention,
        hidden_states: Tensor,
        context: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> str | None:
        if attention_mask is not None:
            return "an attention mask was passed"
        if context is not None and context.shape[0] != hidden_states.shape[0]:
            return "the contexts are not as many as the images"
        if attn.spatial_norm is not None:
            return "its input is normalised by another image"
        if reason := replaced_attention_reason():
            return reason
        return "deprecated arguments were passed" if args or kwargs else None

    def fused_forward(
        self,
        attn: Attention,
        hidden_states: Tensor,
        context: Tensor | None = None,
        attention_mask: None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        sites: SiteGroup = getattr(self, SITES)
        residual = hidden_states
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.flatten(2).mT  # [B, HW, C]; a view when the input is channels-last
        query, key, value = _project(attn, hidden_states, context, sites)
        if sites.runs("spatial_attention") and attn.norm_q is None and attn.norm_k is None:
            out = spatial_attention(query, key, value, attn.heads)
        else:
            out = _stock_attention(attn, query, key, value)
        for layer in output_layers(attn):
            out = layer(out)
        if residual.ndim == 4:
            out = out.mT.reshape(residual.shape)
        out = out + residual if attn.residual_connection else out
        if attn.rescale_output_factor == 1.0 and sites.runs("unit_division"):
            return out
        return out / attn.rescale_output_factor


def _project(
    attn: Attention, hidden_states: Tensor, context: Tensor | None, sites: SiteGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, ``[B, S, H*D]``; those of the same rows in one product where that pays."""
    if attn.group_norm is not None:
        hidden_states = attn.group_norm(hidden_states.mT).mT
    if context is None:
        weights = merged_weights(attn, hidden_states) if sites.runs("qkv_projection") else None
        if weights is not None:
            return qkv_projection(hidden_states, *weights)
        context = hidden_states
    elif attn.norm_cross:
        context = attn.norm_encoder_hidden_states(context)
    return attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)


def merged_weights(attn: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """The weights of ``attn``'s three projections of ``x``, if they are plain and have no bias; else None."""
    if _projections_reason(attn, x.device):
        return None
    return attn.to_q.weight, attn.to_k.weight, attn.to_v.weight


@once_per_call
def _projections_reason(attn: Attention, device: torch.device) -> str | None:
    for layer in (attn.to_q, attn.to_k, attn.to_v):
        if reason := parameters_reason(layer, nn.Linear, device, ("weight",)):
            return reason
        if layer.bias is not None:
            return "a projection has a bias"
    return None


def bypassed(attn: Attention) -> None:
    """Let the sites of ``attn``'s processor know that a fused parent does its work."""
    sites: SiteGroup | None = getattr(attn.processor, SITES, None)
    if overheard() is not None and sites is not None:
        for site in sites.sites.values():
            site.implementations.add("in its block")


@once_per_call
def output_layers(attn: Attention) -> tuple[Any, ...]:
    """What ``attn`` ends with: its projection, and dropout where that does anything."""
    return tuple(
        layer for layer in list(attn.to_out)[:2] if layer.training or plain_reason(layer, nn.Dropout) is not None
    )


def _stock_attention(attn: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, value = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
    query = query if attn.norm_q is None else attn.norm_q(query)
    key = key if attn.norm_k is None else attn.norm_k(key)
    out = F.scaled_dot_product_attention(query, key, value)
    return out.transpose(1, 2).flatten(2).to(query.dtype)


def attend_projected(attn: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What ``attn`` makes of its projections' outputs ``[B, S, H*D]``, up to and with its output projection."""
    if not torch.compiler.is_compiling():
        bypassed(attn)
    out = _stock_attention(attn, query, key, value)
    for layer in output_layers(attn):
        out = layer(out)
    return out if attn.rescale_output_factor == 1.0 else out / attn.rescale_output_factor


def attend(attn: Any, hidden_states: Tensor, context: Tensor | None = None) -> Tensor:
    """``attn(hidden_states, encoder_hidden_states=context)``; of a plain one straight to its processor.

    ``Attention.forward`` inspects the signature of its processor at every call, which takes as long as two kernels.
    """
    if torch.compiler.is_compiling() or _call_reason(attn):
        return attn(hidden_states, encoder_hidden_states=context, attention_mask=None)  # as stock blocks call it
    return attn.processor(attn, hidden_states, context)


@once_per_call
def _call_reason(attn: Any) -> str | None:
    """Why only a call of ``attn`` will do, or None."""
    if reason := plain_reason(attn, Attention):
        return reason
    return None if isinstance(attn.processor, FusedAttnProcessor2_0) else "its processor is somebody else's"


@once_per_call
def attention_reason(attn: Any) -> str | None:
    """Why code that calls ``attn``'s projections itself would not do what ``attn`` does, or None."""
    if reason := plain_reason(attn, Attention):
        return reason
    # in this order: Dynamo takes type(x) for x.__class__, which of ours is that of diffusers'
    fused = isinstance(attn.processor, FusedAttnProcessor2_0)
    if not fused and type(attn.processor) is not AttnProcessor2_0:
        return f"it has a processor of its own, {type(attn.processor).__name__}"
    return replaced_reason(AttnProcessor2_0) or replaced_attention_reason()


@dataclass(frozen=True)
class Processor(Rule):
    """Give stock attention the processor that runs the fastest kernel, and does not divide by 1.0."""

    @property
    def ops(self) -> Mapping[str, Fidelity]:
        return {"spatial_attention": "math-exact", "qkv_projection": "math-exact", "unit_division": "bit-exact"}

    def matches(self, path: str, module: Any) -> bool:
        return type(module) is Attention

    def left_alone_reason(self, module: Any) -> str | None:
        return attention_reason(module)

    def prepare(self, module: Any, sites: list[Site], checks: bool) -> tuple[Any, Any]:
        return module.processor, FusedAttnProcessor2_0(SiteGroup(sites, checks))

    def apply(self, module: Any, sites: list[Site], memo: tuple[Any, Any]) -> None:
        _, module.processor = memo

    def in_place(self, module: Any, memo: tuple[Any, Any]) -> str | None:
        now, (_, fused) = module.processor, memo
        return None if now is fused else f"its processor is a {type(now).__name__} now"

    def undo(self, module: Any, memo: tuple[Any, Any]) -> None:
        original, fused = memo
        if module.processor is fused:  # the user may have put another one in its place since; that stays
            module.processor = original
        if hasattr(fused, SITES):  # without them a processor that somebody kept, and puts back later, runs stock code
            delattr(fused, SITES)
