"""A convolution of clips of rows, which bring the frames that it looks back at; ours where cuDNN is slow.

    out[b, f, y, x] = sum over t, i, j of rows[b, f + t, y + i - Y // 2, x + j - X // 2] @ weight[:, t, i, j].T

or of ``y + i`` and ``x + j`` where the rows bring their border (``bordered``).

* ``gluon``: ours for Hopper, in ``clip_conv_gluon.py``, to 96 channels, those of Wan 2.1's last up-block. cuDNN has no
  fast kernel for so many where a tensor is below 2**31 numbers, and one above that works on tiles of 64.
* ``winograd``: with two thirds of the products, in ``clip_conv_winograd.py``. On an H200, convolutions of 128 to 1024
  channels took 0.69 to 0.89 of the library's time, with the best of three numbers of frames at once
  (clip-conv-variants-h200.json); with ``bordered``, 0.83 to 2.5 of it, and the faster one is found by measuring.
* ``library``: PyTorch's, which is cuDNN's on a GPU.

Fidelity: math-exact. Bound by the tensor cores, or by the shared memory that feeds them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from vidaccel.kernels import settings
from vidaccel.kernels.arguments import require_floats
from vidaccel.kernels.check import Part, cuts
from vidaccel.kernels.conv.channels_last_weight import channels_last_weight
from vidaccel.kernels.hopper import aligned, gluon_reason, on_hopper
from vidaccel.kernels.op import Costs, Implementation, Op, device_reason, tensors_reason

__all__ = ["CLIP_CONV", "clip_conv", "clip_conv_ref", "workspace_bytes"]

CHANNELS, BLOCK_K = 96, 32
TAPS = 3, 3
# Where winograd was measured to pay: its passes through memory are few beside the products, of many, and a frame too
# many does not matter.
LEAST_CHANNELS, LEAST_FLOPS, LEAST_ODD_FRAMES = 128, 1e12, 9
SAMPLES, SAMPLED_FLOPS = 8, 1e11  # a check looks at so many parts in turn of a call of at least so many FLOPs
WINOGRAD_DTYPES = (torch.bfloat16,)
VECTOR = 8  # numbers of 16 bits: fewer channels, or others, the library's fast kernels do not take


def clip_conv_ref(
    rows: Tensor, weight: Tensor, largest: Tensor | None = None, bordered: bool = False
) -> Tensor:  # fmt: skip
    """The specification. Pass float64 inputs for gold values."""
    return _convolved(rows, weight.to(rows.dtype), bordered)


def _library(rows: Tensor, weight: Tensor, largest: Tensor | None, bordered: bool) -> Tensor:
    return _convolved(rows, channels_last_weight(weight, rows.dtype), bordered)


def _convolved(rows: Tensor, weight: Tensor, bordered: bool) -> Tensor:
    padding = 0, *_zeros_around(weight, bordered)
    return F.conv3d(rows.permute(0, 4, 1, 2, 3), weight, padding=padding).permute(0, 2, 3, 4, 1).contiguous()


def _zeros_around(weight: Tensor, bordered: bool) -> tuple[int, int]:
    return (0, 0) if bordered else (weight.shape[3] // 2, weight.shape[4] // 2)


def _bind_gluon(
    rows: Tensor, weight: Tensor, largest: Tensor | None, bordered: bool
) -> Callable[..., Tensor]:  # fmt: skip
    from vidaccel.kernels.conv.clip_conv_gluon import prepare

    shape = _shape(rows, weight, bordered)
    launch = prepare(tuple(rows.shape), weight.shape[2], rows.dtype, rows.device)

    def run(rows: Tensor, weight: Tensor, largest: Tensor | None, bordered: bool) -> Tensor:
        out = rows.new_empty(shape)
        rows, weight = aligned(rows, channels_last_weight(weight, rows.dtype))
        launch(rows, weight, weight, out, out)
        return out

    return run


def _gluon_pays(rows: Tensor, weight: Tensor, largest: Tensor | None, bordered: bool) -> bool:
    """Elsewhere nobody expects the kernel."""
    return on_hopper(rows) and len(weight) == CHANNELS and rows.dtype != torch.float32


def _gluon_reason(rows: Tensor, weight: Tensor, largest: Tensor | None, bordered: bool) -> str | None:
    if reason := gluon_reason(rows):
        return reason
    if bordered:
        return "the kernel adds zeros around each picture"
    if rows.dtype not in (torch.float16, torch.bfloat16):
        return f"the kernel takes float16 and bfloat16, rows is {rows.dtype}"
    if not rows.is_contiguous():
        return "TMA takes contiguous rows"
    if len(weight) != CHANNELS or weight.shape[1] % BLOCK_K or tuple(weight.shape[3:]) != TAPS:
        return f"the kernel takes C'={CHANNELS}, C in steps of {BLOCK_K} and 3 x 3 taps, got {tuple(weight.shape)}"
    if not rows.numel():
        return "there is nothing to multiply"
    return tensors_reason(rows, weight)


def _bind_winograd(
    rows: Tensor, weight: Tensor, largest: Tensor | None, bordered: bool
) -> Callable[..., Tensor]:  # fmt: skip
    from vidaccel.kernels.conv.clip_conv_winograd import prepare

    shape = _shape(rows, weight, bordered)
    fill = prepare(tuple(rows.shape), shape, _zeros_around(weight, bordered))

    def run(rows: Tensor, weight: Tensor, largest: Tensor, bordered: bool) -> Tensor:
        try:
            out = rows.new_empty(shape)
            fill(rows, channels_last_weight(weight, rows.dtype), largest, out)
            return out
        except torch.OutOfMemoryError:  # the library needs no workspace
            return _library(rows, weight, largest, bordered)

    return run


def _winograd_pays(rows: Tensor, weight: Tensor, largest: Tensor | None, bordered: bool) -> bool:
    return not bordered and _may_pay(rows, weight, largest, bordered)


def _measures(rows: Tensor, weight: Tensor, largest: Tensor | None, bordered: bool) -> bool:
    """Of rows that bring their border the library's kernels do 400 to 1000 TFLOP/s on one GPU, by size."""
    return bordered and _may_pay(rows, weight, largest, bordered)


def _may_pay(rows: Tensor, weight: Tensor, largest: Tensor | None, bordered: bool) -> bool:
    samples, frames, height, width, channels_out = _shape(rows, weight, bordered)
    much = _is_much(samples, frames, height * width, weight.shape[1], channels_out)
    return rows.is_cuda and largest is not None and much


def _key(rows: Tensor, weight: Tensor, largest: Tensor | None, bordered: bool) -> dict[str, Any]:
    return {
        "dtype": str(rows.dtype),
        "rows": tuple(rows.shape),
        "weight": tuple(weight.shape),
        "bordered": bordered,
        "cudnn": settings.current().cudnn,
    }


def _is_much(samples: int, frames: int, pixels: int, channels: int, channels_out: int) -> bool:
    """Whether winograd's passes through memory are few beside the products of 27 taps."""
    flops = 2 * 27 * samples * frames * pixels * channels * channels_out
    enough = frames % 2 == 0 or frames >= LEAST_ODD_FRAMES
    return enough and min(channels, channels_out) >= LEAST_CHANNELS and flops >= LEAST_FLOPS


def workspace_bytes(x: Tensor, frames: int, pixels: int, channels: int, channels_out: int) -> int:
    """What a convolution of rows of ``x``'s kind and samples may take beside these and its result."""
    if not x.is_cuda or x.dtype not in WINOGRAD_DTYPES or not _is_much(len(x), frames, pixels, channels, channels_out):
        return 0
    from vidaccel.kernels.conv import clip_conv_winograd as winograd

    return winograd.workspace_bytes(len(x), frames, pixels, channels + channels_out)


def _winograd_reason(rows: Tensor, weight: Tensor, largest: Tensor | None, bordered: bool) -> str | None:
    if largest is None:
        return "nobody says how large the numbers of its input may be"
    if rows.dtype not in WINOGRAD_DTYPES:
        return f"its roundings are small beside those of bfloat16 alone, rows is {rows.dtype}"
    if weight.shape[2:] != (3, 3, 3) or any(channels % VECTOR for channels in weight.shape[:2]):
        return f"it takes 3 x 3 x 3 taps and channels in steps of {VECTOR}, got {tuple(weight.shape)}"
    if not rows.is_contiguous():
        return "the kernel takes contiguous rows"
    if not rows.numel():
        return "there is nothing to multiply"
    return device_reason(rows) or tensors_reason(rows, weight)


def _shape(rows: Tensor, weight: Tensor, bordered: bool) -> tuple[int, ...]:
    height, width = rows.shape[2:4]
    if bordered:
        height, width = height - weight.shape[3] + 1, width - weight.shape[4] + 1
    return len(rows), rows.shape[1] - weight.shape[2] + 1, height, width, len(weight)


def _fake(rows: Tensor, weight: Tensor, largest: Tensor | None, bordered: bool) -> Tensor:
    return rows.new_empty(_shape(rows, weight, bordered))


def _costs(rows: Tensor, weight: Tensor, largest: Tensor | None, bordered: bool) -> Costs:
    samples, frames, height, width, channels = _shape(rows, weight, bordered)
    pixels = samples * frames * height * width
    return Costs(
        bytes=rows.nbytes + weight.nbytes + pixels * channels * rows.itemsize, flops=2 * pixels * weight.numel()
    )  # fmt: skip


def _parts(rows: Tensor, weight: Tensor, largest: Tensor | None, bordered: bool) -> Iterator[Part]:
    return _parts_of(slice(0, _shape(rows, weight, bordered)[1]), rows, weight, largest, bordered)


def _sample(
    number: int, rows: Tensor, weight: Tensor, largest: Tensor | None, bordered: bool
) -> Iterator[Part]:  # fmt: skip
    """Some frames of every clip, for large calls: their reference takes as long as they do."""
    frames = _shape(rows, weight, bordered)[1]
    step = triton.cdiv(frames, SAMPLES) if _costs(rows, weight, largest, bordered).flops >= SAMPLED_FLOPS else frames
    start = step * (number % triton.cdiv(frames, step))
    return _parts_of(slice(start, min(start + step, frames)), rows, weight, largest, bordered)


def _parts_of(
    frames: slice, rows: Tensor, weight: Tensor, largest: Tensor | None, bordered: bool
) -> Iterator[Part]:  # fmt: skip
    """Of these frames, clip by clip, as many as fit."""
    around = weight.shape[2] - 1
    for sample in range(len(rows)):
        for cut in cuts(frames.stop - frames.start, rows[0, 0].numel()):
            some = slice(frames.start + cut.start, frames.start + cut.stop)
            seen = rows[sample : sample + 1, some.start : some.stop + around]
            yield Part((seen, weight, largest, bordered), functools.partial(_part_of, sample, some))


def _part_of(sample: int, frames: slice, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs[0][sample : sample + 1, frames],)


def _validate(rows: Tensor, weight: Tensor, largest: Tensor | None, bordered: bool) -> None:
    require_floats("clip_conv", rows=rows, weight=weight)
    if rows.ndim != 5 or not rows.shape[-1]:
        raise ValueError(f"clip_conv: rows must be [B, F, H, W, C] with channels, got {tuple(rows.shape)}")
    if weight.ndim != 5 or weight.shape[1] != rows.shape[-1] or not weight.numel():
        raise ValueError(f"clip_conv: weight must be [C', {rows.shape[-1]}, T, Y, X], got {tuple(weight.shape)}")
    if weight.shape[3] % 2 == 0 or weight.shape[4] % 2 == 0:
        raise ValueError(f"clip_conv: weight must have odd sides, got {tuple(weight.shape)}")
    if rows.shape[1] < weight.shape[2]:
        raise ValueError(f"clip_conv: rows must have {weight.shape[2]} frames at least, got {rows.shape[1]}")
    if bordered and (rows.shape[2] < weight.shape[3] or rows.shape[3] < weight.shape[4]):
        raise ValueError(f"clip_conv: rows must bring a border, got {tuple(rows.shape)}")
    if largest is not None and (tuple(largest.shape), largest.dtype) != ((1,), torch.float32):
        raise ValueError(f"clip_conv: largest must be [1] and float32, got {tuple(largest.shape)} {largest.dtype}")


CLIP_CONV = Op(
    "clip_conv",
    reference=clip_conv_ref,
    implementations={
        "gluon": Implementation.bound(_bind_gluon, _gluon_reason, pays=_gluon_pays),
        "winograd": Implementation.bound(_bind_winograd, _winograd_reason, pays=_winograd_pays),
        "library": Implementation(_library),
    },
    fake=_fake,
    costs=_costs,
    parts=_parts,
    sample=_sample,
    measures=_measures,
    key=_key,
    validate=_validate,
)


def clip_conv(
    rows: Tensor, weight: Tensor, largest: Tensor | None = None, *, bordered: bool = False, impl: str | None = None
) -> Tensor:
    """``F.conv3d`` of rows, with zeros around each picture and none before or behind the clip, without a bias.

    Args:
        rows: ``[B, F + T - 1, H, W, C]``, fp16 / bf16 / fp32: the frames that a causal convolution looks back at first.
        weight: ``[C', C, T, Y, X]``, any float dtype; rounded to that of the rows first.
        largest: ``[1]``, fp32: no pixel of the rows is longer, as a vector of C numbers. None: nobody knows.
        bordered: The rows bring what lies around each picture, ``H + Y - 1`` and ``W + X - 1``, in place of zeros.
        impl: ``"gluon"``, ``"winograd"``, ``"library"`` or ``"torch"``; None lets the op choose.

    Returns:
        ``[B, F, H, W, C']`` in the dtype of the rows, contiguous.

    Raises:
        ValueError: A shape or a device is not as above; ``impl`` cannot run here.
        TypeError: A tensor is not floating-point.
    """
    out: Tensor = CLIP_CONV(rows, weight, largest, bordered, impl=impl)
    return out
