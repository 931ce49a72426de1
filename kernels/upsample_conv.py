"""Nearest-neighbour x2 upsampling and the 3 x 3 convolution after it, as one 2 x 2 convolution of the small image.

    y = conv3x3(nearest2x(x)) + bias

Of the 3 rows of an upsampled image that a tap column reads, two are the same row of ``x``: their weights can be added
beforehand. An output pixel therefore is a 2 x 2 convolution of ``x``, with one set of weights for each of the four
positions in its 2 x 2 cell (Shi et al. 2016, https://arxiv.org/abs/1609.07009, read the other way round). All four
read the same windows, those of ``x`` padded by one pixel, so they are the output channels of a single convolution

    z[n, p, q, (r, s, c)] = conv2x2(pad(x))     of shape [N, H + 1, W + 1, 4 C]
    y[n, 2 p - 1 + r, 2 q - 1 + s, c] = z[n, p, q, (r, s, c)] + bias[c]

which takes 4 / 9 of the multiplications and never stores the upsampled input. cuDNN runs it; the kernel here puts the
pixels into place and adds the bias on the way, which PyTorch does in a kernel of its own. Channels-last memory.

The weights are added in float32 and rounded to the dtype of ``x`` once, which is one rounding more per product than
eager has; z and y are rounded where eager rounds. Fidelity: math-exact. Bound by the convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.dispatch import choose, tensors_problem
from vidaccel.kernels.launch import Launch, prepared

__all__ = ["cell_weights", "upsample_conv", "upsample_conv_ref"]

TILE = 4096  # elements
NUM_WARPS = 4


def upsample_conv_ref(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The specification. Pass float64 inputs for gold values."""
    upsampled = F.interpolate(x, scale_factor=2.0, mode="nearest")
    return F.conv2d(upsampled, weight.to(x.dtype), bias.to(x.dtype), padding=1)


def cell_weights(weight: Tensor) -> Tensor:
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
def _interleave_kernel(
    z_ptr, bias_ptr, y_ptr,
    height, width, channels,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # of all images
    channel_blocks = channels // BLOCK_C
    offs_w = tl.program_id(1) // channel_blocks * BLOCK_W + tl.arange(0, BLOCK_W)
    offs_c = tl.program_id(1) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    below = row % height + 1
    z_row = row // height * (height // 2 + 1) + below // 2
    z_column = (offs_w + 1) // 2
    cell = below % 2 * 2 + (offs_w + 1) % 2  # [BLOCK_W]
    z_offs = ((z_row * (width // 2 + 1) + z_column) * 4 + cell)[:, None] * channels + offs_c  # [BLOCK_W, BLOCK_C]
    y_offs = (row * width + offs_w)[:, None] * channels + offs_c
    mask = (offs_w < width)[:, None]
    bias = tl.load(bias_ptr + offs_c).to(tl.float32)
    y = tl.load(z_ptr + z_offs, mask=mask).to(tl.float32) + bias
    tl.store(y_ptr + y_offs, y.to(y_ptr.dtype.element_ty), mask=mask)


def _empty_output(z: Tensor, channels: int) -> Tensor:
    samples, _, cell_rows, cell_columns = z.shape
    return z.new_empty((samples, 2 * (cell_rows - 1), 2 * (cell_columns - 1), channels)).permute(0, 3, 1, 2)


@prepared
def _prepare(samples: int, channels: int, height: int, width: int) -> Launch:
    block_c = min(channels & -channels, 128)
    block_w = TILE // block_c
    return Launch(
        _interleave_kernel, (samples * height, triton.cdiv(width, block_w) * (channels // block_c)),
        height, width, channels,
        BLOCK_W=block_w, BLOCK_C=block_c,
        num_warps=NUM_WARPS,
    )  # fmt: skip


def _launch(z: Tensor, bias: Tensor) -> Tensor:
    y = _empty_output(z, bias.shape[0])
    _prepare(*y.shape)(z.contiguous(memory_format=torch.channels_last), bias.to(z.dtype).contiguous(), y)
    return y


@torch.library.custom_op("vidaccel::upsample_conv_interleave", mutates_args=())
def _interleave(z: Tensor, bias: Tensor) -> Tensor:
    return _launch(z, bias)


@_interleave.register_fake
def _(z: Tensor, bias: Tensor) -> Tensor:
    return _empty_output(z, bias.shape[0])


def _problem(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    """Why the kernel does not serve these arguments, or None."""
    if weight.dtype != x.dtype:
        return f"weight must have the dtype of x, {x.dtype}, got {weight.dtype}"
    if weight.shape[0] % 8:
        return f"the kernel takes output channels divisible by 8, got {weight.shape[0]}"
    return tensors_problem(x, weight, bias)


def _validate(x: Tensor, weight: Tensor, bias: Tensor, cells: Tensor | None) -> None:
    if x.ndim != 4:
        raise ValueError(f"upsample_conv: x must be [N, C_in, H, W], got {tuple(x.shape)}")
    if weight.ndim != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        raise ValueError(f"upsample_conv: weight must be [C, {x.shape[1]}, 3, 3], got {tuple(weight.shape)}")
    channels, channels_in = weight.shape[:2]
    if bias.shape != (channels,):
        raise ValueError(f"upsample_conv: bias must be [{channels}], got {tuple(bias.shape)}")
    if cells is not None and cells.shape != (4 * channels, channels_in, 2, 2):
        raise ValueError(
            f"upsample_conv: cells must be [{4 * channels}, {channels_in}, 2, 2], got {tuple(cells.shape)}"
        )


def upsample_conv(
    x: Tensor, weight: Tensor, bias: Tensor, *, cells: Tensor | None = None, impl: str | None = None
) -> Tensor:
    """``F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)``.

    Args:
        x: ``[N, C_in, H, W]``, fp16 / bf16 / fp32.
        weight: ``[C, C_in, 3, 3]``, as ``x``.
        bias: ``[C]``, any float dtype; rounded to ``x.dtype`` first.
        cells: ``cell_weights(weight)``, for a caller that keeps it; None computes it.
        impl: ``"triton"`` or ``"torch"``; None lets ``vidaccel.kernels.dispatch`` choose.

    Returns:
        ``[N, C, 2 H, 2 W]`` in ``x.dtype``, channels innermost in memory.

    Raises:
        ValueError: A shape is not as above, or ``impl`` cannot run here.
    """
    _validate(x, weight, bias, cells)
    chosen = choose("upsample_conv", x, impl, _problem(x, weight, bias))
    if chosen == "torch" or x.numel() == 0:
        return upsample_conv_ref(x, weight, bias).contiguous(memory_format=torch.channels_last)
    z = F.conv2d(x, cell_weights(weight) if cells is None else cells, padding=1)
    return (_interleave if torch.compiler.is_compiling() else _launch)(z, bias)
