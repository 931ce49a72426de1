"""GroupNorm and SiLU of a clip, written as the input of a convolution, its padding included.

    z = x + addend
    n = (z - mean) / sqrt(var + eps) * weight + bias        of every span of frames and every group of channels
    y = pad(silu(n))

Rows ``[B, F, H, W, C]``. Statistics are those of the whole clip, or of spans of its frames: of each frame (Mochi), or
of the frames that stock decodes at once (CogVideoX). The convolution behind wants frames in front, or pixels around
each: eager makes them by ``F.pad`` and ``torch.cat``; here each pixel of the padded clip is computed from the one that
it repeats (``padded_clip``). Statistics and their merge are ``group_norm_silu``'s launches. A program of the last
launch works on pixels of one padded frame, so that what depends on the frame (its source, its statistics) is read once.

Statistics are summed in float32; z and n are rounded to the input dtype in registers, where eager stores them.
Fidelity: math-exact. Bound by memory: two reads and one write; one read where the kernel before has computed the
statistics.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.arguments import require_floats
from vidaccel.kernels.check import PICTURES, Part, cuts, pictures_apart
from vidaccel.kernels.conv.padded_clip import NO_PADDING, Padding, pad_clip, padded_pixel, require_padding
from vidaccel.kernels.launch import Launch
from vidaccel.kernels.norm.channel_statistics import ChannelStatistics, are_of_dtype, choose_tiling, empty_parts, locate
from vidaccel.kernels.norm.group_norm_silu import (
    CHANNELS,
    NO_STATISTICS,
    apply_silu,
    choose_apply_tiling,
    chunk_stats_launch,
    count_spans,
    group_norm_ref,
    group_stats_launch,
)
from vidaccel.kernels.op import Costs, Implementation, Op, device_reason, scaled, tensors_reason

__all__ = [
    "PADDED_GROUP_NORM",
    "padded_group_norm",
    "padded_group_norm_ref",
    "parts_of_groups",
    "prepare_norms",
    "require_norm",
]


def padded_group_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    addend: Tensor | None = None,
    halo: Tensor | None = None,
    padding: Padding = NO_PADDING,
    first_span: int = 0,
    span: int = 0,
    silu: bool = True,
    statistics: ChannelStatistics | None = None,
) -> Tensor:
    """The specification, which computes the statistics itself. Pass float64 inputs for gold values."""
    z = x if addend is None else x + addend.to(x.dtype)
    first_span, span = _spans(x.shape[1], first_span, span)
    last = first_span + max(x.shape[1] - first_span, 0) // span * span  # frames from there on fill no span
    normed = []
    for some, length in ((z[:, :first_span], first_span), (z[:, first_span:last], span), (z[:, last:], span)):
        if some.shape[1]:
            spans = some.unflatten(1, (-1, min(length, some.shape[1])))
            clips = spans.flatten(0, 1).permute(0, 4, 1, 2, 3)  # of every span, all at once
            n = group_norm_ref(clips, weight, bias, groups, eps)
            n = (F.silu(n, inplace=True) if silu else n).permute(0, 2, 3, 4, 1)
            normed.append(n.unflatten(0, spans.shape[:2]).flatten(1, 2))
    return pad_clip(torch.cat(normed, dim=1) if normed else z, halo, padding)


def _spans(frames: int, first_span: int, span: int) -> tuple[int, int]:
    """Of all frames together where ``span`` is 0."""
    return (first_span or span, span) if span else (max(frames, 1),) * 2


@triton.jit(do_not_specialize=["before", "frames", "padded_frames", "height", "width", "first_span", "span", "spans"])
def _padded_apply_kernel(
    x_ptr, addend_ptr, norm_ptr, bias_ptr, halo_ptr, y_ptr,
    channels, before, frames, padded_frames, height, width, chunk_rows, first_span, span, spans,
    BORDER: tl.constexpr, FRAME_MODE: tl.constexpr, PIXEL_MODE: tl.constexpr,
    HAS_ADDEND: tl.constexpr, HAS_HALO: tl.constexpr, SILU: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    dtype = y_ptr.dtype.element_ty
    plane = (height + 2 * BORDER) * (width + 2 * BORDER)
    # backwards: the rows that the statistics read last are still in the L2 cache
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    target, chunk, first_channel = locate(pid, channels, plane, chunk_rows, BLOCK_C)  # a frame of the padded clips
    sample = target // padded_frames
    frame = (target - sample * padded_frames).to(tl.int32) - before
    clip_frame = tl.minimum(tl.maximum(frame, 0), frames - 1)
    frame_size = (height * width).to(tl.int64) * channels
    x_ptr += (sample * frames + clip_frame) * frame_size + first_channel
    there = True
    if FRAME_MODE == "zeros":
        there = (frame >= 0) & (frame < frames)
    of_halo = False
    if HAS_HALO:
        of_halo = frame < 0
        there = there | of_halo
        from_halo = halo_ptr + (sample * before + frame + before) * frame_size + first_channel
        x_ptr = tl.where(of_halo, from_halo, x_ptr)

    offs_c = tl.arange(0, BLOCK_C)
    which = tl.where(clip_frame < first_span, 0, 1 + (clip_frame - first_span) // span)
    norm_ptr += (sample * spans + which) * 2 * channels + first_channel
    mean = tl.load(norm_ptr + offs_c)
    scale = tl.load(norm_ptr + channels + offs_c)
    bias = tl.load(bias_ptr + first_channel + offs_c).to(tl.float32)
    if HAS_ADDEND:
        addend = tl.load(addend_ptr + first_channel + offs_c).to(tl.float32)
    first_row = chunk * chunk_rows
    rows = tl.minimum(chunk_rows, plane - first_row)
    y_ptr += (target * plane + first_row) * channels + first_channel
    for step in tl.range(0, tl.cdiv(rows, BLOCK_R), num_stages=STAGES):
        row = step * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = row < rows
        pixel, within = padded_pixel(first_row + row, height, width, BORDER, PIXEL_MODE)
        read = mask & there
        if PIXEL_MODE == "zeros":
            read = read & within
        x = tl.load(x_ptr + pixel.to(tl.int64)[:, None] * channels + offs_c, mask=read[:, None], other=0.0)
        z = x.to(tl.float32)  # [BLOCK_R, BLOCK_C]
        if HAS_ADDEND:
            z = (z + addend).to(dtype).to(tl.float32)
        y = ((z - mean) * scale + bias).to(dtype)
        if SILU:
            y = apply_silu(y.to(tl.float32), dtype).to(dtype)
        if HAS_HALO:
            y = tl.where(of_halo, x, y)
        if (FRAME_MODE == "zeros") or (PIXEL_MODE == "zeros"):
            y = tl.where(read[:, None], y, 0.0)
        tl.store(y_ptr + row[:, None] * channels + offs_c, y.to(dtype), mask=mask[:, None])


class _Call(NamedTuple):
    """The arguments of a call; ``first_span`` and ``span`` are at least 1."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    groups: int
    eps: float
    addend: Tensor | None
    halo: Tensor | None
    before: int
    after: int
    border: int
    frame_mode: str
    pixel_mode: str
    first_span: int
    span: int
    silu: bool
    parts: Tensor | None
    segment_rows: int
    chunk_rows: int

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.x, self.weight, self.bias, self.addend, self.halo, self.parts

    @property
    def padding(self) -> Padding:
        return Padding(self.before, self.after, self.border, self.frame_mode, self.pixel_mode)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result."""
        return self.padding.shape(self.x.shape)


def prepare_norms(
    shape: Sequence[int],
    groups: int,
    eps: float,
    first_span: int,
    span: int,
    has_addend: bool,
    known_chunk_rows: int | None,
) -> Callable[..., Tensor]:
    """What computes ``[B, spans, 2, C]``, the mean and the scale of every channel in every span of frames.

    It takes x ``[B, F, H, W, C]`` of ``shape``, weight, addend and, with ``known_chunk_rows``, the parts of statistics
    of every frame; all contiguous. float32.
    """
    samples, frames, height, width, channels = shape
    segments, rows = samples * frames, height * width
    tiling = choose_tiling(segments, rows, channels, channels & -channels)
    chunk_stats = chunk_stats_launch(segments, rows, channels, channels, 0 if has_addend else None, tiling)
    chunk_rows = known_chunk_rows or tiling.chunk_rows
    group_stats = group_stats_launch(samples, channels, groups, eps, frames, rows, chunk_rows, first_span, span)
    norms_shape = samples, count_spans(frames, first_span, span), 2, channels

    def compute(x: Tensor, weight: Tensor, addend: Tensor | None, parts: Tensor | None = None) -> Tensor:
        if parts is None:
            parts = empty_parts(x, segments, rows, chunk_rows, channels)
            chunk_stats(x, None, addend, parts)
        norms = torch.empty(norms_shape, dtype=torch.float32, device=x.device)
        group_stats(parts, weight, norms)
        return norms

    return compute


def _bind(*args: Any) -> Callable[..., Tensor]:
    call = _Call(*args)
    shape, (_, frames, height, width, channels) = call.shape, call.x.shape
    known = None if call.parts is None else call.chunk_rows
    norms_of = prepare_norms(
        call.x.shape, call.groups, call.eps, call.first_span, call.span, call.addend is not None, known
    )
    tiling = choose_apply_tiling(channels & -channels)
    apply = Launch(
        _padded_apply_kernel, (tiling.programs(shape[0] * shape[1], shape[2] * shape[3], channels),),
        channels, call.before, frames, shape[1], height, width, tiling.chunk_rows,
        call.first_span, call.span, count_spans(frames, call.first_span, call.span),
        BORDER=call.border, FRAME_MODE=call.frame_mode, PIXEL_MODE=call.pixel_mode,
        HAS_ADDEND=call.addend is not None, HAS_HALO=call.halo is not None, SILU=call.silu,
        BLOCK_R=tiling.block_r, BLOCK_C=tiling.block_c, STAGES=tiling.stages,
        num_warps=tiling.num_warps,
    )  # fmt: skip
    ready = all(t is None or t.is_contiguous() for t in call.tensors)

    def run(*args: Any) -> Tensor:
        x, weight, bias, addend, halo, parts = _Call(*args).tensors
        if not ready:
            x, weight, bias, addend, halo, parts = (
                None if t is None else t.contiguous() for t in (x, weight, bias, addend, halo, parts)
            )
        assert x is not None and weight is not None
        y = x.new_empty(shape)
        apply(x, addend, norms_of(x, weight, addend, parts), bias, halo, y)
        return y

    return run


def _reference(*args: Any) -> Tensor:
    call = _Call(*args)
    return padded_group_norm_ref(
        call.x, call.weight, call.bias, call.groups, call.eps, addend=call.addend, halo=call.halo,
        padding=call.padding, first_span=call.first_span, span=call.span, silu=call.silu,
    )  # fmt: skip


def _fake(*args: Any) -> Tensor:
    call = _Call(*args)
    return call.x.new_empty(call.shape)


def _reason(*args: Any) -> str | None:
    call = _Call(*args)
    channels = call.x.shape[-1]
    if channels % CHANNELS:
        return f"the kernels take C divisible by {CHANNELS}, got C={channels}"
    if call.x.numel() == 0:
        return "there is nothing to normalise"
    if call.halo is not None and call.halo.dtype != call.x.dtype:
        return f"halo must have the dtype of x, {call.x.dtype}, got {call.halo.dtype}"
    return device_reason(call.x) or tensors_reason(call.x, *call.tensors[1:])


def _costs(*args: Any) -> Costs:
    call = _Call(*args)
    written = math.prod(call.shape) * call.x.itemsize
    halo = 0 if call.halo is None else call.halo.nbytes
    return Costs(bytes=call.x.nbytes * (1 + (call.parts is None)) + halo + written)


def parts_of_groups(call: Any, *clips: str) -> Iterator[Part]:
    """Some groups of some samples of a norm's call, statistics computed anew; ``clips`` are its ``[B, ..., C]``."""
    x, width = call.x, call.x.shape[-1] // call.groups
    pixels = math.prod(x.shape[1:4])
    for n in cuts(len(x), x.shape[-1] * pixels, PICTURES):
        for some in cuts(call.groups, (n.stop - n.start) * width * pixels, PICTURES):
            c = slice(some.start * width, some.stop * width)
            cut = {name: None if (clip := getattr(call, name)) is None else clip[n, ..., c] for name in clips}
            part = call._replace(
                **cut,
                weight=call.weight[c],
                bias=call.bias[c],
                groups=some.stop - some.start,
                addend=None if call.addend is None else call.addend[c],
                parts=None,
            )
            yield Part(tuple(part), functools.partial(_part_of, n, c), pictures_apart)


def _part_of(samples: slice, channels: slice, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return pictures_apart(tuple(out[samples, ..., channels] for out in outputs))


def require_norm(name: str, call: Any, padding: Padding) -> None:
    """Raise if the arguments of a norm's call do not fit one another; ``padding`` lies around its result."""
    x = call.x
    if x.ndim != 5 or not x.shape[-1]:
        raise ValueError(f"{name}: x must be [B, F, H, W, C] with channels, got {tuple(x.shape)}")
    frames, height, width, channels = x.shape[1:]
    if call.groups < 1 or channels % call.groups:
        raise ValueError(f"{name}: groups={call.groups} does not divide C={channels} (x is {tuple(x.shape)})")
    for key, vector in (("weight", call.weight), ("bias", call.bias), ("addend", call.addend)):
        if vector is not None and vector.shape != (channels,):
            raise ValueError(f"{name}: {key} must be [{channels}], got {tuple(vector.shape)}")
    if call.first_span < 1 or call.span < 1:
        raise ValueError(f"{name}: spans must have frames, got first_span={call.first_span}, span={call.span}")
    require_padding(name, x.shape, padding, call.halo)
    if call.parts is None:
        return
    if call.addend is not None:
        raise ValueError(f"{name}: statistics are of x alone, and do not serve with an addend")
    rows = f"segment_rows={call.segment_rows}, chunk_rows={call.chunk_rows}"
    if call.segment_rows != height * width or call.chunk_rows < 1:
        raise ValueError(f"{name}: statistics must be of frames, {height * width} rows each, got {rows}")
    expected = len(x) * frames, triton.cdiv(call.segment_rows, call.chunk_rows), 2, channels
    if call.parts.shape != expected or not are_of_dtype(call.parts, x):
        raise ValueError(
            f"{name}: parts of statistics with {rows} must be {expected} torch.float32, "
            f"got {tuple(call.parts.shape)} {call.parts.dtype}"
        )


def _validate(*args: Any) -> None:
    call = _Call(*args)
    require_floats(
        "padded_group_norm", x=call.x, weight=call.weight, bias=call.bias, addend=call.addend, halo=call.halo
    )  # fmt: skip
    require_norm("padded_group_norm", call, call.padding)


PADDED_GROUP_NORM = Op(
    "padded_group_norm",
    reference=_reference,
    implementations={"triton": Implementation.bound(_bind, _reason, _Call)},
    fake=_fake,
    costs=_costs,
    parts=lambda *args: parts_of_groups(_Call(*args), "x", "halo"),
    validate=_validate,
    small=lambda *args: (*scaled(0, 5)(*args)[:-3], *NO_STATISTICS),  # x, addend
)


def padded_group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    addend: Tensor | None = None,
    halo: Tensor | None = None,
    padding: Padding = NO_PADDING,
    first_span: int = 0,
    span: int = 0,
    silu: bool = True,
    statistics: ChannelStatistics | None = None,
    impl: str | None = None,
) -> Tensor:
    """``pad_clip(F.silu(F.group_norm(x + addend, groups, weight, bias, eps)), halo, padding)`` of rows of channels.

    Args:
        x: ``[B, F, H, W, C]``, fp16 / bf16 / fp32; read through a contiguous copy if it is not contiguous.
        weight: ``[C]``, any float dtype.
        bias: ``[C]``, any float dtype.
        groups: Number of groups; must divide ``C``.
        eps: Added to the variance.
        addend: ``[C]``, added to x before the norm (the bias of the convolution before); rounded to ``x.dtype`` first.
        halo: ``[B, padding.before, H, W, C]``, the frames that come before, as ``y`` has them; None: as ``padding``
            says.
        padding: What lies around the clip.
        first_span: How many frames at the start of a clip have their statistics in common; 0: ``span`` of them.
        span: The same for every span of frames behind those; the last may be shorter. 0: all frames, for both.
        silu: Whether SiLU follows the norm.
        statistics: Of x, every frame of which is a segment (``conv_epilogue_and_statistics``). None: computed here.
            Only without ``addend``.
        impl: ``"triton"`` or ``"torch"``; None lets the op choose.

    Returns:
        ``padding.shape(x.shape)`` in ``x.dtype``, contiguous.

    Raises:
        ValueError: ``groups`` does not divide ``C``; a shape is not as above; there are statistics and an addend;
            ``impl`` cannot run here.
        TypeError: A tensor is not floating-point.
    """
    if addend is not None:
        addend = addend.to(x.dtype)
    frames = x.shape[1] if x.ndim == 5 else 0
    return PADDED_GROUP_NORM(
        x, weight, bias, groups, eps, addend, halo, *padding, *_spans(frames, first_span, span), silu,
        *(statistics or NO_STATISTICS), impl=impl,
    )  # fmt: skip
