"""The weights of a convolution that makes all pixels of a cell at once: taps that read the same pixel, added up.

Behind a nearest-neighbour upsampling by 2, two of three neighbours along a dimension are the same pixel of the small
clip (``upsample_clip``). Along each dimension that is doubled, three taps so become two, once for either pixel of a
cell:

    [w0, w1, w2]  ->  [w0 + w1, w2] and [w0, w1 + w2]

The sums are made anew at every call, for weights may be changed in between, and nothing would tell. Added in float32,
the width first, and rounded once. In PyTorch a dozen passes do that, 58 of the 1549 ms of HunyuanVideo's tiled decode
(decoder-profiles-h200.txt); here one does, which keeps the 27 taps of some input channels in registers. Fidelity:
math-exact. Bound by memory: every weight is read once, every sum written once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.arguments import require_floats
from vidaccel.kernels.check import Part, cuts
from vidaccel.kernels.launch import Launch
from vidaccel.kernels.op import Costs, Implementation, Op, device_reason, tensors_reason

__all__ = ["MERGED_TAPS", "load_plane", "merged_taps", "merged_taps_ref"]

BLOCK = 64  # input channels: of more, 27 taps and their sums would not fit into the registers
NUM_WARPS = 1


def merged_taps_ref(weight: Tensor, factor_t: int) -> Tensor:
    """The specification. Pass float64 weights for gold values."""
    merged = weight.float() if weight.dtype.itemsize == 2 else weight
    for _ in range(3 if factor_t == 2 else 2):  # the width, the height, time: each moves by one dimension
        before, here, behind = merged.unbind(4)
        pairs = (before + here, behind), (before, here + behind)
        merged = torch.stack([torch.stack(pair, dim=4) for pair in pairs])
    return _fake(weight, factor_t).copy_(merged.flatten(0, -5))


@triton.jit
def _load_line(weight_ptr, stride_x, mask):
    left = tl.load(weight_ptr, mask=mask, other=0.0).to(tl.float32)
    middle = tl.load(weight_ptr + stride_x, mask=mask, other=0.0).to(tl.float32)
    right = tl.load(weight_ptr + 2 * stride_x, mask=mask, other=0.0).to(tl.float32)
    return left, middle, right


@triton.jit
def load_plane(weight_ptr, stride_y, stride_x, mask):
    """The 3 x 3 taps that ``weight_ptr`` points to the first of, line by line."""
    above = _load_line(weight_ptr, stride_x, mask)
    middle = _load_line(weight_ptr + stride_y, stride_x, mask)
    below = _load_line(weight_ptr + 2 * stride_y, stride_x, mask)
    return above, middle, below


@triton.jit
def _picked(before, here, behind, PLACE: tl.constexpr):
    """What three taps become: ``PLACE`` is 2 times the pixel of the cell, plus the tap of the two that it reads."""
    out = before
    if PLACE == 0:
        out = before + here
    elif PLACE == 1:
        out = behind
    elif PLACE == 3:
        out = here + behind
    return out


@triton.jit
def _picked_of_plane(taps, LINE: tl.constexpr, COLUMN: tl.constexpr):
    """``_picked`` along the width, then along the height."""
    above = _picked(taps[0][0], taps[0][1], taps[0][2], COLUMN)
    middle = _picked(taps[1][0], taps[1][1], taps[1][2], COLUMN)
    below = _picked(taps[2][0], taps[2][1], taps[2][2], COLUMN)
    return _picked(above, middle, below, LINE)


@triton.jit
def _store_sum(out_ptr, made, cell, tap, channel, channels, channels_in, TAPS: tl.constexpr, mask):
    start = ((cell * channels + channel) * TAPS + tap) * channels_in
    tl.store(out_ptr + start, made.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _merged_taps_kernel(
    weight_ptr, out_ptr,
    channels, channels_in,
    stride_out, stride_in, stride_t, stride_y, stride_x,
    FACTOR_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < channels_in
    weight_ptr += channel * stride_out + offs.to(tl.int64) * stride_in
    out_ptr += offs
    first = load_plane(weight_ptr, stride_y, stride_x, mask)
    second = load_plane(weight_ptr + stride_t, stride_y, stride_x, mask)
    third = load_plane(weight_ptr + 2 * stride_t, stride_y, stride_x, mask)
    for LINE in tl.static_range(4):
        for COLUMN in tl.static_range(4):
            before = _picked_of_plane(first, LINE, COLUMN)
            here = _picked_of_plane(second, LINE, COLUMN)
            behind = _picked_of_plane(third, LINE, COLUMN)
            pixel = LINE // 2 * 2 + COLUMN // 2
            tap = LINE % 2 * 2 + COLUMN % 2
            if FACTOR_T == 2:
                for PLACE in tl.static_range(4):
                    made = _picked(before, here, behind, PLACE)
                    cell, of_frame = PLACE // 2 * 4 + pixel, PLACE % 2 * 4 + tap
                    _store_sum(out_ptr, made, cell, of_frame, channel, channels, channels_in, 8, mask)
            else:
                _store_sum(out_ptr, before, pixel, tap, channel, channels, channels_in, 12, mask)
                _store_sum(out_ptr, here, pixel, 4 + tap, channel, channels, channels_in, 12, mask)
                _store_sum(out_ptr, behind, pixel, 8 + tap, channel, channels, channels_in, 12, mask)


def _bind(weight: Tensor, factor_t: int) -> Callable[..., Tensor]:
    channels, channels_in = weight.shape[:2]
    launch = Launch(
        _merged_taps_kernel, (channels, triton.cdiv(channels_in, BLOCK)),
        channels, channels_in, *weight.stride(),
        FACTOR_T=factor_t, BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )  # fmt: skip

    def run(weight: Tensor, factor_t: int) -> Tensor:
        out = _fake(weight, factor_t)
        launch(weight, out)
        return out

    return run


def _fake(weight: Tensor, factor_t: int) -> Tensor:
    channels, channels_in = weight.shape[:2]
    shape = 4 * factor_t * channels, channels_in, 2 if factor_t == 2 else 3, 2, 2
    return torch.empty(shape, dtype=weight.dtype, device=weight.device, memory_format=torch.channels_last_3d)


def _reason(weight: Tensor, factor_t: int) -> str | None:
    if not weight.numel():
        return "there is nothing to add up"
    return device_reason(weight) or tensors_reason(weight)


def _costs(weight: Tensor, factor_t: int) -> Costs:
    made = 4 * factor_t * (8 if factor_t == 2 else 12)
    return Costs(bytes=weight.nbytes + weight[:, :, 0, 0, 0].numel() * made * weight.itemsize)


def _parts(weight: Tensor, factor_t: int) -> Iterator[Part]:
    channels, channels_in = weight.shape[:2]
    for some in cuts(channels, 64 * channels_in):
        yield Part((weight[some], factor_t), functools.partial(_part_of, channels, some), _as_rows)


def _part_of(channels: int, some: slice, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return _as_rows((outputs[0].unflatten(0, (-1, channels))[:, some].flatten(0, 1),))


def _as_rows(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs[0].permute(0, 2, 3, 4, 1).flatten(1, 3),)  # [cells * C', taps, C]


def _validate(weight: Tensor, factor_t: int) -> None:
    require_floats("merged_taps", weight=weight)
    if weight.ndim != 5 or weight.shape[2:] != (3, 3, 3):
        raise ValueError(f"merged_taps: weight must be [C', C, 3, 3, 3], got {tuple(weight.shape)}")
    if factor_t not in (1, 2):
        raise ValueError(f"merged_taps: factor_t must be 1 or 2, got {factor_t}")


MERGED_TAPS = Op(
    "merged_taps",
    reference=merged_taps_ref,
    implementations={"triton": Implementation.bound(_bind, _reason)},
    fake=_fake,
    costs=_costs,
    parts=_parts,
    validate=_validate,
)


def merged_taps(weight: Tensor, *, factor_t: int, impl: str | None = None) -> Tensor:
    """The weights of the convolution of a small clip that stands for one of the clip upsampled by 2.

    Args:
        weight: ``[C', C, 3, 3, 3]``, fp16 / bf16 / fp32, any strides.
        factor_t: 2 where frames are doubled, too, else 1.
        impl: ``"triton"`` or ``"torch"``; None lets the op choose.

    Returns:
        ``[t * 2 * 2 * C', C, taps]``, of 2 x 2 x 2 taps, or 3 x 2 x 2 where time is not doubled; in ``weight.dtype``,
        channels_last_3d.

    Raises:
        ValueError: The weight has another shape; ``factor_t`` is neither; ``impl`` cannot run here.
        TypeError: The weight is not floating-point.
    """
    out: Tensor = MERGED_TAPS(weight, factor_t, impl=impl)
    return out
