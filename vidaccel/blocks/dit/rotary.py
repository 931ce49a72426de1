"""Rotary tables: diffusers' hold every angle twice, ours once.

What makes them is a module of the model, or the pipeline, which gives them to it. Only a table that the model's own
module has made is known to hold both angles of a pair of channels alike. Of others the values are compared: the host
waits for the GPU once in a call for each. Where it may not, stock code turns queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from vidaccel.sites.memo import held, once_in_call

__all__ = ["alike_reason", "half_tables", "halves_alike", "pairs_alike"]


def half_tables(rotary_emb: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Tables of cosines and sines ``[..., D]``, every angle twice, as ``[..., D/2]``; made once in a call."""
    cos, sin = rotary_emb
    return (
        once_in_call("cos", cos, lambda: cos[..., 0::2].contiguous()),
        once_in_call("sin", sin, lambda: sin[..., 1::2].contiguous()),
    )


def pairs_alike(table: Tensor) -> bool:
    """Whether each two neighbours of ``[..., D]`` are the same."""
    return torch.equal(table[..., 0::2], table[..., 1::2])


def halves_alike(table: Tensor) -> bool:
    """Whether the two halves of ``[..., D]`` are the same."""
    return torch.equal(*table.tensor_split(2, dim=-1))


def alike_reason(
    *tables: Tensor, given: bool = False, alike: Callable[[Tensor], bool] = pairs_alike
) -> str | None:  # fmt: skip
    """Why rotary tables may hold two angles for a pair of channels, or None.

    Args:
        tables: ``[..., D]``.
        given: Whether the model is given them in its call.
        alike: Whether a table holds but one.
    """
    if torch.compiler.is_compiling():
        return "its rotary table comes with the call, and is not looked at while that is traced" if given else None
    memo = held()
    if memo is not None and memo.of_model and not memo.hooked and not given:
        return None
    if any(table.is_cuda for table in tables) and torch.cuda.is_current_stream_capturing():
        return "its rotary table comes with the call, and is not looked at while a graph is captured"
    if all(once_in_call(f"one angle, by {alike.__name__}", table, partial(alike, table)) for table in tables):
        return None
    return "its rotary table has two angles for a pair of channels"
