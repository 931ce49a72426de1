"""What ranks send one another, held against plain indexing of the whole tensor."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.distributed as dist
from ranks import Team

from vidaccel.errors import UsageError
from vidaccel.parallel.ranks import Agreement, axes_of, join, shares

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("total", "size"), list(product((0, 1, 5, 8), (1, 2, 3))))
def test_shares_are_even_but_for_one(total: int, size: int) -> None:
    found = shares(total, size)
    assert sum(found) == total and max(found) - min(found) <= 1 and found == sorted(found, reverse=True)


def test_without_a_group_the_error_says_what_starts_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match="torchrun --nproc-per-node 2"):
        join(torch.device("cpu"))


def whole(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def gathers(frames: int) -> None:
    (ranks,) = axes_of([dist.get_world_size()])
    x = whole(3, frames, 4)
    assert ranks.gather(ranks.part(x, 1), 1, frames).equal(x)
    strided = x.transpose(1, 2)
    assert ranks.gather(ranks.part(strided, 2), 2, frames).equal(strided)


def swaps(frames: int, pixels: int) -> None:
    (ranks,) = axes_of([dist.get_world_size()])
    x = whole(2, frames, pixels, 3)
    found = ranks.swap(ranks.part(x, 1), split=2, join=1, total=frames)
    assert found.equal(ranks.part(x, 2))
    assert ranks.swap(found, split=1, join=2, total=pixels).equal(ranks.part(x, 1))


def shifts() -> None:
    (ranks,) = axes_of([dist.get_world_size()])
    x = torch.full((2, 3), float(ranks.rank)).T
    for given in (0, 10):
        before = ranks.shift(x + given)
        assert before is None if ranks.rank == 0 else before is not None and before.eq(ranks.rank - 1 + given).all()
    before = ranks.shift(x, ring=True)
    assert before is not None and before.eq((ranks.rank - 1) % ranks.size).all()
    ranks.shift(x)
    ranks.settle()


def reduces_and_sends() -> None:
    (ranks,) = axes_of([dist.get_world_size()])
    assert ranks.least(torch.tensor([3.0 + ranks.rank, 3.0 - ranks.rank])).tolist() == [3.0, 4.0 - ranks.size]
    x = torch.full((2, 3), float(ranks.rank))
    ranks.send(x, 1)
    assert x.eq(1).all()
    lengths = [3, *([0] * (ranks.size - 2)), 2]
    mine = whole(2, 5, 3).split(lengths, dim=1)[ranks.rank]
    assert ranks.gather(mine, 1, 5, lengths).equal(whole(2, 5, 3))


def exchanges() -> None:
    (ranks,) = axes_of([dist.get_world_size()])
    first, last = (torch.full((2, 3), float(ranks.rank + more)).T for more in (0, 10))
    before, behind = ranks.exchange(first, last)()
    assert before is None if ranks.rank == 0 else before is not None and before.eq(ranks.rank + 9).all()
    is_last = ranks.rank == ranks.size - 1
    assert behind is None if is_last else behind is not None and behind.eq(ranks.rank + 1).all()


def counts_what_it_sends() -> tuple[int, int]:
    (ranks,) = axes_of([2])
    ranks.gather(torch.zeros(2, 5), 0, 4)
    gathered = ranks.sent
    ranks.swap(torch.zeros(4, 6), split=0, join=1, total=12)
    return gathered, ranks.sent - gathered


def meshes() -> list[tuple[int, int]]:
    outer, inner = axes_of([2, 2])
    x = torch.full((1,), float(dist.get_rank()))
    return [tuple(int(value) for value in ranks.gather(x, 0, 2)) for ranks in (outer, inner)]


@pytest.mark.parametrize("frames", [4, 5, 1])
def test_what_is_gathered_is_the_whole(two_ranks: Team, frames: int) -> None:
    two_ranks.run(gathers, frames)


@pytest.mark.parametrize(("frames", "pixels"), [(4, 6), (5, 3), (1, 2)])
def test_an_all_to_all_turns_frames_into_pixels_and_back(two_ranks: Team, frames: int, pixels: int) -> None:
    two_ranks.run(swaps, frames, pixels)


def test_each_rank_gets_what_the_one_before_gives(two_ranks: Team) -> None:
    two_ranks.run(shifts)


def test_neighbours_exchange(two_ranks: Team) -> None:
    two_ranks.run(exchanges)


def test_bytes_are_counted(two_ranks: Team) -> None:
    assert two_ranks.run(counts_what_it_sends) == [(40, 48)] * 2


def test_four_ranks(four_ranks: Team) -> None:
    four_ranks.run(gathers, 7)
    four_ranks.run(swaps, 7, 6)
    four_ranks.run(shifts)
    four_ranks.run(exchanges)
    four_ranks.run(reduces_and_sends)
    assert four_ranks.run(meshes) == [[(0, 2), (0, 1)], [(1, 3), (0, 1)], [(0, 2), (2, 3)], [(1, 3), (2, 3)]]


def notes() -> tuple[list[list[int]], list[str]]:
    agreement = Agreement()
    return agreement.all([dist.get_rank(), 2**62]), agreement.objects(f"rank {dist.get_rank()}")


def test_ranks_compare_notes(two_ranks: Team) -> None:
    assert two_ranks.run(notes) == [([[0, 2**62], [1, 2**62]], ["rank 0", "rank 1"])] * 2
