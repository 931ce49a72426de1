"""Channels of a convolution to pixels and frames of a larger clip, its bias and the shortcut added in the same pass.

    y[b, t f + i, 2 h + j, 2 w + k, c] = (x[b, f, h, w, p] + bias[p]) + source[b, f, h, w, p // repeats]
    p = ((2 i + j) 2 + k) C + c,  i < t,  j, k < 2,  repeats = channels of x / channels of source

The upsampling of diffusers' ``HunyuanVideo15Upsample``; eager makes it by permutes, repeats, cats and sums, six passes
over the largest tensors. The first frame of a clip stays one frame where time doubles: its channels are (2 j + k) 2 C +
c, and of the source (2 (2 j + k) C + 2 c) // repeats. Rows ``[B, F, H, W, C]``. Both sums are rounded as in eager.
Fidelity: bit-exact. Bound by memory: every number is read and written once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.arguments import require_floats
from vidaccel.kernels.check import Part, pictures_apart, piece_of, pieces
from vidaccel.kernels.launch import Launch
from vidaccel.kernels.op import Costs, Implementation, Op, device_reason, tensors_reason

__all__ = ["DEPTH_TO_SPACE", "depth_to_space", "depth_to_space_ref"]

TILE = 4096  # numbers that a program works on
NUM_WARPS = 4


def depth_to_space_ref(x: Tensor, bias: Tensor, source: Tensor, factor_t: int = 1, first: bool = False) -> Tensor:
    """The specification."""
    x = x + bias.to(x.dtype)
    channels, repeats = x.shape[-1] // (4 * factor_t), x.shape[-1] // source.shape[-1]
    if factor_t == 1 or not first:
        return _in_place(x, factor_t) + _in_place(source.repeat_interleave(repeats, -1), factor_t)
    one = _in_place(x[:, :1], 1)[..., :channels] + _in_place(source[:, :1].repeat_interleave(repeats // 2, -1), 1)
    rest = _in_place(x[:, 1:], 2) + _in_place(source[:, 1:].repeat_interleave(repeats, -1), 2)
    return torch.cat([one, rest], dim=1)


def _in_place(x: Tensor, factor_t: int) -> Tensor:
    """``[B, F, H, W, t * 2 * 2 * C]`` as ``[B, t * F, 2 * H, 2 * W, C]``."""
    samples, frames, height, width, depth = x.shape
    channels = depth // (4 * factor_t)
    cells = x.reshape(samples, frames, height, width, factor_t, 2, 2, channels).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return cells.reshape(samples, frames * factor_t, 2 * height, 2 * width, channels)


@triton.jit(do_not_specialize=["frames", "height", "width"])
def _depth_to_space_kernel(
    x_ptr, bias_ptr, source_ptr, y_ptr,
    frames, height, width, channels, depth, source_step,
    stride_x_sample, stride_y_sample,
    stride_source_sample, stride_source_frame, stride_source_row, stride_source_pixel,
    FACTOR_T: tl.constexpr, ALONE: tl.constexpr, REPEATS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of pixels of one line, and those of their channels that become neighbours in one line of y.

    These are two pixels of it; of an ``ALONE`` first frame one, for the channels of the other lie further on.
    """
    dtype = y_ptr.dtype.element_ty
    segments: tl.constexpr = 4 if ALONE else 2 * FACTOR_T
    segment = tl.program_id(0) % segments
    tile = tl.program_id(0) // segments
    line_tiles = tl.cdiv(width, BLOCK_M)
    line = tile // line_tiles
    plane = line // height
    row = line - plane * height
    sample = (plane // frames).to(tl.int64)
    frame = (plane % frames).to(tl.int64)
    offs_m = (tile - line * line_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c, offs_s = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_C // REPEATS)
    if ALONE:
        i, j, k = 0, segment // 2, segment % 2
        columns = channels
    else:
        i, j, k = segment // 2, segment % 2, 0
        columns = 2 * channels
    mask_m, mask_c = (offs_m < width)[:, None], offs_c < columns
    first = segment * (2 * channels)

    x_ptr += sample * stride_x_sample + (frame * height + row) * width * depth + first
    value = tl.load(x_ptr + offs_m[:, None] * depth + offs_c[None, :], mask=mask_m & mask_c[None, :])
    source_ptr += sample * stride_source_sample + frame * stride_source_frame + row.to(tl.int64) * stride_source_row
    source_ptr += segment * source_step
    source = tl.load(
        source_ptr + offs_m[:, None] * stride_source_pixel + offs_s[None, :],
        mask=mask_m & (offs_s < source_step)[None, :],
    )  # [BLOCK_M, BLOCK_C // REPEATS]
    bias = tl.load(bias_ptr + first + offs_c, mask=mask_c).to(dtype).to(tl.float32)
    value = (value.to(tl.float32) + bias[None, :]).to(dtype).to(tl.float32)
    if REPEATS > 1:
        source = tl.broadcast_to(source[:, :, None], (BLOCK_M, BLOCK_C // REPEATS, REPEATS))
        source = source.reshape(BLOCK_M, BLOCK_C)
    value += source.to(tl.float32)
    y_line = (frame * FACTOR_T + i) * (2 * height) + 2 * row + j
    y_ptr += sample * stride_y_sample + (y_line * (2 * width) + k) * channels
    tl.store(y_ptr + offs_m[:, None] * (2 * channels) + offs_c[None, :], value, mask=mask_m & mask_c[None, :])


def _shape(x: Tensor, factor_t: int, first: bool) -> tuple[int, ...]:
    samples, frames, height, width, depth = x.shape
    alone = int(first and factor_t == 2)
    return samples, frames * factor_t - alone, 2 * height, 2 * width, depth // (4 * factor_t)


def _launch(x: Tensor, source: Tensor, y: Tensor, factor_t: int, alone: bool) -> Launch:
    """Of all frames of these; an ``alone`` frame takes half of its channels."""
    samples, frames, height, width, depth = x.shape
    channels, repeats = y.shape[-1], depth // source.shape[-1]
    block_c = triton.next_power_of_2(channels if alone else 2 * channels)
    block_m = max(TILE // block_c, 1)
    lines = samples * frames * height * (4 if alone else 2 * factor_t)
    return Launch(
        _depth_to_space_kernel, (lines * triton.cdiv(width, block_m),),
        frames, height, width, channels, depth, 2 * channels // repeats,
        x.stride(0), y.stride(0), *source.stride()[:4],
        FACTOR_T=factor_t, ALONE=alone, REPEATS=repeats // 2 if alone else repeats,
        BLOCK_M=block_m, BLOCK_C=block_c,
        num_warps=NUM_WARPS,
    )  # fmt: skip


def _bind(x: Tensor, bias: Tensor, source: Tensor, factor_t: int, first: bool) -> Callable[..., Tensor]:
    """What is returned keeps no tensor of this call alive: it outlives it."""
    shape, alone = _shape(x, factor_t, first), int(first and factor_t == 2)
    rows, y = (torch.empty(size, device="meta") for size in (x.shape, shape))
    parts = []
    if alone:
        parts.append((slice(0, 1), _launch(rows[:, :1], source, y, 1, True)))
    if x.shape[1] > alone:
        parts.append((slice(alone, None), _launch(rows[:, alone:], source, y, factor_t, False)))

    def run(x: Tensor, bias: Tensor, source: Tensor, factor_t: int, first: bool) -> Tensor:
        y = x.new_empty(shape)
        x, bias = x.contiguous(), bias.contiguous()
        for frames, launch in parts:  # those of x begin where those of y do: with the first or the second
            launch(x[:, frames], bias, source[:, frames], y[:, frames])
        return y

    return run


def _fake(x: Tensor, bias: Tensor, source: Tensor, factor_t: int, first: bool) -> Tensor:
    return x.new_empty(_shape(x, factor_t, first))


def _reason(x: Tensor, bias: Tensor, source: Tensor, factor_t: int, first: bool) -> str | None:
    if not x.numel():
        return "there is nothing to put in place"
    if source.dtype != x.dtype:
        return f"source must have the dtype of x, {x.dtype}, got {source.dtype}"
    if source.stride(-1) != 1:
        return "the kernel takes a source with a last stride of 1"
    if source.shape[3] * source.stride(3) >= 2**31:  # within a line it counts in 32 bits
        return "the kernel takes a source whose lines span less than 2**31 numbers"
    repeats, columns = x.shape[-1] // source.shape[-1], x.shape[-1] // (2 * factor_t)
    if repeats & (repeats - 1) or columns % repeats:
        return f"a channel of source must serve 2^n channels of a line of y, got {repeats} of {columns}"
    return device_reason(x) or tensors_reason(x, bias, source)


def _costs(x: Tensor, bias: Tensor, source: Tensor, factor_t: int, first: bool) -> Costs:
    written = _fake(x.to("meta"), bias, source, factor_t, first).nbytes
    return Costs(bytes=2 * written + source.nbytes)


def _parts(x: Tensor, bias: Tensor, source: Tensor, factor_t: int, first: bool) -> Iterator[Part]:
    """Some frames of a sample at a time."""
    alone = int(first and factor_t == 2)
    for piece in pieces(x.shape, 0, 1):
        samples, frames, *_ = piece
        begins = frames.start == 0
        written = slice(factor_t * frames.start - alone * (not begins), factor_t * frames.stop - alone)
        args = x[piece], bias, source[samples, frames], factor_t, first and begins
        yield Part(args, functools.partial(_part_of, (samples, written)), pictures_apart)


def _part_of(written: tuple[slice, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return pictures_apart(piece_of(written, outputs))


def _validate(x: Tensor, bias: Tensor, source: Tensor, factor_t: int, first: bool) -> None:
    name = "depth_to_space"
    require_floats(name, x=x, bias=bias, source=source)
    if factor_t not in (1, 2):
        raise ValueError(f"{name}: factor_t must be 1 or 2, got {factor_t}")
    if x.ndim != 5 or not x.shape[-1] or x.shape[-1] % (4 * factor_t):
        raise ValueError(f"{name}: x must be [B, F, H, W, {4 * factor_t} C], got {tuple(x.shape)}")
    if bias.shape != x.shape[-1:]:
        raise ValueError(f"{name}: bias must be [{x.shape[-1]}], got {tuple(bias.shape)}")
    if source.shape[:-1] != x.shape[:-1] or not source.shape[-1] or x.shape[-1] % source.shape[-1]:
        raise ValueError(
            f"{name}: source must be x's shape with channels that divide {x.shape[-1]}, got {tuple(source.shape)}"
        )
    if first and factor_t == 2 and not x.shape[1]:
        raise ValueError(f"{name}: there is no first frame in x {tuple(x.shape)}")
    if first and factor_t == 2 and (x.shape[-1] // source.shape[-1]) % 2:
        raise ValueError(f"{name}: of a first frame, each channel of source must serve an even number of channels of x")


DEPTH_TO_SPACE = Op(
    "depth_to_space",
    reference=depth_to_space_ref,
    implementations={"triton": Implementation.bound(_bind, _reason, fidelity="bit-exact")},
    fake=_fake,
    costs=_costs,
    parts=_parts,
    validate=_validate,
)


def depth_to_space(
    x: Tensor, bias: Tensor, source: Tensor, *, factor_t: int = 1, first: bool = False, impl: str | None = None
) -> Tensor:
    """``HunyuanVideo15Upsample.forward`` behind its convolution, on rows.

    Args:
        x: ``[B, F, H, W, factor_t * 2 * 2 * C]``, what the convolution made without its bias, fp16 / bf16 / fp32.
        bias: One number for each channel of x, any float dtype.
        source: ``[B, F, H, W, C']``, what the convolution was made of, in ``x.dtype``; any strides but the last.
        factor_t: Frames that a frame becomes, 1 or 2.
        first: Whether frame 0 is the first of a clip, which stays one frame.
        impl: ``"triton"`` or ``"torch"``; None lets the op choose.

    Returns:
        ``[B, factor_t * F, 2 * H, 2 * W, C]``, contiguous; one frame less if the first stays one.

    Raises:
        ValueError: A shape or a device is not as above; ``impl`` cannot run here.
        TypeError: A tensor is not floating-point.
    """
    out: Tensor = DEPTH_TO_SPACE(x, bias, source, factor_t, first, impl=impl)
    return out
