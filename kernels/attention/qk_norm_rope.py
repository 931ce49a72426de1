"""Queries and keys between their projections and their attention: norm, rotary embedding, one buffer for two streams.

    q, k = rope(norm(q) * weight_q, cos, sin), rope(norm(k) * weight_k, cos, sin)

in one pass over rows ``[B, S, H*D]``. The norm runs across all heads of a token (``"rms_all"``: Wan, LTX) or over each
head (``"rms_head"``: HunyuanVideo, Cosmos, Mochi; ``"layer_head"``: CogVideoX), or there is none. The rotary embedding
turns pairs of neighbouring channels (``"pairs"``), or channel i of a head with channel i + D/2 (``"halves"``), from
token ``start`` on; the tables hold each angle once. Queries and keys of a token share them, and one program.

A joint block has a second stream (text) with projections and weights of its own, and no rotary embedding. Its queries,
keys and values come in as ``second``; then the results are joint ones, the streams one behind the other, that attention
reads as they are: no ``torch.cat``. Without keys (``k=None``) the queries come alone, or the keys in their place: in
cross-attention there are more of the one than of the other.

``rounding`` as in ``gated_residual_norm``: ``"once"`` is ``torch.nn.RMSNorm``; ``"each"`` is diffusers' RMSNorm, which
rounds before it multiplies by a weight of half precision. Either way the result of the norm is rounded, and that of the
rotary embedding, which is calculated in float32. Fidelity: math-exact. Bound by memory: reads and writes q and k once.

A program holds whole tokens in registers, so that the statistics need no second read. A thread reads 16 bytes at a
time, which are whole pairs: nothing but the sums over all heads passes through shared memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.arguments import require_floats
from vidaccel.kernels.check import Part, cuts
from vidaccel.kernels.launch import Launch
from vidaccel.kernels.op import Costs, Implementation, Op, device_reason, one_or, scaled, tensors_reason

__all__ = [
    "QK_NORM_ROPE",
    "HeadNorm",
    "Rope",
    "SecondStream",
    "Tiling",
    "choose_tiling",
    "qk_norm_rope",
    "qk_norm_rope_ref",
]

NormKind = Literal["rms_all", "rms_head", "layer_head", "none"]
RopeKind = Literal["pairs", "halves", "none"]
Rounding = Literal["once", "each"]


class HeadNorm(NamedTuple):
    """The norms of queries and keys: across heads with weights ``[H*D]``, or per head with weights ``[D]``.

    Attributes:
        kind: What is normed, and how.
        eps: Added to the variance, or to the mean square.
        weight_q: Any float dtype, or None.
        weight_k: As ``weight_q``.
        bias_q: Of a LayerNorm, or None.
        bias_k: As ``bias_q``.
        rounding: Whether the norm is rounded before its weight is multiplied (``"each"``), or only after (``"once"``).
    """

    kind: NormKind
    eps: float = 0.0
    weight_q: Tensor | None = None
    weight_k: Tensor | None = None
    bias_q: Tensor | None = None
    bias_k: Tensor | None = None
    rounding: Rounding = "once"


class Rope(NamedTuple):
    """A rotary embedding.

    Attributes:
        kind: Which channels turn together.
        cos: ``[B, S, H, D/2]``, float32, any strides (best one of 1 along D/2); B and H may be 1: the same for all.
            S counts the tokens that turn, those from ``start`` on.
        sin: As ``cos``.
        start: The first token that turns.
    """

    kind: RopeKind
    cos: Tensor
    sin: Tensor
    start: int = 0


class SecondStream(NamedTuple):
    """Queries, keys and values ``[B, T, H*D]`` of another stream, and their norms (of the same kind).

    Attributes:
        first: Whether this stream comes before the other in the joint result.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    norm: HeadNorm
    first: bool = False


class _Call(NamedTuple):
    """The arguments of the op, by position."""

    q: Tensor
    k: Tensor | None
    num_heads: int
    norm: str
    eps: float
    rounding: str
    weight_q: Tensor | None
    weight_k: Tensor | None
    bias_q: Tensor | None
    bias_k: Tensor | None
    rope: str
    cos: Tensor | None
    sin: Tensor | None
    start: int
    v: Tensor | None
    second_q: Tensor | None
    second_k: Tensor | None
    second_v: Tensor | None
    second_weight_q: Tensor | None
    second_weight_k: Tensor | None
    second_bias_q: Tensor | None
    second_bias_k: Tensor | None
    second_first: bool


def qk_norm_rope_ref(
    q: Tensor,
    k: Tensor | None,
    num_heads: int,
    norm: str = "none",
    eps: float = 0.0,
    rounding: str = "once",
    weight_q: Tensor | None = None,
    weight_k: Tensor | None = None,
    bias_q: Tensor | None = None,
    bias_k: Tensor | None = None,
    rope: str = "none",
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    start: int = 0,
    v: Tensor | None = None,
    second_q: Tensor | None = None,
    second_k: Tensor | None = None,
    second_v: Tensor | None = None,
    second_weight_q: Tensor | None = None,
    second_weight_k: Tensor | None = None,
    second_bias_q: Tensor | None = None,
    second_bias_k: Tensor | None = None,
    second_first: bool = False,
) -> list[Tensor]:
    """The specification: ``[q]``, ``[q, k]``, or joint ``[q, k, v]``. Pass float64 inputs for gold values."""
    call = _Call(
        q, k, num_heads, norm, eps, rounding, weight_q, weight_k, bias_q, bias_k, rope, cos, sin, start, v,
        second_q, second_k, second_v, second_weight_q, second_weight_k, second_bias_q, second_bias_k, second_first,
    )  # fmt: skip
    q = _rope(call, _norm(call, q, weight_q, bias_q))
    if k is None:
        return [q.contiguous()]
    k = _rope(call, _norm(call, k, weight_k, bias_k))
    if second_q is None:
        return [q.contiguous(), k.contiguous()]
    second_q = _norm(call, second_q, second_weight_q, second_bias_q)
    second_k = _norm(call, second_k, second_weight_k, second_bias_k)
    pairs: list[Any] = [(q, second_q), (k, second_k), (v, second_v)]
    return [torch.cat(pair[::-1] if second_first else pair, dim=1) for pair in pairs]


def _norm(call: _Call, x: Any, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``[B, S, H*D]``, rounded to the dtype of x."""
    if call.norm == "none":
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    shape = x.shape
    y = x.to(wide) if call.norm == "rms_all" else x.to(wide).unflatten(2, (call.num_heads, -1))
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    if call.norm == "layer_head":
        y = F.layer_norm(y, y.shape[-1:], weight, bias, call.eps)
    elif call.rounding == "each":
        y = F.rms_norm(y, y.shape[-1:], None, call.eps).to(x.dtype)
        y = y if weight is None else y * weight.to(x.dtype)
    else:
        y = F.rms_norm(y, y.shape[-1:], weight, call.eps)
    return y.to(x.dtype).view(shape)


def _rope(call: _Call, x: Tensor) -> Tensor:
    if call.rope == "none":
        return x
    assert call.cos is not None and call.sin is not None
    wide = torch.promote_types(x.dtype, torch.float32)
    still, turning = x[:, : call.start], x[:, call.start :].unflatten(2, (call.num_heads, -1)).to(wide)
    cos, sin = call.cos.to(wide), call.sin.to(wide)
    if call.rope == "pairs":
        a, b = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    else:
        a, b = turning.chunk(2, dim=-1)
        turned = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
    return torch.cat([still, turned.flatten(2).to(x.dtype)], dim=1)


@triton.jit
def _load_two(ptr, offs, mask, ROPE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The numbers that turn together, ``[BLOCK_M, BLOCK_H, BLOCK_D / 2]`` each."""
    if ROPE == "halves":
        a = tl.load(ptr + offs, mask=mask, other=0.0)
        b = tl.load(ptr + offs + HEAD_DIM // 2, mask=mask, other=0.0)
    else:
        x = tl.load(ptr + offs, mask=mask, other=0.0)
        a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // 2, 2)))
    return a, b


@triton.jit
def _store_two(ptr, offs, a, b, mask, ROPE: tl.constexpr, HEAD_DIM: tl.constexpr):
    if ROPE == "halves":
        tl.store(ptr + offs, a, mask=mask)
        tl.store(ptr + offs + HEAD_DIM // 2, b, mask=mask)
    else:
        x = tl.join(a, b)
        tl.store(ptr + offs, tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] * 2)), mask=mask)


@triton.jit(do_not_specialize=["batch", "tokens", "start", "out_tokens", "out_start"])
def _qk_norm_rope_kernel(
    q_ptr, k_ptr, v_ptr, weight_q_ptr, weight_k_ptr, bias_q_ptr, bias_k_ptr, cos_ptr, sin_ptr,
    out_q_ptr, out_k_ptr, out_v_ptr,
    batch, tokens, start, out_tokens, out_start,
    stride_q_b, stride_q_s, stride_k_b, stride_k_s, stride_v_b, stride_v_s,
    stride_t_b, stride_t_s, stride_t_h, stride_t_d,
    eps,
    OPERANDS: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    NORM: tl.constexpr, ROUNDS_EACH: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROPE: tl.constexpr, TABLE_PER_HEAD: tl.constexpr, HAS_START: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    dtype = out_q_ptr.dtype.element_ty
    CHUNKS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    NORMED: tl.constexpr = 0 if NORM == "none" else 2  # operands: v is only copied
    TURNED: tl.constexpr = 0 if ROPE == "none" else 2
    WIDTH: tl.constexpr = HEAD_DIM // 2 if ROPE == "halves" else HEAD_DIM
    x_ptrs, out_ptrs = (q_ptr, k_ptr, v_ptr), (out_q_ptr, out_k_ptr, out_v_ptr)
    weight_ptrs, bias_ptrs = (weight_q_ptr, weight_k_ptr), (bias_q_ptr, bias_k_ptr)
    offs_h = tl.arange(0, BLOCK_H)[None, :, None]
    offs_d = tl.arange(0, BLOCK_D // 2 if ROPE == "halves" else BLOCK_D)[None, None, :]
    offs_t = tl.arange(0, BLOCK_D // 2)[None, None, :]
    of_pair = offs_t < HEAD_DIM // 2
    # as big as a tile of rows, so that each thread reads the weights of its own numbers
    offs_w = tl.zeros([BLOCK_M, BLOCK_H, 1], tl.int32) + offs_d

    tile = tl.program_id(0)
    # neighbouring programs have the same token of each sample: the samples may share its tables
    n = (tile % batch).to(tl.int64)
    offs_m = (tile // batch * BLOCK_M + tl.arange(0, BLOCK_M))[:, None, None]
    of_sample = offs_m < tokens if BLOCK_M > 1 else tl.full([1, 1, 1], True, tl.int1)
    turns = of_sample & (offs_m >= start) if HAS_START else of_sample
    row = offs_m.to(tl.int64)
    x_rows = (
        n * stride_q_b + row * stride_q_s, n * stride_k_b + row * stride_k_s, n * stride_v_b + row * stride_v_s
    )  # fmt: skip
    table_row = n * stride_t_b + (row - start if HAS_START else row) * stride_t_s
    out_row = (n * out_tokens + out_start + row) * (HEADS * HEAD_DIM)

    # all rows are asked for before one is waited for
    xs = ()  # type: Any
    for i in tl.static_range(OPERANDS):
        for c in tl.static_range(CHUNKS):
            h = offs_h + c * BLOCK_H
            mask = of_sample & (h < HEADS) & (offs_d < WIDTH)
            xs += (_load_two(x_ptrs[i], x_rows[i] + h * HEAD_DIM + offs_d, mask, ROPE, HEAD_DIM),)
    tables = ()  # type: Any
    if ROPE != "none":
        for c in tl.static_range(CHUNKS if TABLE_PER_HEAD else 1):
            h = offs_h + c * BLOCK_H
            mask = turns & (h < HEADS) & of_pair
            offs = table_row + h.to(tl.int64) * stride_t_h + offs_t * stride_t_d
            cos = tl.load(cos_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            sin = tl.load(sin_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            tables += ((cos, sin),)

    rstds = ()  # type: Any
    if NORM == "rms_all":
        for i in tl.static_range(2 if OPERANDS > 1 else 1):
            squares = tl.zeros_like(xs[0][0]).to(tl.float32)
            for c in tl.static_range(CHUNKS):
                a, b = xs[i * CHUNKS + c]
                a, b = a.to(tl.float32), b.to(tl.float32)
                squares += a * a + b * b
            mean_square = tl.sum(tl.sum(squares, axis=2), axis=1) / (HEADS * HEAD_DIM)
            rstds += (tl.rsqrt(mean_square + eps)[:, None, None],)

    for i in tl.static_range(OPERANDS):
        ys = ()  # type: Any
        for c in tl.static_range(CHUNKS):
            h = offs_h + c * BLOCK_H
            mask = of_sample & (h < HEADS) & (offs_d < WIDTH)
            a, b = xs[i * CHUNKS + c]
            if i < NORMED:
                a, b = a.to(tl.float32), b.to(tl.float32)
                if NORM == "layer_head":
                    mean = tl.sum(a + b, axis=2, keep_dims=True) / HEAD_DIM
                    a, b = tl.where(of_pair, a - mean, 0.0), tl.where(of_pair, b - mean, 0.0)
                if NORM == "rms_all":
                    rstd = rstds[i]
                else:
                    rstd = tl.rsqrt(tl.sum(a * a + b * b, axis=2, keep_dims=True) / HEAD_DIM + eps)
                a, b = a * rstd, b * rstd
                if ROUNDS_EACH:
                    a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
                if HAS_WEIGHT and (NORM == "rms_all" or c == 0):
                    offs = offs_w + h * HEAD_DIM if NORM == "rms_all" else offs_w
                    weight_a, weight_b = _load_two(weight_ptrs[i], offs, mask, ROPE, HEAD_DIM)
                    if ROUNDS_EACH:
                        weight_a, weight_b = weight_a.to(dtype), weight_b.to(dtype)
                if HAS_BIAS and c == 0:
                    bias_a, bias_b = _load_two(bias_ptrs[i], offs_w, mask, ROPE, HEAD_DIM)
                if HAS_WEIGHT:
                    a, b = a * weight_a.to(tl.float32), b * weight_b.to(tl.float32)
                if HAS_BIAS:
                    a, b = a + bias_a.to(tl.float32), b + bias_b.to(tl.float32)
                a, b = a.to(dtype), b.to(dtype)
            if i < TURNED:
                cos, sin = tables[c if TABLE_PER_HEAD else 0]
                wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
                turned_a, turned_b = wide_a * cos - wide_b * sin, wide_a * sin + wide_b * cos
                if HAS_START:
                    turned_a, turned_b = tl.where(turns, turned_a, wide_a), tl.where(turns, turned_b, wide_b)
                a, b = turned_a.to(dtype), turned_b.to(dtype)
            ys += ((a, b),)
        # stores come after all weights: no load overtakes a store
        for c in tl.static_range(CHUNKS):
            h = offs_h + c * BLOCK_H
            mask = of_sample & (h < HEADS) & (offs_d < WIDTH)
            a, b = ys[c]
            _store_two(out_ptrs[i], out_row + h * HEAD_DIM + offs_d, a, b, mask, ROPE, HEAD_DIM)


class Tiling(NamedTuple):
    """A program of ``num_warps`` warps holds a tile of ``block_m`` tokens, and works on ``block_h`` heads at a time.

    These should be so many that each thread has 16 bytes of them.
    """

    block_m: int
    block_h: int
    num_warps: int


TENSORS = 12  # that the kernel takes
MAX_CHANNELS = 8192
THREAD_BYTES = 96  # at least, that a thread fetches before it waits; of halves twice as many
WARP_SIZE = 64 if torch.version.hip else 32


def choose_tiling(
    num_heads: int, head_dim: int, itemsize: int, operands: int, halves: bool, table_per_head: bool
) -> Tiling:
    """The tiling for tokens of ``operands`` rows (q, k, v) of ``num_heads`` heads.

    A program has one token, and there are many programs: while some of them wait for memory, others calculate. A thread
    fetches 96 bytes or more before it waits. With fewer, most of its instructions are spent on addresses and sums; with
    twice as many, its numbers take more than 128 registers in float32, and too few programs share a multiprocessor. Of
    halves it fetches 192 or more: LTX-2 gains 6 %.

    On an H200 the widths of Wan, HunyuanVideo 1.5, LTX and CogVideoX get 95 to 100 % of copy bandwidth. Fewer programs
    that walk over tiles, and fetch the next ones ahead, were measured there too: they lost 4 to 43 %
    (samples/benchmarks/transformer-op-variants-h200.json).
    """
    block_d = _block_d(head_dim)
    fetched = num_heads * block_d * (operands * itemsize + (4 if table_per_head else 0))
    thread_bytes = 2 * THREAD_BYTES if halves else THREAD_BYTES
    threads = min(max(_power_of_2_up_to(fetched // thread_bytes), WARP_SIZE), 512)
    tile_d = block_d // 2 if halves else block_d  # halves are read one by one
    tile = threads * 16 // itemsize
    block_h = min(max(tile // tile_d, 1), triton.next_power_of_2(num_heads))
    return Tiling(max(tile // (block_h * tile_d), 1), block_h, threads // WARP_SIZE)


def _block_d(head_dim: int) -> int:
    return triton.next_power_of_2(max(head_dim, 2))


def _power_of_2_up_to(x: int) -> int:
    return 1 << max(x.bit_length() - 1, 0)


class _Stream(NamedTuple):
    """The tensors that the kernel reads for one stream, in its order."""

    q: Tensor
    k: Tensor | None
    v: Tensor | None
    weight_q: Tensor | None
    weight_k: Tensor | None
    bias_q: Tensor | None
    bias_k: Tensor | None
    cos: Tensor | None
    sin: Tensor | None


def _streams(call: _Call) -> list[_Stream]:
    weights = call.weight_q, call.weight_k, call.bias_q, call.bias_k
    tables = (None, None) if call.rope == "none" else (call.cos, call.sin)
    if call.second_q is None:
        return [_Stream(call.q, call.k, None, *weights, *tables)]
    second_weights = call.second_weight_q, call.second_weight_k, call.second_bias_q, call.second_bias_k
    return [
        _Stream(call.q, call.k, call.v, *weights, *tables),
        _Stream(call.second_q, call.second_k, call.second_v, *second_weights, None, None),
    ]


def _laid_out(stream: _Stream) -> _Stream:
    """With copies in place of what the kernel does not read by its strides."""
    q, k, v, *weights, cos, sin = stream
    if cos is not None and sin is not None and _table_strides(cos) != _table_strides(sin):
        cos, sin = (table.contiguous() for table in torch.broadcast_tensors(cos, sin))
    rows = (x if x is None or x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    every: list[Any] = [*rows, *(None if t is None else t.contiguous() for t in weights), cos, sin]
    return _Stream(*every)


def _table_strides(table: Tensor | None) -> tuple[int, ...]:
    """Those of dims that hold one entry for all are 0."""
    if table is None:
        return 0, 0, 0, 0
    return tuple(0 if size == 1 else stride for size, stride in zip(table.shape, table.stride(), strict=True))


def _row_strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def _launches(call: _Call, streams: list[_Stream]) -> list[Launch]:
    """One for each stream, which is a range of tokens of the result."""
    lengths = [stream.q.shape[1] for stream in streams]
    starts = (sum(lengths[1:]), 0) if call.second_first else (0, lengths[0])
    return [_launch(call, stream, sum(lengths), start) for stream, start in zip(streams, starts, strict=False)]


def _launch(call: _Call, stream: _Stream, out_tokens: int, out_start: int) -> Launch:
    q, k, v, weight_q, _, bias_q, _, cos, _ = stream
    batch, tokens, channels = q.shape
    head_dim = channels // call.num_heads
    rope, start = ("none", 0) if cos is None else (call.rope, call.start)
    operands, table_per_head = 1 + (k is not None) + (v is not None), cos is not None and cos.shape[2] > 1
    tiling = choose_tiling(call.num_heads, head_dim, q.itemsize, operands, rope == "halves", table_per_head)
    return Launch(
        _qk_norm_rope_kernel, (triton.cdiv(tokens, tiling.block_m) * batch,),
        batch, tokens, start, out_tokens, out_start,
        *_row_strides(q), *_row_strides(k), *_row_strides(v), *_table_strides(cos),
        float(call.eps),
        OPERANDS=operands, HEADS=call.num_heads, HEAD_DIM=head_dim,
        NORM=call.norm, ROUNDS_EACH=call.rounding == "each" and call.norm != "layer_head",
        HAS_WEIGHT=weight_q is not None, HAS_BIAS=bias_q is not None and call.norm == "layer_head",
        ROPE=rope, TABLE_PER_HEAD=table_per_head, HAS_START=start > 0,
        BLOCK_M=tiling.block_m, BLOCK_H=tiling.block_h, BLOCK_D=_block_d(head_dim),
        num_warps=tiling.num_warps,
    )  # fmt: skip


def _bind(*args: Any) -> Callable[..., list[Tensor]]:
    call = _Call(*args)
    streams = _streams(call)
    laid_out = [_laid_out(stream) for stream in streams]
    ready = all(x is y for pair in zip(streams, laid_out, strict=True) for x, y in zip(*pair, strict=True))
    launches = _launches(call, laid_out)
    shape, outputs = _joint_shape(call), _outputs(call)
    absent = [None] * (3 - outputs)

    def run(*args: Any) -> list[Tensor]:
        call = _Call(*args)
        streams = _streams(call) if ready else map(_laid_out, _streams(call))
        outs = [call.q.new_empty(shape) for _ in range(outputs)]
        for launch, stream in zip(launches, streams, strict=True):
            launch(*stream, *outs, *absent)
        return outs

    return run


def _reason(*args: Any) -> str | None:
    call = _Call(*args)
    streams = _streams(call)
    every = [t for stream in streams for t in stream if t is not None]
    channels = call.q.shape[2]
    if channels // call.num_heads % 2:
        return f"the kernel takes heads of an even number of channels, got D={channels // call.num_heads}"
    if channels > MAX_CHANNELS:
        return f"the kernel keeps a token in registers, up to H*D={MAX_CHANNELS}, got H*D={channels}"
    if any(stream.q.numel() == 0 for stream in streams):
        return "there is nothing to norm"
    for q, k, v, weight_q, weight_k, bias_q, bias_k, *_ in streams:
        if mixed := [x.dtype for x in (q, k, v) if x is not None and x.dtype != call.q.dtype]:
            return f"all queries, keys and values must have the dtype of q, {call.q.dtype}, got {mixed[0]}"
        if k is not None and ((weight_q is None) != (weight_k is None) or (bias_q is None) != (bias_k is None)):
            return "the norm of q has a weight or a bias where that of k has none, or the other way round"
    return device_reason(call.q) or tensors_reason(*every)


def _joint_shape(call: _Call) -> tuple[int, int, int]:
    batch, tokens, channels = call.q.shape
    return batch, tokens + (0 if call.second_q is None else call.second_q.shape[1]), channels


def _outputs(call: _Call) -> int:
    return 1 + (call.k is not None) + (call.second_q is not None)


def _fake(*args: Any) -> list[Tensor]:
    call = _Call(*args)
    return [call.q.new_empty(_joint_shape(call)) for _ in range(_outputs(call))]


def _costs(*args: Any) -> Costs:
    """Each of q, k (and v) once in, once out; the tables once."""
    call = _Call(*args)
    batch, tokens, channels = _joint_shape(call)
    tables = 0 if call.cos is None else 2 * call.cos.nbytes
    return Costs(bytes=2 * _outputs(call) * batch * tokens * channels * call.q.itemsize + tables)


def _parts(*args: Any) -> Iterator[Part]:
    """Some samples, and of each stream some tokens, at a time."""
    call = _Call(*args)
    batch, joint_tokens, channels = _joint_shape(call)
    tokens, second_tokens = call.q.shape[1], joint_tokens - call.q.shape[1]
    out_starts = (second_tokens, 0) if call.second_first else (0, tokens)
    for n in cuts(batch, joint_tokens * channels):
        pieces = len(list(cuts(joint_tokens, (n.stop - n.start) * channels)))
        for i in range(pieces):
            own, other = (slice(size * i // pieces, size * (i + 1) // pieces) for size in (tokens, second_tokens))
            ranges = [(start + s.start, start + s.stop) for start, s in zip(out_starts, (own, other), strict=True)]
            yield Part(_part(call, n, own, other), functools.partial(_pieces_of, n, sorted(ranges)))


def _part(call: _Call, n: slice, own: slice, other: slice) -> tuple[Any, ...]:
    turning = slice(max(own.start - call.start, 0), max(own.stop - call.start, 0))
    tokens = {"q": own, "k": own, "v": own, "cos": turning, "sin": turning}
    tokens |= dict.fromkeys(("second_q", "second_k", "second_v"), other)
    parts: dict[str, Any] = {name: _cut(getattr(call, name), n, s) for name, s in tokens.items()}
    start = min(max(call.start - own.start, 0), own.stop - own.start)
    return tuple(call._replace(start=start, **parts))


def _cut(x: Tensor | None, samples: slice, tokens: slice) -> Tensor | None:
    return x if x is None else (x if len(x) == 1 else x[samples])[:, tokens]


def _pieces_of(samples: slice, ranges: list[tuple[int, int]], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.cat([out[samples, start:stop] for start, stop in ranges], dim=1) for out in outputs)


def _validate(*args: Any) -> None:
    call = _Call(*args)
    q, k = call.q, call.k
    tensors = {name: x for name, x in call._asdict().items() if isinstance(x, Tensor)}
    require_floats("qk_norm_rope", **tensors)
    if q.ndim != 3:
        raise ValueError(f"qk_norm_rope: q must be [B, S, H*D], got {tuple(q.shape)}")
    if k is not None and (k.shape != q.shape or k.dtype != q.dtype):
        got = f"{tuple(q.shape)} {q.dtype} and {tuple(k.shape)} {k.dtype}"
        raise ValueError(f"qk_norm_rope: q and k must be [B, S, H*D] alike, got {got}")
    batch, tokens, channels = q.shape
    if call.num_heads < 1 or channels % call.num_heads:
        raise ValueError(f"qk_norm_rope: num_heads={call.num_heads} must divide the H*D={channels} channels")
    for name, kinds in (("norm", NormKind), ("rounding", Rounding), ("rope", RopeKind)):
        if getattr(call, name) not in get_args(kinds):
            known = ", ".join(get_args(kinds))
            raise ValueError(f"qk_norm_rope: {name} must be one of {known}, got {getattr(call, name)!r}")
    head_dim = channels // call.num_heads
    width = channels if call.norm == "rms_all" else head_dim
    for name in _PARAMETERS:
        parameter = getattr(call, name)
        if parameter is not None and parameter.shape != (width,):
            raise ValueError(f"qk_norm_rope: {name} must be [{width}], got {tuple(parameter.shape)}")
    if call.rope != "none":
        _validate_tables(call, batch, tokens, head_dim)
    if call.second_q is not None:
        _validate_second(call)


_PARAMETERS = (
    *("weight_q", "weight_k", "bias_q", "bias_k"),
    *("second_weight_q", "second_weight_k", "second_bias_q", "second_bias_k"),
)


def _validate_tables(call: _Call, batch: int, tokens: int, head_dim: int) -> None:
    if not 0 <= call.start <= tokens:
        raise ValueError(f"qk_norm_rope: start must be a token of q, 0 to {tokens}, got {call.start}")
    for name in ("cos", "sin"):
        table = getattr(call, name)
        fits = table is not None and table.ndim == 4 and one_or(batch, table.shape[0])
        if not fits or table.shape[1] != tokens - call.start or not one_or(call.num_heads, table.shape[2]):
            got = None if table is None else tuple(table.shape)
            raise ValueError(f"qk_norm_rope: {name} must be [B, {tokens - call.start}, H, D/2], got {got}")
        if table.shape[3] * 2 != head_dim:
            raise ValueError(f"qk_norm_rope: {name} must hold D/2={head_dim // 2} angles, got {table.shape[3]}")


def _validate_second(call: _Call) -> None:
    q, shapes = call.q, [None if t is None else tuple(t.shape) for t in (call.second_q, call.second_k, call.second_v)]
    assert call.second_q is not None
    one = tuple(call.second_q.shape)
    if any(shape != one for shape in shapes) or len(one) != 3 or one[0] != len(q) or one[2] != q.shape[2]:
        raise ValueError(f"qk_norm_rope: q, k and v of the second stream must be [B, T, H*D] alike, got {shapes}")
    if call.k is None or call.v is None or call.v.shape != q.shape:
        raise ValueError("qk_norm_rope: with a second stream, k and v must be given, shaped as q is")


QK_NORM_ROPE = Op(
    "qk_norm_rope",
    reference=qk_norm_rope_ref,
    implementations={"triton": Implementation.bound(_bind, _reason, _Call)},
    fake=_fake,
    costs=_costs,
    parts=_parts,
    validate=_validate,
    small=scaled(0, 1),  # q, k
)


def qk_norm_rope(
    q: Tensor,
    k: Tensor | None,
    num_heads: int,
    norm: HeadNorm,
    rope: Rope | None = None,
    *,
    v: Tensor | None = None,
    second: SecondStream | None = None,
    impl: str | None = None,
) -> list[Tensor]:
    """Normed and turned queries and keys; with a ``second`` stream, joint ones, and the joint values.

    Args:
        q: ``[B, S, H*D]``, fp16 / bf16 / fp32; rows of any stride (a slice of a packed projection).
        k: As ``q``; None: q alone, or keys in its place with their weight as ``norm.weight_q``.
        num_heads: ``H``.
        norm: Of q and k.
        rope: None: nothing turns.
        v: As ``q``; only with ``second``.
        second: None: there is one stream.
        impl: ``"triton"`` or ``"torch"``; None lets the op choose.

    Returns:
        q and k ``[B, S, H*D]``, or q, k and v ``[B, S + T, H*D]``, or only q; contiguous, in ``q.dtype``.

    Raises:
        ValueError: The shapes do not fit one another; ``impl`` cannot run here.
        TypeError: A tensor is not floating-point.
    """
    return QK_NORM_ROPE(*_call(q, k, num_heads, norm, rope, v, second), impl=impl)


def _call(
    q: Tensor,
    k: Tensor | None,
    num_heads: int,
    norm: HeadNorm,
    rope: Rope | None,
    v: Tensor | None,
    second: SecondStream | None,
) -> _Call:
    kind, cos, sin, start = ("none", None, None, 0) if rope is None or rope.kind == "none" else rope
    other: Any = second or SecondStream(None, None, None, HeadNorm("none"))  # type: ignore[arg-type]
    return _Call(
        q, k, num_heads, norm.kind, norm.eps, norm.rounding,
        norm.weight_q, norm.weight_k, norm.bias_q, norm.bias_k,
        kind, cos, sin, start,
        v, other.q, other.k, other.v,
        other.norm.weight_q, other.norm.weight_k, other.norm.bias_q, other.norm.bias_k, other.first,
    )  # fmt: skip
