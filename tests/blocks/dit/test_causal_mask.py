"""Which masks are attention to the first keys, and to how many of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vidaccel.blocks.dit.causal_mask import attended_prefixes
from vidaccel.blocks.dit.modulation_rows import MOST_ROWS


def of_blocks(blocks: int, tokens: int) -> Tensor:
    block = torch.arange(blocks).repeat_interleave(tokens)
    return (block[None] <= block[:, None])[None, None]


@pytest.mark.parametrize(("blocks", "tokens"), [(1, 5), (3, 4), (MOST_ROWS, 1)])
def test_blocks_of_frames(blocks: int, tokens: int) -> None:
    expected = [(slice(k * tokens, (k + 1) * tokens), (k + 1) * tokens) for k in range(blocks)]
    assert attended_prefixes(of_blocks(blocks, tokens)) == expected


def with_a_gap() -> Tensor:
    mask = of_blocks(3, 4)
    mask[0, 0, 9, 2] = False
    return mask


OTHERS = {
    "gap": with_a_gap(),
    "last-keys": of_blocks(3, 4).flip(-1),
    "a-query-without-keys": of_blocks(3, 4) & (torch.arange(12) > 0)[:, None],
    "too-many": of_blocks(MOST_ROWS + 1, 1),
    "of-samples": of_blocks(3, 4).expand(2, -1, -1, -1),
    "added": of_blocks(3, 4).float(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_masks(name: str) -> None:
    assert attended_prefixes(OTHERS[name]) is None
