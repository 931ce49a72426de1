"""Pixel shuffle in time and space behind a convolution, with its bias and the residual that LTX repeats.

    y[b, f t + i - drop, h u + j, w v + k, c] = x[b, f, h, w, (i, j, k, c)] + bias[(i, j, k, c)]
                                                + source[b, f, h, w, (c mod C', i, j, k)]

An upsampler's convolution makes the ``t u v`` pixels of a cell as so many groups of channels; eager adds the bias,
permutes, and does the same with the residual, which it repeats, each a pass of its own. Here a program writes whole
pixels, each from a run of channels. So the channels of x come pixel by pixel, for which the caller reorders the weight
of the convolution; those of the source, of which there are fewer, lie as the convolution before left them. The first
``drop`` frames are left out: the first frame of a clip becomes one frame. So are ``crop`` rows and columns at each side
of a picture, whose cells lie around the pixels of the clip that they were made of (``upsample_clip``).

Channels-last clips ``[B, F, H, W, C]``. Both sums are rounded as in eager: y has its bits. Fidelity: bit-exact with the
reference, math-exact where a reordered weight picks another algorithm. Bound by memory: one read and one write.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.arguments import require_floats
from vidaccel.kernels.check import Part, pictures_apart, piece_of, pieces
from vidaccel.kernels.launch import Launch
from vidaccel.kernels.op import Costs, Implementation, Op, device_reason, tensors_reason

__all__ = ["PIXEL_SHUFFLE", "pixel_shuffle", "pixel_shuffle_ref"]

TILE_BYTES = 4096
MAX_CHANNELS = 4096
NUM_WARPS = 4


def pixel_shuffle_ref(
    x: Tensor, bias: Tensor, source: Tensor | None = None, *, cell: tuple[int, int, int], drop: int = 0,
    crop: int = 0,
) -> Tensor:  # fmt: skip
    """The specification. Pass float64 inputs for gold values."""
    y = (x + bias.to(x.dtype)).unflatten(-1, (*cell, -1)).permute(0, 1, 4, 2, 5, 3, 6, 7)  # [B, F, t, H, u, W, v, C]
    if source is not None:
        addend = source.unflatten(-1, (-1, *cell)).permute(0, 1, 5, 2, 6, 3, 7, 4)
        y = y + addend.repeat(*[1] * 7, y.shape[-1] // addend.shape[-1])
    y = y.flatten(5, 6).flatten(3, 4).flatten(1, 2)
    return y[:, drop:, crop : y.shape[2] - crop, crop : y.shape[3] - crop].contiguous()


@triton.jit(
    do_not_specialize=[
        "rows", "drop", "crop", "frames", "out_frames", "height", "width",
        "stride_source_sample", "stride_source_frame", "stride_source_row", "stride_source_pixel",
    ],
)  # fmt: skip
def _pixel_shuffle_kernel(
    x_ptr, bias_ptr, source_ptr, y_ptr,
    rows, drop, crop, frames, out_frames, height, width, channels, source_channels,
    stride_source_sample, stride_source_frame, stride_source_row, stride_source_pixel,
    HAS_SOURCE: tl.constexpr, T: tl.constexpr, U: tl.constexpr, V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    dtype = y_ptr.dtype.element_ty
    offs_c = tl.arange(0, BLOCK_C)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (offs_m < rows)[:, None] & (offs_c < channels)[None, :]
    # where the pixel is in y
    out_height, out_width = height * U - 2 * crop, width * V - 2 * crop
    row = offs_m // out_width
    column = offs_m - row * out_width + crop
    plane = row // out_height
    row = row - plane * out_height + crop
    sample = plane // out_frames
    frame = plane - sample * out_frames + drop
    # and which pixel of which cell of x that is
    of_cell = (frame % T * U + row % U) * V + column % V
    frame, row, column = frame // T, row // U, column // V
    pixel = ((sample * frames + frame).to(tl.int64) * height + row) * width + column
    offs = (pixel * (T * U * V) + of_cell)[:, None] * channels + offs_c[None, :]
    y = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + of_cell[:, None] * channels + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
    y = (y + bias).to(dtype)
    if HAS_SOURCE:
        pixel = sample.to(tl.int64) * stride_source_sample + frame.to(tl.int64) * stride_source_frame
        pixel += row.to(tl.int64) * stride_source_row + column * stride_source_pixel
        offs = (pixel + of_cell)[:, None] + (offs_c % source_channels * (T * U * V))[None, :]
        y = (y.to(tl.float32) + tl.load(source_ptr + offs, mask=mask, other=0.0).to(tl.float32)).to(dtype)
    tl.store(y_ptr + offs_m.to(tl.int64)[:, None] * channels + offs_c[None, :], y, mask=mask)


class _Call(NamedTuple):
    """The arguments of a call."""

    x: Tensor
    bias: Tensor
    source: Tensor | None
    t: int
    u: int
    v: int
    drop: int
    crop: int

    @property
    def cell(self) -> tuple[int, int, int]:
        return self.t, self.u, self.v

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the result."""
        samples, frames, height, width, channels = self.x.shape
        frames = frames * self.t - self.drop
        height, width = height * self.u - 2 * self.crop, width * self.v - 2 * self.crop
        return samples, frames, height, width, channels // math.prod(self.cell)


def _launch(call: _Call) -> Launch:
    _, frames, height, width, _ = call.x.shape
    *pixels, channels = call.shape
    block_c = triton.next_power_of_2(channels)
    block_m = max(TILE_BYTES // (block_c * call.x.itemsize), 1)
    rows = math.prod(pixels)
    source_channels, strides = 1, call.x.stride()[:4]
    if call.source is not None:
        source_channels, strides = call.source.shape[-1] // math.prod(call.cell), call.source.stride()[:4]
    return Launch(
        _pixel_shuffle_kernel, (triton.cdiv(rows, block_m),),
        rows, call.drop, call.crop, frames, pixels[1], height, width, channels, source_channels,
        *strides,
        HAS_SOURCE=call.source is not None, T=call.t, U=call.u, V=call.v, BLOCK_M=block_m, BLOCK_C=block_c,
        num_warps=NUM_WARPS,
    )  # fmt: skip


def _bind(*args: Any) -> Callable[..., Tensor]:
    """What is returned keeps no tensor of this call alive: it outlives it."""
    call = _Call(*args)
    launch, shape = _launch(call), call.shape
    del call

    def run(x: Tensor, bias: Tensor, source: Tensor | None, *others: int) -> Tensor:
        y = x.new_empty(shape)
        launch(x.contiguous(), bias.to(x.dtype).contiguous(), source, y)
        return y

    return run


def _reference(*args: Any) -> Tensor:
    call = _Call(*args)
    return pixel_shuffle_ref(call.x, call.bias, call.source, cell=call.cell, drop=call.drop, crop=call.crop)


def _fake(*args: Any) -> Tensor:
    call = _Call(*args)
    return call.x.new_empty(call.shape)


def _reason(*args: Any) -> str | None:
    call = _Call(*args)
    *pixels, channels = call.shape
    if not math.prod(call.shape):
        return "there is nothing to write"
    if channels > MAX_CHANNELS:
        return f"the kernel keeps a pixel in registers, up to C={MAX_CHANNELS}, got C={channels}"
    if math.prod(pixels) >= 2**31:
        return "the kernel counts up to 2**31 pixels"
    if call.source is not None and call.source.dtype != call.x.dtype:
        return f"source must have the dtype of x, {call.x.dtype}, got {call.source.dtype}"
    if call.source is not None and call.source.stride(-1) != 1:
        return "the kernel takes a source with a last stride of 1"
    # within a line it counts in 32 bits
    if call.source is not None and call.source.shape[3] * call.source.stride(3) >= 2**31:
        return "the kernel takes a source whose lines span less than 2**31 numbers"
    return device_reason(call.x) or tensors_reason(call.x, call.bias, call.source)


def _costs(*args: Any) -> Costs:
    call = _Call(*args)
    source = 0 if call.source is None else call.source.nbytes
    return Costs(bytes=call.x.nbytes + source + math.prod(call.shape) * call.x.itemsize)


def _parts(*args: Any) -> Iterator[Part]:
    """Some frames of a sample at a time, or rows of one if none is left out; frames are left out of the first alone."""
    call = _Call(*args)
    for piece in pieces(call.x.shape, *((0, 1) if call.crop else (0, 1, 2))):
        samples, frames, height, *_ = piece
        drop = 0 if frames.start else call.drop
        source = None if call.source is None else call.source[samples, frames, height]
        part = call._replace(x=call.x[piece], source=source, drop=drop)
        written = slice(frames.start * call.t - call.drop + drop, frames.stop * call.t - call.drop)
        rows = slice(height.start * call.u, height.stop * call.u - 2 * call.crop)
        yield Part(tuple(part), functools.partial(_part_of, (samples, written, rows)), pictures_apart)


def _part_of(piece: tuple[slice, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return pictures_apart(piece_of(piece, outputs))


def _validate(*args: Any) -> None:
    call = _Call(*args)
    name, x, size = "pixel_shuffle", call.x, math.prod(call.cell)
    require_floats(name, x=x, bias=call.bias, source=call.source)
    if min(call.cell) < 1:
        raise ValueError(f"{name}: cell must be positive, got {call.cell}")
    if x.ndim != 5 or not x.shape[-1] or x.shape[-1] % size:
        raise ValueError(f"{name}: x must be [B, F, H, W, {size} * C], got {tuple(x.shape)}")
    if call.bias.shape != x.shape[-1:]:
        raise ValueError(f"{name}: bias must be [{x.shape[-1]}], got {tuple(call.bias.shape)}")
    if not 0 <= call.drop < call.t or (call.drop and not x.shape[1]):
        raise ValueError(
            f"{name}: drop must be less than the {call.t} frames of a cell, got {call.drop} (x is {tuple(x.shape)})"
        )
    if not 0 <= call.crop < min(call.u, call.v) or (call.crop and not x.shape[2] * x.shape[3]):
        raise ValueError(
            f"{name}: crop must be less than the sides of a cell {call.cell}, got {call.crop} (x is {tuple(x.shape)})"
        )
    if (source := call.source) is not None:
        fits = source.ndim == 5 and source.shape[-1] and not (source.shape[-1] % size or x.shape[-1] % source.shape[-1])
        if not fits or source.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"{name}: source must be [B, F, H, W, {size} * C'] where C' divides C, as x is {tuple(x.shape)}, "
                f"got {tuple(source.shape)}"
            )


PIXEL_SHUFFLE = Op(
    "pixel_shuffle",
    reference=_reference,
    implementations={"triton": Implementation.bound(_bind, _reason, _Call)},
    fake=_fake,
    costs=_costs,
    parts=_parts,
    validate=_validate,
)


def pixel_shuffle(
    x: Tensor,
    bias: Tensor,
    source: Tensor | None = None,
    *,
    cell: tuple[int, int, int],
    drop: int = 0,
    crop: int = 0,
    impl: str | None = None,
) -> Tensor:
    """``x + bias``, the pixels of each cell in their place, and the repeated ``source``'s added.

    Args:
        x: ``[B, F, H, W, t * u * v * C]``, fp16 / bf16 / fp32, the channels of a pixel of the cell together; read
            through a contiguous copy if it is not contiguous.
        bias: ``[t * u * v * C]``, any float dtype; rounded to ``x.dtype`` first.
        source: ``[B, F, H, W, C' * t * u * v]``, the pixels of a cell together, C' a divisor of C; any
            strides but the last. None adds nothing.
        cell: ``(t, u, v)``: the frames, rows and columns that a pixel of x becomes.
        drop: The first frames to leave out, fewer than t.
        crop: Rows and columns to leave out at each side, fewer than u and v.
        impl: ``"triton"`` or ``"torch"``; None lets the op choose.

    Returns:
        ``[B, F * t - drop, H * u - 2 * crop, W * v - 2 * crop, C]``, contiguous in ``x.dtype``.

    Raises:
        ValueError: A shape or a device is not as above; ``impl`` cannot run here.
        TypeError: A tensor is not floating-point.
    """
    return PIXEL_SHUFFLE(x, bias, source, *cell, drop, crop, impl=impl)
