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
from vidaccel.kernels.check import Part, pieces
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


@triton.jit(
    do_not_specialize=[
        "rows", "frames", "height", "width", "stride_source_sample", "stride_source_frame", "stride_source_row",
        "stride_source_pixel",
    ],
)  # fmt: skip
def _depth_to_space_kernel(
    x_ptr, bias_ptr, source_ptr, y_ptr,
    rows, frames, height, width, channels,
    stride_source_sample, stride_source_frame, stride_source_row, stride_source_pixel,
    FACTOR_T: tl.constexpr, FIRST: tl.constexpr, REPEATS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    dtype = y_ptr.dtype.element_ty
    phases: tl.constexpr = 4 * FACTOR_T
    phase = tl.program_id(0) % phases  # the programs of a tile are neighbours: its source stays in the cache
    row = tl.program_id(0) // phases * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    i, j, k = phase // 4, phase // 2 % 2, phase % 2

    x = row % width
    y = row // width % height
    frame_of_all = row // (width * height)
    sample = frame_of_all // frames
    frame = frame_of_all - sample * frames
    mask_m = row < rows
    offs_p = phase * channels + offs_c[None, :]
    of_source = offs_p // REPEATS
    out_frame = frame * FACTOR_T + i
    out_frames = frames * FACTOR_T
    if FIRST:
        alone = frame == 0
        mask_m = mask_m & ~(alone & (i > 0))
        offs_p = tl.where(alone[:, None], (2 * phase) * channels + offs_c[None, :], offs_p)
        of_source = tl.where(alone[:, None], (phase * channels + offs_c[None, :]) // (REPEATS // 2), of_source)
        out_frame = tl.where(alone, 0, out_frame - 1)
        out_frames -= 1
    mask = mask_m[:, None] & (offs_c < channels)[None, :]
    value = tl.load(x_ptr + row.to(tl.int64)[:, None] * (phases * channels) + offs_p, mask=mask).to(tl.float32)
    bias = tl.load(bias_ptr + offs_p + tl.zeros([BLOCK_M, 1], tl.int32), mask=mask).to(dtype).to(tl.float32)
    value = (value + bias).to(dtype).to(tl.float32)
    pixel = sample.to(tl.int64) * stride_source_sample + frame.to(tl.int64) * stride_source_frame
    pixel += y.to(tl.int64) * stride_source_row + x.to(tl.int64) * stride_source_pixel
    value += tl.load(source_ptr + pixel[:, None] + of_source, mask=mask).to(tl.float32)
    to = (sample.to(tl.int64) * out_frames + out_frame) * (2 * height) + 2 * y + j
    to = to * (2 * width) + 2 * x + k
    tl.store(y_ptr + to[:, None] * channels + offs_c[None, :], value, mask=mask)


def _shape(x: Tensor, factor_t: int, first: bool) -> tuple[int, ...]:
    samples, frames, height, width, depth = x.shape
    alone = int(first and factor_t == 2)
    return samples, frames * factor_t - alone, 2 * height, 2 * width, depth // (4 * factor_t)


def _bind(x: Tensor, bias: Tensor, source: Tensor, factor_t: int, first: bool) -> Callable[..., Tensor]:
    _, frames, height, width, depth = x.shape
    phases, rows, shape = 4 * factor_t, x[..., 0].numel(), _shape(x, factor_t, first)
    channels = depth // phases
    block_c = triton.next_power_of_2(channels)
    block_m = max(TILE // block_c, 1)
    launch = Launch(
        _depth_to_space_kernel, (triton.cdiv(rows, block_m) * phases,),
        rows, frames, height, width, channels,
        *source.stride()[:4],
        FACTOR_T=factor_t, FIRST=first and factor_t == 2, REPEATS=depth // source.shape[-1],
        BLOCK_M=block_m, BLOCK_C=block_c,
        num_warps=NUM_WARPS,
    )  # fmt: skip

    def run(x: Tensor, bias: Tensor, source: Tensor, factor_t: int, first: bool) -> Tensor:
        y = x.new_empty(shape)
        launch(x.contiguous(), bias.contiguous(), source, y)
        return y

    return run


def _triton(x: Tensor, bias: Tensor, source: Tensor, factor_t: int, first: bool) -> Tensor:
    return _bind(x, bias, source, factor_t, first)(x, bias, source, factor_t, first)


def _fake(x: Tensor, bias: Tensor, source: Tensor, factor_t: int, first: bool) -> Tensor:
    return x.new_empty(_shape(x, factor_t, first))


def _reason(x: Tensor, bias: Tensor, source: Tensor, factor_t: int, first: bool) -> str | None:
    if not x.numel():
        return "there is nothing to put in place"
    if source.dtype != x.dtype:
        return f"source must have the dtype of x, {x.dtype}, got {source.dtype}"
    if source.stride(-1) != 1:
        return "the kernel takes a source with a last stride of 1"
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
        yield Part(args, functools.partial(_part_of, (samples, written)), _as_frames)


def _part_of(written: tuple[slice, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return _as_frames((outputs[0][written],))


def _as_frames(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs[0].flatten(2, 3).flatten(0, 1),)  # [frames, H*W, C]


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
    implementations={"triton": Implementation(_triton, _reason, _bind, fidelity="bit-exact", registered=True)},
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
