"""GroupNorm, optionally with SiLU behind it and a per-frame addition before it, on channels-last activations.

    y[n, s, c] = silu((z[n, s, c] - mean[n, g]) / sqrt(var[n, g] + eps) * weight[c] + bias[c])
    z[n, s, c] = x[n, s, c] + shift[n, t, c],   g = c // (C / groups),   t = s // (S / T)

Memory is ``[N, S, C]`` with S the rows (pixels, and for a 5-D input frames) of one sample. x may come in two tensors,
the channels of the second behind those of the first; a program reads one of them. Three launches: statistics of every
(chunk of rows, channel); their merge into one mean and scale per (sample, channel); normalise and SiLU. PyTorch gives
one block to a whole (sample, group), which fills no GPU when the statistics span a clip; here the first and the last
pass cut the rows into as many chunks as the GPU likes. Bound by memory: two reads and one write. Given the statistics
that the kernel before has computed (``channel_statistics.py``), there is one read, and no first launch.

z and the normalised value are rounded to the input dtype in registers, where eager stores them. Fidelity: math-exact.

``group_norm_and_sum`` also writes ``x + row``, from the last pass, which reads x anyway: the residual of a transformer,
with the bias of the projection that it will be added to (see ``add_layer_norm``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.arguments import require_floats
from vidaccel.kernels.channels_last import (
    channels_last,
    channels_last_strides,
    empty_channels_last,
)
from vidaccel.kernels.check import Part, cuts, lean, piece_of
from vidaccel.kernels.launch import Launch
from vidaccel.kernels.norm.channel_statistics import (
    FOLD,
    ChannelStatistics,
    Tiling,
    are_of_dtype,
    choose_tiling,
    combine,
    fold,
    locate,
    merge,
    merge_lanes,
    rows_of_tile,
    store_part,
)
from vidaccel.kernels.op import DTYPES, Costs, Implementation, Op, device_reason, scaled, tensors_reason

__all__ = [
    "GROUP_NORM_AND_SUM",
    "GROUP_NORM_SILU",
    "apply_silu",
    "choose_apply_tiling",
    "chunk_stats_launch",
    "compile_ahead",
    "count_spans",
    "group_norm_and_sum",
    "group_norm_and_sum_ref",
    "group_norm_ref",
    "group_norm_silu",
    "group_norm_silu_ref",
    "group_stats_launch",
]

CHANNELS = 32  # a multiple of these in every tensor that the kernels read
NO_STATISTICS = None, 0, 0
APPLY_TILE = 512  # elements: 16 for each thread
LONG_GROUP = 2**17  # numbers: what a block of a GPU takes as long for as the whole GPU for some launches


def group_norm_silu_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool = True,
    shift: Tensor | None = None,
    tail: Tensor | None = None,
    parts: Tensor | None = None,
    segment_rows: int = 0,
    chunk_rows: int = 0,
) -> Tensor:
    """The specification, which computes the statistics unless they are of more than x. float64 for gold values."""
    if tail is not None:
        x = torch.cat([x, tail], dim=1)
    if shift is not None:
        rows = math.prod(x.shape[2:])
        per_row = shift.to(x.dtype).repeat_interleave(rows // shift.shape[1], dim=1)
        x = x + per_row.transpose(1, 2).reshape(x.shape)
    if parts is not None and _is_of_more(parts, segment_rows, x):
        y = _normalised(x, weight, bias, groups, eps, ChannelStatistics(parts, segment_rows, chunk_rows))
        return channels_last(F.silu(y, inplace=True) if silu else y)
    y = group_norm_ref(x, weight, bias, groups, eps)
    return channels_last(F.silu(y, inplace=True) if silu else y)


def group_norm_ref(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """``F.group_norm`` of ``[N, C, *spatial]`` in ``x.dtype``, in any memory order."""
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if x.is_cuda and not torch.is_grad_enabled() and x.numel() > LONG_GROUP * len(x) * groups:
        return _by_reductions(x, weight, bias, groups, eps)
    # channels first: for the other order PyTorch's CPU kernel takes E[x^2] - mean^2, too poor to judge by. An image of
    # one pixel is in both orders at once; a row of pixels is not.
    rows = x.contiguous().unflatten(1, (-1, 1)).flatten(2)
    return F.group_norm(rows, groups, weight, bias, eps).view(x.shape)


def _by_reductions(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """The same by reductions over the whole GPU: PyTorch's norm gives one block to a group, however long that is.

    Nothing of x's size is made in a higher precision than x has.
    """
    spatial = list(range(2, x.ndim))
    dtype = torch.promote_types(x.dtype, torch.float32)
    per_channel = -1, *(1,) * len(spatial)

    def mean_of_groups(sums: Tensor) -> Tensor:
        mean = sums.unflatten(1, (groups, -1)).sum(2) / (x[0].numel() // groups)
        return mean.repeat_interleave(len(weight) // groups, dim=1).unflatten(1, per_channel)

    mean = mean_of_groups(x.sum(spatial, dtype=dtype))
    pivot = mean.to(x.dtype)  # near the mean, so that little cancels in the variance
    deviation = x - pivot
    square = mean_of_groups(torch.linalg.vector_norm(deviation, dim=spatial, dtype=dtype).square())
    variance = (square - (mean - pivot).square()).clamp_min(0)
    scale = (variance + eps).rsqrt() * weight.view(per_channel)
    if x.dtype == dtype:
        x, mean = deviation, mean - pivot
    shift = torch.addcmul(bias.to(dtype).view(per_channel), mean, scale, value=-1)
    return torch.addcmul(shift, x, scale, out=torch.empty_like(x))


def group_norm_and_sum_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    row: Tensor,
    parts: Tensor | None = None,
    segment_rows: int = 0,
    chunk_rows: int = 0,
) -> tuple[Tensor, Tensor]:
    """The specification. Pass float64 inputs for gold values."""
    summed = x + row.to(x.dtype).view(-1, *(1,) * (x.ndim - 2))
    statistics = parts, segment_rows, chunk_rows
    return group_norm_silu_ref(x, weight, bias, groups, eps, False, None, None, *statistics), channels_last(summed)


def _is_of_more(parts: Tensor, segment_rows: int, x: Tensor) -> bool:
    """Whether statistics are of more rows than x has: of a clip that x is some frames of."""
    return len(parts) * segment_rows > len(x) * math.prod(x.shape[2:])


def _normalised(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, statistics: ChannelStatistics
) -> Tensor:
    """x, normalised by the mean and variance that ``statistics`` tell of each group."""
    parts, segment_rows, chunk_rows = statistics
    dtype = torch.promote_types(x.dtype, torch.float32)
    starts = torch.arange(0, segment_rows, chunk_rows, device=x.device)
    rows = (segment_rows - starts).clamp(max=chunk_rows).to(dtype)[:, None, None]  # of each chunk
    # [N, segments, chunks, groups, channels of a group]
    mean, m2 = parts.to(dtype).unflatten(0, (len(x), -1)).unflatten(-1, (groups, -1)).unbind(3)
    total = segment_rows * mean.shape[1] * mean.shape[-1]
    centre = (mean * rows).sum((1, 2, 4)) / total  # [N, groups]
    deviation = mean - centre[:, None, None, :, None]
    variance = (m2 + rows * deviation.square()).sum((1, 2, 4)) / total
    by_group = x.to(dtype).flatten(2).unflatten(1, (groups, -1))  # [N, groups, channels of a group, rows]
    y = (by_group - centre[..., None, None]) * (variance + eps).rsqrt()[..., None, None]
    y = y.view(x.shape) if y.is_contiguous() else y.reshape(x.shape)
    per_channel = -1, *(1,) * (x.ndim - 2)
    return (y * weight.to(dtype).view(per_channel) + bias.to(dtype).view(per_channel)).to(x.dtype)


@triton.jit
def apply_silu(y, dtype):
    """``y / (1 + exp(-y))`` in float32, to the last bit but two; for 16-bit results in half the instructions."""
    if dtype == tl.float32:
        return y / (1.0 + tl.exp(-y))
    else:
        # neither needs the code that exp and a division have for numbers at the ends of float32's range
        root = tl.rsqrt(1.0 + tl.exp2(y * -1.4426950408889634))
        return y * root * root


@triton.jit
def _source(x_ptr, tail_ptr, row, first_channel, head_channels, channels):
    """Where a program reads, all its channels in x or all in the tail behind it, and the stride of the rows there."""
    in_tail = first_channel >= head_channels
    stride = tl.where(in_tail, channels - head_channels, head_channels)
    first_channel -= tl.where(in_tail, head_channels, 0)
    return tl.where(in_tail, tail_ptr, x_ptr) + row * stride + first_channel, stride


@triton.jit
def _part_rows(part, parts, segment_rows, chunk_rows):
    """How many rows each part of a sample has: a chunk's, fewer in the last of a segment, none past the last part."""
    chunks = tl.cdiv(segment_rows, chunk_rows)
    rows = tl.where(part % chunks == chunks - 1, segment_rows - (chunks - 1) * chunk_rows, chunk_rows)
    return tl.where(part < parts, rows, 0)


@triton.jit
def _load_tile(x_ptr, offs, mask, shift, HAS_SHIFT: tl.constexpr):
    """z in float32, 0 where masked."""
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    z = x.to(tl.float32)
    if HAS_SHIFT:
        z = tl.where(mask, (z + shift).to(x.dtype).to(tl.float32), 0.0)
    return z


@triton.jit
def _channel_stats(
    x_ptr, stride, rows, shift,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, FOLD: tl.constexpr, HAS_SHIFT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each of BLOCK_C channels over ``rows`` rows."""
    offs_r = rows_of_tile(BLOCK_R, FOLD)
    offs_c = tl.arange(0, BLOCK_C)
    mean = tl.zeros([BLOCK_R // FOLD, BLOCK_C], dtype=tl.float32)
    m2 = tl.zeros([BLOCK_R // FOLD, BLOCK_C], dtype=tl.float32)
    for step in tl.range(0, tl.cdiv(rows, BLOCK_R), num_stages=STAGES):
        row = step * BLOCK_R + offs_r
        mask = row < rows
        z = _load_tile(x_ptr, row * stride + offs_c, mask, shift, HAS_SHIFT)  # [LANES, FOLD, BLOCK_C]
        mean, m2 = fold(z, mask, step, rows, mean, m2, BLOCK_R, FOLD)
    return merge_lanes(rows, mean, m2, BLOCK_R, FOLD)


@triton.jit
def _normalise(
    x_ptr, sum_ptr, y_ptr,
    stride, channels, rows, mean, scale, bias, shift, addend,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_ROW: tl.constexpr, SILU: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """y, and the sum if there is one, of ``rows`` rows of BLOCK_C channels."""
    offs_r = tl.arange(0, BLOCK_R)
    offs_c = tl.arange(0, BLOCK_C)
    for step in tl.range(0, tl.cdiv(rows, BLOCK_R), num_stages=STAGES):
        row = step * BLOCK_R + offs_r[:, None]
        mask = row < rows
        offs = row * channels + offs_c
        z = _load_tile(x_ptr, row * stride + offs_c, mask, shift, HAS_SHIFT)  # [BLOCK_R, BLOCK_C]
        if HAS_ROW:
            tl.store(sum_ptr + offs, (z + addend).to(sum_ptr.dtype.element_ty), mask=mask)
        y = ((z - mean) * scale + bias).to(y_ptr.dtype.element_ty)
        if SILU:
            y = apply_silu(y.to(tl.float32), y.dtype).to(y.dtype)
        tl.store(y_ptr + offs, y, mask=mask)


@triton.jit(do_not_specialize=["segment_rows", "chunk_rows", "stride_shift_segment"])
def _chunk_stats_kernel(
    x_ptr, tail_ptr, shift_ptr, part_ptr,
    channels, head_channels, segment_rows, chunk_rows,
    stride_shift_segment,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, FOLD: tl.constexpr, HAS_SHIFT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    segment, chunk, first_channel = locate(tl.program_id(0), channels, segment_rows, chunk_rows, BLOCK_C)
    first_row = chunk * chunk_rows
    rows = tl.minimum(chunk_rows, segment_rows - first_row)
    row = segment * segment_rows + first_row
    x_ptr, stride = _source(x_ptr, tail_ptr, row, first_channel, head_channels, channels)
    offs_c = tl.arange(0, BLOCK_C)
    shift = 0.0
    if HAS_SHIFT:
        shift = tl.load(shift_ptr + segment * stride_shift_segment + first_channel + offs_c).to(tl.float32)
    mean, m2 = _channel_stats(x_ptr, stride, rows, shift, BLOCK_R, BLOCK_C, FOLD, HAS_SHIFT, STAGES)
    store_part(part_ptr, segment, chunk, first_channel, channels, segment_rows, chunk_rows, mean, m2)


@triton.jit(
    do_not_specialize=[
        "groups", "group_channels", "segments", "segment_rows", "chunk_rows", "first_span", "span", "spans"
    ]
)  # fmt: skip
def _group_stats_kernel(
    part_ptr, weight_ptr, norm_ptr,
    groups, group_channels, segments, segment_rows, chunk_rows, first_span, span, spans,
    eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    which = (tl.program_id(0) // groups).to(tl.int64)  # of a span of segments that have their statistics in common
    first_channel = tl.program_id(0) % groups * group_channels
    channels = groups * group_channels
    end = which % spans * span + first_span
    first_segment = tl.where(which % spans == 0, 0, end - span)
    span_segments = tl.minimum(end, segments) - first_segment
    chunks = tl.cdiv(segment_rows, chunk_rows)
    parts = span_segments * chunks
    part_ptr += (which // spans * segments + first_segment) * chunks * 2 * channels + first_channel

    count = tl.zeros([BLOCK], dtype=tl.float32)
    mean = tl.zeros([BLOCK], dtype=tl.float32)
    m2 = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, parts * group_channels, BLOCK):
        index = start + tl.arange(0, BLOCK)
        part = index // group_channels
        mask = part < parts
        offs = part.to(tl.int64) * 2 * channels + index % group_channels
        part_count = _part_rows(part, parts, segment_rows, chunk_rows).to(tl.float32)
        part_mean = tl.load(part_ptr + offs, mask=mask, other=0.0)
        part_m2 = tl.load(part_ptr + channels + offs, mask=mask, other=0.0)
        count, mean, m2 = combine(count, mean, m2, part_count, part_mean, part_m2)
    total = 1.0 * span_segments * segment_rows * group_channels
    mean, m2 = merge(count, mean, m2, total)
    rstd = tl.rsqrt(m2 / total + eps)

    # the group's mean once for each channel, so that the last pass reads whole vectors
    norm_ptr += which * 2 * channels + first_channel
    for start in range(0, group_channels, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < group_channels
        weight = tl.load(weight_ptr + first_channel + offs, mask=mask).to(tl.float32)
        tl.store(norm_ptr + offs, tl.zeros([BLOCK], dtype=tl.float32) + mean, mask=mask)
        tl.store(norm_ptr + channels + offs, weight * rstd, mask=mask)


@triton.jit(do_not_specialize=["segments", "segment_rows", "chunk_rows", "stride_shift_segment"])
def _apply_kernel(
    x_ptr, tail_ptr, shift_ptr, norm_ptr, bias_ptr, row_ptr, sum_ptr, y_ptr,
    channels, head_channels, segments, segment_rows, chunk_rows,
    stride_shift_segment,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_ROW: tl.constexpr, SILU: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    # backwards: the rows that the statistics read last are still in the L2 cache
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    segment, chunk, first_channel = locate(pid, channels, segment_rows, chunk_rows, BLOCK_C)
    first_row = chunk * chunk_rows
    rows = tl.minimum(chunk_rows, segment_rows - first_row)
    row = segment * segment_rows + first_row
    x_ptr, stride = _source(x_ptr, tail_ptr, row, first_channel, head_channels, channels)
    offs_c = tl.arange(0, BLOCK_C)
    norm_ptr += segment // segments * 2 * channels + first_channel
    mean = tl.load(norm_ptr + offs_c)
    scale = tl.load(norm_ptr + channels + offs_c)
    bias = tl.load(bias_ptr + first_channel + offs_c).to(tl.float32)
    shift = 0.0
    if HAS_SHIFT:
        shift = tl.load(shift_ptr + segment * stride_shift_segment + first_channel + offs_c).to(tl.float32)
    addend = 0.0
    if HAS_ROW:
        addend = tl.load(row_ptr + first_channel + offs_c).to(tl.float32)
    start = row * channels + first_channel
    _normalise(
        x_ptr, sum_ptr + start, y_ptr + start,
        stride, channels, rows, mean, scale, bias, shift, addend,
        BLOCK_R, BLOCK_C, HAS_SHIFT, HAS_ROW, SILU, STAGES,
    )  # fmt: skip


class _Call(NamedTuple):
    """The arguments of either op."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    groups: int
    eps: float
    silu: bool
    shift: Tensor | None
    tail: Tensor | None
    parts: Tensor | None
    segment_rows: int
    chunk_rows: int
    row: Tensor | None = None

    @classmethod
    def and_sum(
        cls, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, row: Tensor, *statistics: Any
    ) -> _Call:
        parts, segment_rows, chunk_rows = statistics
        return cls(x, weight, bias, groups, eps, False, None, None, parts, segment_rows, chunk_rows, row)

    @property
    def rows(self) -> int:
        """Of a sample."""
        return math.prod(self.x.shape[2:])

    @property
    def tensors(self) -> tuple[Any, ...]:
        """Those that kernels read."""
        return self.x, self.shift, self.tail, self.weight, self.bias, self.row, self.parts

    @property
    def statistics_of_more(self) -> bool:
        return self.parts is not None and _is_of_more(self.parts, self.segment_rows, self.x)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.x.shape[0], self.weight.shape[0], *self.x.shape[2:])


class _Sizes(NamedTuple):
    """Of an activation: to the kernels it is ``[samples * segments, segment_rows, channels]``."""

    samples: int
    channels: int
    head_channels: int  # those in x; the others are in the tail
    segments: int
    segment_rows: int
    groups: int

    @property
    def widest_block(self) -> int:
        """The largest power of two that divides the channels of x and those of the tail."""
        either = self.channels | self.head_channels
        return either & -either

    @property
    def all_segments(self) -> int:
        return self.samples * self.segments

    def grid(self, tiling: Tiling) -> tuple[int]:
        return (tiling.programs(self.all_segments, self.segment_rows, self.channels),)


def choose_apply_tiling(widest_block: int) -> Tiling:
    """Programs of one warp and few rows: most of what they read is on its way before they work on the first tile."""
    block_c = min(widest_block, 128)
    block_r = APPLY_TILE // block_c
    return Tiling(block_r, block_c, 4 * block_r, stages=3, num_warps=1)


class _Launches(NamedTuple):
    """Statistics of chunks; their merge; the norm. And the shapes of what each of the first two writes."""

    chunk_stats: Launch
    group_stats: Launch
    apply: Launch
    parts: tuple[int, int, int, int]
    norm: tuple[int, int, int]


def _launches(
    sizes: _Sizes,
    eps: float,
    silu: bool,
    shift_stride: int | None,
    has_row: bool,
    known: tuple[int, int, int] | None = None,
) -> _Launches:
    """``shift_stride`` is from one segment's shift to the next one's, or None where there is no shift.

    ``known`` are the segments of a sample in statistics that are known, and the rows of a segment and of a chunk there.
    """
    samples, channels, head_channels, segments, segment_rows, groups = sizes
    has_shift = shift_stride is not None
    stats = choose_tiling(sizes.all_segments, segment_rows, channels, sizes.widest_block)
    apply = choose_apply_tiling(sizes.widest_block)
    merged_segments, merged_rows, chunk_rows = known or (segments, segment_rows, stats.chunk_rows)
    chunks = triton.cdiv(merged_rows, chunk_rows)
    chunk_stats = chunk_stats_launch(sizes.all_segments, segment_rows, channels, head_channels, shift_stride, stats)
    group_stats = group_stats_launch(
        samples, channels, groups, eps, merged_segments, merged_rows, chunk_rows, merged_segments, merged_segments
    )
    apply_norm = Launch(
        _apply_kernel, sizes.grid(apply),
        channels, head_channels, segments, segment_rows, apply.chunk_rows,
        shift_stride or 0,
        BLOCK_R=apply.block_r, BLOCK_C=apply.block_c, HAS_SHIFT=has_shift, HAS_ROW=has_row, SILU=silu,
        STAGES=apply.stages,
        num_warps=apply.num_warps,
    )  # fmt: skip
    parts = samples * merged_segments, chunks, 2, channels
    return _Launches(chunk_stats, group_stats, apply_norm, parts, (samples, 2, channels))


def chunk_stats_launch(
    segments: int, segment_rows: int, channels: int, head_channels: int, shift_stride: int | None, tiling: Tiling
) -> Launch:
    """Makes the statistics ``[segments, chunks, 2, C]`` of x, its tail and its shift."""
    return Launch(
        _chunk_stats_kernel, (tiling.programs(segments, segment_rows, channels),),
        channels, head_channels, segment_rows, tiling.chunk_rows,
        shift_stride or 0,
        BLOCK_R=tiling.block_r, BLOCK_C=tiling.block_c, FOLD=FOLD, HAS_SHIFT=shift_stride is not None,
        STAGES=tiling.stages,
        num_warps=tiling.num_warps,
    )  # fmt: skip


def group_stats_launch(
    samples: int,
    channels: int,
    groups: int,
    eps: float,
    segments: int,
    segment_rows: int,
    chunk_rows: int,
    first_span: int,
    span: int,
) -> Launch:
    """Makes ``[samples, spans, 2, C]``, mean and scale of every channel, of the statistics of ``segments``.

    Statistics are of the first ``first_span`` segments of a sample together, and of every ``span`` behind them.
    """
    spans = count_spans(segments, first_span, span)
    values = max(first_span, span) * triton.cdiv(segment_rows, chunk_rows) * (channels // groups)
    num_warps = 1 if values <= 512 else 8
    return Launch(
        _group_stats_kernel, (samples * spans * groups,),
        groups, channels // groups, segments, segment_rows, chunk_rows, first_span, span, spans,
        eps,
        BLOCK=256 * num_warps,
        num_warps=num_warps,
    )  # fmt: skip


def count_spans(segments: int, first_span: int, span: int) -> int:
    """How many spans of segments have statistics of their own: the first, and those behind it."""
    return 1 + triton.cdiv(max(segments - first_span, 0), span)


def compile_ahead(
    weight: Tensor, groups: int, *, silu: bool = True, shift: bool = False, and_sum: bool = False
) -> None:
    """Begin to compile what the ops here will run with such a weight and activations of its dtype.

    Args:
        weight: ``[C]``, on the device in question.
        groups: Number of groups.
        silu: Whether SiLU follows.
        shift: Whether a shift will be added before the norm.
        and_sum: Whether it is :func:`group_norm_and_sum` that will run, which has neither.
    """
    channels, dtype = weight.numel(), weight.dtype
    if channels % CHANNELS or dtype not in DTYPES:
        return
    silu, stride = silu and not and_sum, channels if shift and not and_sum else None
    for rows in (1, 2**20):  # the merge of few parts, and of many
        launches = _launches(_Sizes(1, channels, channels, 1, rows, groups), 0.5, silu, stride, and_sum)
        launches.group_stats.compile_ahead(weight.device, torch.float32, dtype, torch.float32)
    launches.chunk_stats.compile_ahead(weight.device, dtype, dtype, dtype, torch.float32)
    launches.apply.compile_ahead(weight.device, *[dtype] * 3, torch.float32, *[dtype] * 4)


def _readied(x: Tensor, shift: Tensor | None, tail: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors of a call as the kernels read them; those that are so already are the same objects."""
    if tail is not None and x.shape[1] % CHANNELS:  # no block of channels ends where x does
        x, tail = torch.cat([x, tail], dim=1), None
    if shift is not None:
        samples, segments, _ = shift.shape
        # one stride for all N * T rows: 0 for a bias that was expanded
        even = samples == 1 or segments == 1 or shift.stride(0) == segments * shift.stride(1)
        shift = shift if even and shift.stride(2) == 1 else shift.contiguous()
    contiguous = (None if other is None else other.contiguous() for other in others)
    return channels_last(x), shift, None if tail is None else channels_last(tail), *contiguous


def _prepare(call: _Call) -> Callable[..., None]:
    """What writes the norm, and the sum if there is a row, for tensors like these."""
    readied = _readied(*call.tensors)
    ready = all(made is given for made, given in zip(readied, call.tensors, strict=True))
    x, shift = readied[:2]
    assert x is not None
    segments = 1 if shift is None else shift.shape[1]
    sizes = _Sizes(len(x), call.weight.shape[0], x.shape[1], segments, call.rows // segments, call.groups)
    stride = None if shift is None else shift.stride(0 if segments == 1 else 1)
    known = None if call.parts is None else (len(call.parts) // len(x), call.segment_rows, call.chunk_rows)
    launches = _launches(sizes, call.eps, call.silu, stride, call.row is not None, known)
    chunk_stats, group_stats, apply, parts_shape, norm_shape = launches
    empty, dtype, device = torch.empty, torch.float32, x.device

    def write(x, shift, tail, weight, bias, row, parts, summed, y):
        if not ready:
            x, shift, tail, weight, bias, row, parts = _readied(x, shift, tail, weight, bias, row, parts)
        if parts is None:
            parts = empty(parts_shape, dtype=dtype, device=device)
            chunk_stats(x, tail, shift, parts)
        norm = empty(norm_shape, dtype=dtype, device=device)
        group_stats(parts, weight, norm)
        apply(x, tail, shift, norm, bias, row, summed, y)

    return write


def _bind(*args: Any) -> Callable[..., Tensor]:
    call = _Call(*args)
    write, shape = _prepare(call), call.output_shape
    strides = channels_last_strides(shape)

    def run(x, weight, bias, groups, eps, silu, shift, tail, parts, segment_rows, chunk_rows):
        y = x.new_empty_strided(shape, strides)
        write(x, shift, tail, weight, bias, None, parts, None, y)
        return y

    return run


def _bind_and_sum(*args: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    call = _Call.and_sum(*args)
    write, shape = _prepare(call), call.output_shape
    strides = channels_last_strides(shape)

    def run(x, weight, bias, groups, eps, row, parts, segment_rows, chunk_rows):
        y, summed = x.new_empty_strided(shape, strides), x.new_empty_strided(shape, strides)
        write(x, None, None, weight, bias, row, parts, summed, y)
        return y, summed

    return run


def _triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    shift: Tensor | None,
    tail: Tensor | None,
    parts: Tensor | None,
    segment_rows: int,
    chunk_rows: int,
) -> Tensor:
    args = x, weight, bias, groups, eps, silu, shift, tail, parts, segment_rows, chunk_rows
    return _bind(*args)(*args)


def _triton_and_sum(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    row: Tensor,
    parts: Tensor | None,
    segment_rows: int,
    chunk_rows: int,
) -> tuple[Tensor, Tensor]:
    args = x, weight, bias, groups, eps, row, parts, segment_rows, chunk_rows
    return _bind_and_sum(*args)(*args)


def _reason(call: _Call) -> str | None:
    channels = call.weight.shape[0]
    if channels % CHANNELS:
        return f"the kernels take C divisible by {CHANNELS}, got C={channels}"
    if len(call.x) * call.rows == 0:
        return "there is nothing to normalise"
    return device_reason(call.x) or tensors_reason(*call.tensors)


def _validate(name: str, call: _Call) -> None:
    x, shift, tail = call.x, call.shift, call.tail
    require_floats(name, x=x, weight=call.weight, bias=call.bias, shift=shift, tail=tail, row=call.row)
    if not 3 <= x.ndim <= 5:
        raise ValueError(f"{name}: x must be [N, C, *spatial] with 1 to 3 spatial dims, got {tuple(x.shape)}")
    channels = x.shape[1]
    if tail is not None:
        if tail.shape[:1] != x.shape[:1] or tail.shape[2:] != x.shape[2:] or tail.dtype != x.dtype:
            raise ValueError(
                f"{name}: tail must be x but for its channels, got {tuple(tail.shape)} {tail.dtype} "
                f"behind {tuple(x.shape)} {x.dtype}"
            )
        channels += tail.shape[1]
    if call.groups < 1 or channels % call.groups:
        raise ValueError(f"{name}: groups={call.groups} does not divide C={channels} (x is {tuple(x.shape)})")
    if len(x) * channels * call.rows == call.groups:
        raise ValueError(f"{name}: one value in a group has no variance, groups={call.groups} (x is {tuple(x.shape)})")
    if call.weight.shape != (channels,) or call.bias.shape != (channels,):
        raise ValueError(
            f"{name}: weight and bias must be [{channels}], got {tuple(call.weight.shape)} and {tuple(call.bias.shape)}"
        )
    if call.row is not None and call.row.shape != (channels,):
        raise ValueError(f"{name}: row must be [{channels}], got {tuple(call.row.shape)}")
    if shift is not None:
        if shift.ndim != 3 or shift.shape[::2] != (len(x), channels):
            raise ValueError(f"{name}: shift must be [{len(x)}, T, {channels}], got {tuple(shift.shape)}")
        if shift.shape[1] == 0 or call.rows % shift.shape[1]:
            raise ValueError(
                f"{name}: T={shift.shape[1]} of shift does not divide the {call.rows} rows of x {tuple(x.shape)}"
            )
    if call.parts is not None:
        _validate_statistics(name, call, call.parts)


def _validate_statistics(name: str, call: _Call, parts: Tensor) -> None:
    if call.tail is not None:
        raise ValueError(f"{name}: statistics are of x alone, and do not serve with a tail")
    rows = f"segment_rows={call.segment_rows}, chunk_rows={call.chunk_rows}"
    if call.segment_rows < 1 or call.chunk_rows < 1 or call.rows % call.segment_rows:
        raise ValueError(f"{name}: the segments of statistics must divide the {call.rows} rows of x, got {rows}")
    segments = len(call.x) * call.rows // call.segment_rows
    shape = segments, triton.cdiv(call.segment_rows, call.chunk_rows), 2, call.x.shape[1]
    segments_fit = len(parts) == segments or (len(parts) > segments and len(parts) % len(call.x) == 0)
    if not segments_fit or parts.shape[1:] != shape[1:] or not are_of_dtype(parts, call.x):
        raise ValueError(
            f"{name}: parts of statistics with {rows} must be {shape} torch.float32, or of more segments, "
            f"got {tuple(parts.shape)} {parts.dtype}"
        )


def _costs(call: _Call) -> Costs:
    """x is read twice, once where its statistics are known; the norm is written, and the sum."""
    passes = 2 + (call.parts is None) + (call.row is not None)
    return Costs(bytes=passes * math.prod(call.output_shape) * call.x.itemsize)


def _cuts(call: _Call) -> Iterator[tuple[_Call, Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]]]:
    """Calls of some groups of some samples, and where these lie in the outputs.

    Statistics are computed anew, unless they are of more than x.
    """
    x, weight, bias, groups, eps, silu, shift, tail, parts, segment_rows, chunk_rows, row = call
    width, head = len(weight) // groups, x.shape[1]
    many = math.gcd(8 // math.gcd(8, width), groups)  # whose channels begin at a multiple of 16 bytes
    for n in cuts(len(x), len(weight) * call.rows, lean(x)):
        for some in cuts(groups // many, (n.stop - n.start) * width * call.rows * many, lean(x)):
            c = slice(some.start * many * width, some.stop * many * width)
            some_parts = None
            if parts is not None and call.statistics_of_more:
                some_parts = parts.unflatten(0, (len(x), -1))[n, ..., c].flatten(0, 1)
            part = _Call(
                x[n, c], weight[c], bias[c], (some.stop - some.start) * many, eps, silu,
                None if shift is None else shift[n, :, c],
                None if tail is None else tail[n, max(c.start - head, 0) : max(c.stop - head, 0)],
                some_parts, segment_rows, chunk_rows,
                None if row is None else row[c],
            )  # fmt: skip
            yield part, functools.partial(piece_of, (n, c))


GROUP_NORM_SILU = Op(
    "group_norm_silu",
    reference=group_norm_silu_ref,
    implementations={
        "triton": Implementation(_triton, lambda *args: _reason(_Call(*args)), _bind, registered=True),
    },
    fake=lambda x, weight, *others: empty_channels_last(x, len(weight)),
    costs=lambda *args: _costs(_Call(*args)),
    parts=lambda *args: (Part(call[:-1], of) for call, of in _cuts(_Call(*args))),
    validate=lambda *args: _validate("group_norm_silu", _Call(*args)),
    small=lambda *args: (*scaled(0, 6, 7)(*args)[:8], *NO_STATISTICS),  # x, shift, tail
)

GROUP_NORM_AND_SUM = Op(
    "group_norm_and_sum",
    reference=group_norm_and_sum_ref,
    implementations={
        "triton": Implementation(
            _triton_and_sum, lambda *args: _reason(_Call.and_sum(*args)), _bind_and_sum, registered=True
        ),
    },
    fake=lambda x, *others: (empty_channels_last(x), empty_channels_last(x)),
    costs=lambda *args: _costs(_Call.and_sum(*args)),
    parts=lambda *args: (Part((*call[:5], call.row, *call[8:11]), of) for call, of in _cuts(_Call.and_sum(*args))),
    validate=lambda *args: _validate("group_norm_and_sum", _Call.and_sum(*args)),
    small=lambda *args: (*scaled(0)(*args)[:6], *NO_STATISTICS),
)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    silu: bool = True,
    shift: Tensor | None = None,
    tail: Tensor | None = None,
    statistics: ChannelStatistics | None = None,
    impl: str | None = None,
) -> Tensor:
    """``F.silu(F.group_norm(x + shift, groups, weight, bias, eps))``, returned in channels-last memory.

    With ``tail``, x stands for ``torch.cat([x, tail], dim=1)``, which is not made; ``C`` counts the channels of both.

    Args:
        x: ``[N, C, *spatial]``, 3-D to 5-D, fp16 / bf16 / fp32. Read as it is when the channels are innermost in
            memory (channels_last, channels_last_3d, a transposed ``[N, S, C]``), else copied into that order first.
        weight: ``[C]``, any float dtype.
        bias: ``[C]``, any float dtype.
        groups: Number of groups; must divide ``C``.
        eps: Added to the variance.
        silu: Whether SiLU follows the norm.
        shift: ``[N, T, C]``, added to x before the norm (time embedding, bias of the convolution before): row ``s`` of
            the ``S`` pixels of a sample takes ``shift[n, s // (S // T)]``. Rounded to ``x.dtype`` first.
        tail: Like x but for the number of its channels, which lie behind those of x (the skip connection of a UNet).
        statistics: Of ``x + shift``, from the kernel that wrote it; its segments divide the rows of a sample. If it has
            more segments than x, they are of a clip that x is some frames of, and which is normalised as a whole. None:
            computed here. Only without ``tail``.
        impl: ``"triton"`` or ``"torch"``; None lets the op choose.

    Returns:
        ``[N, C, *spatial]`` in ``x.dtype``, channels innermost in memory.

    Raises:
        ValueError: ``groups`` does not divide ``C``; ``weight``, ``bias``, ``shift``, ``tail`` or ``statistics`` has
            another shape; ``T`` does not divide ``S``; there are statistics and a tail; ``impl`` cannot run here.
        TypeError: ``x``, ``weight`` or ``bias`` is not floating-point.
    """
    if shift is not None:
        shift = shift.to(x.dtype)
    return GROUP_NORM_SILU(
        x, weight, bias, groups, eps, silu, shift, tail, *(statistics or NO_STATISTICS), impl=impl
    )  # fmt: skip


def group_norm_and_sum(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    row: Tensor,
    *,
    statistics: ChannelStatistics | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``F.group_norm(x, groups, weight, bias, eps)`` and ``x + row``, both in channels-last memory.

    Args:
        x: As in :func:`group_norm_silu`, and so are ``weight``, ``bias``, ``groups``, ``eps`` and ``impl``.
        weight: ``[C]``.
        bias: ``[C]``.
        groups: Number of groups.
        eps: Added to the variance.
        row: ``[C]``, any float dtype; rounded to ``x.dtype`` first.
        statistics: As in :func:`group_norm_silu`.
        impl: ``"triton"`` or ``"torch"``.

    Returns:
        The norm and the sum, each ``[N, C, *spatial]`` in ``x.dtype``.

    Raises:
        ValueError: As :func:`group_norm_silu`; ``row`` has another shape.
        TypeError: ``x``, ``weight`` or ``bias`` is not floating-point.
    """
    row = row.to(x.dtype)
    return GROUP_NORM_AND_SUM(x, weight, bias, groups, eps, row, *(statistics or NO_STATISTICS), impl=impl)
