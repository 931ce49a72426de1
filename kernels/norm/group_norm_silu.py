"""GroupNorm, optionally with SiLU behind it and a per-frame addition before it, on channels-last activations.

    y[n, s, c] = silu((z[n, s, c] - mean[n, g]) / sqrt(var[n, g] + eps) * weight[c] + bias[c])
    z[n, s, c] = x[n, s, c] + shift[n, t, c],   g = c // (C / groups),   t = s // (S / T)

Memory is ``[N, S, C]`` with S the rows (pixels, and for a 5-D input frames) of one sample. x may come in two tensors,
the channels of the second behind those of the first; a program reads one of them. Three launches: statistics of every
(chunk of rows, channel); their merge into one mean and scale per (sample, channel); normalise and SiLU. PyTorch gives
one block to a whole (sample, group), which fills no GPU when the statistics span a clip; here the first and the last
pass cut the rows into as many chunks as the GPU likes. Bound by memory: two reads and one write. Where the kernel
before has computed the statistics (``channel_statistics.py``), and x carries them, there is one read,
and no first launch.

z and the normalised value are rounded to the input dtype in registers, where eager stores them. Fidelity: math-exact.

``group_norm_and_sum`` also writes ``x + row``, from the last pass, which reads x anyway: the residual of a transformer,
with the bias of the projection that it will be added to (see ``add_layer_norm``).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.channels_last import channels_last, empty_channels_last
from vidaccel.kernels.dispatch import DTYPES, choose
from vidaccel.kernels.launch import Launch, prepared
from vidaccel.kernels.norm.channel_statistics import (
    FOLD,
    ChannelStatistics,
    Tiling,
    carried,
    choose_tiling,
    combine,
    fold,
    locate,
    merge,
    merge_lanes,
    rows_of_tile,
    store_part,
)

__all__ = [
    "apply_silu",
    "compile_ahead",
    "group_norm_and_sum",
    "group_norm_silu",
    "group_norm_silu_ref",
    "group_norm_statistics",
    "validate_norm",
]

APPLY_TILE = 512  # elements: 16 for each thread


def group_norm_silu_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    silu: bool = True,
    shift: Tensor | None = None,
    tail: Tensor | None = None,
) -> Tensor:
    """The specification. Pass float64 inputs for gold values."""
    if tail is not None:
        x = torch.cat([x, tail], dim=1)
    if shift is not None:
        rows = x[0, 0].numel()
        per_row = shift.to(x.dtype).repeat_interleave(rows // shift.shape[1], dim=1)
        x = x + per_row.transpose(1, 2).reshape(x.shape)
    y = F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    return F.silu(y) if silu else y


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


@triton.jit(do_not_specialize=["groups", "group_channels", "segments", "segment_rows", "chunk_rows"])
def _group_stats_kernel(
    part_ptr, weight_ptr, norm_ptr,
    groups, group_channels, segments, segment_rows, chunk_rows,
    eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // groups).to(tl.int64)
    first_channel = tl.program_id(0) % groups * group_channels
    channels = groups * group_channels
    parts = segments * tl.cdiv(segment_rows, chunk_rows)
    part_ptr += sample * parts * 2 * channels + first_channel

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
    total = 1.0 * segments * segment_rows * group_channels
    mean, m2 = merge(count, mean, m2, total)
    rstd = tl.rsqrt(m2 / total + eps)

    # the group's mean once for each channel, so that the last pass reads whole vectors
    norm_ptr += sample * 2 * channels + first_channel
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


_Tilings = tuple[Tiling, Tiling]  # of the statistics and of the last pass


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


def _sizes(x: Tensor, tail: Tensor | None, shift: Tensor | None, groups: int) -> _Sizes:
    samples, head_channels = x.shape[:2]
    channels = head_channels if tail is None else head_channels + tail.shape[1]
    segments = 1 if shift is None else shift.shape[1]
    return _Sizes(samples, channels, head_channels, segments, math.prod(x.shape[2:]) // segments, groups)


def _stats_tiling(sizes: _Sizes) -> Tiling:
    return choose_tiling(sizes.all_segments, sizes.segment_rows, sizes.channels, sizes.widest_block)


def _apply_tiling(sizes: _Sizes) -> Tiling:
    """Programs of one warp and few rows: most of what they read is on its way before they work on the first tile."""
    block_c = min(sizes.widest_block, 128)
    block_r = APPLY_TILE // block_c
    return Tiling(block_r, block_c, 4 * block_r, stages=3, num_warps=1)


class _Launches(NamedTuple):
    """Statistics of chunks, unless x carries them; their merge; the norm."""

    chunk_stats: Launch
    group_stats: Launch
    apply: Launch
    parts: tuple[int, int, int, int]
    norms: tuple[int, int, int]

    def statistics(
        self, x: Tensor, tail: Tensor | None, shift: Tensor | None, weight: Tensor, known: ChannelStatistics | None
    ) -> Tensor:
        """What x is normalised with, ``[N, 2, C]``: the mean and weight / standard deviation of every channel."""
        if known is None:
            parts = torch.empty(self.parts, dtype=torch.float32, device=x.device)
            self.chunk_stats(x, tail, shift, parts)
        else:
            parts = known.parts
        norm = torch.empty(self.norms, dtype=torch.float32, device=x.device)
        self.group_stats(parts, weight, norm)
        return norm

    def __call__(
        self,
        x: Tensor,
        tail: Tensor | None,
        shift: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        row: Tensor | None,
        summed: Tensor | None,
        y: Tensor,
        known: ChannelStatistics | None,
    ) -> None:
        norm = self.statistics(x, tail, shift, weight, known)
        self.apply(x, tail, shift, norm, bias, row, summed, y)


@prepared
def _prepare(
    sizes: _Sizes,
    eps: float,
    silu: bool,
    shift_stride: int | None,
    has_row: bool,
    known_rows: tuple[int, int] | None = None,
    tilings: _Tilings | None = None,
) -> _Launches:
    """``shift_stride`` is from one segment's shift to the next one's, or None where there is no shift.

    ``known_rows`` are those of a segment and of a chunk in the statistics that x carries, or None.
    """
    samples, channels, head_channels, segments, segment_rows, groups = sizes
    has_shift = shift_stride is not None
    stats, apply = tilings or (_stats_tiling(sizes), _apply_tiling(sizes))
    merged_rows, chunk_rows = known_rows or (segment_rows, stats.chunk_rows)
    merged_segments, chunks = segments * segment_rows // merged_rows, triton.cdiv(merged_rows, chunk_rows)
    merge_warps = _merge_warps(merged_segments * chunks * (channels // groups))
    chunk_stats = Launch(
        _chunk_stats_kernel, sizes.grid(stats),
        channels, head_channels, segment_rows, stats.chunk_rows,
        shift_stride or 0,
        BLOCK_R=stats.block_r, BLOCK_C=stats.block_c, FOLD=FOLD, HAS_SHIFT=has_shift, STAGES=stats.stages,
        num_warps=stats.num_warps,
    )  # fmt: skip
    group_stats = Launch(
        _group_stats_kernel, (samples * groups,),
        groups, channels // groups, merged_segments, merged_rows, chunk_rows,
        eps,
        BLOCK=256 * merge_warps,
        num_warps=merge_warps,
    )  # fmt: skip
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


def _merge_warps(values: int) -> int:
    return 1 if values <= 512 else 8


def _known(x: Tensor, tail: Tensor | None, shift: Tensor | None) -> ChannelStatistics | None:
    """The statistics of what is normalised, if x carries them."""
    return carried(x) if tail is None and shift is None else None


def _rows_of(known: ChannelStatistics | None) -> tuple[int, int] | None:
    return None if known is None else known[1:]


def _by_segment(shift: Tensor | None) -> tuple[Tensor | None, int | None]:
    """``[N, T, C]`` with one stride for all its N * T rows, and that: 0 for a bias that was expanded."""
    if shift is None:
        return None, None
    samples, segments, _ = shift.shape
    even = samples == 1 or segments == 1 or shift.stride(0) == segments * shift.stride(1)
    if not even or shift.stride(2) != 1:
        shift = shift.contiguous()
    return shift, shift.stride(0 if segments == 1 else 1)


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
    if channels % 32 or dtype not in DTYPES:
        return
    silu, stride = silu and not and_sum, channels if shift and not and_sum else None
    for rows in (1, 2**20):  # the merge of few parts, and of many
        launches = _prepare(_Sizes(1, channels, channels, 1, rows, groups), 0.5, silu, stride, and_sum)
        launches.group_stats.compile_ahead(weight.device, torch.float32, dtype, torch.float32)
    launches.chunk_stats.compile_ahead(weight.device, dtype, dtype, dtype, torch.float32)
    launches.apply.compile_ahead(weight.device, *[dtype] * 3, torch.float32, *[dtype] * 4)


def group_norm_statistics(x: Tensor, weight: Tensor, groups: int, eps: float, shift: Tensor | None) -> Tensor:
    """``[N, 2, C]``, float32: the mean of ``x + shift`` and ``weight / standard deviation``, for every channel.

    For a kernel that normalises as it reads; the arguments are those that ``group_norm_silu`` gives its kernels.
    """
    known = _known(x, None, shift)
    sizes = _sizes(x, None, shift, groups)
    shift, shift_stride = _by_segment(shift)
    launches = _prepare(sizes, eps, True, shift_stride, False, _rows_of(known))
    return launches.statistics(x, None, shift, weight, known)


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    shift: Tensor | None,
    tail: Tensor | None = None,
    *,
    tilings: _Tilings | None = None,
) -> Tensor:
    known = _known(x, tail, shift)
    x, tail = channels_last(x), None if tail is None else channels_last(tail)
    y = _empty_output(x, tail)
    sizes = _sizes(x, tail, shift, groups)
    shift, shift_stride = _by_segment(shift)
    launches = _prepare(sizes, eps, silu, shift_stride, False, _rows_of(known), tilings)
    launches(x, tail, shift, weight, bias, None, None, y, known)
    return y


def _launch_and_sum(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    row: Tensor,
    *,
    tilings: _Tilings | None = None,
) -> tuple[Tensor, Tensor]:
    known = _known(x, None, None)
    x = channels_last(x)
    y, summed = empty_channels_last(x), empty_channels_last(x)
    sizes = _sizes(x, None, None, groups)
    launches = _prepare(sizes, eps, False, None, True, _rows_of(known), tilings)
    launches(x, None, None, weight, bias, row, summed, y, known)
    return y, summed


def _empty_output(x: Tensor, tail: Tensor | None) -> Tensor:
    if tail is None:
        return empty_channels_last(x)
    return empty_channels_last(x.new_empty(()).expand(x.shape[0], x.shape[1] + tail.shape[1], *x.shape[2:]))


@torch.library.custom_op("vidaccel::group_norm_silu", mutates_args=())
def _group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    shift: Tensor | None,
    tail: Tensor | None,
) -> Tensor:
    return _launch(x, weight, bias, groups, eps, silu, shift, tail)


@_group_norm_silu.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    shift: Tensor | None,
    tail: Tensor | None,
) -> Tensor:
    return _empty_output(x, tail)


@torch.library.custom_op("vidaccel::group_norm_and_sum", mutates_args=())
def _group_norm_and_sum(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, row: Tensor
) -> tuple[Tensor, Tensor]:
    return _launch_and_sum(x, weight, bias, groups, eps, row)


@_group_norm_and_sum.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, row: Tensor) -> tuple[Tensor, Tensor]:
    return empty_channels_last(x), empty_channels_last(x)


def _why_not_triton(x: Tensor, channels: int) -> str | None:
    if x.dtype not in DTYPES:
        return f"the kernels take float16, bfloat16 and float32, x is {x.dtype}"
    if channels % 32:
        return f"the kernels take C divisible by 32, got C={channels}"
    return None


def validate_norm(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    shift: Tensor | None = None,
    tail: Tensor | None = None,
) -> None:
    """Raise for arguments that do not fit one another."""
    if not 3 <= x.ndim <= 5:
        raise ValueError(f"{op}: x must be [N, C, *spatial] with 1 to 3 spatial dims, got {tuple(x.shape)}")
    samples, channels = x.shape[:2]
    if tail is not None:
        if tail.shape[:1] != x.shape[:1] or tail.shape[2:] != x.shape[2:] or tail.dtype != x.dtype:
            raise ValueError(
                f"{op}: tail must be x but for its channels, got {tuple(tail.shape)} {tail.dtype} "
                f"behind {tuple(x.shape)} {x.dtype}"
            )
        channels += tail.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"{op}: groups={groups} does not divide C={channels} (x is {tuple(x.shape)})")
    if weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(
            f"{op}: weight and bias must be [{channels}], got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if shift is None:
        return
    if shift.ndim != 3 or shift.shape[::2] != (samples, channels):
        raise ValueError(f"{op}: shift must be [{samples}, T, {channels}], got {tuple(shift.shape)}")
    rows = math.prod(x.shape[2:])
    if shift.shape[1] == 0 or rows % shift.shape[1]:
        raise ValueError(f"{op}: T={shift.shape[1]} of shift does not divide the {rows} rows of x {tuple(x.shape)}")


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
        impl: ``"triton"`` or ``"torch"``; None lets ``vidaccel.kernels.dispatch`` choose.

    Returns:
        ``[N, C, *spatial]`` in ``x.dtype``, channels innermost in memory.

    Raises:
        ValueError: ``groups`` does not divide ``C``; ``weight``, ``bias``, ``shift`` or ``tail`` has another shape;
            ``T`` does not divide ``S``; ``impl`` cannot run here.
    """
    validate_norm("group_norm_silu", x, weight, bias, groups, shift, tail)
    channels = weight.shape[0]
    if x.shape[0] * channels * math.prod(x.shape[2:]) == 0:
        return _empty_output(x, tail)
    if choose("group_norm_silu", x, impl, _why_not_triton(x, channels)) == "torch":
        y = group_norm_silu_ref(x, weight, bias, groups, eps, silu=silu, shift=shift, tail=tail)
        return channels_last(y)
    if shift is not None:
        shift = shift.to(x.dtype)
    if tail is not None and x.shape[1] % 32:
        x, tail = torch.cat([x, tail], dim=1), None
    run = _group_norm_silu if torch.compiler.is_compiling() else _launch
    return run(x, weight.contiguous(), bias.contiguous(), groups, eps, silu, shift, tail)


def group_norm_and_sum(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, row: Tensor, *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """``F.group_norm(x, groups, weight, bias, eps)`` and ``x + row``, both in channels-last memory.

    Args:
        x: As in :func:`group_norm_silu`, and so are ``weight``, ``bias``, ``groups``, ``eps`` and ``impl``.
        weight: ``[C]``.
        bias: ``[C]``.
        groups: Number of groups.
        eps: Added to the variance.
        row: ``[C]``, any float dtype; rounded to ``x.dtype`` first.
        impl: ``"triton"`` or ``"torch"``.

    Returns:
        The norm and the sum, each ``[N, C, *spatial]`` in ``x.dtype``.

    Raises:
        ValueError: As :func:`group_norm_silu`; ``row`` has another shape.
    """
    validate_norm("group_norm_and_sum", x, weight, bias, groups)
    if row.shape != weight.shape:
        raise ValueError(f"group_norm_and_sum: row must be [{x.shape[1]}], got {tuple(row.shape)}")
    row = row.to(x.dtype)
    if x.numel() == 0:
        return empty_channels_last(x), empty_channels_last(x)
    if choose("group_norm_silu", x, impl, _why_not_triton(x, x.shape[1])) == "torch":
        y = group_norm_silu_ref(x, weight, bias, groups, eps, silu=False)
        return channels_last(y), channels_last(x + row.view(-1, *(1,) * (x.ndim - 2)))
    run = _group_norm_and_sum if torch.compiler.is_compiling() else _launch_and_sum
    return run(x, weight.contiguous(), bias.contiguous(), groups, eps, row.contiguous())
