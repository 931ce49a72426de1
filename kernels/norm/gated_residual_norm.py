"""What a video transformer does between two products: a gated residual, the next norm, its scale and shift.

    z[b, s, c] = x[b, s, c] + gate[b, r(s), c] * branch[b, s, c]
    y[b, s, c] = norm(z)[b, s, c] * (1 + scale[b, r(s), c]) + shift[b, r(s), c]

in one pass over rows of channels. Each piece may be left out: without a branch it is the modulated norm at the start of
a block (:func:`norm_modulate`), without a gate a plain residual, without scale and shift a plain norm, without a norm
the residual alone. ``norm`` is LayerNorm or RMSNorm, with weight and bias or without. Of one norm there may be two
modulations, ``y2`` beside ``y``. The branch itself may be normed on its way (``branch_norm``, Mochi's RMSNorm).

The modulation has R rows per sample: one, or one for each token, or a few that ``rows`` assigns to the tokens (text and
video; the noised frames and the first one). It is mostly a chunk of a bigger tensor, and is read there by its strides,
as is a branch that is a slice of one.

Families round at different places, and here is rounded where each of them stores (``rounding``):

* ``"once"`` (Wan): everything from x and the branch to z, and from z to y, in float32, rounded once;
* ``"each"`` (LTX, HunyuanVideo, CogVideoX): gate * branch, z, the norm, 1 + scale, the product and the sum, each to
  the dtype of x.

A row is read once and stays in registers, so the statistics are plain two-pass ones of the stored z, in float32. The
modulation that many tokens share stays there too, and is read anew where it changes. Fidelity: math-exact. Bound by
memory: reads x and branch, writes z and y; eager makes 15 to 30 such passes, half of them in float32.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels import settings
from vidaccel.kernels.arguments import require_floats
from vidaccel.kernels.check import Part, cuts, piece_of
from vidaccel.kernels.launch import Launch, multiprocessors
from vidaccel.kernels.op import DTYPES, Costs, Implementation, Op, device_reason, one_or, scaled, tensors_reason

__all__ = [
    "GATED_RESIDUAL_NORM",
    "NO_NORM",
    "Norm",
    "Rounding",
    "choose_tiling",
    "gated_residual",
    "gated_residual_norm",
    "gated_residual_norm_ref",
    "norm_modulate",
    "rows_of_tokens",
]

Kind = Literal["layer", "rms", "none"]
Rounding = Literal["once", "each"]


class Norm(NamedTuple):
    """A norm over channels.

    Attributes:
        kind: LayerNorm, RMSNorm, or none.
        eps: Added to the variance, or to the mean square.
        weight: ``[C]``, any float dtype, or None.
        bias: ``[C]``, of a LayerNorm with a weight, or None.
    """

    kind: Kind
    eps: float = 0.0
    weight: Tensor | None = None
    bias: Tensor | None = None


NO_NORM = Norm("none")


class _Call(NamedTuple):
    """The arguments of the op, by position."""

    x: Tensor
    branch: Tensor | None
    gate: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    scale2: Tensor | None
    shift2: Tensor | None
    rows: Tensor | None
    kind: str
    eps: float
    weight: Tensor | None
    bias: Tensor | None
    branch_eps: float | None
    rounding: str


def gated_residual_norm_ref(
    x: Tensor,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    scale2: Tensor | None = None,
    shift2: Tensor | None = None,
    rows: Tensor | None = None,
    kind: str = "layer",
    eps: float = 1e-6,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    branch_eps: float | None = None,
    rounding: str = "once",
) -> list[Tensor]:
    """The specification: ``[z, y, y2]`` without those that there are not. Pass float64 inputs for gold values."""
    args = x, branch, gate, scale, shift, scale2, shift2, rows, kind, eps, weight, bias, branch_eps, rounding
    call = _Call(*args)
    z, outputs = x, []
    if call.branch is not None:
        z = _residual(call).contiguous()
        outputs.append(z)
    if call.kind != "none":
        normed = _norm(call, z)
        outputs.append(_modulated(call, normed, call.scale, call.shift))
        if call.scale2 is not None:
            outputs.append(_modulated(call, normed, call.scale2, call.shift2))
    return outputs


def _wide(call: _Call) -> torch.dtype:
    """What is calculated in."""
    return torch.promote_types(call.x.dtype, torch.float32)


def _residual(call: _Call) -> Tensor:
    x, branch = call.x, call.branch
    assert branch is not None
    wide, rounded = _wide(call), x.dtype if call.rounding == "each" else _wide(call)
    if call.branch_eps is not None:  # Mochi's, in float32 up to and with the gate
        branch = F.rms_norm(branch.to(wide), branch.shape[-1:], eps=call.branch_eps)
        branch = branch if call.gate is None else branch * rows_of_tokens(call.gate, call.rows).to(wide)
        return x + branch.to(x.dtype)
    if call.gate is not None:
        branch = branch.to(rounded) * rows_of_tokens(call.gate, call.rows).to(rounded)
    return (x.to(rounded) + branch).to(x.dtype)


def _norm(call: _Call, z: Tensor) -> Tensor:
    """In float32, or rounded to the dtype of x where each step is."""
    wide, shape = _wide(call), z.shape[-1:]
    weight, bias = (None if t is None else t.to(wide) for t in (call.weight, call.bias))
    if call.kind == "layer":
        y = F.layer_norm(z.to(wide), shape, weight, bias, call.eps)
    else:
        y = F.rms_norm(z.to(wide), shape, weight, call.eps)
    return y.to(z.dtype) if call.rounding == "each" else y


def _modulated(call: _Call, normed: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    y = normed
    if scale is not None:
        y = y * (1 + rows_of_tokens(scale, call.rows).to(y.dtype))
    if shift is not None:
        y = y + rows_of_tokens(shift, call.rows).to(y.dtype)
    return y.to(call.x.dtype)


def rows_of_tokens(modulation: Tensor, rows: Tensor | None) -> Tensor:
    """``[B, R, C]`` as it meets ``[B, S, C]``."""
    return modulation if rows is None else modulation[:, rows]


@triton.jit
def _load_row(ptr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """A row of channels, as a tuple of blocks of registers."""
    row = ()  # type: Any
    for start in tl.static_range(0, CHANNELS, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        if CHANNELS % BLOCK_C == 0:
            row += (tl.load(ptr + offs_c),)
        else:
            row += (tl.load(ptr + offs_c, mask=offs_c < CHANNELS, other=0.0),)
    return row


@triton.jit
def _store_row(ptr, row, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    for i in tl.static_range(len(row)):
        offs_c = i * BLOCK_C + tl.arange(0, BLOCK_C)
        if CHANNELS % BLOCK_C == 0:
            tl.store(ptr + offs_c, row[i])
        else:
            tl.store(ptr + offs_c, row[i], mask=offs_c < CHANNELS)


@triton.jit
def _widened(row):
    return [block.to(tl.float32) for block in row]


@triton.jit
def _sum(row, SQUARED: tl.constexpr):
    """Of all its channels: blocks are added to one another first, and lanes once."""
    total = row[0] * row[0] if SQUARED else row[0]
    for i in tl.static_range(1, len(row)):
        total = tl.fma(row[i], row[i], total) if SQUARED else total + row[i]
    return tl.sum(total)


@triton.jit
def _less_mean(row, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    mean = _sum(row, SQUARED=False) / CHANNELS
    centred = ()  # type: Any
    for i in tl.static_range(len(row)):
        block = row[i] - mean
        if CHANNELS % BLOCK_C != 0:  # what lies behind the last channel stays 0
            block = tl.where(i * BLOCK_C + tl.arange(0, BLOCK_C) < CHANNELS, block, 0.0)
        centred += (block,)
    return centred


@triton.jit
def _load_modulation(
    ptrs, strides, row, dtype: tl.constexpr, THERE: tl.constexpr, ROUND_GATE: tl.constexpr, ROUND: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gate, then twice 1 + scale and the shift: a row of each, or () where there is none."""
    gate = _load_rounded(ptrs[0] + row * strides[0], dtype, THERE[0], ROUND_GATE, CHANNELS, BLOCK_C)
    scale = _load_rounded(ptrs[1] + row * strides[1], dtype, THERE[1], ROUND, CHANNELS, BLOCK_C)
    shift = _load_rounded(ptrs[2] + row * strides[2], dtype, THERE[2], ROUND, CHANNELS, BLOCK_C)
    scale2 = _load_rounded(ptrs[3] + row * strides[3], dtype, THERE[3], ROUND, CHANNELS, BLOCK_C)
    shift2 = _load_rounded(ptrs[4] + row * strides[4], dtype, THERE[4], ROUND, CHANNELS, BLOCK_C)
    return gate, _one_plus(scale, dtype, ROUND), shift, _one_plus(scale2, dtype, ROUND), shift2


@triton.jit
def _load_rounded(
    ptr, dtype: tl.constexpr, THERE: tl.constexpr, ROUND: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr
):
    row = ()  # type: Any
    if THERE:
        row = _load_row(ptr, CHANNELS, BLOCK_C)
    return [block.to(dtype) if ROUND else block for block in row]


@triton.jit
def _one_plus(row, dtype: tl.constexpr, ROUND: tl.constexpr):
    return [(1.0 + block.to(tl.float32)).to(dtype if ROUND else tl.float32) for block in row]


@triton.jit
def _modulate(normed, factor, shift, dtype: tl.constexpr, ROUND: tl.constexpr):
    """``normed * factor + shift`` without those that there are not, in ``dtype``."""
    out = ()  # type: Any
    for i in tl.static_range(len(normed)):
        y = normed[i]
        if len(factor) > 0:
            y *= factor[i].to(tl.float32)
            if ROUND:
                y = y.to(dtype).to(tl.float32)
        if len(shift) > 0:
            y += shift[i].to(tl.float32)
        out += (y.to(dtype),)
    return out


@triton.jit(do_not_specialize=["tokens"])
def _gated_residual_norm_kernel(
    x_ptr, branch_ptr, gate_ptr, scale_ptr, shift_ptr, scale2_ptr, shift2_ptr, rows_ptr, weight_ptr, bias_ptr,
    z_ptr, y_ptr, y2_ptr,
    tokens,
    stride_x_b, stride_x_s, stride_branch_b, stride_branch_s, stride_gate_b, stride_gate_r,
    stride_scale_b, stride_scale_r, stride_shift_b, stride_shift_r,
    stride_scale2_b, stride_scale2_r, stride_shift2_b, stride_shift2_r,
    eps, branch_eps,
    KIND: tl.constexpr, ROUND: tl.constexpr, ROW_OF: tl.constexpr,
    HAS_BRANCH: tl.constexpr, HAS_BRANCH_NORM: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_SCALE2: tl.constexpr, HAS_SHIFT2: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    ROUND_GATE: tl.constexpr = ROUND and not HAS_BRANCH_NORM
    sample, first, step = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    x_ptr += sample * stride_x_b
    branch_ptr += sample * stride_branch_b
    ptrs = (
        gate_ptr + sample * stride_gate_b,
        scale_ptr + sample * stride_scale_b, shift_ptr + sample * stride_shift_b,
        scale2_ptr + sample * stride_scale2_b, shift2_ptr + sample * stride_shift2_b,
    )  # fmt: skip
    strides = stride_gate_r, stride_scale_r, stride_shift_r, stride_scale2_r, stride_shift2_r
    THERE: tl.constexpr = (HAS_GATE, HAS_SCALE, HAS_SHIFT, HAS_SCALE2, HAS_SHIFT2)

    weight = _load_rounded(weight_ptr, dtype, HAS_WEIGHT, False, CHANNELS, BLOCK_C)
    bias = _load_rounded(bias_ptr, dtype, HAS_BIAS, False, CHANNELS, BLOCK_C)
    if ROW_OF != "token":  # what many tokens share stays in registers
        row = tl.load(rows_ptr + first).to(tl.int64) if ROW_OF == "stretch" else 0
        changed = first < 0
        gate, scale, shift, scale2, shift2 = _load_modulation(
            ptrs, strides, row, dtype, THERE, ROUND_GATE, ROUND, CHANNELS, BLOCK_C
        )

    for s in tl.range(first, tokens, step, num_stages=STAGES):
        token = tl.cast(s, tl.int64)
        if ROW_OF == "token":
            gate, scale, shift, scale2, shift2 = _load_modulation(
                ptrs, strides, token, dtype, THERE, ROUND_GATE, ROUND, CHANNELS, BLOCK_C
            )
        elif ROW_OF == "stretch":
            if changed:
                gate, scale, shift, scale2, shift2 = _load_modulation(
                    ptrs, strides, row, dtype, THERE, ROUND_GATE, ROUND, CHANNELS, BLOCK_C
                )
            # that of the next token is on its way while this one is worked on
            following = tl.load(rows_ptr + s + step, mask=s + step < tokens, other=0).to(tl.int64)
            changed = following != row
            row = following

        z = _load_row(x_ptr + token * stride_x_s, CHANNELS, BLOCK_C)
        out = (sample * tokens + token) * CHANNELS
        if HAS_BRANCH:
            branch = _widened(_load_row(branch_ptr + token * stride_branch_s, CHANNELS, BLOCK_C))
            if HAS_BRANCH_NORM:
                branch_rstd = tl.rsqrt(_sum(branch, SQUARED=True) / CHANNELS + branch_eps)
            joined = ()  # type: Any
            for i in tl.static_range(len(branch)):
                addend = branch[i]
                if HAS_BRANCH_NORM:
                    addend *= branch_rstd
                if HAS_GATE:
                    addend *= gate[i].to(tl.float32)
                if HAS_BRANCH_NORM or (HAS_GATE and ROUND):
                    addend = addend.to(dtype).to(tl.float32)
                joined += ((z[i].to(tl.float32) + addend).to(dtype),)
            z = joined
            _store_row(z_ptr + out, z, CHANNELS, BLOCK_C)

        if KIND != "none":
            centred = _widened(z)
            if KIND == "layer":
                centred = _less_mean(centred, CHANNELS, BLOCK_C)
                if dtype == tl.float32:
                    # far from zero the roundings of the mean show in float32; those of what it leaves do not
                    centred = _less_mean(centred, CHANNELS, BLOCK_C)
            rstd = tl.rsqrt(_sum(centred, SQUARED=True) / CHANNELS + eps)
            normed = ()  # type: Any
            for i in tl.static_range(len(centred)):
                y = centred[i] * rstd
                if HAS_WEIGHT:
                    y *= weight[i].to(tl.float32)
                if HAS_BIAS:
                    y += bias[i].to(tl.float32)
                normed += (y.to(dtype).to(tl.float32) if ROUND else y,)
            _store_row(y_ptr + out, _modulate(normed, scale, shift, dtype, ROUND), CHANNELS, BLOCK_C)
            if HAS_SCALE2:
                _store_row(y2_ptr + out, _modulate(normed, scale2, shift2, dtype, ROUND), CHANNELS, BLOCK_C)


class Tiling(NamedTuple):
    """``programs`` programs to a multiprocessor, of ``num_warps`` warps each, walk over tokens, a row at a time.

    A row is in registers in blocks of ``block_c`` channels; ``stages - 1`` rows are fetched ahead of it.
    """

    block_c: int
    num_warps: int
    programs: int
    stages: int


MAX_CHANNELS = 8192
LANES = 64 if torch.version.hip else 32  # of a warp
VECTOR = 8  # numbers of a block to a lane: 16 bytes in half precision
MOST_NUMBERS = 40  # of a row to a lane
# of a lane's 255 registers, for a row and what is held beside it, by the number of warps
MOST_REGISTERS = {1: 160, 2: 160, 4: 160, 8: 216, 16: 216}
OTHER_REGISTERS = 40  # addresses, and what is on its way
MOST_AHEAD = 48 * 2**10  # bytes of shared memory: two programs fit into every GPU's
REGISTERS, SHARED = 2**16, 200 * 2**10  # of a multiprocessor of an H100


# By the bytes that are fetched for a token: where an H200 is 5 % faster than by the rule below.
MEASURED = {4 * 1536: Tiling(1024, 4, 4, 3), 4 * 3072: Tiling(1024, 4, 4, 2)}


def choose_tiling(channels: int, held: float, fetched: int, lanes: int) -> Tiling:
    """For rows of ``channels`` numbers: at the models' widths 88 to 96 % of an H200's copy bandwidth.

    A norm without a residual gets 85 to 89 % (samples/benchmarks/transformer-op-variants-h200.json).

    A lane takes 16 bytes of each block, and a row is as many blocks as it needs: 3072 channels are 3 blocks of 1024,
    1536 are 3 of 512. The fewer warps share a row, the less they wait for one another in its reductions, and the fewer
    lanes are left over in its last block: they are as few as can keep it in registers with all that is held beside it.

    The grid is what an H100 runs at once, by an estimate that is rather too low: a program loads its modulation once,
    and no second wave comes after the first. Few programs suffice, since rows are fetched ahead: two with 5120
    channels have up to 80 KB on their way, where 30 keep the memory busy.

    ``constants_overridden(BLOCK_C=1024, num_warps=4, STAGES=2, PROGRAMS=4)``, or some of these, tries another one.

    Args:
        channels: C.
        held: Registers for each number of a row that a program holds beside the row.
        fetched: Bytes that it reads for a token.
        lanes: Of a warp.
    """
    if lanes == 32 and fetched in MEASURED:
        return MEASURED[fetched]
    for num_warps, most in MOST_REGISTERS.items():
        numbers = VECTOR * triton.cdiv(channels, VECTOR * num_warps * lanes)
        if numbers <= MOST_NUMBERS and numbers * (1 + held) <= most:
            break
    stages = 3 if 2 * fetched <= MOST_AHEAD else 2 if fetched <= MOST_AHEAD else 1
    if lanes == 64:  # AMD's compiler fetches ahead into registers
        stages = min(stages, 2)
    registers = int(numbers * (1 + held)) + OTHER_REGISTERS
    programs = min(REGISTERS // (registers * num_warps * lanes), SHARED // max((stages - 1) * fetched, 1), 16)
    return Tiling(VECTOR * num_warps * lanes, num_warps, max(programs, 1), stages)


def _row_of(call: _Call) -> str:
    """Whose row of the modulation a token takes.

    That of its ``"sample"``, of which there is one; its ``"token"``'s own; or that of the ``"stretch"`` it is in.
    """
    if all(t.shape[1] == 1 or t.stride(1) == 0 for t in _modulation(call)):
        return "sample"
    return "token" if call.rows is None else "stretch"


def _modulation(call: _Call) -> list[Tensor]:
    return [t for t in (call.gate, call.scale, call.shift, call.scale2, call.shift2) if t is not None]


def _strides(tensor: Tensor | None, samples: int) -> tuple[int, int]:
    """Of the samples and rows of ``[B, S, C]`` or ``[B, R, C]``; 0 where there is one sample, or one row for all."""
    if tensor is None:
        return 0, 0
    of_sample, of_row, _ = tensor.stride()
    return of_sample if len(tensor) == samples > 1 else 0, of_row if tensor.shape[1] > 1 else 0


def _launch(call: _Call) -> Launch:
    samples, tokens, channels = call.x.shape
    row_of, modulation, each = _row_of(call), _modulation(call), call.rounding == "each"
    has_bias, has_branch_norm = call.bias is not None and call.kind == "layer", call.branch_eps is not None
    parameters = (call.weight is not None) + has_bias + has_branch_norm
    # rounded to half precision, two numbers share a register; a modulation that changes is there twice for a moment
    held = sum(0.5 if each and t.itemsize == 2 else 1 for t in modulation) + 0.75 * (row_of == "stretch")
    fetched = [call.x, call.branch, *(modulation if row_of == "token" else ())]
    fetched_bytes = sum(channels * t.itemsize for t in fetched if t is not None)
    tiling = choose_tiling(channels, held + parameters, fetched_bytes, LANES)
    programs = dict(settings.overridden_constants()).get("PROGRAMS", tiling.programs)
    programs = max(programs * multiprocessors(call.x.device) // samples, 1)
    return Launch(
        _gated_residual_norm_kernel, (samples, min(programs, tokens)),
        tokens,
        *itertools.chain(*(_strides(t, samples) for t in (call.x, call.branch, *call[2:7]))),
        float(call.eps), float(call.branch_eps or 0.0),
        KIND=call.kind, ROUND=each, ROW_OF=row_of,
        HAS_BRANCH=call.branch is not None, HAS_BRANCH_NORM=has_branch_norm, HAS_GATE=call.gate is not None,
        HAS_SCALE=call.scale is not None, HAS_SHIFT=call.shift is not None,
        HAS_SCALE2=call.scale2 is not None, HAS_SHIFT2=call.shift2 is not None,
        HAS_WEIGHT=call.weight is not None, HAS_BIAS=has_bias,
        CHANNELS=channels, BLOCK_C=tiling.block_c, STAGES=tiling.stages,
        num_warps=tiling.num_warps,
        # a product and a sum in half precision would become one instruction, that rounds once
        enable_fp_fusion=not each,
    )  # fmt: skip


def _row_major(tensor: Tensor | None) -> Tensor | None:
    """With the channels of a row beside one another: copied where they are not."""
    return tensor if tensor is None or tensor.shape[-1] == 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _bind(*args: Any) -> Callable[..., list[Tensor]]:
    laid_out: list[Any] = [_row_major(x) if isinstance(x, Tensor) else x for x in args]
    call = _Call(*laid_out)
    launch = _launch(call)
    ready = all(kept is given for kept, given in zip(laid_out, args, strict=True))
    joins, norms = call.branch is not None, call.kind != "none"
    modulates_twice = norms and call.scale2 is not None

    def run(x, branch, gate, scale, shift, scale2, shift2, rows, kind, eps, weight, bias, branch_eps, rounding):
        given = x, branch, gate, scale, shift, scale2, shift2, rows, weight, bias
        if not ready:
            given = tuple(map(_row_major, given))
        z = x.new_empty(x.shape) if joins else None
        y = x.new_empty(x.shape) if norms else None
        y2 = x.new_empty(x.shape) if modulates_twice else None
        launch(*given, z, y, y2)
        return [out for out in (z, y, y2) if out is not None]

    return run


def _reason(*args: Any) -> str | None:
    call = _Call(*args)
    x, modulation = call.x, [*_modulation(call), *(t for t in (call.weight, call.bias) if t is not None)]
    given = [t for t in (call.branch, call.rows, *modulation) if t is not None]
    if x.shape[-1] > MAX_CHANNELS:
        return f"the kernel keeps a row in registers, up to C={MAX_CHANNELS}, got C={x.shape[-1]}"
    if x.numel() == 0:
        return "there are no rows"
    if reason := device_reason(x) or tensors_reason(x, *given):
        return reason
    if call.branch is not None and call.branch.dtype != x.dtype:
        return f"the branch must have the dtype of x, {x.dtype}, got {call.branch.dtype}"
    if others := [t.dtype for t in modulation if t.dtype not in DTYPES]:
        return f"the kernel takes a modulation or weight in float16, bfloat16 and float32, got {others[0]}"
    if elsewhere := [t.device for t in given if t.device != x.device]:
        return f"x is on {x.device}, another tensor on {elsewhere[0]}"
    return None


def _outputs(*args: Any) -> int:
    call = _Call(*args)
    normed = 0 if call.kind == "none" else 1 + (call.scale2 is not None)
    return (call.branch is not None) + normed


def _fake(*args: Any) -> list[Tensor]:
    x = _Call(*args).x
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(_outputs(*args))]


def _costs(*args: Any) -> Costs:
    """x and the branch once, every output once; the modulation where it has a row for each token."""
    call = _Call(*args)
    passes = 1 + (call.branch is not None) + _outputs(*args)
    return Costs(bytes=passes * call.x.nbytes + sum(t.nbytes for t in _modulation(call) if t.shape[1] > 1))


def _parts(*args: Any) -> Iterator[Part]:
    call = _Call(*args)
    samples, tokens, channels = call.x.shape
    for n in cuts(samples, tokens * channels):
        for s in cuts(tokens, (n.stop - n.start) * channels):
            part = call._replace(
                x=call.x[n, s],
                branch=None if call.branch is None else call.branch[n, s],
                gate=_part_of(call.gate, call, n, s),
                scale=_part_of(call.scale, call, n, s),
                shift=_part_of(call.shift, call, n, s),
                scale2=_part_of(call.scale2, call, n, s),
                shift2=_part_of(call.shift2, call, n, s),
                rows=None if call.rows is None else call.rows[s],
            )
            yield Part(tuple(part), functools.partial(piece_of, (n, s)))


def _part_of(modulation: Tensor | None, call: _Call, samples: slice, tokens: slice) -> Tensor | None:
    if modulation is None:
        return None
    modulation = modulation[samples] if len(modulation) > 1 else modulation
    return modulation[:, tokens] if call.rows is None and modulation.shape[1] > 1 else modulation


def _validate(*args: Any) -> None:
    call = _Call(*args)
    x = call.x
    names = ("x", "branch", "gate", "scale", "shift", "scale2", "shift2", "weight", "bias")
    require_floats("gated_residual_norm", **{name: getattr(call, name) for name in names})
    if x.ndim != 3:
        raise ValueError(f"gated_residual_norm: x must be [B, S, C], got {tuple(x.shape)}")
    samples, tokens, channels = x.shape
    if call.branch is not None and call.branch.shape != x.shape:
        raise ValueError(f"gated_residual_norm: branch must be {tuple(x.shape)}, got {tuple(call.branch.shape)}")
    if call.branch is None and (call.gate is not None or call.kind == "none"):
        raise ValueError("gated_residual_norm: without a branch there is nothing to gate, and no norm means no work")
    for name in ("gate", "scale", "shift", "scale2", "shift2"):
        modulation = getattr(call, name)
        if modulation is None:
            continue
        fits = modulation.ndim == 3 and one_or(samples, modulation.shape[0]) and modulation.shape[2] == channels
        if not fits or (call.rows is None and not one_or(tokens, modulation.shape[1])):
            raise ValueError(
                f"gated_residual_norm: {name} must be [B, R, C] with R=1 or S, or other R with rows, "
                f"got {tuple(modulation.shape)} for x {tuple(x.shape)}"
            )
    if call.shift2 is not None and call.scale2 is None:
        raise ValueError("gated_residual_norm: a second shift needs a second scale")
    rows = call.rows
    if rows is not None and (rows.shape != (tokens,) or rows.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"gated_residual_norm: rows must be [{tokens}] int32, got {tuple(rows.shape)} {rows.dtype}")
    for name in ("weight", "bias"):
        parameter = getattr(call, name)
        if parameter is not None and parameter.shape != (channels,):
            raise ValueError(f"gated_residual_norm: {name} must be [{channels}], got {tuple(parameter.shape)}")
    if call.kind not in get_args(Kind) or call.rounding not in get_args(Rounding):
        raise ValueError(f"gated_residual_norm: no such kind or rounding: {call.kind!r}, {call.rounding!r}")


GATED_RESIDUAL_NORM = Op(
    "gated_residual_norm",
    reference=gated_residual_norm_ref,
    implementations={"triton": Implementation.bound(_bind, _reason, _Call)},
    fake=_fake,
    costs=_costs,
    parts=_parts,
    validate=_validate,
    small=scaled(0, 1),  # x, branch
)


def norm_modulate(
    x: Tensor,
    norm: Norm,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    rounding: Rounding = "once",
    impl: str | None = None,
) -> Tensor:
    """``norm(x) * (1 + scale) + shift``.

    Args:
        x: ``[B, S, C]``, fp16 / bf16 / fp32; rows of any stride.
        norm: LayerNorm or RMSNorm.
        scale: ``[B, R, C]``, any float dtype and strides (B may be 1), R = 1 or S, or any R with ``rows``; or None.
        shift: As ``scale``.
        rows: ``[S]`` int32: the row of the modulation that each token takes. None: the only one, or its own.
        rounding: Where intermediate results are rounded to ``x.dtype``; see the module's docstring.
        impl: ``"triton"`` or ``"torch"``; None lets the op choose.

    Returns:
        ``[B, S, C]``, contiguous, in ``x.dtype``.

    Raises:
        ValueError: The shapes do not fit one another; ``impl`` cannot run here.
        TypeError: A tensor but ``rows`` is not floating-point.
    """
    args = x, None, None, scale, shift, None, None, rows, norm.kind, norm.eps, norm.weight, norm.bias, None, rounding
    return GATED_RESIDUAL_NORM(*args, impl=impl)[0]


def gated_residual(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    branch_eps: float | None = None,
    rounding: Rounding = "once",
    impl: str | None = None,
) -> Tensor:
    """``x + gate * branch``; arguments as of :func:`gated_residual_norm`."""
    args = x, branch, gate, None, None, None, None, rows, "none", 0.0, None, None, branch_eps, rounding
    return GATED_RESIDUAL_NORM(*args, impl=impl)[0]


def gated_residual_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    norm: Norm,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    second: tuple[Tensor, Tensor] | None = None,
    rows: Tensor | None = None,
    branch_eps: float | None = None,
    rounding: Rounding = "once",
    impl: str | None = None,
) -> list[Tensor]:
    """``z = x + gate * branch`` and ``norm(z) * (1 + scale) + shift``.

    Args:
        x: ``[B, S, C]``, fp16 / bf16 / fp32; rows of any stride.
        branch: Like x.
        gate: ``[B, R, C]``, any float dtype and strides (B may be 1), R = 1 or S, or any R with ``rows``; None: 1.
        norm: Of z.
        scale: As ``gate``; None: 0.
        shift: As ``gate``; None: 0.
        second: Another scale and shift for the same norm.
        rows: ``[S]`` int32: the row of the modulation that each token takes. None: the only one, or its own.
        branch_eps: Not None: the branch is RMS-normed first, with this eps and no weight.
        rounding: Where intermediate results are rounded to ``x.dtype``; see the module's docstring.
        impl: ``"triton"`` or ``"torch"``; None lets the op choose.

    Returns:
        z, y, and with ``second`` y2: ``[B, S, C]`` each, contiguous, in ``x.dtype``.

    Raises:
        ValueError: The shapes do not fit one another; ``impl`` cannot run here.
        TypeError: A tensor but ``rows`` is not floating-point.
    """
    scale2, shift2 = second or (None, None)
    return GATED_RESIDUAL_NORM(
        x, branch, gate, scale, shift, scale2, shift2, rows,
        norm.kind, norm.eps, norm.weight, norm.bias, branch_eps, rounding,
        impl=impl,
    )  # fmt: skip
