"""Mean and spread of every channel in every frame of a clip, chunk of rows by chunk of rows: a GroupNorm's first pass.

Where the frames of a clip lie on several GPUs, a norm over all of them needs the statistics of all: each GPU computes
those of its own, they are gathered, and ``group_norm_silu`` takes them. See ``channel_statistics.py`` for how they are
summed. Fidelity: math-exact. Bound by memory: one read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vidaccel.kernels.arguments import require_floats
from vidaccel.kernels.channels_last import channels_last
from vidaccel.kernels.check import Part, cuts
from vidaccel.kernels.norm.channel_statistics import (
    ChannelStatistics,
    channel_statistics_ref,
    choose_tiling,
    empty_parts,
    frames_and_rows,
    moments,
)
from vidaccel.kernels.norm.group_norm_silu import CHANNELS, chunk_stats_launch
from vidaccel.kernels.op import Costs, Implementation, Op, device_reason, scaled, tensors_reason

__all__ = ["FRAME_STATISTICS", "frame_statistics", "frame_statistics_ref"]


def frame_statistics_ref(x: Tensor, shift: Tensor | None, chunk_rows: int) -> Tensor:
    """The specification. Pass float64 inputs for gold values."""
    if shift is not None:
        x = x + shift.to(x.dtype).mT[..., None, None]
    return channel_statistics_ref(x, chunk_rows)


def _bind(x: Tensor, shift: Tensor | None, chunk_rows: int) -> Callable[..., Tensor]:
    channels, (segments, rows) = x.shape[1], frames_and_rows(x.shape)
    tiling = choose_tiling(segments, rows, channels, channels & -channels)._replace(chunk_rows=chunk_rows)
    stride = None if shift is None else 0 if shift.stride()[:2] == (0, 0) else channels
    launch = chunk_stats_launch(segments, rows, channels, channels, stride, tiling)

    def run(x: Tensor, shift: Tensor | None, chunk_rows: int) -> Tensor:
        parts = empty_parts(x, segments, rows, chunk_rows, channels)
        shift = shift.contiguous() if shift is not None and (stride or shift.stride(2) != 1) else shift
        launch(channels_last(x), None, shift, parts)
        return parts

    return run


def _fake(x: Tensor, shift: Tensor | None, chunk_rows: int) -> Tensor:
    segments, rows = frames_and_rows(x.shape)
    return x.new_empty(segments, -(-rows // chunk_rows), 2, x.shape[1], dtype=torch.float32)


def _reason(x: Tensor, shift: Tensor | None, chunk_rows: int) -> str | None:
    if x.shape[1] % CHANNELS:
        return f"the kernels take C divisible by {CHANNELS}, got C={x.shape[1]}"
    if x.numel() == 0:
        return "there is nothing to normalise"
    return device_reason(x) or tensors_reason(x, shift)


def _validate(x: Tensor, shift: Tensor | None, chunk_rows: int) -> None:
    require_floats("frame_statistics", x=x, shift=shift)
    if x.ndim != 5:
        raise ValueError(f"frame_statistics: x must be [N, C, F, H, W], got {tuple(x.shape)}")
    expected = len(x), x.shape[2], x.shape[1]
    if shift is not None and shift.shape != expected:
        raise ValueError(f"frame_statistics: shift must be {expected}, got {tuple(shift.shape)}")


def _parts(x: Tensor, shift: Tensor | None, chunk_rows: int) -> Iterator[Part]:
    """Some frames of a sample."""
    frames, rows = x.shape[2], x.shape[3] * x.shape[4]
    seen = functools.partial(_seen, chunk_rows, x.dtype)
    for n in range(len(x)):
        for f in cuts(frames, x.shape[1] * rows):
            some = None if shift is None else shift[n : n + 1, f]
            segments = slice(n * frames + f.start, n * frames + f.stop)
            yield Part((x[n : n + 1, :, f], some, chunk_rows), functools.partial(_seen_of, segments, seen), seen)


def _seen(chunk_rows: int, dtype: torch.dtype, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (parts,) = outputs
    _, *found = moments(chunk_rows, dtype, (parts, parts))
    return tuple(found)


def _seen_of(segments: slice, seen: Callable[..., tuple[Tensor, ...]], outputs: tuple[Tensor, ...]) -> Any:
    return seen(tuple(out[segments] for out in outputs))


FRAME_STATISTICS = Op(
    "frame_statistics",
    reference=frame_statistics_ref,
    implementations={"triton": Implementation.bound(_bind, _reason)},
    fake=_fake,
    costs=lambda x, shift, chunk_rows: Costs(bytes=x.nbytes),
    parts=_parts,
    validate=_validate,
    small=scaled(0, 1),
)


def frame_statistics(
    x: Tensor, *, shift: Tensor | None = None, most_frames: int = 0, impl: str | None = None
) -> ChannelStatistics:
    """Mean and sum of squared deviations of the channels of ``x + shift``, every frame of which is a segment.

    Args:
        x: ``[N, C, F, H, W]``, fp16 / bf16 / fp32; read as it is in channels-last memory, else copied into that first.
        shift: ``[N, F, C]``, or None; rounded to ``x.dtype`` first.
        most_frames: Of a sample, on whichever rank has most: the chunks are such as would be chosen for that many, the
            same for all. 0: those of x.
        impl: ``"triton"`` or ``"torch"``; None lets the op choose.

    Returns:
        ``parts`` ``[N * F, chunks, 2, C]``, float32, and the rows of a segment and of a chunk.

    Raises:
        ValueError: A shape is not as above; ``impl`` cannot run here.
        TypeError: A tensor is not floating-point.
    """
    chunk_rows, rows = 1, math.prod(x.shape[3:])
    if x.ndim == 5 and x.numel():
        channels = x.shape[1]
        chunk_rows = choose_tiling(
            len(x) * (most_frames or x.shape[2]), rows, channels, channels & -channels
        ).chunk_rows  # fmt: skip
    shift = None if shift is None else shift.to(x.dtype)
    parts = FRAME_STATISTICS(x, shift, chunk_rows, impl=impl)
    return ChannelStatistics(parts.float(), rows, chunk_rows)
