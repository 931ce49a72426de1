"""Text padded to one length: cut to its valid tokens, it needs no mask.

A pipeline pads every text to what its encoder takes at most, and attention hides the padding behind a mask. Nothing but
the padding itself depends on the padding: where valid tokens stand first, and are as many in each sample, a block works
on those alone and attends without a mask, which is several times faster, and exact. What it hands on is as long as
before, with zeros for padding, so that blocks of any kind may follow.

How many are valid is known to the GPU only: the host waits for it once in a call of the model. Where it may not (while
a call is traced, or captured as a CUDA graph), the padding and the mask stay. So they do where layers are hooked, or
have a forward of their own, which may look at the padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vidaccel.sites.block import SITES, FusedBlock
from vidaccel.sites.memo import held, once_in_call

__all__ = ["cut_padding", "layers_are_hooked", "padded", "valid_length", "valid_lengths"]


def cut_padding(block: FusedBlock, text: Tensor, mask: Tensor, before: int) -> Tensor | None:
    """The valid tokens of ``text``, or None if the padding, and the mask, have to stay: then that is counted.

    Args:
        block: With a site of ``padded_text``.
        text: ``[B, T, C]``.
        mask: ``[B, ..., before + T]`` bool, made once in a call of the model: False where there is padding.
        before: How many keys stand before the text.
    """
    if torch.compiler.is_compiling() or not block.runs("padded_text"):
        return None
    length = valid_length(mask, before)
    if isinstance(length, int):
        return text[:, :length]
    # what a mask holds differs from call to call, and no plan knows it: counted here, not noted for the plan
    getattr(block, SITES).count(length, "padded_text")
    return None


def padded(text: Tensor, tokens: int) -> Tensor:
    """``text`` with zeros for the tokens that were cut off; ``tokens`` in all."""
    return F.pad(text, (0, 0, 0, tokens - text.shape[1])) if text.shape[1] < tokens else text


def valid_length(mask: Tensor, before: int) -> int | str:
    """How many tokens of the text are valid, or why that is no one number; arguments as of :func:`cut_padding`."""
    return once_in_call("valid length", mask, lambda: _valid_length(mask.flatten(1).bool(), before))


def valid_lengths(mask: Tensor) -> tuple[int, ...] | str:
    """How many tokens of each text are valid, or why there is no telling; ``mask`` ``[B, T]`` as :func:`cut_padding`'s.

    Of a text there may be none.
    """
    return once_in_call("valid lengths", mask, lambda: _valid_lengths(mask.bool()))


def layers_are_hooked() -> bool:
    """Whether a hook on a layer of the model whose call is under way may look at padding."""
    memo = None if torch.compiler.is_compiling() else held()
    return memo is not None and memo.hooked


def _valid_length(mask: Tensor, before: int) -> int | str:
    lengths = _valid_lengths(mask)
    if isinstance(lengths, str):
        return lengths
    if len(set(lengths)) > 1:
        return "the texts of the batch have different lengths"
    return lengths[0] - before if lengths[0] > before else "no token of the text is valid"


def _valid_lengths(mask: Tensor) -> tuple[int, ...] | str:
    if layers_are_hooked():
        return "a layer has forward hooks, or a forward of its own, which may look at the padding"
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured, and the length of the text is not known"
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    counts, ends = torch.stack([mask.sum(1), (mask * places).amax(1)]).tolist()  # one wait for the GPU in a call
    return tuple(counts) if counts == ends else "padding stands between valid tokens"
