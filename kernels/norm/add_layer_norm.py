"""LayerNorm and the additions before and after it, in one pass over rows of channels.

    z[b, s, c] = row[b, c] + (x[b, s, c] + residual[b, s, c])
    y[b, s, c] = (z[b, s, c] - mean[b, s]) / sqrt(var[b, s] + eps) * weight[c] + bias[c] + position[b % T, c]

The row may instead join the residual first, ``z = x + (row + residual)``, or only what is normed, ``norm(row + z)``:
the sum of a temporal block's input and its frame embedding is normed, and is a residual later, but is never stored.
Or it joins only what is stored: the norm is that of ``x + residual``, z is ``row + (x + residual)``. So a residual
takes up the bias of the product that it will be the addend of: cuBLAS adds a bias or a matrix, not both.

Rows ``[B, S, C]``; any of residual, row and position may be left out. A row is read once and stays in registers, so
the statistics are plain two-pass ones in float32. Each sum, and the norm that position is added to, is rounded to the
input dtype where eager PyTorch stores it: z has eager's bits. Fidelity: math-exact. Bound by memory: reads x (and
residual), writes y (and z); with residual and one of the others eager makes 7 such passes, this op 4.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.arguments import require_floats
from vidaccel.kernels.check import Part, cuts, lean, piece_of
from vidaccel.kernels.launch import Launch
from vidaccel.kernels.op import DTYPES, Costs, Implementation, Op, device_reason, scaled, tensors_reason

__all__ = ["ADD_LAYER_NORM", "RowTo", "add_layer_norm", "add_layer_norm_ref", "choose_tiling", "compile_ahead"]

RowTo = Literal["sum", "residual", "norm", "stored"]
ROW_TO = get_args(RowTo)


def add_layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None = None,
    row: Tensor | None = None,
    position: Tensor | None = None,
    row_to: str = "sum",
) -> tuple[Tensor, Tensor]:
    """The specification. Pass float64 inputs for gold values."""
    if row is not None and residual is not None and row_to == "residual":
        residual, row = row + residual, None
    if residual is not None:
        x = x + residual
    joined = x if row is None else row + x
    normed = x if row_to == "stored" else joined
    y = F.layer_norm(normed, x.shape[-1:], weight.to(normed.dtype), bias.to(normed.dtype), eps)
    if position is not None:
        y = y + position.repeat(len(y) // len(position), 1)[:, None]
    return x if row_to == "norm" else joined, y


@triton.jit(do_not_specialize=["rows", "sample_rows", "positions"])
def _add_layer_norm_kernel(
    x_ptr, residual_ptr, row_ptr, position_ptr, weight_ptr, bias_ptr, z_ptr, y_ptr,
    rows, sample_rows, channels, positions,
    eps,
    HAS_RESIDUAL: tl.constexpr, HAS_ROW: tl.constexpr, HAS_POSITION: tl.constexpr, ROW_TO: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    dtype = y_ptr.dtype.element_ty
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    weight = tl.load(weight_ptr + offs_c, mask=mask_c).to(tl.float32)
    bias = tl.load(bias_ptr + offs_c, mask=mask_c).to(tl.float32)

    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (offs_m < rows)[:, None] & mask_c[None, :]
        offs = offs_m.to(tl.int64)[:, None] * channels + offs_c[None, :]
        z = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_C]
        sample = (offs_m // sample_rows).to(tl.int64)
        if HAS_ROW:
            row = tl.load(row_ptr + sample[:, None] * channels + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            if HAS_ROW and ROW_TO == "residual":
                residual = (row + residual).to(dtype).to(tl.float32)
            z = (z + residual).to(dtype).to(tl.float32)
        if HAS_ROW and ROW_TO == "sum":
            z = (row + z).to(dtype).to(tl.float32)
        if HAS_ROW and ROW_TO == "stored":
            tl.store(z_ptr + offs, row + z, mask=mask)
        elif HAS_RESIDUAL or (HAS_ROW and ROW_TO == "sum"):
            tl.store(z_ptr + offs, z, mask=mask)
        if HAS_ROW and ROW_TO == "norm":
            z = (row + z).to(dtype).to(tl.float32)

        mean = tl.sum(z, axis=1) / channels
        centred = tl.where(mask_c[None, :], z - mean[:, None], 0.0)
        if dtype == tl.float32:
            # far from zero the roundings of the mean show in float32; those of the mean of what it leaves do not
            mean = tl.sum(centred, axis=1) / channels
            centred = tl.where(mask_c[None, :], centred - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / channels + eps)
        y = centred * rstd[:, None] * weight[None, :] + bias[None, :]
        if HAS_POSITION:
            offs_p = (sample % positions)[:, None] * channels + offs_c[None, :]
            y = y.to(dtype).to(tl.float32)
            y += tl.load(position_ptr + offs_p, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + offs, y, mask=mask)


class Tiling(NamedTuple):
    """``programs`` programs of ``num_warps`` warps walk tiles of ``block_m`` whole rows.

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


def choose_tiling(block_c: int, itemsize: int, has_residual: bool, has_row: bool, row_to: str) -> Tiling:
    """For rows of ``block_c`` numbers, a power of two, of ``itemsize`` bytes."""
    row_bytes = block_c * itemsize
    # few warps to a row: each more makes both reductions wait for one another; two half-precision rows fill a warp
    block_m = max(TILE_BYTES // row_bytes, 4 // itemsize)
    # measured on an H200 at C = 320, 640 and 1280: x and the residual overlap well enough with one tile ahead
    stages = 2 if has_residual and (not has_row or row_to == "stored") else 3
    return Tiling(block_m, RESIDENT_BYTES // (block_m * row_bytes), num_warps=1 if block_c <= 512 else 2, stages=stages)


def _launch(
    shape: Sequence[int],
    itemsize: int,
    positions: int,
    eps: float,
    has_residual: bool,
    has_row: bool,
    row_to: str,
) -> Launch:
    """``positions`` is 0 where there are none."""
    samples, sample_rows, channels = shape
    rows, block_c = samples * sample_rows, triton.next_power_of_2(channels)
    block_m, programs, num_warps, stages = choose_tiling(block_c, itemsize, has_residual, has_row, row_to)
    return Launch(
        _add_layer_norm_kernel, (min(triton.cdiv(rows, block_m), programs),),
        rows, sample_rows, channels, max(positions, 1),
        eps,
        HAS_RESIDUAL=has_residual, HAS_ROW=has_row, HAS_POSITION=positions > 0, ROW_TO=row_to,
        BLOCK_M=block_m, BLOCK_C=block_c, STAGES=stages,
        num_warps=num_warps,
    )  # fmt: skip


def compile_ahead(
    weight: Tensor, *, residual: bool = False, row_to: RowTo | None = None, position: bool = False
) -> None:
    """Begin to compile what :func:`add_layer_norm` will run with such a weight and activations of its dtype.

    Args:
        weight: ``[C]``, on the device in question.
        residual: Whether there will be a residual.
        row_to: What a row will join; None: there will be none.
        position: Whether there will be positions.
    """
    if weight.numel() <= MAX_CHANNELS and weight.dtype in DTYPES:
        flags = residual, row_to is not None, row_to or "sum"
        launch = _launch((1, 1, weight.numel()), weight.itemsize, int(position), 0.5, *flags)
        launch.compile_ahead(weight.device, *[weight.dtype] * TENSORS)


def _bind(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None,
    row: Tensor | None,
    position: Tensor | None,
    row_to: str,
) -> Callable[..., list[Tensor]]:
    positions = 0 if position is None else len(position)
    launch = _launch(x.shape, x.itemsize, positions, eps, residual is not None, row is not None, row_to)
    ready = all(t is None or t.is_contiguous() for t in (x, residual, row, position, weight, bias))
    stores = _stores_sum(residual, row, row_to)

    def run(x, weight, bias, eps, residual, row, position, row_to):
        if not ready:
            every = x, weight, bias, residual, row, position
            x, weight, bias, residual, row, position = (None if t is None else t.contiguous() for t in every)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        if not stores:
            launch(x, residual, row, position, weight, bias, None, y)
            return [y]
        z = torch.empty_like(x, memory_format=torch.contiguous_format)
        launch(x, residual, row, position, weight, bias, z, y)
        return [z, y]

    return run


def _stores_sum(residual: Tensor | None, row: Tensor | None, row_to: str) -> bool:
    """Whether z is another tensor than x."""
    return residual is not None or (row is not None and row_to != "norm")


@functools.wraps(add_layer_norm_ref)
def _reference(*args: Any) -> list[Tensor]:
    """``[z, y]``, or only ``[y]`` when z is x: a custom op may not return its input."""
    z, y = add_layer_norm_ref(*args)
    return [z.contiguous(), y] if _stores_sum(args[4], args[5], args[7]) else [y]


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None,
    row: Tensor | None,
    position: Tensor | None,
    row_to: str,
) -> list[Tensor]:
    outputs = 1 + _stores_sum(residual, row, row_to)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(outputs)]


def _reason(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *others: Any) -> str | None:
    addends = others[:-1]
    if x.shape[-1] > MAX_CHANNELS:
        return f"the kernel keeps a row in registers, up to C={MAX_CHANNELS}, got C={x.shape[-1]}"
    if x.numel() == 0:
        return "there is nothing to normalise"
    if mixed := [t.dtype for t in addends if t is not None and t.dtype != x.dtype]:
        return f"the addends must have the dtype of x, {x.dtype}, got {mixed[0]}"
    return device_reason(x) or tensors_reason(x, weight, bias, *addends)


def _costs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None,
    row: Tensor | None,
    position: Tensor | None,
    row_to: str,
) -> Costs:
    return Costs(bytes=x.nbytes * (2 + (residual is not None) + _stores_sum(residual, row, row_to)))


def _parts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None,
    row: Tensor | None,
    position: Tensor | None,
    row_to: str,
) -> Iterator[Part]:
    samples, rows, channels = x.shape
    for n in cuts(samples, rows * channels, lean(x)):
        if position is not None:
            positions = position[torch.arange(n.start, n.stop, device=x.device) % len(position)]
        for s in cuts(rows, (n.stop - n.start) * channels, lean(x)):
            yield Part(
                (
                    x[n, s], weight, bias, eps,
                    None if residual is None else residual[n, s],
                    None if row is None else row[n],
                    None if position is None else positions,
                    row_to,
                ),
                functools.partial(piece_of, (n, s)),
            )  # fmt: skip


def _validate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None,
    row: Tensor | None,
    position: Tensor | None,
    row_to: str,
) -> None:
    require_floats("add_layer_norm", x=x, weight=weight, bias=bias, residual=residual, row=row, position=position)
    if x.ndim != 3:
        raise ValueError(f"add_layer_norm: x must be [B, S, C], got {tuple(x.shape)}")
    samples, _, channels = x.shape
    if weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(
            f"add_layer_norm: weight and bias must be [{channels}], got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"add_layer_norm: residual must be {tuple(x.shape)}, as x is, got {tuple(residual.shape)}")
    if row is not None and row.shape != (samples, 1, channels):
        raise ValueError(f"add_layer_norm: row must be [{samples}, 1, {channels}], got {tuple(row.shape)}")
    if position is not None and (position.ndim != 2 or position.shape[1] != channels or not len(position)):
        raise ValueError(f"add_layer_norm: position must be [T, {channels}], got {tuple(position.shape)}")
    if position is not None and samples % len(position):
        raise ValueError(f"add_layer_norm: T={len(position)} of position does not divide the B={samples} of x")
    if row_to not in ROW_TO:
        raise ValueError(f"add_layer_norm: row_to must be one of {', '.join(ROW_TO)}, got {row_to!r}")
    if row_to == "residual" and residual is None:
        raise ValueError("add_layer_norm: row_to='residual' needs a residual")


ADD_LAYER_NORM = Op(
    "add_layer_norm",
    reference=_reference,
    implementations={"triton": Implementation.bound(_bind, _reason)},
    fake=_fake,
    costs=_costs,
    parts=_parts,
    validate=_validate,
    small=scaled(0, 4, 5),  # x, residual, row
)


def add_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    row: Tensor | None = None,
    position: Tensor | None = None,
    row_to: RowTo = "sum",
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``z = row + (x + residual)`` and ``F.layer_norm(z, [C], weight, bias, eps) + position``.

    Args:
        x: ``[B, S, C]``, fp16 / bf16 / fp32; read through a contiguous copy if it is not contiguous.
        weight: ``[C]``, any float dtype.
        bias: ``[C]``, any float dtype.
        eps: Added to the variance.
        residual: ``[B, S, C]``, like the row and the position in ``x.dtype``: another one joins by PyTorch's rules, and
            the kernel does not take it. None adds nothing.
        row: ``[B, 1, C]``, added to every row of its sample (a frame's embedding, a one-token attention); None adds
            nothing.
        position: ``[T, C]``, added to the norm: every row of sample ``b`` takes ``position[b % T]`` (a positional
            embedding of the frames of several clips); None adds nothing.
        row_to: What the row joins: the ``"sum"``, as above; the ``"residual"`` before it joins the sum,
            ``z = x + (row + residual)``; only what is normed, ``"norm"``: ``z = x + residual``, norm of ``row + z``; or
            only z, ``"stored"``: ``z = row + (x + residual)``, norm of ``x + residual``.
        impl: ``"triton"`` or ``"torch"``; None lets the op choose.

    Returns:
        z, and the norm with its position, both ``[B, S, C]`` in ``x.dtype``, contiguous; z is ``x`` itself when nothing
        is added to it.

    Raises:
        ValueError: ``x`` is not 3-D; another argument has another shape; ``T`` does not divide ``B``; ``row_to`` is
            unknown or wants a residual that is not there; ``impl`` cannot run here.
        TypeError: A tensor is not floating-point.
    """
    outputs = ADD_LAYER_NORM(x, weight, bias, eps, residual, row, position, row_to, impl=impl)
    return (outputs[0] if len(outputs) == 2 else x), outputs[-1]
