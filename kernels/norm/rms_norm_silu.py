"""RMS norm over the channels of a pixel, and SiLU, written as the input of a convolution, its padding included.

    z = (x + bias) + (residual + residual_bias)
    n = z / max(||z||_2 over C, eps) * sqrt(C) * gamma      kind "normalize"
        z / sqrt(mean(z^2 over C) + eps) * gamma            kind "mean"
        z                                                   kind "none", for a convolution without a norm before it
    y = pad(silu(n * (1 + scale) + shift))

A causal convolution looks two frames back: at zeros, at the first frame once more, or at the last frames of the chunk
before (``halo``). Others want a frame at either end, or pixels around each. Eager makes them by ``F.pad``,
``torch.cat`` and ``clone``; here each pixel of the padded clip is computed from the one that it repeats
(``padded_clip``). The same pass adds what the convolution before has left out: its bias and the residual. The sum is
stored if it is asked for, in place of x if x may be overwritten and no pixel of it is read twice.

Channels-last clips ``[B, F, H, W, C]``. All is float32 between loads and stores, but for the two sums, which are
rounded as in eager: z has its bits. Eager also stores the quotient, the products and the shift; to round there as well
takes as many instructions as the rest, and memory would wait for them. Fidelity: math-exact. Bound by memory: one or
two reads and writes, where eager makes 15 passes and more. ``"normalize"`` is the norm of diffusers' ``WanRMS_norm``
and ``HunyuanVideo15RMS_norm``, ``"mean"`` that of its ``RMSNorm``, and of LTX-2's ``PerChannelRMSNorm``, which rounds
the mean square too.

Behind an upsampler x may be the cells that its convolution leaves, and the residual a clip half as large whose numbers
serve several pixels (``enlarged_clip``): the pixels are read where they are, and z is the first that is put into place.

With ``out_dtype``, a convolution of a float32 clip may work on 16-bit numbers: y, and x if it is such a convolution's
output, have that dtype, while sums and norm are float32 all the way. ``x_scale`` says how many times too large x is.
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
from vidaccel.kernels.check import Part, pictures_apart, pieces
from vidaccel.kernels.conv.enlarged_clip import enlarged, pixel_in_cells, pixel_in_shortcut, rows_of_cells, small_frames
from vidaccel.kernels.conv.padded_clip import NO_PADDING, Padding, pad_clip, padded_lines, padded_tiles, require_padding
from vidaccel.kernels.launch import Launch
from vidaccel.kernels.norm.group_norm_silu import apply_silu
from vidaccel.kernels.op import DTYPES, Costs, Implementation, Op, device_reason, scaled, tensors_reason

__all__ = ["RMS_NORM_SILU", "choose_tiling", "compile_ahead", "rms_norm_silu", "rms_norm_silu_ref"]

KINDS = ("normalize", "mean", "none")
EPS = 1e-12  # the least norm, that of F.normalize


def rms_norm_silu_ref(
    x: Tensor,
    gamma: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    residual_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    halo: Tensor | None = None,
    x_scale: Tensor | None = None,
    factor_t: int = 0,
    skip: int = 0,
    padding: Padding = NO_PADDING,
    kind: str = "normalize",
    eps: float = EPS,
    silu: bool = True,
    keep: bool = True,
    inplace: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification; nothing happens in place. Pass float64 inputs for gold values, which stay float64."""
    if out_dtype is not None:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.ndim == 6:
        x = rows_of_cells(x)
    z = x if x_scale is None else x / x_scale.to(x.dtype)
    z = z if bias is None else z + bias.to(x.dtype)
    if residual is not None and factor_t:
        residual = enlarged(residual, x.shape[-1], x.shape[1], factor_t, skip)
    if residual is not None:
        z = z + (residual if residual_bias is None else residual + residual_bias.to(x.dtype))
    wide = z.float() if z.dtype.itemsize == 2 else z
    if kind == "normalize":
        y = F.normalize(wide, dim=-1, eps=eps).to(x.dtype) * x.shape[-1] ** 0.5
    elif kind == "none":
        y = z
    else:
        y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    if gamma is not None:
        y = y * gamma.to(x.dtype)
    if scale is not None and shift is not None:
        scale, shift = (vector.to(x.dtype)[:, None, None, None] for vector in (scale, shift))
        y = y * (1 + scale) + shift
    if silu:
        y = F.silu(y)
    if out_dtype is not None and x.dtype != torch.float64:
        y = y.to(out_dtype)
    return z, pad_clip(y, halo, padding)


@triton.jit
def _channels_of(part, channels, BLOCK_C: tl.constexpr, PARTS: tl.constexpr):
    """The channels of a part of a pixel, and which of them there are: all, where a pixel has several parts."""
    offs = part * BLOCK_C + tl.arange(0, BLOCK_C)
    return offs, (offs < channels) | (PARTS > 1)


@triton.jit
def _load_parts(ptr, channels, BLOCK_C: tl.constexpr, PARTS: tl.constexpr):
    """A vector over channels in float32, part by part."""
    parts = ()
    for part in tl.static_range(PARTS):
        offs_c, mask_c = _channels_of(part, channels, BLOCK_C, PARTS)
        parts += (tl.load(ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32),)  # type: ignore[assignment]
    return parts


@triton.jit
def _one_of_two(pair, second, DTYPE: tl.constexpr):
    """The first of two numbers that were read as one integer, or the second of them."""
    bits: tl.constexpr = DTYPE.primitive_bitwidth
    one = pair >> (second * bits).to(pair.dtype)
    return one.to(tl.int16 if bits == 16 else tl.int32).to(DTYPE, bitcast=True)


@triton.jit(
    do_not_specialize=[
        "samples", "before", "frames", "padded_frames", "height", "width", "residual_frames", "skip",
    ]
)  # fmt: skip
def _rms_norm_silu_kernel(
    x_ptr, gamma_ptr, bias_ptr, residual_ptr, residual_bias_ptr, scale_ptr, shift_ptr, halo_ptr, x_scale_ptr,
    z_ptr, y_ptr,
    samples, before, frames, padded_frames, height, width, channels, residual_frames, skip,
    gain, eps,
    HAS_GAMMA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_RESIDUAL_BIAS: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_HALO: tl.constexpr, HAS_X_SCALE: tl.constexpr,
    CELLS: tl.constexpr, FACTOR_T: tl.constexpr, STEP: tl.constexpr,
    BORDER: tl.constexpr, FRAME_MODE: tl.constexpr, PIXEL_MODE: tl.constexpr,
    KIND: tl.constexpr, KEEP: tl.constexpr, SILU: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    y_dtype: tl.constexpr = y_ptr.dtype.element_ty
    z_dtype: tl.constexpr = tl.float32 if WIDE else y_dtype
    if HAS_GAMMA:
        gamma = _load_parts(gamma_ptr, channels, BLOCK_C, PARTS)
    if HAS_BIAS:
        bias = _load_parts(bias_ptr, channels, BLOCK_C, PARTS)
    if HAS_RESIDUAL_BIAS:
        residual_bias = _load_parts(residual_bias_ptr, channels, BLOCK_C, PARTS)
    if HAS_X_SCALE:
        unscaled = 1.0 / tl.load(x_scale_ptr)
    tiles = padded_tiles(samples, padded_frames, height, width, BORDER, BLOCK_M)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        sample, frame, place, pixel, front, there, inner, target, within = padded_lines(
            tile, before, frames, padded_frames, height, width,
            BORDER, FRAME_MODE, PIXEL_MODE, HAS_HALO, BLOCK_M,
        )  # fmt: skip
        of_clip = there
        if HAS_HALO:
            of_clip = there & ~front
        row, column = place // width, place % width
        of_x, of_residual, lane = pixel, pixel, place
        if CELLS:
            of_x = pixel_in_cells(sample.to(tl.int64) * frames + frame, row, column, height, width)
        if FACTOR_T > 0:
            of_residual, lane = pixel_in_shortcut(
                sample, frame, row, column, residual_frames, height, width, skip, FACTOR_T, STEP
            )  # fmt: skip
        squares = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
        sums = ()
        for part in tl.static_range(PARTS):
            offs_c, mask_c = _channels_of(part, channels, BLOCK_C, PARTS)
            mask = of_clip[:, None] & mask_c[None, :]
            offs = pixel[:, None] * channels + offs_c[None, :]
            z = tl.load(x_ptr + of_x[:, None] * channels + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
            if HAS_X_SCALE:
                z *= unscaled  # [BLOCK_M, BLOCK_C]
            if HAS_BIAS:
                z = (z + bias[part][None, :]).to(z_dtype).to(tl.float32)
            if HAS_RESIDUAL:
                residual = tl.load(residual_ptr + of_residual[:, None] * channels + offs_c[None, :], mask=mask, other=0)
                if STEP == 2:  # two numbers in one, for both rows or columns of a cell
                    residual = _one_of_two(residual, lane[:, None], z_dtype)
                residual = residual.to(tl.float32)
                if HAS_RESIDUAL_BIAS:
                    residual = (residual + residual_bias[part][None, :]).to(z_dtype).to(tl.float32)
                z = (z + residual).to(z_dtype).to(tl.float32)
            if KEEP:
                tl.store(z_ptr + offs, z, mask=inner[:, None] & mask_c[None, :])
            squares += z * z
            sums += (z,)  # type: ignore[assignment]
        if KIND == "normalize":
            factor = gain / tl.maximum(tl.sqrt(tl.sum(squares, axis=1)), eps)
        elif KIND == "mean":
            factor = tl.rsqrt(tl.sum(squares, axis=1) / channels + eps)
        for part in tl.static_range(PARTS):
            offs_c, mask_c = _channels_of(part, channels, BLOCK_C, PARTS)
            if KIND == "none":
                y = tl.where(there[:, None], sums[part], 0.0)
            else:
                y = sums[part] * tl.where(there, factor, 0.0)[:, None]
            if HAS_GAMMA:
                y = y * gamma[part][None, :]
            if HAS_SHIFT:
                of_sample = sample.to(tl.int64) * channels + offs_c
                scale = tl.load(scale_ptr + of_sample, mask=mask_c, other=0.0).to(tl.float32)
                shift = tl.load(shift_ptr + of_sample, mask=mask_c, other=0.0).to(tl.float32)
                y = tl.where(there[:, None], y * (1.0 + scale)[None, :] + shift[None, :], 0.0)
            if SILU:
                y = apply_silu(y, y_dtype)
            y = y.to(y_dtype)
            if HAS_HALO:
                of_halo = (there & front)[:, None] & mask_c[None, :]
                kept = tl.load(halo_ptr + pixel[:, None] * channels + offs_c[None, :], mask=of_halo, other=0.0)
                y = tl.where(front, kept, y)
            tl.store(y_ptr + target[:, None] * channels + offs_c[None, :], y, mask=within[:, None] & mask_c[None, :])


class Tiling(NamedTuple):
    """``programs`` programs of ``num_warps`` warps walk tiles of ``block_m`` pixels, ``parts`` x ``block_c`` channels.

    ``stages - 1`` tiles are fetched ahead of the one being worked on.
    """

    block_m: int
    block_c: int
    parts: int
    programs: int
    num_warps: int
    stages: int


MAX_CHANNELS = 2048
PARTS = (3, 5)  # that a pixel may be cut into
LEAST_PART = 32
TILE_BYTES = 2048
MULTIPROCESSORS = 132  # of an H100 or H200
RESIDENT_BYTES = 16 * TILE_BYTES  # on each of them


def choose_tiling(channels: int, itemsize: int, has_residual: bool) -> Tiling:
    """For pixels of so many numbers of ``itemsize`` bytes.

    Tiles are powers of two. Of 96 channels, a tile of 128 would leave a quarter of all lanes idle, and these kernels
    issue nearly as many instructions as a GPU can while it reads as fast as it can; three parts of 32 leave none.
    """
    block_c = channels & -channels
    parts = channels // block_c
    if parts not in PARTS or block_c < LEAST_PART:
        block_c, parts = triton.next_power_of_2(channels), 1
    pixel_bytes = parts * block_c * itemsize
    # As in add_layer_norm, where it is measured: one warp sums a pixel without waiting for another, and so small a tile
    # leaves room for many. Tiles of one input leave room for half as many again, which was measured faster than to
    # fetch one more tile ahead.
    block_m = max(triton.next_power_of_2(triton.cdiv(TILE_BYTES, pixel_bytes)), 4 // itemsize)
    resident = RESIDENT_BYTES if has_residual else RESIDENT_BYTES * 3 // 2
    programs = MULTIPROCESSORS * max(resident // (block_m * pixel_bytes), 1)
    return Tiling(block_m, block_c, parts, programs, num_warps=1 if parts * block_c <= 512 else 2, stages=2)


def _launch(
    shape: Sequence[int],
    itemsize: int,
    padding: Padding,
    eps: float,
    *,
    residual_frames: int = 0,
    skip: int = 0,
    **flags: bool | int | str,
) -> Launch:  # fmt: skip
    samples, frames, height, width, channels = shape
    tiling = choose_tiling(channels, itemsize, bool(flags["HAS_RESIDUAL"]))
    pixels = math.prod(padding.shape(shape)[:4])
    return Launch(
        _rms_norm_silu_kernel, (min(triton.cdiv(pixels, tiling.block_m), tiling.programs),),
        samples, padding.before, frames, padding.before + frames + padding.after, height, width, channels,
        residual_frames, skip,
        channels**0.5, eps,
        **flags,
        BORDER=padding.border, FRAME_MODE=padding.frame_mode, PIXEL_MODE=padding.pixel_mode,
        BLOCK_M=tiling.block_m, BLOCK_C=tiling.block_c, PARTS=tiling.parts, STAGES=tiling.stages,
        num_warps=tiling.num_warps,
    )  # fmt: skip


class _Call(NamedTuple):
    """The arguments of a call."""

    x: Tensor
    gamma: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    residual_bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    halo: Tensor | None
    x_scale: Tensor | None
    factor_t: int
    skip: int
    before: int
    after: int
    border: int
    frame_mode: str
    pixel_mode: str
    kind: str
    eps: float
    silu: bool
    keep: bool
    inplace: bool
    out_dtype: torch.dtype | None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the order of the kernel's pointers."""
        return self[:9]

    @property
    def shape(self) -> torch.Size:
        """``[B, F, H, W, C]``, also of cells."""
        if self.x.ndim != 6:
            return self.x.shape
        samples, frames, height, width, _, channels = self.x.shape
        return torch.Size((samples, frames, 2 * height - 2, 2 * width - 2, channels))

    @property
    def step(self) -> int:
        """Channels of the residual for each of x."""
        return 1 if self.residual is None else self.residual.shape[-1] // self.x.shape[-1]

    @property
    def padding(self) -> Padding:
        return Padding(self.before, self.after, self.border, self.frame_mode, self.pixel_mode)

    @property
    def dtype(self) -> torch.dtype:
        """Of all but y, the halo, the scale of x, and x if that is narrower."""
        return self.x.dtype if self.out_dtype is None else torch.promote_types(self.x.dtype, torch.float32)

    @property
    def y_dtype(self) -> torch.dtype:
        return self.x.dtype if self.out_dtype is None else self.out_dtype

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """What the kernel reads, in the order of its pointers."""
        return (self.x.dtype, *[self.dtype] * 6, self.y_dtype, torch.float32)

    @property
    def itemsize(self) -> int:
        """Of the widest clip that is read."""
        return self.x.itemsize if self.residual is None else max(self.x.itemsize, self.residual.itemsize)

    def overwrites(self) -> int | None:
        """Position of the argument whose memory z may take: x, or the residual where x is narrower than z."""
        if self.x.dtype == self.dtype and self.x.ndim == 5:
            return 0
        return None if self.residual is None or self.factor_t else 3

    def flags(self) -> dict[str, bool | int | str]:
        return {
            "HAS_GAMMA": self.gamma is not None,
            "HAS_BIAS": self.bias is not None,
            "HAS_RESIDUAL": self.residual is not None,
            "HAS_RESIDUAL_BIAS": self.residual_bias is not None,
            "HAS_SHIFT": self.shift is not None,
            "HAS_HALO": self.halo is not None,
            "HAS_X_SCALE": self.x_scale is not None,
            "CELLS": self.x.ndim == 6,
            "FACTOR_T": self.factor_t,
            "STEP": self.step,
            "KIND": self.kind,
            "KEEP": self.stores_sum(),
            "SILU": self.silu,
            "WIDE": self.out_dtype is not None,
        }

    def stores_sum(self) -> bool:
        """Whether z is wanted, and another tensor than x."""
        return self.keep and (self.x.ndim == 6 or any(t is not None for t in (self.bias, self.residual, self.x_scale)))


_PAIRS = {2: torch.int32, 4: torch.int64}  # what holds two numbers of so many bytes


def compile_ahead(
    gamma: Tensor,
    *,
    bias: bool = True,
    residual: bool = False,
    residual_bias: bool = False,
    halo: bool = False,
    x_scale: bool = False,
    cells: bool = False,
    factor_t: int = 0,
    step: int = 1,
    padding: Padding = NO_PADDING,
    silu: bool = True,
    keep: bool = False,
    out_dtype: torch.dtype | None = None,
) -> None:
    """Begin to compile what :func:`rms_norm_silu` will run with such a ``gamma`` and clips of its dtype.

    With ``out_dtype``, ``x`` has that.
    """
    if gamma.numel() <= MAX_CHANNELS and gamma.dtype in DTYPES:
        itemsize = gamma.itemsize if out_dtype is None or residual else out_dtype.itemsize
        launch = _launch(
            (1, 1, 1, 1, gamma.numel()), itemsize, padding, EPS,
            HAS_GAMMA=True, HAS_BIAS=bias, HAS_RESIDUAL=residual, HAS_RESIDUAL_BIAS=residual_bias, HAS_SHIFT=False,
            HAS_HALO=halo, HAS_X_SCALE=x_scale, CELLS=cells, FACTOR_T=factor_t, STEP=step,
            KIND="normalize", KEEP=keep, SILU=silu, WIDE=out_dtype is not None,
        )  # fmt: skip
        narrow = out_dtype or gamma.dtype  # also where there is no tensor, for x stands in there
        there = False, True, bias, residual, residual_bias, False, False, False, False, keep, False
        dtypes = [gamma.dtype if wide else narrow for wide in there]
        if step == 2:
            dtypes[3] = _PAIRS[gamma.itemsize]
        if x_scale:
            dtypes[8] = torch.float32
        launch.compile_ahead(gamma.device, *dtypes)


def _bind(*args: Any) -> Callable[..., list[Tensor]]:
    """What is returned keeps no tensor of this call alive: it outlives it."""
    call = _Call(*args)
    shape, padded, stores = call.shape, call.padding.shape(call.shape), call.stores_sum()
    residual_frames = call.residual.shape[1] if call.residual is not None else 0
    launch = _launch(
        shape, call.itemsize, call.padding, call.eps, residual_frames=residual_frames, skip=call.skip, **call.flags()
    )  # fmt: skip
    pairs = _PAIRS[call.dtype.itemsize] if call.step == 2 else None
    dtypes, dtype, y_dtype = call.dtypes, call.dtype, call.y_dtype
    given = zip(call.tensors, dtypes, strict=True)
    ready = all(t is None or (t.is_contiguous() and t.dtype == kind) for t, kind in given)
    overwritten = call.overwrites() if call.inplace and not call.padding.reads_twice() else None
    del call, given

    def run(*args: Any) -> list[Tensor]:
        tensors = args[:9]
        if not ready:
            laid_out = zip(tensors, dtypes, strict=True)
            tensors = tuple(None if t is None else t.to(kind).contiguous() for t, kind in laid_out)
        x, residual = tensors[0], tensors[3]
        read = tensors if pairs is None else (*tensors[:3], _in_pairs(residual, pairs), *tensors[4:])
        y = x.new_empty(padded, dtype=y_dtype)
        if not stores:
            launch(*read, None, y)
            return [y]
        if overwritten is not None and tensors[overwritten] is args[overwritten]:
            z = tensors[overwritten]
        else:
            z = x.new_empty(shape, dtype=dtype)
        launch(*read, z, y)
        return [z, y]

    return run


def _in_pairs(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Two numbers of a contiguous ``x`` as one of ``dtype``; a copy's, where x begins in the middle of a pair."""
    return (x.clone() if x.storage_offset() % 2 else x).view(dtype)


def _reference(*args: Any) -> list[Tensor]:
    """``[z, y]``, or only ``[y]`` when z is x or unwanted."""
    call = _Call(*args)
    z, y = rms_norm_silu_ref(
        call.x, call.gamma, bias=call.bias, residual=call.residual, residual_bias=call.residual_bias, scale=call.scale,
        shift=call.shift, halo=call.halo, x_scale=call.x_scale, factor_t=call.factor_t, skip=call.skip,
        padding=call.padding, kind=call.kind, eps=call.eps, silu=call.silu, out_dtype=call.out_dtype,
    )  # fmt: skip
    return [z.contiguous(), y] if call.stores_sum() else [y]


def _out_of_place(*args: Any) -> list[Tensor]:
    """Never in place, for ``torch.compile`` is told so."""
    call = _Call(*args)._replace(inplace=False)
    return _bind(*call)(*call)


def _fake(*args: Any) -> list[Tensor]:
    call = _Call(*args)
    y = call.x.new_empty(call.padding.shape(call.shape), dtype=call.y_dtype)
    return [call.x.new_empty(call.shape, dtype=call.dtype), y] if call.stores_sum() else [y]


def _reason(*args: Any) -> str | None:
    call = _Call(*args)
    if call.x.shape[-1] > MAX_CHANNELS:
        return f"the kernel keeps a pixel in registers, up to C={MAX_CHANNELS}, got C={call.x.shape[-1]}"
    if math.prod(call.shape) == 0:
        return "there is nothing to normalise"
    for name, t, dtype in (("residual", call.residual, call.dtype), ("halo", call.halo, call.y_dtype)):
        if t is not None and t.dtype != dtype:
            return f"the {name} must be {dtype}, got {t.dtype}"
    found, channels = 0 if call.residual is None else call.residual.shape[-1], call.x.shape[-1]
    if call.factor_t and found not in (channels, 2 * channels):
        return f"the kernel takes as many channels of the residual as of x, or twice as many, got {found}, {channels}"
    return device_reason(call.x) or tensors_reason(call.x, *call.tensors[1:])


def _costs(*args: Any) -> Costs:
    call = _Call(*args)
    x = call.x
    numbers = math.prod(call.shape)
    read = numbers * x.itemsize + sum(t.nbytes for t in (call.residual, call.halo) if t is not None)
    sums = numbers * call.dtype.itemsize * call.stores_sum()
    return Costs(bytes=read + sums + math.prod(call.padding.shape(call.shape)) * call.y_dtype.itemsize)


def _parts(*args: Any) -> Iterator[Part]:
    """Some frames of a sample at a time, or rows of one if nothing is around them.

    The first frames bring what lies before them, the last what lies behind.
    """
    call = _Call(*args)
    whole_rows = call.border or call.x.ndim == 6 or call.factor_t
    for piece in pieces(call.shape, *((0, 1) if whole_rows else (0, 1, 2))):
        samples, frames, height, *_ = piece
        first, last = frames.start == 0, frames.stop == call.shape[1]
        residual, skip = _residual_of(call, piece)
        before, after = call.before * first, call.after * last
        part = call._replace(
            x=call.x[samples, frames] if whole_rows else call.x[piece],
            residual=residual,
            skip=skip,
            scale=None if call.scale is None else call.scale[samples],
            shift=None if call.shift is None else call.shift[samples],
            halo=call.halo[samples, :, height] if call.halo is not None and first else None,
            before=before,
            after=after,
        )
        written = slice(frames.start + call.before - before, frames.stop + call.before + after)
        rows = slice(height.start, height.stop + 2 * call.border)
        yield Part(tuple(part), functools.partial(_part_of, piece, (samples, written, rows)), pictures_apart)


def _residual_of(call: _Call, piece: tuple[slice, ...]) -> tuple[Tensor | None, int]:
    """What a piece of the clip reads of it, and the frames that it skips."""
    if call.residual is None or not call.factor_t:
        return None if call.residual is None else call.residual[piece], 0
    samples, frames, *_ = piece
    return small_frames(call.residual[samples], frames, call.factor_t, call.skip)


def _part_of(piece: tuple[slice, ...], written: tuple[slice, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    *sums, y = outputs
    return pictures_apart((*(z[piece] for z in sums), y[written]))


def _validate(*args: Any) -> None:
    call = _Call(*args)
    name, x = "rms_norm_silu", call.x
    names = ("x", "gamma", "bias", "residual", "residual_bias", "scale", "shift", "halo", "x_scale")
    given = dict(zip(names, call.tensors, strict=True))
    require_floats(name, **given)
    if x.ndim not in (5, 6) or not x.shape[-1] or (x.ndim == 6 and (x.shape[4] != 4 or 0 in x.shape[2:4])):
        raise ValueError(
            f"{name}: x must be [B, F, H, W, C] with channels, or cells [B, F, H / 2 + 1, W / 2 + 1, 4, C], "
            f"got {tuple(x.shape)}"
        )
    samples, *_, channels = x.shape
    for key in ("gamma", "bias", "residual_bias", "scale", "shift"):
        vector, expected = given[key], [samples, channels] if key in ("scale", "shift") else [channels]
        if vector is not None and list(vector.shape) != expected:
            raise ValueError(f"{name}: {key} must be {expected}, got {tuple(vector.shape)}")
    if call.x_scale is not None and call.x_scale.shape != (1,):
        raise ValueError(f"{name}: x_scale must be [1], got {tuple(call.x_scale.shape)}")
    _validate_residual(name, call)
    if call.residual_bias is not None and call.residual is None:
        raise ValueError(f"{name}: residual_bias needs a residual")
    if call.out_dtype is not None and call.out_dtype not in DTYPES:
        raise ValueError(f"{name}: out_dtype must be one of {', '.join(map(str, DTYPES))}, got {call.out_dtype}")
    if (call.scale is None) != (call.shift is None):
        raise ValueError(f"{name}: scale and shift come together, got one of them")
    if call.kind not in KINDS:
        raise ValueError(f"{name}: kind must be one of {', '.join(KINDS)}, got {call.kind!r}")
    require_padding(name, call.shape, call.padding, call.halo)


def _validate_residual(name: str, call: _Call) -> None:
    factor_t, skip, residual, shape = call.factor_t, call.skip, call.residual, tuple(call.shape)
    if factor_t < 0 or not 0 <= skip < max(factor_t, 1):
        raise ValueError(f"{name}: factor_t must be 0 or more, and skip from 0 to less, got {factor_t} and {skip}")
    if residual is None:
        if factor_t:
            raise ValueError(f"{name}: factor_t needs a residual")
        return
    if not factor_t:
        if residual.shape != shape:
            raise ValueError(f"{name}: residual must be {shape}, as x is, got {tuple(residual.shape)}")
        return
    samples, frames, height, width, channels = shape
    expected = samples, triton.cdiv(frames + skip, factor_t), height // 2, width // 2
    fits = residual.ndim == 5 and residual.shape[-1] and 4 * factor_t * channels % residual.shape[-1] == 0
    if height % 2 or width % 2 or not fits or residual.shape[:4] != expected:
        raise ValueError(
            f"{name}: residual must be {expected}, with channels that divide {4 * factor_t * channels}, to make "
            f"{shape} of it, got {tuple(residual.shape)}"
        )


RMS_NORM_SILU = Op(
    "rms_norm_silu",
    reference=_reference,
    implementations={"triton": Implementation.bound(_bind, _reason, _Call, run=_out_of_place)},
    fake=_fake,
    costs=_costs,
    parts=_parts,
    overwrites=lambda *args: _Call(*args).overwrites(),
    validate=_validate,
    small=scaled(0, 3, 4),  # x, residual, residual_bias
)


def rms_norm_silu(
    x: Tensor,
    gamma: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    residual_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    halo: Tensor | None = None,
    x_scale: Tensor | None = None,
    factor_t: int = 0,
    skip: int = 0,
    padding: Padding = NO_PADDING,
    kind: str = "normalize",
    eps: float = EPS,
    silu: bool = True,
    keep: bool = True,
    inplace: bool = False,
    out_dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``z = x + bias + residual``; ``pad_clip(silu(F.normalize(z, dim=-1) * C**0.5 * gamma), halo, padding)``.

    Args:
        x: ``[B, F, H, W, C]``, or cells ``[B, F, H / 2 + 1, W / 2 + 1, 4, C]`` as ``upsample_cells`` leaves them,
            fp16 / bf16 / fp32; read through a contiguous copy if it is not contiguous.
        gamma: ``[C]``, any float dtype, as are all vectors; None multiplies by nothing.
        bias: ``[C]``, added to x; None adds nothing.
        residual: ``[B, F, H, W, C]``; None adds nothing. With ``factor_t``, ``[B, F', H / 2, W / 2, C']``.
        residual_bias: ``[C]``, added to the residual first.
        scale: ``[B, C]``; the norm is multiplied by ``1 + scale``. None, with ``shift``: not modulated.
        shift: ``[B, C]``, added then.
        halo: ``[B, padding.before, H, W, C]``, the frames that come before, as ``y`` has them; None: as ``padding``
            says.
        x_scale: ``[1]``, fp32, a power of two: x is so many times what it stands for. None: it is what it is.
        factor_t: How many frames a frame of the residual makes, each of them twice as high and wide
            (``kernels/conv/enlarged_clip.py``). 0: the residual is as large as x.
        skip: How many of the first of these are left out, less than ``factor_t``.
        padding: What lies around the clip.
        kind: ``"normalize"``; ``"mean"``: ``z / sqrt(mean(z**2) + eps)``; ``"none"``: z itself.
        eps: The least norm; of ``"mean"``, what is added to the mean square.
        silu: Whether SiLU follows the norm.
        keep: Whether the sum is needed.
        inplace: Whether the sum may be written over x; over the residual, if x is narrower than the sum, or cells. Not
            over what is smaller than the sum.
        out_dtype: That of ``y``, of which ``halo`` is too; ``x`` may be, and all else is float32. None: all have the
            dtype of ``x``.
        impl: ``"triton"`` or ``"torch"``; None lets the op choose.

    Returns:
        The sum ``[B, F, H, W, C]``, and the padded clip ``padding.shape(x.shape)``, both contiguous and of the dtypes
        above. The first is ``x`` itself where nothing is done to it before the norm, or where ``keep`` is False.

    Raises:
        ValueError: A shape or a device is not as above; ``impl`` cannot run here.
        TypeError: A tensor is not floating-point.
    """
    outputs = RMS_NORM_SILU(
        x, gamma, bias, residual, residual_bias, scale, shift, halo, x_scale, factor_t, skip, *padding,
        kind, eps, silu, keep, inplace, out_dtype, impl=impl,
    )  # fmt: skip
    return (outputs[0] if len(outputs) == 2 else x), outputs[-1]
