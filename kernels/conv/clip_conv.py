"""A convolution of clips of rows, which bring the frames that it looks back at; ours where cuDNN is slow.

    out[b, f, y, x] = sum over t, i, j of rows[b, f + t, y + i - Y // 2, x + j - X // 2] @ weight[:, t, i, j].T

* ``gluon``: ours for Hopper, in ``clip_conv_gluon.py``, to 96 channels, those of Wan 2.1's last up-block. cuDNN has no
  fast kernel for so many where a tensor is below 2**31 numbers, and one above that works on tiles of 64.
* ``library``: PyTorch's, which is cuDNN's on a GPU.

Fidelity: math-exact. Bound by the tensor cores, or by the shared memory that feeds them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vidaccel.kernels.arguments import require_floats
from vidaccel.kernels.check import Part, cuts
from vidaccel.kernels.conv.channels_last_weight import channels_last_weight
from vidaccel.kernels.hopper import aligned, gluon_reason, on_hopper
from vidaccel.kernels.op import Costs, Implementation, Op, scaled, tensors_reason

__all__ = ["CLIP_CONV", "clip_conv", "clip_conv_ref"]

CHANNELS, BLOCK_K = 96, 32
TAPS = 3, 3


def clip_conv_ref(rows: Tensor, weight: Tensor) -> Tensor:
    """The specification. Pass float64 inputs for gold values."""
    return _convolved(rows, weight.to(rows.dtype))


def _library(rows: Tensor, weight: Tensor) -> Tensor:
    return _convolved(rows, channels_last_weight(weight, rows.dtype))


def _convolved(rows: Tensor, weight: Tensor) -> Tensor:
    padding = 0, weight.shape[3] // 2, weight.shape[4] // 2
    return F.conv3d(rows.permute(0, 4, 1, 2, 3), weight, padding=padding).permute(0, 2, 3, 4, 1).contiguous()


def _bind(rows: Tensor, weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    from vidaccel.kernels.conv.clip_conv_gluon import prepare

    shape = _shape(rows, weight)
    launch = prepare(tuple(rows.shape), weight.shape[2], rows.dtype, rows.device)

    def run(rows: Tensor, weight: Tensor) -> Tensor:
        out = rows.new_empty(shape)
        rows, weight = aligned(rows, channels_last_weight(weight, rows.dtype))
        launch(rows, weight, out)
        return out

    return run


def _gluon(rows: Tensor, weight: Tensor) -> Tensor:
    return _bind(rows, weight)(rows, weight)


def _pays(rows: Tensor, weight: Tensor) -> bool:
    """Elsewhere nobody expects the kernel."""
    return on_hopper(rows) and len(weight) == CHANNELS and rows.dtype != torch.float32


def _gluon_reason(rows: Tensor, weight: Tensor) -> str | None:
    if reason := gluon_reason(rows):
        return reason
    if rows.dtype not in (torch.float16, torch.bfloat16):
        return f"the kernel takes float16 and bfloat16, rows is {rows.dtype}"
    if not rows.is_contiguous():
        return "TMA takes contiguous rows"
    if len(weight) != CHANNELS or weight.shape[1] % BLOCK_K or tuple(weight.shape[3:]) != TAPS:
        return f"the kernel takes C'={CHANNELS}, C in steps of {BLOCK_K} and 3 x 3 taps, got {tuple(weight.shape)}"
    if not rows.numel():
        return "there is nothing to multiply"
    return tensors_reason(rows, weight)


def _shape(rows: Tensor, weight: Tensor) -> tuple[int, ...]:
    return len(rows), rows.shape[1] - weight.shape[2] + 1, *rows.shape[2:4], len(weight)


def _costs(rows: Tensor, weight: Tensor) -> Costs:
    samples, frames, height, width, channels = _shape(rows, weight)
    pixels = samples * frames * height * width
    return Costs(
        bytes=rows.nbytes + weight.nbytes + pixels * channels * rows.itemsize, flops=2 * pixels * weight.numel()
    )  # fmt: skip


def _parts(rows: Tensor, weight: Tensor) -> Iterator[Part]:
    around = weight.shape[2] - 1
    for sample in range(len(rows)):
        for frames in cuts(_shape(rows, weight)[1], rows[0, 0].numel()):
            some = rows[sample : sample + 1, frames.start : frames.stop + around]
            yield Part((some, weight), functools.partial(_part_of, sample, frames))


def _part_of(sample: int, frames: slice, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs[0][sample : sample + 1, frames],)


def _validate(rows: Tensor, weight: Tensor) -> None:
    require_floats("clip_conv", rows=rows, weight=weight)
    if rows.ndim != 5 or not rows.shape[-1]:
        raise ValueError(f"clip_conv: rows must be [B, F, H, W, C] with channels, got {tuple(rows.shape)}")
    if weight.ndim != 5 or weight.shape[1] != rows.shape[-1] or not weight.numel():
        raise ValueError(f"clip_conv: weight must be [C', {rows.shape[-1]}, T, Y, X], got {tuple(weight.shape)}")
    if weight.shape[3] % 2 == 0 or weight.shape[4] % 2 == 0:
        raise ValueError(f"clip_conv: weight must have odd sides, got {tuple(weight.shape)}")
    if rows.shape[1] < weight.shape[2]:
        raise ValueError(f"clip_conv: rows must have {weight.shape[2]} frames at least, got {rows.shape[1]}")


CLIP_CONV = Op(
    "clip_conv",
    reference=clip_conv_ref,
    implementations={
        "gluon": Implementation(_gluon, _gluon_reason, _bind, registered=True, pays=_pays),
        "library": Implementation(_library),
    },
    fake=lambda rows, weight: rows.new_empty(_shape(rows, weight)),
    costs=_costs,
    parts=_parts,
    validate=_validate,
    small=scaled(0),  # rows
)


def clip_conv(rows: Tensor, weight: Tensor, *, impl: str | None = None) -> Tensor:
    """``F.conv3d`` of rows, with zeros around each picture and none before or behind the clip, without a bias.

    Args:
        rows: ``[B, F + T - 1, H, W, C]``, fp16 / bf16 / fp32: the frames that a causal convolution looks back at first.
        weight: ``[C', C, T, Y, X]``, any float dtype; rounded to that of the rows first.
        impl: ``"gluon"``, ``"library"`` or ``"torch"``; None lets the op choose.

    Returns:
        ``[B, F, H, W, C']`` in the dtype of the rows, contiguous.

    Raises:
        ValueError: A shape or a device is not as above; ``impl`` cannot run here.
        TypeError: A tensor is not floating-point.
    """
    out: Tensor = CLIP_CONV(rows, weight, impl=impl)
    return out
