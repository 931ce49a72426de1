"""Masks of frames that attend to themselves and to those before: each query attends to the first keys, so many.

Attention under such a mask is a few attentions without one, of a stretch of queries to the keys they attend to. That is
half the products, and every kernel serves it; a dense mask costs a kernel most of its speed.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from vidaccel.blocks.dit.modulation_rows import MOST_ROWS, may_wait
from vidaccel.kernels.check import cuts
from vidaccel.sites.memo import once_in_call

__all__ = ["attended_prefixes"]


def attended_prefixes(mask: Tensor) -> list[tuple[slice, int]] | None:
    """Stretches of queries that attend to as many keys, from the first on, and how many; found out once in a call.

    Args:
        mask: ``[1, 1, S, Skv]`` bool, True where a query attends to a key.

    Returns:
        None if the mask is another one, or has too many stretches, or nobody may wait for the GPU now.
    """
    return once_in_call("attended prefixes", mask, lambda: _attended_prefixes(mask))


def _attended_prefixes(mask: Tensor) -> list[tuple[slice, int]] | None:
    if not may_wait(mask) or mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[:2] != (1, 1):
        return None
    rows = mask[0, 0]
    resumed = [(rows[part, 1:] > rows[part, :-1]).any() for part in cuts(len(rows), rows.shape[1])]
    counts = torch.cat([torch.stack(resumed).any()[None].long(), rows.sum(1)]).tolist()  # waits for the GPU
    if counts[0] or 0 in counts[1:]:
        return None
    prefixes = []
    for keys, queries in groupby(range(len(rows)), key=counts[1:].__getitem__):
        first, *others = queries
        prefixes.append((slice(first, first + 1 + len(others)), keys))
    return prefixes if len(prefixes) <= MOST_ROWS else None
