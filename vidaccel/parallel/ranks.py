"""The processes that share one clip: what they send one another, and how they make sure that they do the same.

Each runs the same program on the same arguments. Inside a model's call the work is split among them along an axis
(halves of guidance, frames, tokens), one :class:`Ranks` each. Before every call they compare notes on their hosts
(:class:`Agreement`): no GPU waits for that, a rank that is gone is found out there, and none goes on alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vidaccel.errors import UsageError, first_line

__all__ = ["Agreement", "RankError", "Ranks", "axes_of", "copy_wide", "join", "shares"]

# With a rank that loads, compiles or measures longer than the others. One that is gone is found out at once: its
# connections close, and torchrun ends the others.
PATIENCE = timedelta(minutes=10)


class RankError(UsageError):
    """The ranks cannot go on together: one is gone, or does something else than the others."""

    exit_code = 1


def join(device: torch.device) -> None:
    """Join the process group that ``torchrun`` has prepared, unless the program has made one.

    Raises:
        UsageError: There is neither.
    """
    if dist.is_available() and dist.is_initialized():
        return
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise UsageError("parallel: there is no process group; start with torchrun --nproc-per-node 2 (one per GPU)")
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE, device_id=device if device.type == "cuda" else None)


def shares(total: int, size: int) -> list[int]:
    """How many of ``total`` things each of ``size`` ranks has; the first ones have one more if it does not divide."""
    return [total // size + (rank < total % size) for rank in range(size)]


class Ranks:
    """The ranks along one axis: each has its share of something, in order.

    Attributes:
        rank: The place of this process among them.
        size: How many they are.
        sent: Bytes that this process has sent the others.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.sent = 0
        self._giving: list[dist.Work] = []
        self._given: Tensor | None = None  # alive until it is taken

    def own(self, total: int) -> slice:
        """This rank's share of ``total`` things."""
        start = sum(shares(total, self.size)[: self.rank])
        return slice(start, start + shares(total, self.size)[self.rank])

    def part(self, x: Tensor, dim: int) -> Tensor:
        """This rank's share of ``x`` along ``dim``, a view."""
        own = self.own(x.shape[dim])
        return x.narrow(dim, own.start, own.stop - own.start)

    def gather_parts(self, x: Tensor) -> Tensor:
        """``[size, ...]``: the ``x`` of every rank, of equal shape on all."""
        out = x.new_empty(self.size, *x.shape)
        _all_gather(out.flatten(0, 1), x.contiguous(), group=self.group)
        self.sent += x.nbytes * (self.size - 1)
        return out

    def gather(self, x: Tensor, dim: int, total: int, lengths: Sequence[int] = ()) -> Tensor:
        """All shares along ``dim``, which together are ``total``, in order; of ``lengths``, if they are not even."""
        lengths = lengths or shares(total, self.size)
        rows, most = x.movedim(dim, 0).contiguous(), max(lengths)
        if len(rows) < most:  # all send the same number of rows
            rows = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
        out = self.gather_parts(rows).flatten(0, 1)
        if min(lengths) != most:
            out = torch.cat([piece[:length] for piece, length in zip(out.chunk(self.size), lengths, strict=True)])
        return out.movedim(0, dim)

    def swap(self, x: Tensor, split: int, join: int, total: int) -> Tensor:
        """From all of ``split`` and a share of ``join`` to a share of ``split`` and all of ``join``: an all-to-all.

        ``total`` is the length of dimension ``join`` on all ranks together; the result is contiguous.
        """
        lengths, joined = shares(x.shape[split], self.size), shares(total, self.size)
        shape = list(x.shape)
        shape[split] = lengths[self.rank]
        rest = shape.copy()
        rest[join] = 1
        of_one = torch.Size(rest).numel()
        to_each = [x.numel() // max(x.shape[split], 1) * length for length in lengths]
        if torch.Size(x.shape[:split]).numel() == 1:  # the pieces lie one behind the other
            send = x.reshape(-1)
        else:
            send = x.new_empty(x.numel())
            for place, piece in zip(send.split(to_each), x.split(lengths, split), strict=True):
                place.view(piece.shape).copy_(piece)
        received = send.new_empty(of_one * total)
        from_each = [of_one * length for length in joined]
        self.begin_all_to_all(received, send, from_each, to_each).wait()
        if torch.Size(shape[:join]).numel() == 1:
            shape[join] = total
            return received.view(shape)
        pieces = []
        for piece, length in zip(received.split(from_each), joined, strict=True):
            shape[join] = length
            pieces.append(piece.view(shape))
        return torch.cat(pieces, join)

    def begin_all_to_all(self, received: Tensor, send: Tensor, from_each: list[int], to_each: list[int]) -> dist.Work:
        """Begin to send ``to_each`` numbers of the flat ``send`` to each rank, and to receive ``from_each``."""
        work: dist.Work = dist.all_to_all_single(
            received, send, from_each, to_each, group=self.group, async_op=True
        )  # fmt: skip
        self.sent += (send.numel() - to_each[self.rank]) * send.element_size()
        return work

    def exchange(self, first: Tensor, last: Tensor) -> Callable[[], tuple[Tensor | None, Tensor | None]]:
        """Begin to give ``first`` to the rank before and ``last`` to the one behind, both of equal shape on all ranks.

        What is returned waits for what these give: the ``last`` of the rank before and the ``first`` of the one behind,
        or None where there is none. It is one all-to-all: fewer calls for the host than sends and receives.
        """
        given = {self.rank - 1: first, self.rank + 1: last}
        neighbours = [rank for rank in given if 0 <= rank < self.size]
        if not neighbours:
            return lambda: (None, None)
        send = torch.stack([given[rank] for rank in neighbours])
        received = torch.empty_like(send)
        numbers = [first.numel() if rank in neighbours else 0 for rank in range(self.size)]
        work = self.begin_all_to_all(received.view(-1), send.view(-1), numbers, numbers)

        def wait() -> tuple[Tensor | None, Tensor | None]:
            work.wait()
            theirs = dict(zip(neighbours, received, strict=True))
            return theirs.get(self.rank - 1), theirs.get(self.rank + 1)

        return wait

    def least(self, x: Tensor) -> Tensor:
        """The smallest of all ranks' ``x``, number by number, in its place."""
        dist.all_reduce(x, dist.ReduceOp.MIN, group=self.group)
        self.sent += x.nbytes
        return x

    def send(self, x: Tensor, rank: int) -> None:
        """What ``rank`` has in the contiguous ``x`` goes to the ``x`` of all others."""
        dist.broadcast(x, group=self.group, group_src=rank)
        if rank == self.rank:
            self.sent += x.nbytes * (self.size - 1)

    def shift(self, x: Tensor, *, ring: bool = False) -> Tensor | None:
        """What the rank before has given; None for the first rank. ``x``, of equal shape on all, goes to the next.

        In a ``ring``, the first rank gets what the last one has given. Otherwise a rank does not wait until the next
        has received ``x``: the next call does, or :meth:`settle`. So the first rank is a little ahead of the others.
        """
        self.settle()
        sent = x.clone(memory_format=torch.contiguous_format)  # x need not stay until it is taken
        before = torch.empty_like(sent) if self.rank or ring else None
        give, take = [], []
        if before is not None:
            take = [dist.P2POp(dist.irecv, before, group=self.group, group_peer=(self.rank - 1) % self.size)]
        if self.rank + 1 < self.size or ring:
            give = [dist.P2POp(dist.isend, sent, group=self.group, group_peer=(self.rank + 1) % self.size)]
            self.sent += sent.nbytes
        if ring:  # at once: each would wait for the one before
            give, take = [], give + take
        taking = dist.batch_isend_irecv(take) if take else []
        self._giving = dist.batch_isend_irecv(give) if give else []
        self._given = sent
        for work in taking:
            work.wait()
        return before

    def settle(self) -> None:
        """Wait until the next rank has taken what :meth:`shift` gives it: the GPU does, not the host."""
        for work in self._giving:
            work.wait()
        self._giving, self._given = [], None


def copy_wide(out: Tensor, x: Tensor) -> None:
    """``out.copy_(x)`` of the same dtype, 8 bytes at a time if rows allow: PyTorch copies strided rows by numbers."""
    ratio = 8 // x.element_size()
    if all(
        t.stride(-1) == 1 and not any(n % ratio for n in (t.shape[-1], t.storage_offset(), *t.stride()[:-1]))
        for t in (out, x)
    ):
        out, x = out.view(torch.int64), x.view(torch.int64)
    out.copy_(x)


class Agreement:
    """What the hosts of all ranks tell one another before each call, over a group of their own."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def all(self, facts: Sequence[int], patience: timedelta = PATIENCE) -> list[list[int]]:
        """The ``facts`` (of 63 bits) of every rank."""
        own = torch.tensor(facts, dtype=torch.int64)
        out = own.new_empty(self.size * len(own))
        self._all(lambda: _all_gather(out, own, self._group, patience))
        found: list[list[int]] = out.view(self.size, -1).tolist()
        return found

    def objects(self, mine: Any) -> list[Any]:
        """What every rank has given; for what is rare."""
        out: list[Any] = [None] * self.size
        self._all(lambda: dist.all_gather_object(out, mine, group=self._group))
        return out

    def _all(self, collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:  # gloo's: a connection was closed, or timed out
            raise RankError(f"parallel: another rank is gone, or does something else ({first_line(error)})") from None


def axes_of(world: Sequence[int]) -> list[Ranks]:
    """One :class:`Ranks` for each axis of a mesh whose sizes are ``world``; neighbours are along the last axis."""
    places = torch.arange(torch.Size(world).numel()).view(*world)
    found = []
    for axis in range(len(world)):
        rows = places.movedim(axis, -1).reshape(-1, world[axis]).tolist()
        group, _ = dist.new_subgroups_by_enumeration(rows, timeout=PATIENCE)
        found.append(Ranks(group))
    return found


def _all_gather(out: Tensor, x: Tensor, group: dist.ProcessGroup, patience: timedelta | None = None) -> None:
    # the newer name, since PyTorch 2.13
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    # On a stream of NCCL's, as all else that is sent: to send from one stream, then from another, costs hosts more.
    work = gather(out, x, group=group, async_op=True)
    work.wait(patience) if patience else work.wait()
