"""``clip_conv`` with two thirds of the products: Winograd's F(2, 3) over time.

Two frames of the output are made of four of the input, ``d``, by three planes of the weight, ``g``, each: six
convolutions of pictures. Four are enough (S. Winograd, 1980; Lavin and Gray, arXiv:1509.09308):

    m0 = (d0 - d2) * g0    m1 = (d1 + d2) * (g0 + g1 + g2) / 2
    m3 = (d1 - d3) * g2    m2 = (d2 - d1) * (g0 - g1 + g2) / 2
    y0 = m0 + m1 + m2      y1 = m1 - m2 - m3

One kernel writes the sums and differences of frames, the library convolves them, another kernel adds up what comes out.
These passes through memory take a tenth to a fifth of what the six convolutions took, and the four save a third.

To round sums and products to bfloat16 would double the error. So they are float16, which has three bits more: what is
left is the rounding of the result, and the error to float64 is 1.02 times that of one convolution in bfloat16. What
float16 lacks is range. No number of a product is larger than ``6 * largest`` times the longest row of the weight
(Cauchy and Schwarz: nine pixels of a sum of two), if no pixel of the input is longer than ``largest``. So the input,
and the weight of each output channel, which may be small beside others, are multiplied by powers of two, such that
float16 holds all of that; the result is divided by them. They are worked out on the GPU, anew at every call: nothing
waits for them, and nothing goes stale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.launch import Launch

__all__ = ["pairs_at_once", "prepare", "workspace_bytes"]

ENOUGH_PIXELS = 2**17  # of all pairs that are convolved at once: more are no faster
WORKSPACE_BYTES = 2**31  # at most, where a pair of frames does not need more
_BYTES_OF_A_PAIR = 4 * 2  # for each pixel and channel: four numbers in float16
LARGEST_SUM, LARGEST_PRODUCT = 2.0**15, 2.0**15  # half of what float16 holds: roundings are on top
MOST_EXPONENT = 60  # of a scale: float32 holds the inverse of two of them
BLOCK, NUM_WARPS = 2048, 8
BLOCK_WEIGHT, NUM_WARPS_WEIGHT = 1024, 4


@triton.jit
def _power_of_two(x, EXPONENT: tl.constexpr):
    """The largest that is no larger, within reason; of NaN, 1."""
    found = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)  # its exponent alone
    return tl.where(x == x, tl.minimum(tl.maximum(found, 2.0**-EXPONENT), 2.0**EXPONENT), 1.0)


@triton.jit
def _measure_kernel(weight_ptr, units_ptr, lengths_ptr, numbers, EXPONENT: tl.constexpr, BLOCK: tl.constexpr):
    """Of the weight of one output channel: what brings its largest number to 1 or below, and how long it is then."""
    weight_ptr += tl.program_id(0).to(tl.int64) * numbers
    largest = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, numbers, BLOCK):
        at = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.abs(tl.load(weight_ptr + at, mask=at < numbers, other=0.0).to(tl.float32)))
    unit = _power_of_two(1 / tl.maximum(tl.max(largest, axis=0), 2.0**-EXPONENT), EXPONENT)
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, numbers, BLOCK):
        at = start + tl.arange(0, BLOCK)
        row = tl.load(weight_ptr + at, mask=at < numbers, other=0.0).to(tl.float32) * unit
        squares += row * row
    tl.store(units_ptr + tl.program_id(0), unit)
    tl.store(lengths_ptr + tl.program_id(0), tl.sqrt(tl.sum(squares, axis=0)))


@triton.jit
def _planes_kernel(
    weight_ptr, units_ptr, lengths_ptr, largest_ptr, planes_ptr, scale_ptr, inverses_ptr,
    numbers, largest_sum, largest_product,
    CHANNELS: tl.constexpr, EXPONENT: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The four planes of one output channel; the input's scale; what undoes that and the weight's."""
    channel = tl.program_id(0)
    channels = tl.arange(0, BLOCK_CHANNELS)
    lengths = tl.load(lengths_ptr + channels, mask=channels < CHANNELS, other=0.0)
    longest = tl.maximum(tl.max(lengths, axis=0), 2.0**-EXPONENT)  # so that nothing is divided by zero
    largest = tl.maximum(tl.load(largest_ptr).to(tl.float32), 2.0**-EXPONENT)
    fits = tl.minimum(largest_sum / (2 * largest), largest_product / (6 * largest * longest))
    scale = _power_of_two(fits, EXPONENT)
    unit = tl.load(units_ptr + channel)
    if tl.program_id(1) == 0:
        tl.store(scale_ptr, scale)
        tl.store(inverses_ptr + channel, 1 / (scale * unit))
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numbers
    weight_ptr += channel.to(tl.int64) * 3 * numbers + at
    g0 = tl.load(weight_ptr, mask=inside).to(tl.float32) * unit
    g1 = tl.load(weight_ptr + numbers, mask=inside).to(tl.float32) * unit
    g2 = tl.load(weight_ptr + 2 * numbers, mask=inside).to(tl.float32) * unit
    outer = g0 + g2
    planes_ptr += channel.to(tl.int64) * numbers + at
    step = tl.num_programs(0).to(tl.int64) * numbers
    dtype = planes_ptr.dtype.element_ty
    tl.store(planes_ptr, g0.to(dtype), mask=inside)
    tl.store(planes_ptr + step, ((outer + g1) / 2).to(dtype), mask=inside)
    tl.store(planes_ptr + 2 * step, ((outer - g1) / 2).to(dtype), mask=inside)
    tl.store(planes_ptr + 3 * step, g2.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["sample_frames"])
def _spread_kernel(
    rows_ptr, scale_ptr, sums_ptr, numbers, sample_frames,
    ODD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The four sums of each pair of frames, and the two behind it; with ``ODD``, only one is behind the last pair."""
    pair, pairs, sample = tl.program_id(1).to(tl.int64), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numbers
    scale = tl.load(scale_ptr)
    frame_ptr = rows_ptr + (sample * sample_frames + 2 * pair) * numbers + at
    d0 = tl.load(frame_ptr, mask=inside).to(tl.float32) * scale
    d1 = tl.load(frame_ptr + numbers, mask=inside).to(tl.float32) * scale
    d2 = tl.load(frame_ptr + 2 * numbers.to(tl.int64), mask=inside).to(tl.float32) * scale
    there = inside
    if ODD:
        there = inside & (pair < pairs - 1)
    d3 = tl.load(frame_ptr + 3 * numbers.to(tl.int64), mask=there, other=0.0).to(tl.float32) * scale
    sums_ptr += (sample * pairs + pair) * numbers + at
    step = tl.num_programs(2) * pairs * numbers.to(tl.int64)
    dtype = sums_ptr.dtype.element_ty
    tl.store(sums_ptr, (d0 - d2).to(dtype), mask=inside)
    tl.store(sums_ptr + step, (d1 + d2).to(dtype), mask=inside)
    tl.store(sums_ptr + 2 * step, (d2 - d1).to(dtype), mask=inside)
    tl.store(sums_ptr + 3 * step, (d1 - d3).to(dtype), mask=inside)


@triton.jit(do_not_specialize=["sample_frames"])
def _join_kernel(
    m0_ptr, m1_ptr, m2_ptr, m3_ptr, inverses_ptr, out_ptr, numbers, sample_frames,
    CHANNELS: tl.constexpr, ODD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The two frames of each pair; with ``ODD``, the last pair has but one."""
    pair, pairs, sample = tl.program_id(1).to(tl.int64), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numbers
    first = (tl.program_id(0).to(tl.int64) * BLOCK % CHANNELS).to(tl.int32)
    channel = (first + tl.arange(0, BLOCK)) % CHANNELS
    # eight at a time, as BLOCK and CHANNELS are multiples of eight
    inverse = tl.load(inverses_ptr + tl.max_contiguous(tl.multiple_of(channel, 8), 8))
    of_pair = (sample * pairs + pair) * numbers + at
    m0 = tl.load(m0_ptr + of_pair, mask=inside).to(tl.float32)
    m1 = tl.load(m1_ptr + of_pair, mask=inside).to(tl.float32)
    m2 = tl.load(m2_ptr + of_pair, mask=inside).to(tl.float32)
    m3 = tl.load(m3_ptr + of_pair, mask=inside).to(tl.float32)
    out_ptr += (sample * sample_frames + 2 * pair) * numbers + at
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr, ((m0 + m1 + m2) * inverse).to(dtype), mask=inside)
    there = inside
    if ODD:
        there = inside & (pair < pairs - 1)
    tl.store(out_ptr + numbers, ((m1 - m2 - m3) * inverse).to(dtype), mask=there)


class _Step(NamedTuple):
    """Pairs of frames that are convolved at once: as many of each of these samples, from this frame on."""

    samples: slice
    start: int
    pairs: int
    spread: Launch
    join: Launch


def prepare(
    shape: Sequence[int], out_shape: Sequence[int], padding: tuple[int, int]
) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    """What takes rows of ``shape``, a weight ``[C', C, 3, 3, 3]``, ``largest`` and the output, which it fills.

    Args:
        shape: ``[B, F + 2, H, W, C]``.
        out_shape: ``[B, F, H', W', C']``.
        padding: Zeros above and below, left and right of each picture.
    """
    steps = list(_steps(shape, out_shape))
    of_weight = _weight_launches(out_shape[4], 27 * shape[4])

    def run(rows: Tensor, weight: Tensor, largest: Tensor, out: Tensor) -> None:
        scale, inverses, planes = _scaled_planes(of_weight, weight, largest)
        for samples, start, pairs, spread, join in steps:
            some, made = rows[samples, start:], out[samples, start:]
            sums = rows.new_empty((4, len(some) * pairs, *shape[2:]), dtype=torch.float16)
            spread(some, scale, sums)
            products = [
                F.conv2d(one.permute(0, 3, 1, 2), plane, padding=padding).permute(0, 2, 3, 1).contiguous()
                for one, plane in zip(sums, planes, strict=True)
            ]
            join(*products, inverses, made)
            del sums, products  # before the next ones are made

    return run


def _steps(shape: Sequence[int], out_shape: Sequence[int]) -> Iterator[_Step]:
    samples, frames = out_shape[:2]
    at_once, all_pairs = pairs_at_once(math.prod(shape[2:4]), shape[4] + out_shape[4]), triton.cdiv(frames, 2)
    step = _samples_at_once(at_once, all_pairs)
    for sample in range(0, samples, step):
        some = slice(sample, min(sample + step, samples))
        for start in range(0, all_pairs, at_once):
            pairs = min(at_once, all_pairs - start)
            odd = start + pairs == all_pairs and frames % 2 == 1
            count = pairs, some.stop - some.start, odd
            spread = _launch(_spread_kernel, shape, *count)
            join = _launch(_join_kernel, out_shape, *count, CHANNELS=out_shape[4])
            yield _Step(some, 2 * start, pairs, spread, join)


def _launch(kernel: Any, shape: Sequence[int], pairs: int, samples: int, odd: bool, **constants: int) -> Launch:
    numbers = math.prod(shape[2:])
    grid = triton.cdiv(numbers, BLOCK), pairs, samples
    return Launch(kernel, grid, numbers, shape[1], ODD=odd, BLOCK=BLOCK, **constants, num_warps=NUM_WARPS)


def pairs_at_once(pixels: int, channels: int) -> int:
    """How many pairs of frames of so many pixels; ``channels`` are those of the input and the output together."""
    most = WORKSPACE_BYTES // (_BYTES_OF_A_PAIR * pixels * channels)
    return max(min(triton.cdiv(ENOUGH_PIXELS, pixels), most), 1)


def _samples_at_once(at_once: int, all_pairs: int) -> int:
    """Of whole samples, as many as have so many pairs; or one, if not all of its pairs are convolved at once."""
    return max(at_once // all_pairs, 1)


def workspace_bytes(samples: int, frames: int, pixels: int, channels: int) -> int:
    """What is needed beside the input and the output, whose channels are taken together."""
    at_once, all_pairs = pairs_at_once(pixels, channels), triton.cdiv(frames, 2)
    pairs = min(at_once, min(_samples_at_once(at_once, all_pairs), samples) * all_pairs)
    return pairs * _BYTES_OF_A_PAIR * pixels * channels


def _weight_launches(channels: int, of_channel: int) -> tuple[Launch, Launch]:
    """Of a weight ``[C', 3, 3, 3, C]``, ``27 C`` numbers of each output channel."""
    measure = Launch(
        _measure_kernel, (channels,), of_channel,
        EXPONENT=MOST_EXPONENT, BLOCK=BLOCK_WEIGHT, num_warps=NUM_WARPS_WEIGHT,
    )  # fmt: skip
    of_plane = of_channel // 3
    planes = Launch(
        _planes_kernel, (channels, triton.cdiv(of_plane, BLOCK_WEIGHT)), of_plane, LARGEST_SUM, LARGEST_PRODUCT,
        CHANNELS=channels, EXPONENT=MOST_EXPONENT, BLOCK_CHANNELS=triton.next_power_of_2(channels),
        BLOCK=BLOCK_WEIGHT, num_warps=NUM_WARPS_WEIGHT,
    )  # fmt: skip
    return measure, planes


def _scaled_planes(
    launches: tuple[Launch, Launch], weight: Tensor, largest: Tensor
) -> tuple[Tensor, Tensor, Iterable[Tensor]]:
    """The input's scale ``[1]``; what undoes it and the weight's ``[C']``; four planes, as the library takes them.

    These are ``[C', C, 3, 3]``, channels-last, float16.
    """
    measure, make = launches
    rows = weight.permute(0, 2, 3, 4, 1).contiguous()
    channels, _, height, width, inner = rows.shape
    numbers = torch.empty(3 * channels + 1, dtype=torch.float32, device=weight.device)
    units, lengths, inverses, scale = numbers.split([channels, channels, channels, 1])
    planes = rows.new_empty((4, channels, height, width, inner), dtype=torch.float16)
    measure(rows, units, lengths)
    make(rows, units, lengths, largest, planes, scale, inverses)
    return scale, inverses, planes.permute(0, 1, 4, 2, 3)
