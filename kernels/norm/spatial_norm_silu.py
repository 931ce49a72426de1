"""GroupNorm of a clip, scaled and shifted pixel by pixel by its latents, and SiLU; written as a convolution's input.

    z = x + addend
    n = (z - mean) / sqrt(var + eps) * weight + bias        of every span of frames and every group of channels
    y = silu(n * nearest(gain) + nearest(shift)), with the last frames of a halo, or the first frame again, in front

This is the norm of CogVideoX's video decoder (``CogVideoXSpatialNorm3D``; Zheng et al., MoVQ,
https://arxiv.org/abs/2209.09002). Eager enlarges the latents to the size of the clip and convolves them there, twice
for each norm. A convolution of one pixel may as well come before the enlarging: so ``gain`` and ``shift`` come in the
size of the latents, and the kernel reads the nearest pixel of them, most of the time from a cache.

Rows ``[B, F, H, W, C]``. Statistics and their merge are ``group_norm_silu``'s launches. A program of the last launch
works on pixels of one frame, so that what depends on the frame (its source, its statistics, its frame of latents) is
read once. Statistics are summed in float32; z, n, its product, the sum and y are rounded where eager stores them.
Fidelity: math-exact. Bound by memory: two reads and one write; one read where the kernel before has computed the
statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.arguments import require_floats
from vidaccel.kernels.conv.padded_clip import Padding, pad_clip
from vidaccel.kernels.launch import Launch
from vidaccel.kernels.norm.channel_statistics import ChannelStatistics, locate
from vidaccel.kernels.norm.group_norm_silu import (
    CHANNELS,
    NO_STATISTICS,
    apply_silu,
    choose_apply_tiling,
    count_spans,
)
from vidaccel.kernels.norm.padded_group_norm import (
    padded_group_norm_ref,
    parts_of_groups,
    prepare_norms,
    require_norm,
)
from vidaccel.kernels.op import Costs, Implementation, Op, device_reason, scaled, tensors_reason

__all__ = ["SPATIAL_NORM_SILU", "spatial_norm_silu", "spatial_norm_silu_ref"]


def spatial_norm_silu_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    gain: Tensor,
    shift: Tensor,
    *,
    addend: Tensor | None = None,
    halo: Tensor | None = None,
    before: int = 0,
    first_span: int = 0,
    span: int = 0,
    silu: bool = True,
    statistics: ChannelStatistics | None = None,
) -> Tensor:
    """The specification, which computes the statistics itself. Pass float64 inputs for gold values."""
    n = padded_group_norm_ref(
        x, weight, bias, groups, eps, addend=addend, first_span=first_span, span=span, silu=False
    )  # fmt: skip
    y = n * _nearest(gain, x) + _nearest(shift, x)
    return pad_clip(F.silu(y) if silu else y, halo, _padding(before))


def _nearest(latents: Tensor, x: Tensor) -> Tensor:
    """Rows ``[B, Z, h, w, C]`` in the size of ``x``; of an odd number of frames, the first has its own latents."""
    frames, height, width = x.shape[1:4]
    apart = int(frames > 1 and frames % 2 == 1)
    at = _sources(latents.shape[1] - apart, frames - apart, x) + apart
    at = torch.cat([at.new_zeros(apart), at])
    lines, pixels = _sources(latents.shape[2], height, x), _sources(latents.shape[3], width, x)
    return latents[:, at][:, :, lines][:, :, :, pixels]


def _sources(small: int, large: int, x: Tensor) -> Tensor:
    """Which of ``small`` pixels each of ``large`` is a copy of, as F.interpolate has it."""
    numbers = torch.arange(small, device=x.device, dtype=torch.float32)
    return F.interpolate(numbers[None, None], size=large)[0, 0].long()


def _padding(before: int) -> Padding:
    return Padding(before, frame_mode="replicate")


@triton.jit(
    do_not_specialize=[
        "before", "frames", "height", "width", "chunk_rows", "latent_frames", "rate", "first_span", "span", "spans"
    ]
)  # fmt: skip
def _spatial_apply_kernel(
    x_ptr, addend_ptr, norm_ptr, bias_ptr, gain_ptr, shift_ptr, halo_ptr, y_ptr,
    channels, before, frames, height, width, chunk_rows, latent_frames, rate, first_span, span, spans,
    SCALE: tl.constexpr, HAS_ADDEND: tl.constexpr, HAS_HALO: tl.constexpr, SILU: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    dtype = y_ptr.dtype.element_ty
    area = height * width
    # backwards: the rows that the statistics read last are still in the L2 cache
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    target, chunk, first_channel = locate(pid, channels, area, chunk_rows, BLOCK_C)  # a frame of the padded clips
    sample = target // (before + frames)
    at = (target - sample * (before + frames)).to(tl.int32) - before
    frame = tl.maximum(at, 0)
    first_row = chunk * chunk_rows
    rows = tl.minimum(chunk_rows, area - first_row)
    offs_c = tl.arange(0, BLOCK_C)
    offs_r = tl.arange(0, BLOCK_R)
    x_ptr += ((sample * frames + frame) * area + first_row) * channels + first_channel
    y_ptr += (target * area + first_row) * channels + first_channel
    of_halo = False
    if HAS_HALO:
        of_halo = at < 0
        from_halo = halo_ptr + ((sample * before + at + before) * area + first_row) * channels + first_channel
        x_ptr = tl.where(of_halo, from_halo, x_ptr)
    apart = frames % 2
    latent = sample * latent_frames + tl.where(frame < apart, 0, apart + (frame - apart) // rate)
    latent_width = width // SCALE
    latent_start = latent * (height // SCALE * latent_width) * channels + first_channel
    gain_ptr += latent_start
    shift_ptr += latent_start
    which = tl.where(frame < first_span, 0, 1 + (frame - first_span) // span)
    norm_ptr += (sample * spans + which) * 2 * channels + first_channel
    mean = tl.load(norm_ptr + offs_c)
    scale = tl.load(norm_ptr + channels + offs_c)
    bias = tl.load(bias_ptr + first_channel + offs_c).to(tl.float32)
    if HAS_ADDEND:
        addend = tl.load(addend_ptr + first_channel + offs_c).to(tl.float32)
    for step in tl.range(0, tl.cdiv(rows, BLOCK_R), num_stages=STAGES):
        row = step * BLOCK_R + offs_r
        mask = (row < rows)[:, None]
        x = tl.load(x_ptr + row[:, None] * channels + offs_c, mask=mask, other=0.0)
        z = x.to(tl.float32)  # [BLOCK_R, BLOCK_C]
        if HAS_ADDEND:
            z = (z + addend).to(dtype).to(tl.float32)
        pixel = first_row + row
        line = pixel // width
        near = line // SCALE * latent_width + (pixel - line * width) // SCALE
        near = near[:, None] * channels + offs_c
        gain = tl.load(gain_ptr + near, mask=mask, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + near, mask=mask, other=0.0).to(tl.float32)
        y = ((z - mean) * scale + bias).to(dtype).to(tl.float32)
        y = ((y * gain).to(dtype).to(tl.float32) + shift).to(dtype)
        if SILU:
            y = apply_silu(y.to(tl.float32), dtype).to(dtype)
        if HAS_HALO:
            y = tl.where(of_halo, x, y)
        tl.store(y_ptr + row[:, None] * channels + offs_c, y, mask=mask)


class _Call(NamedTuple):
    """The arguments of a call; ``first_span`` and ``span`` are at least 1."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    groups: int
    eps: float
    gain: Tensor
    shift: Tensor
    addend: Tensor | None
    halo: Tensor | None
    before: int
    first_span: int
    span: int
    silu: bool
    parts: Tensor | None
    segment_rows: int
    chunk_rows: int

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.x, self.weight, self.bias, self.gain, self.shift, self.addend, self.halo, self.parts

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result."""
        return _padding(self.before).shape(self.x.shape)

    @property
    def rate(self) -> int:
        """How many frames get the same frame of latents, but for the first of an odd number."""
        apart = self.x.shape[1] % 2
        return max(self.x.shape[1] - apart, 1) // max(self.gain.shape[1] - apart, 1)

    @property
    def scale(self) -> int:
        """How many pixels of a line get the same pixel of latents."""
        return self.x.shape[3] // max(self.gain.shape[3], 1)


def _bind(*args: Any) -> Callable[..., Tensor]:
    call = _Call(*args)
    shape, (_, frames, height, width, channels) = call.shape, call.x.shape
    known = None if call.parts is None else call.chunk_rows
    norms_of = prepare_norms(
        call.x.shape, call.groups, call.eps, call.first_span, call.span, call.addend is not None, known
    )
    tiling = choose_apply_tiling(channels & -channels)
    apply = Launch(
        _spatial_apply_kernel, (tiling.programs(shape[0] * shape[1], height * width, channels),),
        channels, call.before, frames, height, width, tiling.chunk_rows,
        call.gain.shape[1], call.rate, call.first_span, call.span, count_spans(frames, call.first_span, call.span),
        SCALE=call.scale, HAS_ADDEND=call.addend is not None, HAS_HALO=call.halo is not None, SILU=call.silu,
        BLOCK_R=tiling.block_r, BLOCK_C=tiling.block_c, STAGES=tiling.stages,
        num_warps=tiling.num_warps, enable_fp_fusion=False,  # eager rounds the product before it adds the shift
    )  # fmt: skip
    ready = all(t is None or t.is_contiguous() for t in call.tensors)

    def run(*args: Any) -> Tensor:
        tensors: Any = _Call(*args).tensors
        if not ready:
            tensors = [None if t is None else t.contiguous() for t in tensors]
        x, weight, bias, gain, shift, addend, halo, parts = tensors
        y = x.new_empty(shape)
        apply(x, addend, norms_of(x, weight, addend, parts), bias, gain, shift, halo, y)
        return y

    return run


def _reference(*args: Any) -> Tensor:
    call = _Call(*args)
    return spatial_norm_silu_ref(
        *call[:7], addend=call.addend, halo=call.halo, before=call.before,
        first_span=call.first_span, span=call.span, silu=call.silu,
    )  # fmt: skip


def _fake(*args: Any) -> Tensor:
    call = _Call(*args)
    return call.x.new_empty(call.shape)


def _reason(*args: Any) -> str | None:
    call = _Call(*args)
    x, gain = call.x, call.gain
    _, frames, height, width, channels = x.shape
    if channels % CHANNELS:
        return f"the kernels take C divisible by {CHANNELS}, got C={channels}"
    if x.numel() == 0:
        return "there is nothing to normalise"
    if mixed := [t.dtype for t in (gain, call.shift, call.halo) if t is not None and t.dtype != x.dtype]:
        return f"gain, shift and halo must have the dtype of x, {x.dtype}, got {mixed[0]}"
    apart, scale = frames % 2, call.scale
    enlarged = apart + call.rate * (gain.shape[1] - apart), scale * gain.shape[2], scale * gain.shape[3]
    if enlarged != (frames, height, width):
        return f"the kernel enlarges by whole numbers, the same for both sides, not {tuple(gain.shape)} to {x.shape}"
    return device_reason(x) or tensors_reason(x, *call.tensors[1:])


def _costs(*args: Any) -> Costs:
    call = _Call(*args)
    beside = sum(t.nbytes for t in (call.gain, call.shift, call.halo) if t is not None)
    written = math.prod(call.shape) * call.x.itemsize
    return Costs(bytes=call.x.nbytes * (1 + (call.parts is None)) + beside + written)


def _validate(*args: Any) -> None:
    call = _Call(*args)
    name = "spatial_norm_silu"
    require_floats(
        name, x=call.x, weight=call.weight, bias=call.bias, gain=call.gain, shift=call.shift, addend=call.addend,
        halo=call.halo,
    )  # fmt: skip
    require_norm(name, call, _padding(call.before))
    samples, channels, gain = len(call.x), call.x.shape[-1], call.gain.shape
    if len(gain) != 5 or (gain[0], gain[4]) != (samples, channels) or not math.prod(gain[1:4]):
        raise ValueError(f"{name}: gain must be [{samples}, Z, h, w, {channels}], got {tuple(gain)}")
    if call.shift.shape != gain:
        raise ValueError(f"{name}: shift must be {tuple(gain)}, as gain is, got {tuple(call.shift.shape)}")


SPATIAL_NORM_SILU = Op(
    "spatial_norm_silu",
    reference=_reference,
    implementations={"triton": Implementation.bound(_bind, _reason, _Call)},
    fake=_fake,
    costs=_costs,
    parts=lambda *args: parts_of_groups(_Call(*args), "x", "gain", "shift", "halo"),
    validate=_validate,
    small=lambda *args: (*scaled(0, 7)(*args)[:-3], *NO_STATISTICS),  # x, addend
    screen=3.0,  # n * gain and shift may cancel, and PyTorch rounds the mean and the deviation to the dtype of x
)


def spatial_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    gain: Tensor,
    shift: Tensor,
    *,
    addend: Tensor | None = None,
    halo: Tensor | None = None,
    before: int = 0,
    first_span: int = 0,
    span: int = 0,
    silu: bool = True,
    statistics: ChannelStatistics | None = None,
    impl: str | None = None,
) -> Tensor:
    """``cat([halo, F.silu(F.group_norm(x + addend, ...) * nearest(gain) + nearest(shift))], dim=1)`` of rows.

    ``nearest`` is ``F.interpolate`` to the frames and sides of x. Of an odd number of frames, the first is enlarged
    from the first of the latents, and the others from the others.

    Args:
        x: ``[B, F, H, W, C]``, fp16 / bf16 / fp32; read through a contiguous copy if it is not contiguous.
        weight: ``[C]``, any float dtype.
        bias: ``[C]``, any float dtype.
        groups: Number of groups; must divide ``C``.
        eps: Added to the variance.
        gain: ``[B, Z, h, w, C]`` in ``x.dtype``.
        shift: As ``gain``.
        addend: ``[C]``, added to x before the norm (the bias of the convolution before); rounded to ``x.dtype`` first.
        halo: ``[B, before, H, W, C]``, the frames that come before; None: the first frame of y, repeated.
        before: How many those are.
        first_span: How many frames at the start of a clip have their statistics in common; 0: ``span`` of them.
        span: The same for every span of frames behind those; the last may be shorter. 0: all frames, for both.
        silu: Whether SiLU follows.
        statistics: Of x, every frame of which is a segment (``conv_epilogue_and_statistics``). None: computed here.
            Only without ``addend``.
        impl: ``"triton"`` or ``"torch"``; None lets the op choose.

    Returns:
        ``[B, before + F, H, W, C]`` in ``x.dtype``, contiguous.

    Raises:
        ValueError: ``groups`` does not divide ``C``; a shape is not as above; there are statistics and an addend;
            ``impl`` cannot run here.
        TypeError: A tensor is not floating-point.
    """
    if addend is not None:
        addend = addend.to(x.dtype)
    whole = max(x.shape[1], 1) if x.ndim == 5 else 1
    spans = (first_span or span, span) if span else (whole, whole)
    return SPATIAL_NORM_SILU(
        x, weight, bias, groups, eps, gain, shift, addend, halo, before, *spans, silu,
        *(statistics or NO_STATISTICS), impl=impl,
    )  # fmt: skip
