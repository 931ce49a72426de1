"""diffusers' ``models/attention_processor.py``: the stock attention by the fastest kernel, without its last pass.

``AttnProcessor2_0`` ends with ``hidden_states / rescale_output_factor``, a kernel that reads and writes the whole
tensor to divide it by 1.0 in every model here (``unit_division``). The attention itself is the op
``spatial_attention``, which holds its implementations against PyTorch's before it runs one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from vidaccel.blocks.unet.projections import QKV_PROJECTION, project_together
from vidaccel.kernels.attention.spatial_attention import spatial_attention
from vidaccel.kernels.dispatch import record_choices
from vidaccel.sites.parameters import has_hook
from vidaccel.sites.site import BlockState, Site

__all__ = ["STOCK_PROCESSORS", "FusedAttnProcessor2_0", "attend_projected", "why_attention_left_alone"]


class FusedAttnProcessor2_0(AttnProcessor2_0):
    """Self- or cross-attention without a mask, by the ops whose sites it is given.

    Without ``spatial_attention`` among them it is bit for bit the stock one's result when the factor is 1.0. diffusers
    makes processors anew without arguments: such a one runs as stock attention does.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, sites: Iterable[Site] = ()) -> None:
        super().__init__()
        self._state = BlockState(sites, self_check=False)

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
        if attn.rescale_output_factor != 1.0 or attn.spatial_norm is not None or attention_mask is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        residual = hidden_states
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.flatten(2).mT  # [B, HW, C]; a view when the input is channels-last
        out = self._attend(attn, hidden_states, encoder_hidden_states)
        if residual.ndim == 4:
            out = out.mT.reshape(residual.shape)
        out = out + residual if attn.residual_connection else out
        return out if self._state.enabled("unit_division") else out / attn.rescale_output_factor

    def _attend(self, attn: Attention, hidden_states: Tensor, context: Tensor | None) -> Tensor:
        query, key, value = _project(attn, hidden_states, context, self._state.sites.get(QKV_PROJECTION))
        if self._state.enabled("spatial_attention") and attn.norm_q is None and attn.norm_k is None:
            out = self._attend_rows(query, key, value, attn.heads)
        else:
            out = _stock_attention(attn, query, key, value)
        return _project_out(attn, out)

    def _attend_rows(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        if torch.compiler.is_compiling():
            return spatial_attention(query, key, value, heads)
        signature = query.shape, key.shape, query.dtype, query.device
        if signature in self._state.verdicts:
            return spatial_attention(query, key, value, heads)
        with record_choices() as choices:
            out = spatial_attention(query, key, value, heads)
        self._state.note_choices(choices)
        self._state.verdicts[signature] = ""
        return out


def _project(
    attn: Attention, hidden_states: Tensor, context: Tensor | None, together: Site | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, ``[B, S, H*D]``; those of the same rows in one product at the site ``together``."""
    if attn.group_norm is not None:
        hidden_states = attn.group_norm(hidden_states.mT).mT
    if context is None:
        context = hidden_states
        projected = project_together((attn.to_q, attn.to_k, attn.to_v), context) if together else None
        if together:
            together.implementations.add("merged" if projected else "torch")
        if projected:
            query, key, value = projected
            return query, key, value
    elif attn.norm_cross:
        context = attn.norm_encoder_hidden_states(context)
    return attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)


def attend_projected(attn: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What ``attn`` makes of its projections' outputs ``[B, S, H*D]``, up to and with its output projection."""
    return _project_out(attn, _stock_attention(attn, query, key, value))


def _stock_attention(attn: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, value = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
    query = query if attn.norm_q is None else attn.norm_q(query)
    key = key if attn.norm_k is None else attn.norm_k(key)
    out = F.scaled_dot_product_attention(query, key, value)
    return out.transpose(1, 2).flatten(2).to(query.dtype)


def _project_out(attn: Attention, out: Tensor) -> Tensor:
    for layer in attn.to_out:  # projection, dropout
        out = layer(out)
    return out


STOCK_PROCESSORS = (AttnProcessor2_0, FusedAttnProcessor2_0)


def why_attention_left_alone(attn: Attention) -> str | None:
    """Why code that calls ``attn``'s projections itself would not do what ``attn`` does, or None."""
    if type(attn.processor) not in STOCK_PROCESSORS:
        return f"it has a processor of its own, {type(attn.processor).__name__}"
    if has_hook(attn):
        return "a hook replaced its forward (offload or casting)"
    if attn._forward_hooks or attn._forward_pre_hooks:
        return "it has forward hooks, which only a call of it runs"
    return None
