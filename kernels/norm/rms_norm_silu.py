"""RMS norm over the channels of a pixel, and SiLU, written behind the frames that a causal convolution looks back at.

    z = (x + bias) + (residual + residual_bias)
    n = z / max(||z||_2 over C, 1e-12) * sqrt(C) * gamma
    y = [frames before, silu(n)]

A convolution that looks two frames back needs them in front of its input: zeros, or the last frames of the chunk before
(``halo``). Eager makes them by ``F.pad``, ``torch.cat`` and ``clone``; here n is written to where it is to lie, and the
same pass adds what the convolution before has left out: its bias and the residual. The sum is stored if it is asked
for, in place of x if x may be overwritten.

Channels-last clips ``[B, F, H, W, C]``. The norm is summed in float32, and whatever eager stores is rounded as there
(both sums, ``F.normalize``, both products), which costs nothing: y has eager's bits but for the order of the sum of
squares, its reciprocal, and the exponential. Fidelity: math-exact. Bound by memory: one or two reads and writes, where
eager makes 15 passes and more. The norm is that of diffusers' ``WanRMS_norm``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.check import Part, pieces
from vidaccel.kernels.conv.arguments import require_floats
from vidaccel.kernels.launch import Launch
from vidaccel.kernels.op import DTYPES, Costs, Implementation, Op, device_reason, tensors_reason

__all__ = ["RMS_NORM_SILU", "choose_tiling", "compile_ahead", "rms_norm_silu", "rms_norm_silu_ref"]

EPS = 1e-12  # the least norm, that of F.normalize


def rms_norm_silu_ref(
    x: Tensor,
    gamma: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    residual_bias: Tensor | None = None,
    halo: Tensor | None = None,
    before: int = 0,
    silu: bool = True,
    keep: bool = True,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """The specification; nothing happens in place. Pass float64 inputs for gold values."""
    z = x if bias is None else x + bias.to(x.dtype)
    if residual is not None:
        z = z + (residual if residual_bias is None else residual + residual_bias.to(x.dtype))
    wide = z.float() if z.dtype.itemsize == 2 else z
    y = F.normalize(wide, dim=-1, eps=EPS).to(x.dtype) * x.shape[-1] ** 0.5 * gamma.to(x.dtype)
    if silu:
        y = F.silu(y)
    if before:
        samples, _, *frame = x.shape
        y = torch.cat([x.new_zeros(samples, before, *frame) if halo is None else halo, y], dim=1)
    return z, y


@triton.jit(do_not_specialize=["samples", "sample_rows", "halo_rows", "halo_programs"])
def _rms_norm_silu_kernel(
    x_ptr, gamma_ptr, bias_ptr, residual_ptr, residual_bias_ptr, halo_ptr, z_ptr, y_ptr,
    samples, sample_rows, halo_rows, halo_programs, channels,
    scale, eps,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_RESIDUAL_BIAS: tl.constexpr, HAS_HALO: tl.constexpr,
    KEEP: tl.constexpr, SILU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    dtype = y_ptr.dtype.element_ty
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    program = tl.program_id(0)
    if program < halo_programs:
        rows = samples * halo_rows
        for tile in range(program, tl.cdiv(rows, BLOCK_M), halo_programs):
            offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            mask = (offs_m < rows)[:, None] & mask_c[None, :]
            before = tl.zeros([BLOCK_M, BLOCK_C], dtype=dtype)
            if HAS_HALO:
                before = tl.load(halo_ptr + offs_m.to(tl.int64)[:, None] * channels + offs_c[None, :], mask=mask)
            to = offs_m.to(tl.int64) + (offs_m // halo_rows).to(tl.int64) * sample_rows
            tl.store(y_ptr + to[:, None] * channels + offs_c[None, :], before, mask=mask)
    else:
        rows = samples * sample_rows
        programs = tl.num_programs(0) - halo_programs
        gamma = tl.load(gamma_ptr + offs_c, mask=mask_c).to(tl.float32)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        if HAS_RESIDUAL_BIAS:
            residual_bias = tl.load(residual_bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        for tile in tl.range(program - halo_programs, tl.cdiv(rows, BLOCK_M), programs, num_stages=STAGES):
            offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            mask = (offs_m < rows)[:, None] & mask_c[None, :]
            offs = offs_m.to(tl.int64)[:, None] * channels + offs_c[None, :]
            z = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_C]
            if HAS_BIAS:
                z = (z + bias[None, :]).to(dtype).to(tl.float32)
            if HAS_RESIDUAL:
                residual = tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
                if HAS_RESIDUAL_BIAS:
                    residual = (residual + residual_bias[None, :]).to(dtype).to(tl.float32)
                z = (z + residual).to(dtype).to(tl.float32)
            if KEEP:
                tl.store(z_ptr + offs, z, mask=mask)
            norm = tl.sqrt(tl.sum(z * z, axis=1))
            y = (z * (1.0 / tl.maximum(norm, eps))[:, None]).to(dtype).to(tl.float32)
            y = ((y * scale).to(dtype).to(tl.float32) * gamma[None, :]).to(dtype).to(tl.float32)
            if SILU:
                y = y / (1.0 + tl.exp(-y))
            to = offs_m.to(tl.int64) + (offs_m // sample_rows + 1).to(tl.int64) * halo_rows
            tl.store(y_ptr + to[:, None] * channels + offs_c[None, :], y, mask=mask)


class Tiling(NamedTuple):
    """``programs`` programs of ``num_warps`` warps walk tiles of ``block_m`` whole pixels.

    ``stages - 1`` tiles are fetched ahead of the one being worked on.
    """

    block_m: int
    programs: int
    num_warps: int
    stages: int


TENSORS = 8  # that the kernel takes
MAX_CHANNELS = 2048
TILE_BYTES = 2048
RESIDENT_BYTES = 132 * 16 * TILE_BYTES  # sixteen small tiles on every multiprocessor of an H100 or H200


def choose_tiling(block_c: int, itemsize: int, has_residual: bool) -> Tiling:
    """For pixels of ``block_c`` numbers, a power of two, of ``itemsize`` bytes."""
    pixel_bytes = block_c * itemsize
    # As in add_layer_norm, where it is measured: one warp sums a pixel without waiting for another, and so small a tile
    # leaves room for many; a tile of two inputs needs to be only one ahead, for the two overlap.
    block_m = max(TILE_BYTES // pixel_bytes, 4 // itemsize)
    stages = 2 if has_residual else 3
    return Tiling(
        block_m, RESIDENT_BYTES // (block_m * pixel_bytes), num_warps=1 if block_c <= 512 else 2, stages=stages
    )


def _launch(shape: Sequence[int], itemsize: int, before: int, has_halo: bool, **flags: bool) -> Launch:
    samples, frames, height, width, channels = shape
    sample_rows, halo_rows = frames * height * width, before * height * width
    block_c = triton.next_power_of_2(channels)
    block_m, programs, num_warps, stages = choose_tiling(block_c, itemsize, flags["HAS_RESIDUAL"])
    tiles, halo_tiles = (triton.cdiv(samples * rows, block_m) for rows in (sample_rows, halo_rows))
    halo_programs = min(halo_tiles, triton.cdiv(programs * halo_tiles, tiles))
    return Launch(
        _rms_norm_silu_kernel, (halo_programs + min(tiles, programs),),
        samples, sample_rows, halo_rows, halo_programs, channels,
        channels**0.5, EPS,
        **flags, HAS_HALO=has_halo,
        BLOCK_M=block_m, BLOCK_C=block_c, STAGES=stages,
        num_warps=num_warps, enable_fp_fusion=False,  # eager rounds a product before it adds to it
    )  # fmt: skip


class _Call(NamedTuple):
    """The arguments of a call."""

    x: Tensor
    gamma: Tensor
    bias: Tensor | None
    residual: Tensor | None
    residual_bias: Tensor | None
    halo: Tensor | None
    before: int
    silu: bool
    keep: bool
    inplace: bool

    def flags(self) -> dict[str, bool]:
        return {
            "HAS_BIAS": self.bias is not None,
            "HAS_RESIDUAL": self.residual is not None,
            "HAS_RESIDUAL_BIAS": self.residual_bias is not None,
            "KEEP": self.stores_sum(),
            "SILU": self.silu,
        }

    def stores_sum(self) -> bool:
        """Whether z is wanted, and another tensor than x."""
        return self.keep and (self.bias is not None or self.residual is not None)


def compile_ahead(
    gamma: Tensor,
    *,
    bias: bool = True,
    residual: bool = False,
    residual_bias: bool = False,
    halo: bool = False,
    silu: bool = True,
    keep: bool = False,
) -> None:
    """Begin to compile what :func:`rms_norm_silu` will run with such a ``gamma`` and clips of its dtype."""
    if gamma.numel() <= MAX_CHANNELS and gamma.dtype in DTYPES:
        launch = _launch(
            (1, 1, 1, 1, gamma.numel()), gamma.itemsize, 1, halo,
            HAS_BIAS=bias, HAS_RESIDUAL=residual, HAS_RESIDUAL_BIAS=residual_bias, KEEP=keep, SILU=silu,
        )  # fmt: skip
        launch.compile_ahead(gamma.device, *[gamma.dtype] * TENSORS)


def _bind(*args: Any) -> Callable[..., list[Tensor]]:
    call = _Call(*args)
    shape, stores = call.x.shape, call.stores_sum()
    launch = _launch(shape, call.x.itemsize, call.before, call.halo is not None, **call.flags())
    buffer_shape = shape[0], call.before + shape[1], *shape[2:]
    ready = all(t is None or (t.is_contiguous() and t.dtype == call.x.dtype) for t in call[:6])

    def run(*args: Any) -> list[Tensor]:
        x, gamma, bias, residual, residual_bias, halo, *_, inplace = args
        if not ready:
            every = x, gamma, bias, residual, residual_bias, halo
            laid_out = [None if t is None else t.to(call.x.dtype).contiguous() for t in every]
            inplace = inplace and laid_out[0] is x
            x, gamma, bias, residual, residual_bias, halo = laid_out
        y = x.new_empty(buffer_shape)
        if not stores:
            launch(x, gamma, bias, residual, residual_bias, halo, None, y)
            return [y]
        z = x if inplace else x.new_empty(shape)
        launch(x, gamma, bias, residual, residual_bias, halo, z, y)
        return [z, y]

    return run


def _triton(
    x: Tensor,
    gamma: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_bias: Tensor | None,
    halo: Tensor | None,
    before: int,
    silu: bool,
    keep: bool,
    inplace: bool,
) -> list[Tensor]:
    """Never in place, for ``torch.compile`` is told so."""
    args = x, gamma, bias, residual, residual_bias, halo, before, silu, keep, False
    return _bind(*args)(*args)


@functools.wraps(rms_norm_silu_ref)
def _reference(*args: Any) -> list[Tensor]:
    """``[z, y]``, or only ``[y]`` when z is x or unwanted."""
    z, y = rms_norm_silu_ref(*args)
    return [z, y] if _Call(*args).stores_sum() else [y]


def _fake(*args: Any) -> list[Tensor]:
    call = _Call(*args)
    samples, frames, *frame = call.x.shape
    y = call.x.new_empty((samples, call.before + frames, *frame))
    return [call.x.new_empty(call.x.shape), y] if call.stores_sum() else [y]


def _reason(*args: Any) -> str | None:
    call = _Call(*args)
    if call.x.shape[-1] > MAX_CHANNELS:
        return f"the kernel keeps a pixel in registers, up to C={MAX_CHANNELS}, got C={call.x.shape[-1]}"
    if call.x.numel() == 0:
        return "there is nothing to normalise"
    if mixed := [t.dtype for t in (call.residual, call.halo) if t is not None and t.dtype != call.x.dtype]:
        return f"residual and halo must have the dtype of x, {call.x.dtype}, got {mixed[0]}"
    return device_reason(call.x) or tensors_reason(*call[:6])


def _costs(*args: Any) -> Costs:
    call = _Call(*args)
    passes = 2 + (call.residual is not None) + call.stores_sum()
    halo = call.before * call.x.nbytes // max(call.x.shape[1], 1)
    return Costs(bytes=call.x.nbytes * passes + halo * (2 if call.halo is not None else 1))


def _parts(*args: Any) -> Iterator[Part]:
    """Some frames of a sample at a time, or rows of one; the first bring what lies before them."""
    call = _Call(*args)
    for piece in pieces(call.x.shape, 0, 1, 2):
        samples, frames, height, *_ = piece
        before = 0 if frames.start else call.before
        halo = None if frames.start or call.halo is None else call.halo[samples, :, height]
        residual = None if call.residual is None else call.residual[piece]
        part = call._replace(x=call.x[piece], residual=residual, halo=halo, before=before)
        written = slice(frames.start + call.before - before, frames.stop + call.before)
        yield Part(tuple(part), functools.partial(_part_of, piece, (samples, written, height)), _as_frames)


def _part_of(piece: tuple[slice, ...], written: tuple[slice, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    *sums, y = outputs
    return _as_frames((*(z[piece] for z in sums), y[written]))


def _as_frames(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(out.flatten(2, 3).flatten(0, 1) for out in outputs)  # [frames, H*W, C]


def _validate(*args: Any) -> None:
    call = _Call(*args)
    name, x = "rms_norm_silu", call.x
    require_floats(
        name, x=x, gamma=call.gamma, bias=call.bias, residual=call.residual, residual_bias=call.residual_bias,
        halo=call.halo,
    )  # fmt: skip
    if x.ndim != 5 or not x.shape[-1]:
        raise ValueError(f"{name}: x must be [B, F, H, W, C] with channels, got {tuple(x.shape)}")
    for key, vector in (("gamma", call.gamma), ("bias", call.bias), ("residual_bias", call.residual_bias)):
        if vector is not None and vector.shape != x.shape[-1:]:
            raise ValueError(f"{name}: {key} must be [{x.shape[-1]}], got {tuple(vector.shape)}")
    if call.residual is not None and call.residual.shape != x.shape:
        raise ValueError(f"{name}: residual must be {tuple(x.shape)}, as x is, got {tuple(call.residual.shape)}")
    if call.residual_bias is not None and call.residual is None:
        raise ValueError(f"{name}: residual_bias needs a residual")
    if call.before < 0:
        raise ValueError(f"{name}: before must not be negative, got {call.before}")
    expected = x.shape[0], call.before, *x.shape[2:]
    if call.halo is not None and call.halo.shape != expected:
        raise ValueError(f"{name}: halo must be {expected}, got {tuple(call.halo.shape)}")


RMS_NORM_SILU = Op(
    "rms_norm_silu",
    reference=_reference,
    implementations={"triton": Implementation(_triton, _reason, _bind, registered=True)},
    fake=_fake,
    costs=_costs,
    parts=_parts,
    overwrites=0,
    validate=_validate,
)


def rms_norm_silu(
    x: Tensor,
    gamma: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    residual_bias: Tensor | None = None,
    halo: Tensor | None = None,
    before: int = 0,
    silu: bool = True,
    keep: bool = True,
    inplace: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``z = x + bias + residual``; ``cat([halo, silu(F.normalize(z, dim=-1) * C**0.5 * gamma)], dim=1)``.

    Args:
        x: ``[B, F, H, W, C]``, fp16 / bf16 / fp32; read through a contiguous copy if it is not contiguous.
        gamma: ``[C]``, any float dtype; so are the two biases.
        bias: ``[C]``, added to x; None adds nothing.
        residual: ``[B, F, H, W, C]``; None adds nothing.
        residual_bias: ``[C]``, added to the residual first.
        halo: ``[B, before, H, W, C]``, the frames that come before; None: zeros.
        before: How many those are.
        silu: Whether SiLU follows the norm.
        keep: Whether the sum is needed.
        inplace: Whether the sum may be written over x.
        impl: ``"triton"`` or ``"torch"``; None lets the op choose.

    Returns:
        The sum ``[B, F, H, W, C]``, and the frames ``[B, before + F, H, W, C]``, both contiguous in ``x.dtype``. The
        first is ``x`` itself where nothing is added, or where ``keep`` is False.

    Raises:
        ValueError: A shape or a device is not as above; ``impl`` cannot run here.
        TypeError: A tensor is not floating-point.
    """
    outputs = RMS_NORM_SILU(
        x, gamma, bias, residual, residual_bias, halo, before, silu, keep, inplace, impl=impl
    )  # fmt: skip
    return (outputs[0] if len(outputs) == 2 else x), outputs[-1]
