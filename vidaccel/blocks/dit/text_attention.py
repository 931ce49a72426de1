"""Attention to texts that are padded to one length: each sample attends to its valid tokens, without a mask.

LTX hides padding by adding -10000 to its scores, whose softmax is 0 to the last bit. So where the valid tokens stand
first, keys and values are cut behind them, and kernels that know no mask serve. Where all are valid, as after LTX-2's
connectors, there is nothing to cut, and the mask goes. Samples with texts of different lengths (a prompt and a negative
prompt) attend one by one.

How many tokens are valid is known to the GPU only: the host waits for it once in a call of the model. Where it may not
(while a call is traced, or captured as a CUDA graph), the mask stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidaccel.blocks.dit.attention import attend
from vidaccel.sites.memo import once_in_call, version

__all__ = ["Lengths", "attend_to_text", "head_mask", "valid_lengths"]

HIDDEN = -9000.0  # -10000, rounded to any dtype, is less
UNFIT = "the mask of a text is not [B, 1, T] of numbers to add"

Lengths = tuple[int, ...] | None  # how many of the first tokens of each sample are valid; None: the mask has to stay


def valid_lengths(*masked: tuple[Tensor | None, Tensor]) -> tuple[Lengths | str, ...]:
    """For each of the texts of a call: how many tokens of each sample are valid, or why there is no telling.

    Args:
        masked: A mask ``[B, 1, T]``, made in a call of the model, 0 for a valid token and -10000 for padding, or None;
            and its text ``[B, T, C]``.
    """
    if torch.compiler.is_compiling():
        return (None,) * len(masked)
    answers = iter(_answers([mask for mask, text in masked if mask is not None and _fits(mask, text)]))
    return tuple(None if mask is None else next(answers) if _fits(mask, text) else UNFIT for mask, text in masked)


def _fits(mask: Tensor, text: Tensor) -> bool:
    batch, tokens, _ = text.shape
    return mask.shape == (batch, 1, tokens) and mask.is_floating_point() and mask.numel() > 0


def _answers(masks: list[Tensor]) -> list[tuple[int, ...] | str]:
    if not masks:
        return []
    if masks[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return ["a graph is being captured: no length of a text is known"] * len(masks)
    # the masks are kept with the answer: their ids are nobody else's for as long
    name = " ".join(["valid lengths", *(f"{id(mask)}.{version(mask)}" for mask in masks)])
    return once_in_call(name, masks[0], lambda: (masks, _found(masks)))[1]


def _found(masks: list[Tensor]) -> list[tuple[int, ...] | str]:
    counted = torch.cat([_counted(mask[:, 0]) for mask in masks], dim=1).tolist()  # one wait for the GPU in a call
    found: list[tuple[int, ...] | str] = []
    for mask in masks:
        found.append(_lengths(*(column[: len(mask)] for column in counted)))
        counted = [column[len(mask) :] for column in counted]
    return found


def _counted(mask: Tensor) -> Tensor:
    """``[3, B]`` of ``[B, T]``: valid tokens, the place behind the last of them, tokens neither valid nor hidden."""
    valid = mask == 0
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return torch.stack([valid.sum(1), (valid * places).amax(1), (~valid & ~(mask <= HIDDEN)).sum(1)])


def _lengths(counts: list[int], ends: list[int], partly: list[int]) -> tuple[int, ...] | str:
    if any(partly):
        return "the mask of a text weighs tokens"
    if counts != ends:
        return "padding stands between valid tokens"
    return tuple(counts) if all(counts) else "no token of a text is valid"


def attend_to_text(
    attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, lengths: Lengths, *, fused: bool
) -> Tensor:
    """Attention of ``query`` ``[B, S, H*D]`` to a text ``[B, T, H*D]``.

    Args:
        attn: An ``AttentionModuleMixin``.
        query: ``[B, S, H*D]``.
        key: ``[B, T, H*D]``.
        value: As ``key``.
        mask: ``[B, 1, T]``, additive; or None.
        lengths: Of the texts behind the mask, where :func:`valid_lengths` has found them.
        fused: As of :func:`~vidaccel.blocks.dit.attention.attend`.

    Returns:
        ``[B, S, H*D]``.
    """
    if lengths is None:
        mask = head_mask(attn, mask, key)
        return attend(attn.processor, query, key, value, attn.heads, mask=mask, fused=fused)
    if len(set(lengths)) == 1:
        key, value = key[:, : lengths[0]], value[:, : lengths[0]]
        return attend(attn.processor, query, key, value, attn.heads, fused=fused)
    samples = [(slice(i, i + 1), slice(length)) for i, length in enumerate(lengths)]
    return torch.cat(
        [attend(attn.processor, query[i], key[i, kept], value[i, kept], attn.heads, fused=fused) for i, kept in samples]
    )


def head_mask(attn: Any, mask: Tensor | None, key: Tensor) -> Tensor | None:
    """``mask`` ``[B, 1 or S, T]`` as stock code gives it to attention, ``[B, H, 1 or S, T]``."""
    if mask is None:
        return None
    batch, tokens, _ = key.shape
    mask = attn.prepare_attention_mask(mask, tokens, batch)
    return mask.view(batch, attn.heads, -1, mask.shape[-1])
