"""Nearest-neighbour x2 upsampling and the 3 x 3 convolution after it, as one 2 x 2 convolution of the small image.

    y = conv3x3(nearest2x(x)) + bias

Of the 3 rows of an upsampled image that a tap column reads, two are the same row of ``x``: their weights can be added
beforehand. An output pixel therefore is a 2 x 2 convolution of ``x``, with one set of weights for each of the four
positions in its 2 x 2 cell (Shi et al. 2016, https://arxiv.org/abs/1609.07009, read the other way round). All four
read the same windows, those of ``x`` padded by one pixel, so they are the output channels of a single convolution

    z[n, p, q, (r, s, c)] = conv2x2(pad(x))     of shape [N, H + 1, W + 1, 4 C]
    y[n, 2 p - 1 + r, 2 q - 1 + s, c] = z[n, p, q, (r, s, c)] + bias[c]

which takes 4 / 9 of the multiplications and never stores the upsampled input. cuDNN runs it; a kernel here puts the
pixels into place and adds the bias on the way, which PyTorch does in a kernel of its own, and computes the statistics
for a norm behind it (``channel_statistics.py``). Where that norm's kernel can read the cells z as they are
(``enlarged_clip.py``), :func:`upsample_cells` leaves them to it, the bias too. Channels-last memory.

The weights are added in float32 and rounded to the dtype of ``x`` once, which is one rounding more per product than
eager has; z and y are rounded where eager rounds. A kernel adds them at every call, in one pass bound by memory: they
may be changed in place between two calls, and nothing would tell. Fidelity: math-exact. Bound by the convolution.

For a few shapes cuDNN has only a kernel for older tensor cores, at less than half the speed (on an H100, 32 images of
1280 x 16 x 16: 310 TFLOP/s, where 28 of 1280 x 9 x 16 have 690), though not for half as many images. So the whole batch
at once and one half after the other are two implementations, of which the faster is measured.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels import settings
from vidaccel.kernels.arguments import require_floats
from vidaccel.kernels.channels_last import channels_last, channels_last_strides
from vidaccel.kernels.check import Part, cuts, lean
from vidaccel.kernels.conv.enlarged_clip import cells_of_rows, rows_of_cells
from vidaccel.kernels.conv.merged_taps import load_plane
from vidaccel.kernels.launch import Launch
from vidaccel.kernels.norm.channel_statistics import (
    FOLD,
    ChannelStatistics,
    Tiling,
    channel_statistics_ref,
    chunk_rows_for,
    empty_parts,
    fold,
    locate,
    merge_lanes,
    moments,
    rows_of_tile,
    store_part,
    writer_tiling,
)
from vidaccel.kernels.op import DTYPES, Costs, Implementation, Op, device_reason, scaled, tensors_reason

__all__ = [
    "UPSAMPLE_CELLS",
    "UPSAMPLE_CONV",
    "UPSAMPLE_CONV_AND_STATISTICS",
    "compile_ahead",
    "upsample_cells",
    "upsample_conv",
    "upsample_conv_and_statistics",
    "upsample_conv_and_statistics_ref",
    "upsample_conv_ref",
]

CELLS_BLOCK = 256  # input channels: 16 bytes of 16-bit weights for each thread of a warp
CELLS_NUM_WARPS = 1
BLOCK = 2048  # numbers of a line of pixels
NUM_WARPS = 4
CHANNEL_STEP = 8  # that output channels are divisible by
MEASURED_FLOPS = 5e10  # of the convolution; a smaller one takes too little of a model's time


def upsample_conv_ref(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The specification. Pass float64 inputs for gold values."""
    if not (x.numel() and len(weight)):
        return _empty_output(x, weight, bias)
    upsampled = F.interpolate(x, scale_factor=2.0, mode="nearest")
    bias = None if bias is None else bias.to(x.dtype)
    return channels_last(F.conv2d(upsampled, weight.to(x.dtype), bias, padding=1))


def upsample_cells_ref(x: Tensor, weight: Tensor) -> Tensor:
    """The specification; zeros where cells at the edges are of no pixel."""
    return cells_of_rows(upsample_conv_ref(x, weight, None).permute(0, 2, 3, 1))


def upsample_conv_and_statistics_ref(x: Tensor, weight: Tensor, bias: Tensor, chunk_rows: int) -> tuple[Tensor, Tensor]:
    """The specification; ``chunk_rows`` rows make a chunk of the statistics."""
    y = upsample_conv_ref(x, weight, bias)
    return y, channel_statistics_ref(y, chunk_rows)


@triton.jit
def _store_sums(cells_ptr, above, below, channel, channels, channels_in, mask, SUM_Y: tl.constexpr):
    """Row ``SUM_Y`` of the 4 x 4 sums of neighbouring taps, of two rows of taps, each to where its cell has it.

    The sums are [w0, w0 + w1, w1 + w2, w2] along both axes. An upper pixel of a cell (r = 1) weighs its two rows with
    w0 and w1 + w2, a lower one (r = 0, of the cell above) with w0 + w1 and w2.
    """
    sums = (
        above[0] + below[0],
        above[0] + above[1] + below[0] + below[1],
        above[1] + above[2] + below[1] + below[2],
        above[2] + below[2],
    )
    for SUM_X in tl.static_range(4):
        cell = (1 - SUM_Y % 2) * 2 + 1 - SUM_X % 2  # (r, s)
        tap = SUM_Y // 2 * 2 + SUM_X // 2  # (u, v)
        start = ((cell * channels + channel) * 4 + tap) * channels_in
        tl.store(cells_ptr + start, sums[SUM_X].to(cells_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _cells_kernel(
    weight_ptr, cells_ptr,
    channels, channels_in,
    stride_weight_c, stride_weight_i, stride_weight_h, stride_weight_w,
    BLOCK_I: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0).to(tl.int64)
    offs_i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = offs_i < channels_in
    weight_ptr += channel * stride_weight_c + offs_i.to(tl.int64) * stride_weight_i
    top, middle, bottom = load_plane(weight_ptr, stride_weight_h, stride_weight_w, mask)
    zeros = tl.zeros([BLOCK_I], tl.float32)
    padding = (zeros, zeros, zeros)
    cells_ptr += offs_i
    _store_sums(cells_ptr, padding, top, channel, channels, channels_in, mask, SUM_Y=0)
    _store_sums(cells_ptr, top, middle, channel, channels, channels_in, mask, SUM_Y=1)
    _store_sums(cells_ptr, middle, bottom, channel, channels, channels_in, mask, SUM_Y=2)
    _store_sums(cells_ptr, bottom, padding, channel, channels, channels_in, mask, SUM_Y=3)


@triton.jit(do_not_specialize=["height", "width"])
def _interleave_kernel(
    z_ptr, bias_ptr, y_ptr,
    height, width, channels,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A line of y is what a line of cells has of it, one after the other, but for half a cell at either end."""
    line_blocks = tl.cdiv(width * channels, BLOCK)
    line = tl.program_id(0) // line_blocks
    start = (tl.program_id(0) - line * line_blocks) * BLOCK
    image = line // height
    below = line - image * height + 1
    cells = (image * (height // 2 + 1) + below // 2).to(tl.int64) * (width // 2 + 1)
    offs = start + tl.arange(0, BLOCK)
    mask = offs < width * channels
    of_line = offs + channels
    cell = of_line // (2 * channels)
    z_ptr += (cells * 4 + below % 2 * 2) * channels
    y = tl.load(z_ptr + cell * 4 * channels + of_line % (2 * channels), mask=mask, other=0.0).to(tl.float32)
    y += tl.load(bias_ptr + of_line % channels).to(tl.float32)
    tl.store(y_ptr + line.to(tl.int64) * width * channels + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["height", "width", "chunk_rows"])
def _interleave_statistics_kernel(
    z_ptr, bias_ptr, y_ptr, part_ptr,
    height, width, channels, chunk_rows,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, FOLD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pixels = height * width
    image, chunk, first_channel = locate(tl.program_id(0), channels, pixels, chunk_rows, BLOCK_C)
    first_pixel = chunk * chunk_rows
    rows = tl.minimum(chunk_rows, pixels - first_pixel)
    offs_c = first_channel + tl.arange(0, BLOCK_C)
    offs_r = rows_of_tile(BLOCK_R, FOLD)
    z_width = width // 2 + 1
    z_ptr += image * (height // 2 + 1) * z_width * 4 * channels
    y_ptr += image * pixels * channels
    bias = tl.load(bias_ptr + offs_c).to(tl.float32)
    mean = tl.zeros([BLOCK_R // FOLD, BLOCK_C], dtype=tl.float32)
    m2 = tl.zeros([BLOCK_R // FOLD, BLOCK_C], dtype=tl.float32)
    for step in tl.range(0, tl.cdiv(rows, BLOCK_R), num_stages=STAGES):
        row = step * BLOCK_R + offs_r  # [LANES, FOLD, 1]
        mask = row < rows
        pixel = first_pixel + row
        below, right = pixel // width + 1, pixel % width + 1
        z_pixel = below // 2 * z_width + right // 2
        cell = below % 2 * 2 + right % 2
        z_offs = (z_pixel * 4 + cell).to(tl.int64) * channels + offs_c  # [LANES, FOLD, BLOCK_C]
        y = tl.load(z_ptr + z_offs, mask=mask, other=0.0).to(tl.float32) + bias
        y = y.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + pixel.to(tl.int64) * channels + offs_c, y, mask=mask)
        y = tl.where(mask, y.to(tl.float32), 0.0)
        mean, m2 = fold(y, mask, step, rows, mean, m2, BLOCK_R, FOLD)
    mean, m2 = merge_lanes(rows, mean, m2, BLOCK_R, FOLD)
    store_part(part_ptr, image, chunk, first_channel, channels, pixels, chunk_rows, mean, m2)


def _cells_launch(weight: Tensor) -> Launch:
    channels, channels_in = weight.shape[:2]
    return Launch(
        _cells_kernel, (channels, triton.cdiv(channels_in, CELLS_BLOCK)),
        channels, channels_in, *weight.stride(),
        BLOCK_I=CELLS_BLOCK,
        num_warps=CELLS_NUM_WARPS,
    )  # fmt: skip


def _interleave_launch(shape: tuple[int, ...]) -> Launch:
    """For a result of this shape."""
    samples, channels, height, width = shape
    return Launch(
        _interleave_kernel, (samples * height * triton.cdiv(width * channels, BLOCK),),
        height, width, channels,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )  # fmt: skip


def _interleave_statistics_launch(shape: tuple[int, ...], tiling: Tiling) -> Launch:
    samples, channels, height, width = shape
    return Launch(
        _interleave_statistics_kernel, (tiling.programs(samples, height * width, channels),),
        height, width, channels, tiling.chunk_rows,
        BLOCK_R=tiling.block_r, BLOCK_C=tiling.block_c, FOLD=FOLD, STAGES=tiling.stages,
        num_warps=tiling.num_warps,
    )  # fmt: skip


def _shape(x: Tensor, weight: Tensor) -> tuple[int, ...]:
    """The result's."""
    return x.shape[0], weight.shape[0], 2 * x.shape[2], 2 * x.shape[3]


Put = Callable[[Tensor, slice], None]  # puts the pixels of what the convolution makes of some images into place


def _bind_cells(batches: int, x: Tensor, weight: Tensor) -> tuple[list[slice], Callable[[Tensor, Tensor, Put], None]]:
    """The images of each batch, and what runs the convolution of them."""
    cells_shape = 4 * weight.shape[0], weight.shape[1], 2, 2
    cells_strides = channels_last_strides(cells_shape)
    sum_taps = _cells_launch(weight)
    samples = x.shape[0]
    step = triton.cdiv(samples, batches)
    images = [slice(start, min(start + step, samples)) for start in range(0, samples, step)]

    def convolve(x: Tensor, weight: Tensor, put: Put) -> None:
        cells = x.new_empty_strided(cells_shape, cells_strides)
        sum_taps(weight, cells)
        for some in images:
            put(channels_last(F.conv2d(x if len(images) == 1 else x[some], cells, padding=1)), some)

    return images, convolve


def _bind(batches: int, x: Tensor, weight: Tensor, bias: Tensor) -> Callable[..., Tensor]:
    """Runs the images in so many batches."""
    shape = _shape(x, weight)
    strides = channels_last_strides(shape)
    images, convolve = _bind_cells(batches, x, weight)
    launches = {some.start: _interleave_launch((some.stop - some.start, *shape[1:])) for some in images}

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = x.new_empty_strided(shape, strides)
        bias = bias.to(x.dtype).contiguous()

        def put(z: Tensor, some: slice) -> None:
            launches[some.start](z, bias, y[some])

        convolve(x, weight, put)
        return y

    return run


def _bind_with_statistics(
    batches: int, x: Tensor, weight: Tensor, bias: Tensor, chunk_rows: int
) -> Callable[..., tuple[Tensor, Tensor]]:
    shape = _shape(x, weight)
    samples, channels, height, width = shape
    strides, tiling = channels_last_strides(shape), writer_tiling(shape)._replace(chunk_rows=chunk_rows)
    images, convolve = _bind_cells(batches, x, weight)
    launches = {
        some.start: _interleave_statistics_launch((some.stop - some.start, *shape[1:]), tiling) for some in images
    }

    def run(x: Tensor, weight: Tensor, bias: Tensor, chunk_rows: int) -> tuple[Tensor, Tensor]:
        y = x.new_empty_strided(shape, strides)
        parts = empty_parts(x, samples, height * width, chunk_rows, channels)
        bias = bias.to(x.dtype).contiguous()

        def put(z: Tensor, some: slice) -> None:
            launches[some.start](z, bias, y[some], parts[some])

        convolve(x, weight, put)
        return y, parts

    return run


def _bind_to_cells(x: Tensor, weight: Tensor) -> Callable[..., Tensor]:
    _, convolve = _bind_cells(1, x, weight)
    channels = weight.shape[0]

    def run(x: Tensor, weight: Tensor) -> Tensor:
        made = []
        convolve(x, weight, lambda z, some: made.append(z))
        return made[0].permute(0, 2, 3, 1).unflatten(-1, (4, channels))

    return run


def _empty_output(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    shape = _shape(x, weight)
    return x.new_empty_strided(shape, channels_last_strides(shape))


def _empty_cells(x: Tensor, weight: Tensor) -> Tensor:
    samples, _, height, width = x.shape
    return x.new_empty(samples, height + 1, width + 1, 4, len(weight))


def _empty_outputs(x: Tensor, weight: Tensor, bias: Tensor, chunk_rows: int) -> tuple[Tensor, Tensor]:
    samples, channels, height, width = _shape(x, weight)
    return _empty_output(x, weight, bias), empty_parts(x, samples, height * width, chunk_rows, channels)


def _reason(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    if reason := _cells_reason(x, weight):
        return reason
    if weight.dtype != x.dtype:
        return f"weight must have the dtype of x, {x.dtype}, got {weight.dtype}"
    if weight.shape[0] % CHANNEL_STEP:
        return f"the kernel takes output channels divisible by {CHANNEL_STEP}, got {weight.shape[0]}"
    return tensors_reason(x, bias)


def _cells_reason(x: Tensor, weight: Tensor) -> str | None:
    if not (x.numel() and len(weight)):
        return "there is nothing to multiply"
    return device_reason(x) or tensors_reason(x, weight)


def _halves_reason(x: Tensor, *others: Any) -> str | None:
    return _reason(x, *others) if x.shape[0] > 1 else f"there are no halves of {x.shape[0]} images"


def _statistics_reason(x: Tensor, weight: Tensor, bias: Tensor, chunk_rows: int) -> str | None:
    return _reason(x, weight, bias)


def _statistics_halves_reason(x: Tensor, weight: Tensor, bias: Tensor, chunk_rows: int) -> str | None:
    return _halves_reason(x, weight, bias)


def _flops(x: Tensor, weight: Tensor) -> int:
    return 32 * x.numel() * weight.shape[0]


def _costs(x: Tensor, weight: Tensor, *others: Any) -> Costs:
    output = 4 * x.nbytes // max(x.shape[1], 1) * len(weight)
    return Costs(bytes=x.nbytes + weight.nbytes + output, flops=_flops(x, weight))


def _measures(x: Tensor, weight: Tensor, *others: Any) -> bool:
    return x.is_cuda and _halves_reason(x, weight, *others) is None and _flops(x, weight) >= MEASURED_FLOPS


def _measures_with_statistics(x: Tensor, weight: Tensor, bias: Tensor, chunk_rows: int) -> bool:
    return _measures(x, weight, bias)


def _key(x: Tensor, weight: Tensor, *others: Any) -> dict[str, Any]:
    return {
        "dtype": str(x.dtype),
        "shape": tuple(x.shape),
        "channels": weight.shape[0],
        "cudnn": settings.current().cudnn,
    }


def _parts(x: Tensor, weight: Tensor, bias: Tensor) -> Iterator[Part]:
    for image, channels in _images_and_channels(x, weight):
        args = x[image], weight[channels], bias[channels]
        yield Part(args, functools.partial(_of_y, image, channels))


def _parts_to_cells(x: Tensor, weight: Tensor) -> Iterator[Part]:
    for image, channels in _images_and_channels(x, weight):
        args = x[image], weight[channels]
        yield Part(args, functools.partial(_of_cells, image, channels), _all_of_cells)


def _of_cells(image: slice, channels: slice, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return _all_of_cells((outputs[0][image][..., channels],))


def _all_of_cells(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Without what is of no pixel."""
    return (rows_of_cells(outputs[0]),)


def _of_y(image: slice, channels: slice, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs[0][image, channels],)


def _parts_with_statistics(x: Tensor, weight: Tensor, bias: Tensor, chunk_rows: int) -> Iterator[Part]:
    seen = functools.partial(moments, chunk_rows, x.dtype)
    for image, channels in _images_and_channels(x, weight):
        args = x[image], weight[channels], bias[channels], chunk_rows
        yield Part(args, functools.partial(_of_both, image, channels, seen), seen)


def _of_both(
    image: slice, channels: slice, seen: Callable[..., tuple[Tensor, ...]], outputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    y, parts = outputs
    return seen((y[image, channels], parts[image, ..., channels]))


def _images_and_channels(x: Tensor, weight: Tensor) -> Iterator[tuple[slice, slice]]:
    """Some images, or one of them and some output channels, by eights where there are eights."""
    pixels, many = 4 * x.shape[2] * x.shape[3], math.gcd(weight.shape[0], 8)
    for images in cuts(x.shape[0], pixels * max(weight.shape[:2]), lean(x)):
        for some in cuts(weight.shape[0] // many, (images.stop - images.start) * pixels * many, lean(x)):
            yield images, slice(some.start * many, some.stop * many)


def _validate(op: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    require_floats(op, x=x, weight=weight, bias=bias)
    if x.ndim != 4 or not x.shape[1]:
        raise ValueError(f"{op}: x must be [N, C_in, H, W] with channels, got {tuple(x.shape)}")
    if weight.ndim != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        raise ValueError(f"{op}: weight must be [C, {x.shape[1]}, 3, 3], got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")


def _validate_with_statistics(x: Tensor, weight: Tensor, bias: Tensor, chunk_rows: int) -> None:
    _validate("upsample_conv_and_statistics", x, weight, bias)


UPSAMPLE_CELLS = Op(
    "upsample_cells",
    reference=upsample_cells_ref,
    implementations={"whole": Implementation.bound(_bind_to_cells, _cells_reason)},
    fake=_empty_cells,
    costs=_costs,
    parts=_parts_to_cells,
    validate=functools.partial(_validate, "upsample_cells"),
    small=scaled(0),  # x
)

UPSAMPLE_CONV = Op(
    "upsample_conv",
    reference=upsample_conv_ref,
    implementations={
        "whole": Implementation.bound(functools.partial(_bind, 1), _reason),
        "halves": Implementation.bound(functools.partial(_bind, 2), _halves_reason),
    },
    fake=_empty_output,
    costs=_costs,
    parts=_parts,
    measures=_measures,
    key=_key,
    validate=functools.partial(_validate, "upsample_conv"),
    small=scaled(0),  # x
)

UPSAMPLE_CONV_AND_STATISTICS = Op(
    "upsample_conv_and_statistics",
    reference=upsample_conv_and_statistics_ref,
    implementations={
        "whole": Implementation.bound(functools.partial(_bind_with_statistics, 1), _statistics_reason),
        "halves": Implementation.bound(functools.partial(_bind_with_statistics, 2), _statistics_halves_reason),
    },
    fake=_empty_outputs,
    costs=_costs,
    parts=_parts_with_statistics,
    measures=_measures_with_statistics,
    key=_key,
    validate=_validate_with_statistics,
    small=scaled(0),  # x
)


def upsample_cells(x: Tensor, weight: Tensor, *, impl: str | None = None) -> Tensor:
    """:func:`upsample_conv` without its bias, the pixels where the convolution leaves them.

    Args:
        x: ``[N, C_in, H, W]``, fp16 / bf16 / fp32.
        weight: ``[C, C_in, 3, 3]``, any float dtype; the sums of its taps are rounded to that of x.
        impl: ``"whole"`` or ``"torch"``; None lets the op choose.

    Returns:
        ``[N, H + 1, W + 1, 4, C]`` in ``x.dtype``, contiguous, of which ``enlarged_clip.py`` says where each pixel is.

    Raises:
        ValueError: A shape or device is not as above, or ``impl`` cannot run here.
        TypeError: A tensor is not floating-point.
    """
    return UPSAMPLE_CELLS(x, weight, impl=impl)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor, *, impl: str | None = None) -> Tensor:
    """``F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)``.

    Args:
        x: ``[N, C_in, H, W]``, fp16 / bf16 / fp32.
        weight: ``[C, C_in, 3, 3]``, as ``x``.
        bias: ``[C]``, any float dtype; rounded to that of ``x`` first.
        impl: ``"whole"``, ``"halves"`` or ``"torch"``; None lets the op choose.

    Returns:
        ``[N, C, 2 H, 2 W]`` in ``x.dtype``; channels innermost in memory.

    Raises:
        ValueError: A shape or device is not as above, or ``impl`` cannot run here.
        TypeError: A tensor is not floating-point.
    """
    return UPSAMPLE_CONV(x, weight, bias, impl=impl)


def upsample_conv_and_statistics(
    x: Tensor, weight: Tensor, bias: Tensor, *, impl: str | None = None
) -> tuple[Tensor, ChannelStatistics]:
    """:func:`upsample_conv`, and what a GroupNorm needs to know of each of the images that it returns."""
    chunk_rows, pixels = 1, 0
    if x.ndim == 4 and weight.ndim == 4:  # else the op says what is wrong
        shape = _shape(x, weight)
        chunk_rows, pixels = chunk_rows_for(shape), shape[2] * shape[3]
    y, parts = UPSAMPLE_CONV_AND_STATISTICS(x, weight, bias, chunk_rows, impl=impl)
    return y, ChannelStatistics(parts, pixels, chunk_rows)


def compile_ahead(weight: Tensor, *, statistics: bool = False) -> None:
    """Begin to compile what a convolution of this ``weight``, ``[C, C_in, 3, 3]``, needs before and behind it."""
    channels, dtype = weight.shape[0], weight.dtype
    if channels % CHANNEL_STEP or dtype not in DTYPES:
        return
    _cells_launch(weight).compile_ahead(weight.device, dtype, dtype)
    if not statistics:
        _interleave_launch((1, channels, 2, 2)).compile_ahead(weight.device, dtype, dtype, dtype)
        return
    for side in (2, 2048):  # small images, and large ones
        shape = 1, channels, side, side
        launch = _interleave_statistics_launch(shape, writer_tiling(shape))
        launch.compile_ahead(weight.device, *[dtype] * 3, torch.float32)
