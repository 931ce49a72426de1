"""Mean and spread of every channel, chunk of rows by chunk of rows: what a GroupNorm needs to know of an activation.

Statistics are Welford means and squared deviations in float32, merged by Chan's formula (Chan, Golub, LeVeque 1983,
https://doi.org/10.1080/00031305.1983.10483115), so an off-centre input loses nothing; every sum has a fixed order.

Memory is ``[S, R, C]``: the rows of a segment, which is a frame, or whatever has an addend of its own. A program reads
a chunk of a segment's rows in tiles of BLOCK_R x BLOCK_C, each of them LANES x FOLD rows. The compiler keeps the FOLD
rows of a lane in one thread, which merges them alone, tile after tile; threads meet only after the loop. A program that
only reads is one warp, which never waits for another.

A kernel that writes an activation can compute these on its way. Handed to the norm behind it, they save one reading.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "FOLD",
    "ChannelStatistics",
    "Tiling",
    "add_both",
    "are_of_dtype",
    "channel_statistics_ref",
    "choose_tiling",
    "chunk_rows_for",
    "combine",
    "empty_parts",
    "fold",
    "frames_and_rows",
    "locate",
    "merge",
    "merge_lanes",
    "moments",
    "rows_of_tile",
    "store_part",
    "writer_tiling",
]

TILE = 1024  # elements: 32 for each thread
FOLD = 4
MOST_TILES = 64  # of a program
PROGRAMS = 2560  # as many as a Hopper GPU runs at once, or more
# What writes as well is bound by memory: on an H100 larger tiles, fetched ahead, take 7 % less where there are many.
WRITER_TILE = 4096
WRITER_PROGRAMS = 10240
WRITER_ELEMENTS = 2**23


class ChannelStatistics(NamedTuple):
    """Of an activation ``[S, R, C]``."""

    parts: Tensor  # [S, chunks, 2, C]: mean and sum of squared deviations of every chunk; float32, or float64 as x is
    segment_rows: int
    chunk_rows: int  # fewer in the last chunk of a segment


def are_of_dtype(parts: Tensor, x: Tensor) -> bool:
    """Whether ``parts`` may be those of ``x``: float32, or of float64 as a reference computes them."""
    return parts.dtype in (torch.float32, torch.promote_types(x.dtype, torch.float32))


def moments(chunk_rows: int, dtype: torch.dtype, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """An activation of this dtype and its ``parts`` as a check judges them: means beside squares would look small.

    A spread that is small beside the mean may be nothing but roundings of the activation, and is judged beside that.
    """
    y, parts = outputs
    mean, m2 = parts.unbind(2)
    return y, mean, (m2 + chunk_rows * torch.finfo(dtype).eps * mean.square()).sqrt()


def channel_statistics_ref(x: Tensor, chunk_rows: int) -> Tensor:
    """The specification: the ``parts`` of ``x`` ``[N, C, *spatial]``, of which every frame is a segment."""
    rows = x.movedim(1, -1)
    rows = (rows.flatten(0, 1) if x.ndim == 5 else rows).flatten(1, -2)  # [S, R, C]
    rows = rows if x.dtype == torch.float64 else rows.float()
    full = rows.shape[1] // chunk_rows * chunk_rows
    parts = []
    for some in (rows[:, :full].unflatten(1, (-1, chunk_rows)), rows[:, None, full:]):
        if some.numel():
            variance, mean = torch.var_mean(some, dim=2, correction=0)
            parts.append(torch.stack([mean, variance * some.shape[2]], dim=2))
    shape = len(rows), triton.cdiv(rows.shape[1], chunk_rows), 2, rows.shape[2]
    return torch.cat(parts, dim=1) if parts else rows.new_empty(shape)


class Tiling(NamedTuple):
    """How a kernel cuts an activation: a program walks ``chunk_rows`` rows in tiles of ``block_r`` x ``block_c``."""

    block_r: int
    block_c: int
    chunk_rows: int
    stages: int  # depth of the prefetch: tiles on their way, plus the one at work
    num_warps: int

    def programs(self, segments: int, segment_rows: int, channels: int) -> int:
        return segments * triton.cdiv(segment_rows, self.chunk_rows) * (channels // self.block_c)


def choose_tiling(segments: int, segment_rows: int, channels: int, widest_block: int) -> Tiling:
    """For kernels that compute statistics; ``widest_block`` is what their blocks of channels must divide."""
    block_c = min(widest_block, 64)
    block_r = TILE // block_c
    tiles = triton.cdiv(segment_rows, block_r)
    chunks = max(PROGRAMS // (segments * (channels // block_c)), triton.cdiv(tiles, MOST_TILES), 1)
    # so many programs hide each other's latencies: on an H100, prefetching up to three tiles gains nothing
    return Tiling(block_r, block_c, triton.cdiv(tiles, chunks) * block_r, stages=1, num_warps=1)


def frames_and_rows(shape: Sequence[int]) -> tuple[int, int]:
    """How many frames an activation ``[N, C, *spatial]`` has, and how many rows of channels each of them."""
    if len(shape) == 5:
        return shape[0] * shape[2], math.prod(shape[3:])
    return shape[0], math.prod(shape[2:])


def writer_tiling(shape: Sequence[int]) -> Tiling:
    """For kernels that write an activation ``[N, C, *spatial]``, each frame of which is a segment."""
    (segments, segment_rows), channels = frames_and_rows(shape), shape[1]
    widest_block = channels & -channels
    if segments * segment_rows * channels < WRITER_ELEMENTS:
        return choose_tiling(segments, segment_rows, channels, widest_block)
    block_c = min(widest_block, 128)
    block_r = WRITER_TILE // block_c
    tiles = triton.cdiv(segment_rows, block_r)
    chunks = max(WRITER_PROGRAMS // (segments * (channels // block_c)), 1)
    return Tiling(block_r, block_c, triton.cdiv(tiles, chunks) * block_r, stages=2, num_warps=4)


def chunk_rows_for(shape: Sequence[int]) -> int:
    """The chunks of :func:`writer_tiling`, for any shape."""
    return writer_tiling(shape).chunk_rows if all(shape) else 1


def empty_parts(x: Tensor, segments: int, segment_rows: int, chunk_rows: int, channels: int) -> Tensor:
    """Memory for the statistics of every chunk."""
    shape = segments, triton.cdiv(segment_rows, chunk_rows), 2, channels
    return torch.empty(shape, dtype=torch.float32, device=x.device)


@triton.jit
def locate(pid, channels, segment_rows, chunk_rows, BLOCK_C: tl.constexpr):
    """Segment, chunk and first channel of a program; channel blocks of the same rows are neighbours, as in memory."""
    channel_blocks = channels // BLOCK_C
    chunks = tl.cdiv(segment_rows, chunk_rows)
    index = pid // channel_blocks
    return (index // chunks).to(tl.int64), index % chunks, (pid % channel_blocks) * BLOCK_C


@triton.jit
def rows_of_tile(BLOCK_R: tl.constexpr, FOLD: tl.constexpr):
    """Which row of a tile lies where in ``[LANES, FOLD, BLOCK_C]``."""
    LANES: tl.constexpr = BLOCK_R // FOLD
    return tl.arange(0, LANES)[:, None, None] + LANES * tl.arange(0, FOLD)[None, :, None]


@triton.jit
def combine(count, mean, m2, other_count, other_mean, other_m2):
    """Chan's formula, lane by lane: count, mean and sum of squared deviations of two disjoint samples together."""
    total = count + other_count
    share = other_count / tl.maximum(total, 1.0)
    delta = other_mean - mean
    return total, mean + delta * share, m2 + other_m2 + delta * delta * (count * share)


@triton.jit
def add_both(a, b, other_a, other_b):
    return a + other_a, b + other_b


@triton.jit
def merge(count, mean, m2, total):
    """The same for all lanes along axis 0 together, whose counts make ``total``: their mean and m2."""
    share = 1.0 / total
    rough_mean = tl.sum(count * mean, axis=0) * share
    deviation = mean - rough_mean
    # for an off-centre input the first sum rounds at the size of the mean, the second at that of the spread
    drift, m2 = tl.reduce((count * deviation, m2 + count * deviation * deviation), 0, add_both)
    return rough_mean + drift * share, m2


@triton.jit
def _count(rows, BLOCK_R: tl.constexpr, FOLD: tl.constexpr):
    """How many of ``rows`` rows fall to each lane when they are dealt out in turn, ``[LANES, 1]``."""
    LANES: tl.constexpr = BLOCK_R // FOLD
    lane = tl.arange(0, LANES)[:, None]
    return (tl.maximum(rows - lane + LANES - 1, 0) // LANES).to(tl.float32)


@triton.jit
def fold(z, mask, step, rows, mean, m2, BLOCK_R: tl.constexpr, FOLD: tl.constexpr):
    """Take tile number ``step`` of ``rows`` rows, 0 where masked, into the statistics of lanes and channels."""
    tile_count = tl.minimum(_count(rows - step * BLOCK_R, BLOCK_R, FOLD), 1.0 * FOLD)
    tile_mean = tl.sum(z, axis=1) * (1.0 / tl.maximum(tile_count, 1.0))
    deviation = tl.where(mask, z - tile_mean[:, None, :], 0.0)
    tile_m2 = tl.sum(deviation * deviation, axis=1)
    # every tile but the last is full
    _, mean, m2 = combine(1.0 * step * FOLD, mean, m2, tile_count, tile_mean, tile_m2)
    return mean, m2


@triton.jit
def merge_lanes(rows, mean, m2, BLOCK_R: tl.constexpr, FOLD: tl.constexpr):
    """The statistics of the channels, ``[BLOCK_C]``, once all ``rows`` rows are folded in."""
    return merge(_count(rows, BLOCK_R, FOLD), mean, m2, 1.0 * rows)


@triton.jit
def store_part(part_ptr, segment, chunk, first_channel, channels, segment_rows, chunk_rows, mean, m2):
    part = segment * tl.cdiv(segment_rows, chunk_rows) + chunk
    part_ptr += part * 2 * channels + first_channel + tl.arange(0, mean.shape[0])
    tl.store(part_ptr, mean)
    tl.store(part_ptr + channels, m2)
