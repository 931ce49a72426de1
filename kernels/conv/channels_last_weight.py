"""The weight of a 3-D convolution with its input channels innermost in memory, as cuDNN reads it beside rows.

    out[k, c, t, y, x] = weight[k, c, t, y, x], in memory [k, t, y, x, c]

A weight is laid out anew at every call: a copy that was kept would be stale after a write through ``.data``, of which
nobody is told. ``Tensor.contiguous`` is slow at this, because it reads or writes two bytes at a time, far from one
another: copies took up to 49 of the 3242 ms of HunyuanVideo 1.5's decode (decoder-profiles-h200.txt). Here a program
turns a tile of channels and taps in shared memory. Fidelity: bit-exact, the cast included. Bound by memory: every
number is read and written once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.arguments import require_floats
from vidaccel.kernels.check import Part, cuts
from vidaccel.kernels.launch import Launch
from vidaccel.kernels.op import Costs, Implementation, Op, device_reason, tensors_reason

__all__ = ["CHANNELS_LAST_WEIGHT", "channels_last_weight", "channels_last_weight_ref"]

TILE = 4096  # numbers that a program works on
NUM_WARPS = 4
MOST_TAPS = 64
LARGE = 2**18  # numbers; PyTorch copies a smaller weight in the time that one launch takes


def channels_last_weight_ref(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The specification; the weight itself where nothing is to be done."""
    return weight.to(dtype).contiguous(memory_format=torch.channels_last_3d)


@triton.jit
def _channels_last_weight_kernel(
    weight_ptr, out_ptr,
    channels,
    TAPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(channels, BLOCK_C)
    row = (tl.program_id(0) // tiles).to(tl.int64) * channels * TAPS
    offs_c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_t = tl.arange(0, BLOCK_T)
    mask = (offs_c < channels)[:, None] & (offs_t < TAPS)[None, :]
    tile = tl.load(weight_ptr + row + offs_c[:, None] * TAPS + offs_t[None, :], mask=mask)  # [BLOCK_C, BLOCK_T]
    mask = (offs_t < TAPS)[:, None] & (offs_c < channels)[None, :]
    tl.store(out_ptr + row + offs_t[:, None] * channels + offs_c[None, :], tl.trans(tile), mask=mask)


def _bind(weight: Tensor, dtype: torch.dtype) -> Callable[..., Tensor]:
    rows, channels, *window = weight.shape
    taps = math.prod(window)
    block_t = triton.next_power_of_2(taps)
    block_c = TILE // block_t
    launch = Launch(
        _channels_last_weight_kernel, (rows * triton.cdiv(channels, block_c),),
        channels,
        TAPS=taps, BLOCK_C=block_c, BLOCK_T=block_t,
        num_warps=NUM_WARPS,
    )  # fmt: skip

    def run(weight: Tensor, dtype: torch.dtype) -> Tensor:
        out = _fake(weight, dtype)
        launch(weight, out)
        return out

    return run


def _fake(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(weight, dtype=dtype, memory_format=torch.channels_last_3d)


def _reason(weight: Tensor, dtype: torch.dtype) -> str | None:
    if not weight.is_contiguous() or not weight.numel():
        return "the kernel takes a contiguous weight"
    if (taps := weight[0, 0].numel()) > MOST_TAPS:
        return f"the kernel takes up to {MOST_TAPS} taps, got {taps}"
    return device_reason(weight) or tensors_reason(weight)


def _pays(weight: Tensor, dtype: torch.dtype) -> bool:
    in_order = weight.is_contiguous(memory_format=torch.channels_last_3d)
    return weight.numel() >= LARGE and weight.is_contiguous() and not in_order


def _costs(weight: Tensor, dtype: torch.dtype) -> Costs:
    return Costs(bytes=weight.numel() * (weight.itemsize + dtype.itemsize))


def _parts(weight: Tensor, dtype: torch.dtype) -> Iterator[Part]:
    for rows in cuts(len(weight), math.prod(weight.shape[1:])):
        yield Part((weight[rows], dtype), functools.partial(_part_of, rows))


def _part_of(rows: slice, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs[0][rows],)


def _validate(weight: Tensor, dtype: torch.dtype) -> None:
    require_floats("channels_last_weight", weight=weight)
    if weight.ndim != 5:
        raise ValueError(f"channels_last_weight: weight must be [C', C, T, Y, X], got {tuple(weight.shape)}")
    if not dtype.is_floating_point:
        raise TypeError(f"channels_last_weight: dtype must be a floating-point one, got {dtype}")


CHANNELS_LAST_WEIGHT = Op(
    "channels_last_weight",
    reference=channels_last_weight_ref,
    implementations={"triton": Implementation.bound(_bind, _reason, fidelity="bit-exact", pays=_pays)},
    fake=_fake,
    costs=_costs,
    parts=_parts,
    validate=_validate,
)


def channels_last_weight(weight: Tensor, dtype: torch.dtype, *, impl: str | None = None) -> Tensor:
    """``weight.to(dtype).contiguous(memory_format=torch.channels_last_3d)``.

    Args:
        weight: ``[C', C, T, Y, X]``, any float dtype and strides.
        dtype: That of the result.
        impl: ``"triton"`` or ``"torch"``; None lets the op choose.

    Returns:
        The same shape; the weight itself where nothing is to be done.

    Raises:
        ValueError: The weight has another rank; ``impl`` cannot run here.
        TypeError: The weight or ``dtype`` is not floating-point.
    """
    out: Tensor = CHANNELS_LAST_WEIGHT(weight, dtype, impl=impl)
    return out
