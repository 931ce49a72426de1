"""Which rows of a modulation differ, and which of them each token takes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vidaccel.blocks.dit.modulation_rows import MOST_ROWS, distinct_rows, keep_rows, stretches_of
from vidaccel.sites.memo import Memo, holding


@pytest.fixture(autouse=True)
def call() -> Iterator[Memo]:
    memo = Memo()
    with holding(memo):
        yield memo


def of_stretches(*lengths: int, samples: int = 2) -> Tensor:
    """``[B, S, 6, C]`` of stretches of these lengths."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(samples, len(lengths), 6, 5, generator=generator)
    return rows.repeat_interleave(torch.tensor(lengths), dim=1)


def every_row(values: Tensor) -> Tensor:
    distinct, rows = distinct_rows(values)
    return distinct.expand_as(values) if rows is None else distinct[:, rows]


@pytest.mark.parametrize(
    ("lengths", "count"),
    [((7,), 1), ((1,), 1), ((1, 1), 2), ((3, 1, 8), 3), ((2,) * MOST_ROWS, MOST_ROWS)],
    ids=["all-alike", "one-token", "two-tokens", "three", "most"],
)
def test_stretches(lengths: tuple[int, ...], count: int) -> None:
    values = of_stretches(*lengths)
    distinct, rows = distinct_rows(values)
    assert distinct.shape[1] == count and (rows is None) == (count == 1)
    assert rows is None or rows.dtype == torch.int32
    assert torch.equal(every_row(values), values)


def test_views_of_any_order() -> None:
    values = of_stretches(3, 4).transpose(1, 2).contiguous().transpose(1, 2)
    assert distinct_rows(values)[0].shape[1] == 2
    assert torch.equal(every_row(values), values)
    assert distinct_rows(values[:, :1].expand(-1, 9, -1, -1))[0].shape[1] == 1


def test_samples_that_change_at_different_tokens() -> None:
    values = torch.cat([of_stretches(3, 5, samples=1), of_stretches(6, 2, samples=1)])
    assert distinct_rows(values)[0].shape[1] == 3
    assert torch.equal(every_row(values), values)


def test_one_channel_of_one_piece_counts() -> None:
    values = of_stretches(6)
    values[1, 4, 5, 3] += 1
    assert distinct_rows(values)[0].shape[1] == 3
    assert torch.equal(every_row(values), values)


def test_too_many_keep_their_own() -> None:
    values = of_stretches(*(1,) * (MOST_ROWS + 1))
    distinct, rows = distinct_rows(values)
    assert distinct is values and rows is None


def test_not_a_number_is_equal_to_nothing() -> None:
    values = torch.full((1, 3, 6, 5), torch.nan)
    assert distinct_rows(values)[0].shape[1] == 3


def test_found_out_once_in_a_call(call: Memo) -> None:
    values = of_stretches(3, 4)
    first = distinct_rows(values)
    assert all(a is b for a, b in zip(first, distinct_rows(values.view(values.shape)), strict=True))
    call.of_call.clear()
    assert distinct_rows(values)[0] is not first[0]


def test_what_is_known_is_not_looked_for() -> None:
    values, distinct, rows = of_stretches(3, 4), torch.zeros(2, 2, 6, 5), torch.zeros(7, dtype=torch.int32)
    keep_rows(values, distinct, rows)
    assert distinct_rows(values.view(values.shape)) == (distinct, rows)
    assert distinct_rows(values.clone())[0] is not distinct


def test_what_was_written_to_is_looked_at_again() -> None:
    values = of_stretches(3, 4)
    distinct_rows(values)
    values[:, 5:] += 1
    assert distinct_rows(values)[0].shape[1] == 3


@pytest.mark.parametrize("hooked", [False, True])
def test_of_inference_tensors_nobody_knows_where_there_are_hooks(call: Memo, hooked: bool) -> None:
    call.hooked = hooked
    with torch.inference_mode():
        values = of_stretches(3, 4)
    found = distinct_rows(values)
    assert (distinct_rows(values)[0] is found[0]) == (not hooked)


def test_starts_and_rows() -> None:
    stretches = stretches_of(torch.tensor([[5.0, 5.0, 0.0, 0.0, 0.0, 5.0]])[..., None, None])
    assert stretches is not None
    assert stretches.starts.tolist() == [0, 2, 5] and stretches.rows.tolist() == [0, 0, 1, 1, 1, 2]
