"""The first look of a check: is an output so near to the reference's that float64 need not decide?

Both are seen as frames of rows of channels (:func:`frames_of`). With the difference d = x - y of what came, x, and what
should have come, y, a frame is plainly right if

* each row's and each channel's ``|d|`` is within a few units in the last place of its ``|y|``, or of the mean one of
  the frame where that is larger;
* ``|sum(d y)|``, what the frame is scaled by, is within half a unit of ``|y|**2``;
* ``|y|`` is neither zero nor infinite, and every number is finite.

On a GPU a kernel reads x and y once for all of these sums, in float32; PyTorch's norms would read them five times, and
take longer than the call that is checked. A check that finds nothing wrong is believed, so the kernel has to find
planted faults before it is used, and PyTorch runs as long as it is being compiled.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.errors import first_line
from vidaccel.kernels.launch import Launch, prepared

__all__ = ["Limits", "compile_ahead", "frames_of", "limits", "screen", "screen_by_kernel", "screen_ref"]

logger = logging.getLogger(__name__)

ROW_UNITS, CHANNEL_UNITS, GAIN_UNITS = 2.0, 2.0, 0.5  # units in the last place, relative L2: less needs no second look
# By the bytes of a number: norms of a frame in which float32 holds the squares of errors in the last place.
SMALL = {2: 1e-12, 4: 1e-6}
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
VECTOR = 8  # numbers that a thread reads at once
BLOCK_OUTER, BLOCK_INNER = 32, 64  # of a tile: rows of numbers that lie one after the other in memory (inner)
CHUNK = 1024  # rows that a program walks
STAGES = 4  # tiles in flight, and at work
BLOCK_VERDICT = 1024


class Limits(NamedTuple):
    """How far a plainly right result may be off, relative to what it should be: a row, a channel, a frame's scale."""

    row: float
    channel: float
    gain: float


def limits(eps: float, rows: float = 1.0) -> Limits:
    """For results that are rounded to units of ``eps``; ``rows``: how many times more is right for a row of them."""
    return Limits(rows * ROW_UNITS * eps, CHANNEL_UNITS * eps, GAIN_UNITS * eps)


def frames_of(x: Tensor) -> Tensor:
    """``[frames, rows, channels]`` of rows ``[..., S, C]``, images ``[N, C, H, W]`` or clips ``[B, C, F, H, W]``."""
    if x.ndim == 5:
        return x.permute(0, 2, 3, 4, 1).flatten(2, 3).flatten(0, 1)
    if x.ndim == 4:
        return x.permute(0, 2, 3, 1).flatten(1, 2)
    if x.ndim == 3:
        return x
    return x.reshape(1, math.prod(x.shape[:-1]), x.shape[-1] if x.ndim else 1)


def screen(x: Tensor, y: Tensor, allowed: Limits, suspects: Tensor, at: int) -> None:
    """Add to ``suspects[at]`` if something in ``x`` needs a second look; the host waits for nothing.

    Args:
        x: What an implementation returned, not empty.
        y: What it should be, of the same shape and dtype.
        allowed: How near is near.
        suspects: int32, on the device of both.
        at: An index of it.
    """
    x, y = frames_of(x), frames_of(y)
    if x.is_cuda and x.dtype in KERNEL_DTYPES:
        pair = _pair(x, y)
        if _kernels_are_ready(pair):
            _launch(pair, allowed, suspects, at)
            return
    suspects[at] += (~screen_ref(x, y, allowed)).sum()


def screen_ref(x: Tensor, y: Tensor, allowed: Limits) -> Tensor:
    """The specification: for each frame of ``x`` and ``y``, ``[frames, rows, channels]``, whether it is plainly right.

    Both are read in their own dtype, without copies in float32: what their difference is rounded by is small beside it.
    The scale follows from three norms: ``|x|**2 = |y|**2 + 2 (x - y) y + |x - y|**2``.
    """
    dtype = torch.float32 if y.dtype.itemsize == 2 else torch.float64
    norms = functools.partial(torch.linalg.vector_norm, dtype=dtype)
    difference = x - y
    rows = norms(y, dim=2), norms(x, dim=2), norms(difference, dim=2)
    of_frames = torch.linalg.vector_norm(torch.stack(rows), dim=2)  # [3, frames]
    norm, (square, square_x, square_error) = of_frames[0], of_frames * of_frames
    small = SMALL[2]  # in float64, which adds up those of float32, it is more than small enough
    near = (norm > small) & (norm < 1 / small)
    near &= (square_x - square - square_error).abs() <= 2 * allowed.gain * square
    of_rows = rows[2], rows[0], allowed.row
    of_channels = norms(difference, dim=1), norms(y, dim=1), allowed.channel
    for error, size, limit in (of_rows, of_channels):
        mean = (norm / math.sqrt(size.shape[1]))[:, None]
        near &= (error <= limit * torch.maximum(size, mean)).all(1)
    return near


@triton.jit
def _places(ptr, offs_o, offs_i, stride_outer, stride_inner, UNIT: tl.constexpr, ALIGN: tl.constexpr):
    """Pointers to a tile, ``[BLOCK_OUTER, BLOCK_INNER]``."""
    rows = ptr + tl.multiple_of(offs_o.to(tl.int64) * stride_outer, ALIGN)
    if ALIGN > 1:
        rows = tl.multiple_of(rows, 16)  # bytes; the launch has looked
    if UNIT:
        return rows[:, None] + offs_i[None, :]
    return rows[:, None] + (offs_i.to(tl.int64) * stride_inner)[None, :]


@triton.jit(
    do_not_specialize=[
        "outer", "inner", "chunks", "stride_x_frame", "stride_x_outer", "stride_x_inner", "stride_y_frame",
        "stride_y_outer", "stride_y_inner",
    ],
    do_not_specialize_on_alignment=["x_ptr", "y_ptr"],
)  # fmt: skip
def _screen_sums_kernel(
    x_ptr, y_ptr, sums_ptr,
    outer, inner, chunks,
    stride_x_frame, stride_x_outer, stride_x_inner, stride_y_frame, stride_y_outer, stride_y_inner,
    X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_OUTER: tl.constexpr, BLOCK_INNER: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add up, of a frame: y^2 and d y; for each outer row y^2 and d^2; for each inner one the same."""
    tiles = tl.cdiv(inner, BLOCK_INNER)
    index = tl.program_id(0) // tiles
    frame = (index // chunks).to(tl.int64)
    first = index % chunks * CHUNK
    x_ptr += tl.multiple_of(frame * stride_x_frame, ALIGN)
    y_ptr += tl.multiple_of(frame * stride_y_frame, ALIGN)
    start = tl.program_id(0) % tiles * BLOCK_INNER
    offs_i = start + tl.arange(0, BLOCK_INNER)
    mask_i = tl.arange(0, BLOCK_INNER) < tl.multiple_of(inner - start, ALIGN)
    sums_ptr += frame * 2 * (1 + outer.to(tl.int64) + inner)
    outer_ptr, inner_ptr = sums_ptr + 2, sums_ptr + 2 + 2 * outer
    sizes = tl.zeros([BLOCK_OUTER, BLOCK_INNER], dtype=tl.float32)
    errors = tl.zeros([BLOCK_OUTER, BLOCK_INNER], dtype=tl.float32)
    crossed = tl.zeros([BLOCK_OUTER, BLOCK_INNER], dtype=tl.float32)
    for row in tl.range(first, tl.minimum(first + CHUNK, outer), BLOCK_OUTER, num_stages=STAGES):
        offs_o = row + tl.arange(0, BLOCK_OUTER)
        mask_o = offs_o < outer
        mask = mask_o[:, None] & mask_i[None, :]
        x_ptrs = _places(x_ptr, offs_o, offs_i, stride_x_outer, stride_x_inner, X_UNIT, ALIGN)
        y_ptrs = _places(y_ptr, offs_o, offs_i, stride_y_outer, stride_y_inner, Y_UNIT, ALIGN)
        y = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
        difference = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32) - y
        size, error = y * y, difference * difference
        sizes += size  # added up across warps at the end, once
        errors += error
        crossed += difference * y
        # rows, the longer axis in images and clips, are looped over: few programs add to one place
        tl.atomic_add(outer_ptr + offs_o, tl.sum(size, axis=1), mask=mask_o, sem="relaxed")
        tl.atomic_add(outer_ptr + outer + offs_o, tl.sum(error, axis=1), mask=mask_o, sem="relaxed")
    of_inner = tl.sum(sizes, axis=0)
    tl.atomic_add(inner_ptr + offs_i, of_inner, mask=mask_i, sem="relaxed")
    tl.atomic_add(inner_ptr + inner + offs_i, tl.sum(errors, axis=0), mask=mask_i, sem="relaxed")
    tl.atomic_add(sums_ptr, tl.sum(of_inner, axis=0), sem="relaxed")
    tl.atomic_add(sums_ptr + 1, tl.sum(tl.sum(crossed, axis=0), axis=0), sem="relaxed")


@triton.jit
def _all_near(sums_ptr, start, count, mean, limit, BLOCK: tl.constexpr):
    """1 if each error is within ``limit`` of its size, or of ``mean`` where that is larger; else, as of NaN, 0."""
    offs = start + tl.arange(0, BLOCK)
    size = tl.sqrt(tl.load(sums_ptr + offs, mask=offs < count, other=0.0))
    error = tl.sqrt(tl.load(sums_ptr + count + offs, mask=offs < count, other=0.0))
    return tl.min((error <= limit * tl.maximum(size, mean)).to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["outer", "inner", "blocks", "at"])
def _screen_verdict_kernel(
    sums_ptr, suspects_ptr,
    outer, inner, blocks, at,
    outer_limit, inner_limit, gain_limit, least, most,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Whether the sums of a frame, and of one block of its rows either way, are those of a right one; if not, count."""
    sums_ptr += (tl.program_id(0) // blocks).to(tl.int64) * 2 * (1 + outer.to(tl.int64) + inner)
    start = tl.program_id(0) % blocks * BLOCK
    square = tl.load(sums_ptr)
    norm = tl.sqrt(square)
    near = ((norm > least) & (norm < most) & (tl.abs(tl.load(sums_ptr + 1)) <= gain_limit * square)).to(tl.int32)
    outer_ptr = sums_ptr + 2
    near &= _all_near(outer_ptr, start, outer, tl.sqrt(square / outer), outer_limit, BLOCK)
    near &= _all_near(outer_ptr + 2 * outer, start, inner, tl.sqrt(square / inner), inner_limit, BLOCK)
    tl.atomic_add(suspects_ptr + at, 1 - near, sem="relaxed")


class _Pair(NamedTuple):
    """What came and what should have come, ``[frames, outer, inner]``: numbers along the last are likelier neighbours.

    Attributes:
        x: The one.
        y: The other.
        turned: Whether the outer rows are channels.
        layout: X_UNIT, Y_UNIT and ALIGN of the kernel.
    """

    x: Tensor
    y: Tensor
    turned: bool
    layout: tuple[bool, bool, int]


def _pair(x: Tensor, y: Tensor) -> _Pair:
    """Of ``[frames, rows, channels]``."""
    strides_x, strides_y = x.stride(), y.stride()
    turned = 1 in (strides_x[1], strides_y[1]) and 1 not in (strides_x[2], strides_y[2])
    if turned:
        x, y = x.transpose(1, 2), y.transpose(1, 2)
        strides_x, strides_y = x.stride(), y.stride()
    odd = any(step % VECTOR for step in (x.shape[2], *strides_x[:2], *strides_y[:2]))
    aligned = not odd and (x.data_ptr() | y.data_ptr()) % 16 == 0
    return _Pair(x, y, turned, (strides_x[2] == 1, strides_y[2] == 1, VECTOR if aligned else 1))


def screen_by_kernel(x: Tensor, y: Tensor, allowed: Limits, suspects: Tensor, at: int) -> None:
    """:func:`screen` of ``[frames, rows, channels]`` on a GPU, float16, bfloat16 or float32."""
    _launch(_pair(x, y), allowed, suspects, at)


def _launch(pair: _Pair, allowed: Limits, suspects: Tensor, at: int) -> None:
    x, y, turned, layout = pair
    row, channel, gain = allowed
    frames, outer, inner = x.shape
    sums = torch.zeros(frames * 2 * (1 + outer + inner), dtype=torch.float32, device=x.device)
    _sums_launch(x.shape, x.stride(), y.stride(), *layout)(x, y, sums)
    of_outer, of_inner = (channel, row) if turned else (row, channel)
    small = SMALL[x.element_size()]
    _verdict_launch(frames, outer, inner, at, of_outer, of_inner, gain, small)(sums, suspects)


@prepared
def _sums_launch(
    shape: tuple[int, ...], strides_x: tuple[int, ...], strides_y: tuple[int, ...], *layout: Any
) -> Launch:
    frames, outer, inner = shape
    chunks = triton.cdiv(outer, CHUNK)
    grid = (frames * chunks * triton.cdiv(inner, BLOCK_INNER),)
    x_unit, y_unit, align = layout
    return Launch(
        _screen_sums_kernel, grid, outer, inner, chunks, *strides_x, *strides_y,
        X_UNIT=x_unit, Y_UNIT=y_unit, ALIGN=align, BLOCK_OUTER=BLOCK_OUTER, BLOCK_INNER=BLOCK_INNER, CHUNK=CHUNK,
        STAGES=STAGES, num_warps=4,
    )  # fmt: skip


@prepared
def _verdict_launch(
    frames: int, outer: int, inner: int, at: int, row: float, channel: float, gain: float, small: float
) -> Launch:
    blocks = triton.cdiv(max(outer, inner), BLOCK_VERDICT)
    allowed = row, channel, gain, small, 1 / small
    return Launch(
        _screen_verdict_kernel, (frames * blocks,), outer, inner, blocks, at, *allowed, BLOCK=BLOCK_VERDICT, num_warps=4
    )


_proven: dict[tuple[Any, ...], bool] = {}  # by device, dtype and layout: whether the kernels found what was planted


def _kernels_are_ready(pair: _Pair) -> bool:
    """Whether the kernels are compiled for such tensors, and find faults."""
    x, layout = pair.x, pair.layout
    key = x.device, x.dtype, layout
    proven = _proven.get(key)
    if proven is None:
        if _are_awaited(x.device, x.dtype, layout):
            return False
        try:
            proven = _finds_faults(x.device, x.dtype, layout)
        except Exception as error:  # of a new GPU, or a new compiler
            logger.debug("checks are screened by PyTorch: %s", first_line(error))
            proven = False
        _proven[key] = proven
    return proven


def compile_ahead(device: torch.device, dtype: torch.dtype) -> None:
    """Begin to compile, in the background, what the checks of a model of this dtype need first."""
    if dtype in KERNEL_DTYPES:
        _are_awaited(device, dtype, (True, True, VECTOR))


def _are_awaited(device: torch.device, dtype: torch.dtype, layout: tuple[bool, bool, int]) -> bool:
    """Begin to compile the kernels if they are not; whether that is still under way."""
    launches = (
        (_sums_launch((1, 1, 1), (1, 1, 1), (1, 1, 1), *layout), (dtype, dtype, torch.float32)),
        (_verdict_launch(1, 1, 1, 0, 1.0, 1.0, 1.0, 1.0), (torch.float32, torch.int32)),
    )
    for launch, dtypes in launches:
        launch.compile_ahead(device, *dtypes)
    return any(launch.is_awaited(*dtypes) for launch, dtypes in launches)


def _finds_faults(device: torch.device, dtype: torch.dtype, layout: tuple[bool, bool, int]) -> bool:
    """Whether the kernels pass what is right, and find a wrong row, a wrong channel and a wrong scale by themselves."""
    frames, outer, inner = 2, CHUNK + BLOCK_OUTER + VECTOR, BLOCK_INNER + VECTOR
    x_unit, y_unit, align = layout

    def laid_out(values: Tensor, unit: bool) -> Tensor:
        step, row = 1 if unit else 2, inner if align == VECTOR else inner + 1
        return values.new_empty(frames, outer, row * step)[:, :, : inner * step : step].copy_(values)

    values = torch.linspace(-1, 1, frames * outer * inner, device=device).sin_().view(frames, outer, inner).to(dtype)
    row, channel = values.clone(), values.clone()
    row[1, outer - 1] *= 0.5
    channel[1, :, inner - 1] *= 0.5
    near, far = limits(torch.finfo(dtype).eps), math.inf
    cases = [
        (values, near, False),
        (row, near._replace(channel=far, gain=far), True),
        (channel, near._replace(row=far, gain=far), True),
        (values * 1.25, near._replace(row=far, channel=far), True),
        (values * math.nan, Limits(far, far, far), True),
    ]
    suspects = torch.zeros(len(cases), dtype=torch.int32, device=device)
    y = laid_out(values, y_unit)
    for at, (x, allowed, _) in enumerate(cases):
        screen_by_kernel(laid_out(x, x_unit), y, allowed, suspects, at)
    found = [count > 0 for count in suspects.tolist()] == [wrong for _, _, wrong in cases]
    if not found:
        logger.warning("the kernels that screen checks do not find planted faults on %s: PyTorch does it", device)
    return found
