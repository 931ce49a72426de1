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
for a norm behind it (``channel_statistics.py``). Channels-last memory.

The weights are added in float32 and rounded to the dtype of ``x`` once, which is one rounding more per product than
eager has; z and y are rounded where eager rounds. A kernel adds them at every call, in one pass bound by memory: they
may be changed in place between two calls, and nothing would tell. Fidelity: math-exact. Bound by the convolution.

For a few shapes cuDNN has only a kernel for older tensor cores, at less than half the speed (on an H100, 32 images of
1280 x 16 x 16: 310 TFLOP/s, where 28 of 1280 x 9 x 16 have 690), though not for half as many images. So the first call
of a shape times the whole batch and two halves, once, and keeps the answer on disk (``tuning_cache``).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.config import tuning_enabled
from vidaccel.kernels import tuning_cache
from vidaccel.kernels.dispatch import DTYPES, choose, tensors_problem
from vidaccel.kernels.launch import Launch, prepared
from vidaccel.kernels.norm.channel_statistics import (
    FOLD,
    ChannelStatistics,
    Tiling,
    attach,
    choose_writer_tiling,
    empty_parts,
    fold,
    locate,
    merge_lanes,
    rows_of_tile,
    store_part,
)

__all__ = ["cell_weights_ref", "compile_ahead", "upsample_conv", "upsample_conv_ref"]

OP = "upsample_conv"
CELLS_BLOCK = 256  # input channels: 16 bytes of 16-bit weights for each thread of a warp
CELLS_NUM_WARPS = 1
WHOLE, HALVES = "whole", "halves"
MEASURED_FLOPS = 5e10  # of the convolution; a smaller one takes too little of a model's time


def upsample_conv_ref(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The specification. Pass float64 inputs for gold values."""
    upsampled = F.interpolate(x, scale_factor=2.0, mode="nearest")
    return F.conv2d(upsampled, weight.to(x.dtype), bias.to(x.dtype), padding=1)


def cell_weights_ref(weight: Tensor) -> Tensor:
    """The weights ``[4 C, C_in, 2, 2]``, channels-last, that do the work of ``weight`` ``[C, C_in, 3, 3]``.

    Output channels are ordered by (r, s, c), as in this file's formula.
    """
    # sums of neighbouring taps of the padded kernel: [w0, w0 + w1, w1 + w2, w2] along both axes. An upper pixel of a
    # cell (r = 1) weighs its two rows with w0 and w1 + w2, a lower one (r = 0, of the cell above) with w0 + w1 and w2.
    sums = F.avg_pool2d(weight.float(), 2, stride=1, padding=1, divisor_override=1)  # [C, C_in, 4, 4]
    cells = sums.unflatten(3, (2, 2)).unflatten(2, (2, 2)).flip(3, 5)  # [C, C_in, u, r, v, s]
    cells = cells.permute(3, 5, 0, 2, 4, 1).to(weight.dtype, memory_format=torch.contiguous_format)
    return cells.flatten(0, 2).permute(0, 3, 1, 2)


@triton.jit
def _load_taps(weight_ptr, stride_weight_w, mask):
    """The three taps of a row of the 3 x 3 kernel, which ``weight_ptr`` points to the first of."""
    left = tl.load(weight_ptr, mask=mask).to(tl.float32)
    middle = tl.load(weight_ptr + stride_weight_w, mask=mask).to(tl.float32)
    right = tl.load(weight_ptr + 2 * stride_weight_w, mask=mask).to(tl.float32)
    return left, middle, right


@triton.jit
def _store_sums(cells_ptr, above, below, channel, channels, channels_in, mask, SUM_Y: tl.constexpr):
    """Row ``SUM_Y`` of the 4 x 4 sums in :func:`cell_weights_ref`, of two rows of taps, each to where its cell has it.

    Added as PyTorch's pooling adds, a row after the other: the results are the same.
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
    top = _load_taps(weight_ptr, stride_weight_w, mask)
    middle = _load_taps(weight_ptr + stride_weight_h, stride_weight_w, mask)
    bottom = _load_taps(weight_ptr + 2 * stride_weight_h, stride_weight_w, mask)
    zeros = tl.zeros([BLOCK_I], tl.float32)
    padding = (zeros, zeros, zeros)
    cells_ptr += offs_i
    _store_sums(cells_ptr, padding, top, channel, channels, channels_in, mask, SUM_Y=0)
    _store_sums(cells_ptr, top, middle, channel, channels, channels_in, mask, SUM_Y=1)
    _store_sums(cells_ptr, middle, bottom, channel, channels, channels_in, mask, SUM_Y=2)
    _store_sums(cells_ptr, bottom, padding, channel, channels, channels_in, mask, SUM_Y=3)


@triton.jit(do_not_specialize=["height", "width", "chunk_rows"])
def _interleave_kernel(
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


def _empty_cells(weight: Tensor) -> Tensor:
    channels, channels_in = weight.shape[:2]
    return weight.new_empty((4 * channels, 2, 2, channels_in)).permute(0, 3, 1, 2)


@prepared
def _prepare_cells(channels: int, channels_in: int, *strides: int) -> Launch:
    return Launch(
        _cells_kernel, (channels, triton.cdiv(channels_in, CELLS_BLOCK)),
        channels, channels_in, *strides,
        BLOCK_I=CELLS_BLOCK,
        num_warps=CELLS_NUM_WARPS,
    )  # fmt: skip


def _launch_cells(weight: Tensor) -> Tensor:
    cells = _empty_cells(weight)
    _prepare_cells(*weight.shape[:2], *weight.stride())(weight, cells)
    return cells


@torch.library.custom_op("vidaccel::upsample_conv_cells", mutates_args=())
def _cells(weight: Tensor) -> Tensor:
    return _launch_cells(weight)


@_cells.register_fake
def _(weight: Tensor) -> Tensor:
    return _empty_cells(weight)


def _empty_output(z: Tensor, channels: int) -> Tensor:
    samples, _, cell_rows, cell_columns = z.shape
    return z.new_empty((samples, 2 * (cell_rows - 1), 2 * (cell_columns - 1), channels)).permute(0, 3, 1, 2)


@prepared
def _prepare(samples: int, channels: int, height: int, width: int, tiling: Tiling) -> Launch:
    return Launch(
        _interleave_kernel, (tiling.programs(samples, height * width, channels),),
        height, width, channels, tiling.chunk_rows,
        BLOCK_R=tiling.block_r, BLOCK_C=tiling.block_c, FOLD=FOLD, STAGES=tiling.stages,
        num_warps=tiling.num_warps,
    )  # fmt: skip


class _Output(NamedTuple):
    """The memory of a result, and how it is written."""

    y: Tensor
    parts: Tensor
    tiling: Tiling

    def put(self, z: Tensor, bias: Tensor, images: slice = slice(None)) -> None:
        """Bring what the convolution gave for some images to its place."""
        y, parts = self.y[images], self.parts[images]
        launch = _prepare(*y.shape, self.tiling)
        launch(z.contiguous(memory_format=torch.channels_last), bias.to(z.dtype).contiguous(), y, parts)

    def with_statistics(self) -> Tensor:
        _, _, height, width = self.y.shape
        return attach(self.y, ChannelStatistics(self.parts, height * width, self.tiling.chunk_rows))


@prepared
def _tiling(samples: int, channels: int, pixels: int) -> Tiling:
    return choose_writer_tiling(samples, pixels, channels, channels & -channels)


def _output(x: Tensor, samples: int, channels: int, height: int, width: int) -> _Output:
    """For a result of this size, like ``x`` in all else."""
    y = x.new_empty((samples, height, width, channels)).permute(0, 3, 1, 2)
    tiling = _tiling(samples, channels, height * width)
    return _Output(y, empty_parts(x, samples, height * width, tiling.chunk_rows, channels), tiling)


def compile_ahead(weight: Tensor) -> None:
    """Begin to compile what puts the pixels into place for a convolution of this ``weight``, ``[C, C_in, 3, 3]``."""
    channels, dtype = weight.shape[0], weight.dtype
    if channels % 8 or dtype not in DTYPES:
        return
    for side in (2, 2048):  # small images, and large ones
        launch = _prepare(1, channels, side, side, _tiling(1, channels, side * side))
        launch.compile_ahead(weight.device, *[dtype] * 3, torch.float32)


def _launch(z: Tensor, bias: Tensor) -> _Output:
    samples, _, cell_rows, cell_columns = z.shape
    output = _output(z, samples, bias.shape[0], 2 * (cell_rows - 1), 2 * (cell_columns - 1))
    output.put(z, bias)
    return output


@torch.library.custom_op("vidaccel::upsample_conv_interleave", mutates_args=())
def _interleave(z: Tensor, bias: Tensor) -> Tensor:
    return _launch(z, bias).y


@_interleave.register_fake
def _(z: Tensor, bias: Tensor) -> Tensor:
    return _empty_output(z, bias.shape[0])


def _run(parts: str, x: Tensor, cells: Tensor, bias: Tensor) -> Tensor:
    """y by way of the whole batch, or of one half after the other."""
    if parts == WHOLE:
        return _launch(F.conv2d(x, cells, padding=1), bias).with_statistics()
    samples, _, height, width = x.shape
    output = _output(x, samples, bias.shape[0], 2 * height, 2 * width)
    middle = triton.cdiv(samples, 2)
    for images in (slice(middle), slice(middle, None)):
        output.put(F.conv2d(x[images], cells, padding=1), bias, images)
    return output.with_statistics()


# Which is faster, by what decides it.
_chosen: dict[tuple[Any, ...], str] = {}


def _parts(x: Tensor, cells: Tensor, bias: Tensor) -> str:
    """The way to run these: as measured, now or on another day, where that is worth it."""
    flops = 8 * x.numel() * cells.shape[0]
    if not x.is_cuda or x.shape[0] < 2 or flops < MEASURED_FLOPS or not tuning_enabled():
        return WHOLE
    shape = x.device.index, x.dtype, tuple(x.shape), cells.shape[0], torch.backends.cudnn.benchmark
    if shape not in _chosen:
        measured = tuning_cache.settled(
            OP, _cache_key(x, cells), (WHOLE, HALVES), functools.partial(_measure, x, cells, bias), x
        )
        if measured is None:
            return WHOLE
        _chosen[shape] = measured.winner or WHOLE
    return _chosen[shape]


def _cache_key(x: Tensor, cells: Tensor) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(x.device),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "dtype": str(x.dtype),
        "shape": list(x.shape),
        "channels": cells.shape[0],
    }


def _measure(x: Tensor, cells: Tensor, bias: Tensor) -> tuning_cache.Measured | None:
    """Time both ways. Either way each image goes through a kernel of cuDNN's: there is nothing to hold against it."""
    runs = {parts: functools.partial(_run, parts, x, cells, bias) for parts in (WHOLE, HALVES)}
    with torch.cuda.device_of(x):
        return tuning_cache.fastest(runs, lambda y: None, tuning_cache.cuda_milliseconds, favourite=WHOLE)


def _problem(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    """Why the kernel does not serve these arguments, or None."""
    if weight.dtype != x.dtype:
        return f"weight must have the dtype of x, {x.dtype}, got {weight.dtype}"
    if weight.shape[0] % 8:
        return f"the kernel takes output channels divisible by 8, got {weight.shape[0]}"
    return tensors_problem(x, weight, bias)


def _validate(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(f"upsample_conv: x must be [N, C_in, H, W], got {tuple(x.shape)}")
    if weight.ndim != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        raise ValueError(f"upsample_conv: weight must be [C, {x.shape[1]}, 3, 3], got {tuple(weight.shape)}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"upsample_conv: bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor, *, impl: str | None = None) -> Tensor:
    """``F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)``.

    Args:
        x: ``[N, C_in, H, W]``, fp16 / bf16 / fp32.
        weight: ``[C, C_in, 3, 3]``, as ``x``.
        bias: ``[C]``, any float dtype; rounded to ``x.dtype`` first.
        impl: ``"triton"`` or ``"torch"``; None lets ``vidaccel.kernels.dispatch`` choose.

    Returns:
        ``[N, C, 2 H, 2 W]`` in ``x.dtype``, channels innermost in memory; it may carry statistics for a GroupNorm.

    Raises:
        ValueError: A shape is not as above, or ``impl`` cannot run here.
    """
    _validate(x, weight, bias)
    chosen = choose(OP, x, impl, _problem(x, weight, bias))
    if chosen == "torch" or x.numel() == 0:
        return upsample_conv_ref(x, weight, bias).contiguous(memory_format=torch.channels_last)
    if torch.compiler.is_compiling():
        return _interleave(F.conv2d(x, _cells(weight), padding=1), bias)
    cells = _launch_cells(weight)
    return _run(_parts(x, cells, bias), x, cells, bias)


def upsample_conv_and_statistics(*args, **kwargs):
    return upsample_conv(*args, **kwargs), None
