"""Attention and feed-forward of a video transformer: what the blocks of all families share.

A block calls the projections as modules, whatever they are (LoRA, quantised), and brings queries, keys and values to
the fastest kernel. Where the user has chosen one of diffusers' attention backends (``set_attention_backend``, the
``attention_backend`` context, ``DIFFUSERS_ATTN_BACKEND``), that runs: his choice wins.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.models.activations import GELU, SwiGLU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from torch import Tensor, nn

from vidaccel.kernels.attention.spatial_attention import spatial_attention
from vidaccel.kernels.ffn.linear_gelu import linear_gelu
from vidaccel.kernels.ffn.swiglu import swiglu
from vidaccel.kernels.op import REFERENCE, note
from vidaccel.parallel.layout import tokens
from vidaccel.sites.memo import once_per_call
from vidaccel.sites.plain import (
    is_replaced,
    parameters_reason,
    plain_reason,
    replaced_attention_reason,
    replaced_reason,
)

__all__ = [
    "CROSS_ATTENTION",
    "Attention",
    "attend",
    "attend_to_all",
    "attention_reason",
    "feed_forward",
    "gated_feed_forward",
    "over_heads",
    "project",
    "qkv",
    "stock_heads",
    "whole_over_heads",
]

CROSS_ATTENTION = "it is a cross-attention, of which stock code turns no keys"
Attention = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # of queries, keys, values and how many heads they have


@once_per_call
def attention_reason(attn: Any, kind: type[nn.Module], processor: type) -> str | None:
    """Why code that does what ``processor`` does with the children of ``attn`` would not do what ``attn`` does."""
    if reason := plain_reason(attn, kind):
        return reason
    if type(attn.processor) is not processor:
        return f"it has a processor of its own, {type(attn.processor).__name__}"
    if getattr(attn.processor, "_parallel_config", None) is not None:
        return "its tokens are spread over several GPUs (context parallel)"
    return replaced_reason(processor) or replaced_attention_reason()


def qkv(attn: Any, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, S, H*D]`` of an ``AttentionModuleMixin``, its projections fused or not."""
    if not attn.fused_projections:
        context = x if context is None else context
        return attn.to_q(x), attn.to_k(context), attn.to_v(context)
    if context is None:
        query, key, value = attn.to_qkv(x).chunk(3, dim=-1)
        return query, key, value
    key, value = attn.to_kv(context).chunk(2, dim=-1)
    return attn.to_q(x), key, value


def attend(
    processor: Any, q: Tensor, k: Tensor, v: Tensor, num_heads: int, *, mask: Tensor | None = None, fused: bool
) -> Tensor:
    """``softmax(q k^T / sqrt(D)) v`` of ``[B, S, H*D]``, by our choice, or by the backend that the user has chosen.

    Args:
        processor: Of the attention; ``set_attention_backend`` has left its choice there.
        q: ``[B, S, H*D]``.
        k: ``[B, Skv, H*D]``.
        v: As ``k``.
        num_heads: ``H``.
        mask: Broadcast to ``[B, H, S, Skv]``; bool, False where nobody attends to a key, or a number that is added to
            the score. Kernels of ours take none. None: no mask.
        fused: False: by diffusers' dispatcher in any case.

    Returns:
        ``[B, S, H*D]``.
    """
    backend = getattr(processor, "_attention_backend", None)
    # there is no public way to ask which one a context or the environment has made the default
    active, function = _AttentionBackendRegistry.get_active_backend()
    chosen = not torch.compiler.is_compiling() and is_replaced(function)  # by registering another of the same name
    ours = k.shape[1] > 0 and not chosen  # to no keys at all, as a text without tokens has, there is no kernel
    if fused and ours and mask is None and backend is None and active == AttentionBackendName.NATIVE:
        return spatial_attention(q, k, v, num_heads)
    note("spatial_attention", str(getattr(backend or active, "value", backend or active)))
    query, key, value = (x.unflatten(2, (num_heads, -1)) for x in (q, k, v))
    return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=backend).flatten(2).type_as(q)


def attend_to_all(
    processor: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    *,
    mask: Tensor | None = None,
    fused: bool,
    behind: int = 0,
) -> Tensor:
    """:func:`attend` as :func:`over_heads` does it."""
    attention = partial(attend, processor, mask=mask, fused=fused)
    return over_heads(attention, q, k, v, num_heads, behind=behind)


def over_heads(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, num_heads: int, *, before: int = 0, behind: int = 0
) -> Tensor:
    """``attention(q, k, v, num_heads)`` of the tokens of a video to one another, wherever they are.

    Where they are spread over ranks, each rank has all of them for its share of the heads while it attends (DeepSpeed
    Ulysses, arXiv 2309.14509). The first ``before`` and the last ``behind`` tokens are those of a text.
    """
    over = tokens()
    if over is None:
        return attention(q, k, v, num_heads)
    query, key, value = over.to_heads(q, k, v, before=before, behind=behind)
    out = attention(query, key, value, num_heads // over.ranks.size)
    return over.to_tokens(out, q.shape[2], before, behind)


def whole_over_heads(attention: Attention, q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """The same of queries that every rank has, all of them, to the tokens of a video, wherever these are."""
    over = tokens()
    if over is None:
        return attention(q, k, v, num_heads)
    key, value = over.to_heads(k, v)
    out = attention(over.ranks.part(q, 2), key, value, num_heads // over.ranks.size)
    return over.ranks.gather(out, 2, q.shape[2])


def stock_heads(norm: Any, x: Tensor, num_heads: int) -> Tensor:
    """``[B, S, H*D]`` as ``[B, S, H, D]``, normed by a module if there is one."""
    heads = x.unflatten(2, (num_heads, -1))
    return heads if norm is None else norm(heads)


def project(attn: Any, out: Tensor) -> Tensor:
    """``out`` ``[B, S, H*D]`` through the two layers that processors call; a third in the list is called by nobody."""
    projection, dropout = attn.to_out[0], attn.to_out[1]
    projected: Tensor = dropout(projection(out))
    return projected


def feed_forward(ff: Any, x: Tensor, *, fused: bool) -> Tensor:
    """``ff(x)``, where ``fused`` with GELU in the epilogue of its first product."""
    if not fused:
        return ff(x)
    if reason := _feed_forward_reason(ff, x.device):
        note("linear_gelu", REFERENCE, reason)
        return ff(x)
    first, _, *others = ff.net
    out = linear_gelu(x, first.proj.weight, first.proj.bias, approximate=first.approximate)
    for layer in others:
        out = layer(out)
    return out


@once_per_call
def _feed_forward_reason(ff: Any, device: torch.device) -> str | None:
    """Why ``ff`` does not begin with a linear layer and GELU, or these have to be called."""
    if reason := plain_reason(ff, FeedForward):
        return reason
    first, dropout, *_ = ff.net
    if reason := plain_reason(first, GELU) or plain_reason(dropout, nn.Dropout):
        return reason
    if dropout.training and dropout.p:
        return "dropout is on"
    return parameters_reason(first.proj, nn.Linear, device, ("weight",))


def gated_feed_forward(ff: Any, x: Tensor, *, fused: bool) -> Tensor:
    """``ff(x)``, where ``fused`` with value times SiLU of gate in one pass behind its first product."""
    if not fused:
        return ff(x)
    if reason := _gated_reason(ff):
        note("swiglu", REFERENCE, reason)
        return ff(x)
    first, *others = ff.net
    out = swiglu(first.proj(x))
    for layer in others:
        out = layer(out)
    return out


@once_per_call
def _gated_reason(ff: Any) -> str | None:
    """Why ``ff`` does not begin with SwiGLU."""
    if reason := plain_reason(ff, FeedForward):
        return reason
    first = ff.net[0]
    return plain_reason(first, SwiGLU) or plain_reason(first.activation, nn.SiLU)
