"""Tokens that share a timestep share a modulation: which rows of it differ, and which of these each token takes.

Some models have a timestep for each frame or for each token (Wan 2.2 TI2V, SkyReels-V2's diffusion forcing, Helios,
AnyFlow), and stock code makes the modulation of every block for every token. But neighbours mostly have the same, so
tokens come in a few stretches of equal rows. Where these begin is found out once in a call of a model, by comparing
each token with the one before: one pass over what all blocks are modulated by, and one wait for the GPU.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidaccel.parallel.layout import own_tokens
from vidaccel.sites.memo import memo_of_call, version

__all__ = ["MOST_ROWS", "Stretches", "distinct_rows", "keep_rows", "may_wait", "own_rows", "stretches_of"]

MOST_ROWS = 64  # stretches in a call, from which on each token keeps its own


class Stretches(NamedTuple):
    """Stretches of equal tokens.

    Attributes:
        starts: ``[R]`` int64, the first token of each.
        rows: ``[S]`` int32, the stretch that each token is in.
    """

    starts: Tensor
    rows: Tensor


def stretches_of(*values: Tensor) -> Stretches | None:
    """The stretches of tokens whose ``values`` ``[B, S, P, C]`` are all equal in all samples.

    None if there are more than ``MOST_ROWS``, or nobody may wait for the GPU now.
    """
    first, *_ = values
    if not may_wait(first):
        return None
    begins = torch.ones(first.shape[1], dtype=torch.bool, device=first.device)
    begins[1:] = False
    # one after the other, for the memory that the comparison takes
    for part in chain.from_iterable(x.unbind(2) for x in values):
        begins[1:] |= (part[:, 1:] != part[:, :-1]).any(2).any(0)
    starts = begins.nonzero().flatten()
    if len(starts) > MOST_ROWS:
        return None
    return Stretches(starts, begins.cumsum(0, dtype=torch.int32) - 1)


def may_wait(x: Tensor) -> bool:
    """Whether the host may wait for what is in ``x``: not while Dynamo traces, nor while a CUDA graph is captured."""
    return not torch.compiler.is_compiling() and not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def distinct_rows(values: Tensor) -> tuple[Tensor, Tensor | None]:
    """The rows of ``values`` ``[B, S, P, C]`` that differ, ``[B, R, P, C]``, and the row of each token if R > 1.

    The rows of tokens are None also where each keeps its own, and R is S. It is found out once in a call.
    """
    if values.stride(1) == 0 or values.shape[1] == 1:
        return values[:, :1], None
    if (memo := memo_of_call(values)) is None:
        return _distinct(values)
    if _key(values) not in memo.of_call:
        keep_rows(values, *_distinct(values))
    _, distinct, rows = memo.of_call[_key(values)]
    return distinct, rows


def own_rows(distinct: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The answer of :func:`distinct_rows`, found of all tokens, for those of this rank."""
    if rows is not None:
        return distinct, own_tokens(rows, 0)
    return (distinct if distinct.shape[1] == 1 else own_tokens(distinct, 1)), None


def keep_rows(values: Tensor, distinct: Tensor, rows: Tensor | None) -> None:
    """Let :func:`distinct_rows` of ``values``, and of other views of the same numbers, know its answer."""
    if (memo := memo_of_call(values)) is not None:
        # the values are kept with it: their address is nobody else's for as long
        memo.of_call[_key(values)] = values, distinct, rows


def _distinct(values: Tensor) -> tuple[Tensor, Tensor | None]:
    stretches = stretches_of(values)
    if stretches is None:
        return values, None
    return values[:, stretches.starts], stretches.rows if len(stretches.starts) > 1 else None


def _key(values: Tensor) -> Any:
    return "distinct rows", values.data_ptr(), values.shape, values.stride(), version(values)
