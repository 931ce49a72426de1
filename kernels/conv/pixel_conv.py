"""The convolution that ends a video decoder: from many channels to the few of a pixel.

    y[b, c, f, h, w] = bias[c] + sum over (t, y, x), k of weight[c, k, t, y, x] * rows[b, f + t, h + y - Y//2, ..., k]

or ``h + y`` and ``w + x`` where the rows bring their border (``bordered``): not every decoder wants zeros.

Tensor cores work on 64 output channels or more at once; of three, nearly all of that is lost, and each of the 27 taps
reads the clip again. Here every row is multiplied with all taps first, one GEMM of ``T Y X C'`` columns (81 for RGB),
and a kernel adds up what the taps have made of the pixels around. That reads and writes about as many numbers as the
clip has, some frames at a time, so that it takes no more memory than the clip. The numbers in between are float32, for
taps may cancel, and then their roundings would be all that is left. Fidelity: math-exact. Bound by memory. Whether it
beats cuDNN is measured.
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
from vidaccel.kernels.check import Part, cuts
from vidaccel.kernels.launch import Launch
from vidaccel.kernels.op import Costs, Implementation, Op, device_reason, scaled, tensors_reason

__all__ = ["PIXEL_CONV", "pixel_conv", "pixel_conv_ref"]

BLOCK = 512  # with twice as many, a thread holds so many numbers that few warps fit on a multiprocessor
NUM_WARPS = 4
MOST_CHANNELS = 16  # that one pixel has
MOST_PRODUCTS = 2**30  # numbers that are stored between the GEMM and the sum
GEMM_STEP = 8  # numbers that a row of a product must be a multiple of, for cuBLAS's kernels that write 16 bytes
CUDNN_STEP = 8  # output channels that cuDNN's kernels for tensor cores want
MEASURED_FLOPS = 1e10


def pixel_conv_ref(rows: Tensor, weight: Tensor, bias: Tensor, bordered: bool = False) -> Tensor:
    """The specification. Pass float64 inputs for gold values."""
    y = F.conv3d(rows.permute(0, 4, 1, 2, 3), weight.to(rows.dtype), padding=_zeros_around(weight, bordered))
    return (y + bias.view(-1, 1, 1, 1)).contiguous()


def _zeros_around(weight: Tensor, bordered: bool) -> tuple[int, int, int]:
    return (0, 0, 0) if bordered else (0, weight.shape[3] // 2, weight.shape[4] // 2)


@triton.jit(do_not_specialize=["frames"])
def _sum_taps_kernel(
    products_ptr, rows_ptr, bias_ptr, y_ptr,
    frames, height, width, pitch, stride_y_c,
    CHANNELS: tl.constexpr, T: tl.constexpr, Y: tl.constexpr, X: tl.constexpr, BORDERED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One channel of one frame: products are ``[F + T - 1, T, Y, X, C, pitch]``, of which H * W are a frame's.

    Of the rows only the dtype matters, to which the sum is rounded before the bias is added.
    """
    pixels = height * width
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    frame = (tl.program_id(1) // CHANNELS).to(tl.int64)
    channel = (tl.program_id(1) % CHANNELS).to(tl.int64)
    row, column = pixel // width, pixel % width
    there, to, to_pixels = pixel < pixels, pixel, pixels
    if BORDERED:  # a pixel stands for that whose first tap it is
        to_width = width - (X - 1)
        to_pixels = (height - (Y - 1)) * to_width
        there = (row < height - (Y - 1)) & (column < to_width)
        to = row * to_width + column
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for t in tl.static_range(T):
        for y in tl.static_range(Y):
            for x in tl.static_range(X):
                inside, at = there, pixel + (y * width + x)
                if not BORDERED:
                    above, left = row + (y - Y // 2), column + (x - X // 2)
                    inside = there & (above >= 0) & (above < height) & (left >= 0) & (left < width)
                    at = above * width + left
                plane = ((frame + t) * (T * Y * X) + (t * Y + y) * X + x) * CHANNELS + channel
                taken = tl.load(products_ptr + plane * pitch + at, mask=inside, other=0.0)
                acc += taken
    acc = acc.to(rows_ptr.dtype.element_ty).to(tl.float32) + tl.load(bias_ptr + channel).to(tl.float32)
    tl.store(y_ptr + channel * stride_y_c + frame * to_pixels + to, acc, mask=there)


def _bind_taps(rows: Tensor, weight: Tensor, bias: Tensor, bordered: bool) -> Callable[..., Tensor]:
    channels_in, *taps = weight.shape[1:]
    samples, _, height, width, _ = rows.shape
    shape, pixels, planes = _shape(rows, weight, bordered), height * width, len(weight) * weight[0, 0].numel()
    around, dtype = taps[0] - 1, _dtype(rows, bias)
    pitch = triton.cdiv(pixels, GEMM_STEP) * GEMM_STEP if pixels >= GEMM_STEP else pixels
    step = _frames_at_once(rows, planes, around)
    some = [slice(start, min(start + step, shape[2])) for start in range(0, shape[2], step)]
    launches = {
        count: Launch(
            _sum_taps_kernel, (triton.cdiv(pixels, BLOCK), count * shape[1]),
            count, height, width, pitch, math.prod(shape[2:]),
            CHANNELS=shape[1], T=taps[0], Y=taps[1], X=taps[2], BORDERED=bordered, BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
        for count in {part.stop - part.start for part in some}
    }  # fmt: skip

    def run(rows: Tensor, weight: Tensor, bias: Tensor, bordered: bool) -> Tensor:
        rows, bias = rows.contiguous(), bias.contiguous()
        y = rows.new_empty(shape, dtype=dtype)
        # [T Y X C', C], and for each frame the product [T Y X C', H W]
        columns = weight.to(rows.dtype).permute(2, 3, 4, 0, 1).reshape(planes, channels_in)
        for sample in range(samples):
            for part in some:
                seen = rows[sample, part.start : part.stop + around].view(-1, pixels, channels_in)
                products = rows.new_empty(len(seen), planes, pitch, dtype=torch.float32)
                _multiply(columns, seen, products)
                launches[part.stop - part.start](products, rows, bias, y[sample, :, part])
        return y

    return run


def _multiply(columns: Tensor, seen: Tensor, products: Tensor) -> None:
    """``columns @ seen[f].T`` of every frame, ``[F, H W, C]``, at the beginning of the rows of ``products[f]``.

    Where these rows are longer, what follows is of the next frame's pixels, and unspecified in the last.
    """
    (frames, pixels, channels), pitch = seen.shape, products.shape[2]
    whole = frames if pitch == pixels else frames - 1
    long = seen.as_strided((whole, channels, pitch), (pixels * channels, 1, channels))
    _product(columns.expand(whole, -1, -1), long, products[:whole])
    if whole < frames:
        _product(columns[None], seen[-1:].transpose(1, 2), products[-1:, :, :pixels])


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a @ b`` of batches, in float32 from inputs of fewer bits; only CUDA has it as one call."""
    if a.dtype == torch.float32 or not a.is_cuda:
        torch.bmm(a.float(), b.float(), out=out)
    else:
        torch.bmm(a, b, torch.float32, out=out)


def _frames_at_once(rows: Tensor, planes: int, around: int) -> int:
    """Output frames whose products take no more memory than the clip, and are no more than ``MOST_PRODUCTS``."""
    frame = planes * rows.shape[2] * rows.shape[3]
    return max(min(MOST_PRODUCTS, rows[:1].nbytes // torch.float32.itemsize) // frame - around, 1)


def _cudnn(rows: Tensor, weight: Tensor, bias: Tensor, bordered: bool) -> Tensor:
    channels = len(weight)
    filled = F.pad(weight.to(rows.dtype), (0,) * 9 + (-channels % CUDNN_STEP,))
    laid_out = filled.contiguous(memory_format=torch.channels_last_3d)
    y = F.conv3d(rows.permute(0, 4, 1, 2, 3), laid_out, padding=_zeros_around(weight, bordered))[:, :channels]
    out = rows.new_empty(y.shape, dtype=_dtype(rows, bias))
    return torch.add(y, bias.view(-1, 1, 1, 1), out=out)


def _shape(rows: Tensor, weight: Tensor, bordered: bool) -> tuple[int, ...]:
    samples, frames, height, width, _ = rows.shape
    if bordered:
        height, width = height - weight.shape[3] + 1, width - weight.shape[4] + 1
    return samples, len(weight), frames - weight.shape[2] + 1, height, width


def _dtype(rows: Tensor, bias: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, bias.dtype)


def _fake(rows: Tensor, weight: Tensor, bias: Tensor, bordered: bool) -> Tensor:
    return rows.new_empty(_shape(rows, weight, bordered), dtype=_dtype(rows, bias))


def _taps_reason(rows: Tensor, weight: Tensor, bias: Tensor, bordered: bool) -> str | None:
    if len(weight) > MOST_CHANNELS:
        return f"it is for up to {MOST_CHANNELS} channels of a pixel, got {len(weight)}"
    return _nothing_reason(rows) or device_reason(rows) or tensors_reason(rows, weight, bias)


def _cudnn_reason(rows: Tensor, weight: Tensor, bias: Tensor, bordered: bool) -> str | None:
    if not rows.is_cuda or not torch.backends.cudnn.enabled:
        return f"cuDNN is for GPUs and turned on or off by PyTorch, rows is on {rows.device.type}"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (rows, weight, bias)):
        return "it writes into its output, which has no backward pass (call it under torch.no_grad)"
    return _nothing_reason(rows)


def _nothing_reason(rows: Tensor) -> str | None:
    return None if rows.numel() else "there is nothing to multiply"


def _flops(rows: Tensor, weight: Tensor) -> int:
    return 2 * rows.numel() * len(weight) * weight[0, 0].numel()


def _costs(rows: Tensor, weight: Tensor, bias: Tensor, bordered: bool) -> Costs:
    output = rows.nbytes // max(rows.shape[-1], 1) * len(weight)
    return Costs(bytes=rows.nbytes + weight.nbytes + output, flops=_flops(rows, weight))


def _measures(rows: Tensor, weight: Tensor, bias: Tensor, bordered: bool) -> bool:
    return (
        rows.is_cuda and _taps_reason(rows, weight, bias, bordered) is None and _flops(rows, weight) >= MEASURED_FLOPS
    )


def _key(rows: Tensor, weight: Tensor, bias: Tensor, bordered: bool) -> dict[str, Any]:
    return {
        "dtype": str(rows.dtype),
        "shape": tuple(rows.shape),
        "weight": tuple(weight.shape),
        "bordered": bordered,
        "cudnn": settings.current().cudnn,
    }


def _parts(rows: Tensor, weight: Tensor, bias: Tensor, bordered: bool) -> Iterator[Part]:
    around = weight.shape[2] - 1
    for sample in range(len(rows)):
        for frames in cuts(_shape(rows, weight, bordered)[2], rows[0, 0].numel()):
            args = rows[sample : sample + 1, frames.start : frames.stop + around], weight, bias, bordered
            yield Part(args, functools.partial(_part_of, sample, frames))


def _part_of(sample: int, frames: slice, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs[0][sample : sample + 1, :, frames],)


def _validate(rows: Tensor, weight: Tensor, bias: Tensor, bordered: bool) -> None:
    name = "pixel_conv"
    require_floats(name, rows=rows, weight=weight, bias=bias)
    if rows.ndim != 5 or not rows.shape[-1]:
        raise ValueError(f"{name}: rows must be [B, F, H, W, C] with channels, got {tuple(rows.shape)}")
    if weight.ndim != 5 or weight.shape[1] != rows.shape[-1] or not weight.numel():
        raise ValueError(f"{name}: weight must be [C', {rows.shape[-1]}, T, Y, X], got {tuple(weight.shape)}")
    if weight.shape[3] % 2 == 0 or weight.shape[4] % 2 == 0:
        raise ValueError(f"{name}: weight must have odd sides, got {tuple(weight.shape)}")
    if rows.shape[1] < weight.shape[2]:
        raise ValueError(f"{name}: rows must have {weight.shape[2]} frames at least, got {rows.shape[1]}")
    if bordered and (rows.shape[2] < weight.shape[3] or rows.shape[3] < weight.shape[4]):
        raise ValueError(f"{name}: rows with a border must be as large as weight, got {tuple(rows.shape)}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias must be [{len(weight)}], got {tuple(bias.shape)}")


PIXEL_CONV = Op(
    "pixel_conv",
    reference=pixel_conv_ref,
    implementations={
        "taps": Implementation.bound(_bind_taps, _taps_reason),
        "cudnn": Implementation(_cudnn, _cudnn_reason),
    },
    fake=_fake,
    costs=_costs,
    parts=_parts,
    measures=_measures,
    key=_key,
    validate=_validate,
    small=scaled(0),  # rows
)


def pixel_conv(
    rows: Tensor, weight: Tensor, bias: Tensor, *, bordered: bool = False, impl: str | None = None
) -> Tensor:  # fmt: skip
    """``F.conv3d`` of rows, with zeros around each picture and none before or behind the clip, plus the bias.

    Args:
        rows: ``[B, F + T - 1, H, W, C]``, fp16 / bf16 / fp32: the frames that a causal convolution looks back at first.
        weight: ``[C', C, T, Y, X]``, any float dtype; rounded to that of the rows first.
        bias: ``[C']``, any float dtype.
        bordered: Whether the pictures bring what the convolution reads around them, so that there are no zeros: rows
            are ``[B, F + T - 1, H + Y - 1, W + X - 1, C]``.
        impl: ``"taps"``, ``"cudnn"`` or ``"torch"``; None lets the op choose.

    Returns:
        ``[B, C', F, H, W]``, contiguous, of the wider dtype of rows and bias.

    Raises:
        ValueError: A shape or a device is not as above; ``impl`` cannot run here.
        TypeError: A tensor is not floating-point.
    """
    out: Tensor = PIXEL_CONV(rows, weight, bias, bordered, impl=impl)
    return out
