"""Attention over the frame axis of channels-last video rows, without a permute.

    out[b, :, p, h] = softmax(q[b, :, p, h] @ k[b, :, p, h].T * scale) @ v[b, :, p, h]

Rows ``[B*F, HW, H*D]``, as a QKV projection writes them. An *item* is one (pixel, head) pair: a short attention of its
own, whose neighbours in memory are the next items. A tile holds all frames of as many neighbouring items as fit; one
product scores them all and a block-diagonal mask keeps them apart, so a 16-row tile is enough where library kernels
pad 14 frames to 64 or 128. Programs stream over the tiles of a sample: while one is worked on, the next are on their
way (cp.async). Bound by memory: reads q, k, v once and writes the output once.

Scores, softmax and sums are float32; probabilities are rounded to the input dtype before they meet v, as PyTorch's
fused kernels do. Fidelity: math-exact. Items of one tile share a product: an inf or NaN in k or v reaches all.

Sources: FlashAttention-2 (https://arxiv.org/abs/2307.08691) for the arithmetic; the masked windows of Swin
(https://arxiv.org/abs/2103.14030) for several small attentions in one product.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.arguments import require_floats
from vidaccel.kernels.attention.alignment import aligned_rows
from vidaccel.kernels.check import Part, cuts, heads_apart, heads_of, lean
from vidaccel.kernels.compile_ahead import foreseen
from vidaccel.kernels.launch import Launch
from vidaccel.kernels.op import DTYPES, Costs, Implementation, Op, device_reason, tensors_reason
from vidaccel.kernels.without_plans import attention_without_plans

__all__ = [
    "TEMPORAL_ATTENTION",
    "Tiling",
    "bind",
    "choose_tiling",
    "compile_ahead",
    "temporal_attention",
    "temporal_attention_ref",
]

MAX_HEAD_DIM = 160
MAX_FRAMES = 128
MAX_FRAMES_BLACKWELL = 64  # Triton 3.6 makes a trap, and nothing else, of longer tiles of wide heads
MAX_FRAMES_FLOAT32 = 32  # longer tiles spill: without tensor cores the operands live in registers
MAX_SDPA_BATCH = 65535  # the flash and efficient kernels launch one grid row per batch entry: pytorch/pytorch#146704
PREFETCHED_TILE_BYTES = 24 * 1024  # two of them and the scratch fit the 64 KB of an MI300 multiprocessor
RESIDENT_BYTES = 132 * 192 * 1024  # of the tiles of all programs: twice what an H100 or H200 works on at a time
AHEAD_PIXELS = 4096  # of a clip whose size is not known yet: many
WIDE_ITEMS = 8192  # from which on wider tiles leave enough programs
SHORT_PROGRAMS = 6  # times as many programs where each is one warp: they share the work out more evenly


def temporal_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, num_frames: int, num_heads: int, scale: float | None = None
) -> Tensor:
    """The specification. Pass float64 inputs for gold values."""
    out = _empty_output(q)
    samples, num_pixels = q.shape[0] // num_frames, q.shape[1]
    q, k, v, out_items = (_as_items(x, samples, num_heads) for x in (*map(aligned_rows, (q, k, v)), out))
    for sample in range(samples):  # samples and pixels do not merge into the one batch axis of SDPA without a copy
        for start in range(0, num_pixels, MAX_SDPA_BATCH):
            part = sample, slice(start, start + MAX_SDPA_BATCH)
            out_items[part] = attention_without_plans(q[part], k[part], v[part], scale=scale)
    return out


def _as_items(x: Tensor, samples: int, num_heads: int) -> Tensor:
    """``[B*F, HW, H*D]`` seen as ``[B, HW, H, F, D]``: a view, whatever the strides."""
    return x.unflatten(-1, (num_heads, -1)).unflatten(0, (samples, -1)).permute(0, 2, 3, 1, 4)


@triton.jit
def _row_offsets(frame_offs, items, stride_pixel, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ALIGN: tl.constexpr):
    pixel = (items // NUM_HEADS).to(tl.int64)
    offs = frame_offs + pixel * stride_pixel + (items % NUM_HEADS) * HEAD_DIM
    return tl.multiple_of(offs, ALIGN)  # 16-byte accesses and cp.async need to know


@triton.jit
def _columns(rows, row_mask, START: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Offsets and mask of ``BLOCK_D`` columns of a tile's rows."""
    offs_d = START + tl.arange(0, BLOCK_D)
    return rows[:, None] + offs_d[None, :], row_mask[:, None] & (offs_d < HEAD_DIM)[None, :]


@triton.jit(
    do_not_specialize=[
        "num_pixels", "programs_per_sample",
        "stride_q_frame", "stride_q_pixel", "stride_k_frame", "stride_k_pixel", "stride_v_frame", "stride_v_pixel",
    ],
)  # fmt: skip
def _temporal_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr,
    num_pixels, programs_per_sample,
    stride_q_frame, stride_q_pixel, stride_k_frame, stride_k_pixel, stride_v_frame, stride_v_pixel,
    scale_log2,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, FRAMES_Q: tl.constexpr, FRAMES_K: tl.constexpr,
    ITEMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // programs_per_sample).to(tl.int64)
    num_items = num_pixels * NUM_HEADS

    # items run fastest along the rows of a tile: they are neighbours in memory
    item_m, frame_m = tl.arange(0, BLOCK_M) % ITEMS, tl.arange(0, BLOCK_M) // ITEMS
    item_n, frame_n = tl.arange(0, BLOCK_N) % ITEMS, tl.arange(0, BLOCK_N) // ITEMS
    q_frames = (sample * FRAMES_Q + frame_m) * stride_q_frame
    k_frames = (sample * FRAMES_K + frame_n) * stride_k_frame
    v_frames = (sample * FRAMES_K + frame_n) * stride_v_frame
    out_frames = (sample * FRAMES_Q + frame_m) * num_items * HEAD_DIM
    same_item = (item_m[:, None] == item_n[None, :]) & (frame_n < FRAMES_K)[None, :]
    bias = tl.where(same_item, 0.0, float("-inf"))  # [BLOCK_M, BLOCK_N]

    # programs that run side by side read neighbouring tiles: together they consume whole DRAM pages
    first_tile = tl.program_id(0) % programs_per_sample
    for tile in tl.range(first_tile, tl.cdiv(num_items, ITEMS), programs_per_sample, num_stages=STAGES):
        items_m, items_n = tile * ITEMS + item_m, tile * ITEMS + item_n
        mask_m = (items_m < num_items) & (frame_m < FRAMES_Q)
        mask_n = (items_n < num_items) & (frame_n < FRAMES_K)
        q_rows = _row_offsets(q_frames, items_m, stride_q_pixel, NUM_HEADS, HEAD_DIM, ALIGN)
        k_rows = _row_offsets(k_frames, items_n, stride_k_pixel, NUM_HEADS, HEAD_DIM, ALIGN)
        v_rows = _row_offsets(v_frames, items_n, stride_v_pixel, NUM_HEADS, HEAD_DIM, ALIGN)
        out_rows = out_frames + items_m.to(tl.int64) * HEAD_DIM

        s = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for start in tl.static_range(0, HEAD_DIM, BLOCK_D):
            q_offs, q_mask = _columns(q_rows, mask_m, start, BLOCK_D, HEAD_DIM)
            k_offs, k_mask = _columns(k_rows, mask_n, start, BLOCK_D, HEAD_DIM)
            q = tl.load(q_ptr + q_offs, mask=q_mask, other=0.0)  # [BLOCK_M, BLOCK_D]
            k = tl.load(k_ptr + k_offs, mask=k_mask, other=0.0)  # [BLOCK_N, BLOCK_D]
            s = tl.dot(q, tl.trans(k), acc=s, input_precision="ieee")

        s = s * scale_log2 + bias
        p = tl.exp2(s - tl.max(s, axis=1)[:, None])
        inv_l = 1.0 / tl.sum(p, axis=1)
        p = p.to(q_ptr.dtype.element_ty)
        for start in tl.static_range(0, HEAD_DIM, BLOCK_D):
            v_offs, v_mask = _columns(v_rows, mask_n, start, BLOCK_D, HEAD_DIM)
            v = tl.load(v_ptr + v_offs, mask=v_mask, other=0.0)  # [BLOCK_N, BLOCK_D]
            out = tl.dot(p, v, input_precision="ieee") * inv_l[:, None]
            out_offs, out_mask = _columns(out_rows, mask_m, start, BLOCK_D, HEAD_DIM)
            tl.store(out_ptr + out_offs, out.to(out_ptr.dtype.element_ty), mask=out_mask)


class Tiling(NamedTuple):
    """How the kernel cuts its work.

    A tile has ``rows`` rows, all frames of ``rows // frames`` items. It is loaded and multiplied ``columns`` at a time,
    by ``num_warps`` warps, with ``stages - 1`` tiles fetched ahead.
    """

    rows: int
    columns: int
    num_warps: int
    stages: int


def choose_tiling(frames: int, head_dim: int, dtype: torch.dtype, items: int) -> Tiling:
    """The tiling the op runs with; ``frames`` is the longer of the two frame axes, ``items`` are those of a sample."""
    rows = max(16, triton.next_power_of_2(frames))
    columns = 64 // dtype.itemsize  # wider blocks of more than 16 rows spill
    if rows <= 32 and dtype != torch.float32 and head_dim < (48 if rows == 16 else 72):
        # A frame of several items is a longer piece of memory to fetch. On an H100 a third less time for 16 frames of
        # heads of 40; for 25 of 64, 397 us against 450 (99 % of copy bandwidth).
        return Tiling(64, 64, num_warps=4, stages=3)
    if rows == 16:
        # 64 of 16 bits are a 128-byte line; of 32 bits 32 are, and pad less
        columns = 64 if dtype != torch.float32 or -head_dim % 64 < 32 else 32
        if dtype != torch.float32 and head_dim <= 64 and items >= WIDE_ITEMS:
            rows = 32  # 14 frames of heads of 64 at 98 % of an H100's copy bandwidth, 93 % with 16 rows
    if dtype == torch.float32:
        num_warps = 4
    elif rows <= 32:
        num_warps = 1  # which never waits for another warp
    else:
        num_warps = rows // 16
    # two fetched tiles must leave room for several programs: on an H100, fetching 64 rows ahead made it slower
    prefetches = rows <= 32 and _tile_bytes(rows, columns, head_dim, dtype) <= PREFETCHED_TILE_BYTES
    return Tiling(rows, columns, num_warps, stages=3 if prefetches else 1)


def _tile_bytes(rows: int, columns: int, head_dim: int, dtype: torch.dtype) -> int:
    """Shared memory that q, k and v of one tile take."""
    return 3 * rows * triton.cdiv(head_dim, columns) * columns * dtype.itemsize


def bind(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_frames: int,
    num_heads: int,
    scale: float,
    *,
    tiling: Tiling | None = None,
    programs: int | None = None,
) -> Callable[..., Tensor]:
    """The kernel, prepared for tensors of these sizes and strides; ``programs`` share the tiles of a sample evenly."""
    samples, (_, num_pixels, channels) = q.shape[0] // num_frames, q.shape
    num_frames_k, head_dim = k.shape[0] // samples, channels // num_heads
    longest = max(num_frames, num_frames_k)
    rows, columns, num_warps, stages = tiling or choose_tiling(longest, head_dim, q.dtype, num_pixels * num_heads)
    items = rows // longest
    tiles = triton.cdiv(num_pixels * num_heads, items)
    if programs is None:
        programs = RESIDENT_BYTES // _tile_bytes(rows, columns, head_dim, q.dtype)
        programs *= SHORT_PROGRAMS if num_warps == 1 else 1
    programs_per_sample = min(tiles, triton.cdiv(programs, samples))
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    launch = Launch(
        _temporal_attention_kernel, (samples * programs_per_sample,),
        num_pixels, programs_per_sample,
        *strides,
        scale * math.log2(math.e),
        NUM_HEADS=num_heads, HEAD_DIM=head_dim, FRAMES_Q=num_frames, FRAMES_K=num_frames_k,
        ITEMS=items, BLOCK_M=_block_rows(items * num_frames), BLOCK_N=_block_rows(items * num_frames_k),
        BLOCK_D=columns, ALIGN=math.gcd(16, head_dim, *strides), STAGES=stages,
        num_warps=num_warps,
    )  # fmt: skip

    def run(q: Tensor, k: Tensor, v: Tensor, num_frames: int, num_heads: int, scale: float) -> Tensor:
        out = _empty_output(q)
        launch(q, k, v, out)
        return out

    return run


def _block_rows(rows: int) -> int:
    return max(16, triton.next_power_of_2(rows))


def _empty_output(q: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _reason(q: Tensor, k: Tensor, v: Tensor, num_frames: int, num_heads: int, scale: float) -> str | None:
    if reason := device_reason(q):
        return reason
    head_dim = q.shape[2] // num_heads
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        return f"the kernel takes head_dim up to {MAX_HEAD_DIM} in steps of 8, got {head_dim}"
    most = MAX_FRAMES_FLOAT32 if q.dtype == torch.float32 else _most_frames(q)
    frames = max(num_frames, num_frames * k.shape[0] // q.shape[0])
    if frames > most:
        return f"the kernel takes up to {most} frames of {q.dtype}, got {frames}"
    if not q.stride(2) == k.stride(2) == v.stride(2) == 1:
        return "the kernel takes q, k and v with a last stride of 1"
    return tensors_reason(q, k, v)


def _most_frames(q: Tensor) -> int:
    on_blackwell = q.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(q.device)[0] >= 10
    return MAX_FRAMES_BLACKWELL if on_blackwell else MAX_FRAMES


def _costs(q: Tensor, k: Tensor, v: Tensor, num_frames: int, num_heads: int, scale: float) -> Costs:
    frames_k = num_frames * k.shape[0] // max(q.shape[0], 1)
    return Costs(bytes=2 * q.nbytes + k.nbytes + v.nbytes, flops=4 * q.numel() * frames_k)


def _parts(q: Tensor, k: Tensor, v: Tensor, num_frames: int, num_heads: int, scale: float) -> Iterator[Part]:
    """Sample by sample, as many heads and pixels as fit."""
    (_, num_pixels, channels), samples = q.shape, q.shape[0] // num_frames
    frames_k, head_dim = k.shape[0] // max(samples, 1), channels // num_heads
    elements = (num_frames + frames_k) * head_dim + num_frames * frames_k
    for sample, heads in itertools.product(range(samples), cuts(num_heads, elements * num_pixels, lean(q))):
        channel, count = slice(heads.start * head_dim, heads.stop * head_dim), heads.stop - heads.start
        frames, keys = (slice(sample * length, (sample + 1) * length) for length in (num_frames, frames_k))
        for pixels in cuts(num_pixels, elements * count, lean(q)):
            place = frames, pixels, channel
            args = q[place], k[keys, pixels, channel], v[keys, pixels, channel], num_frames, count, scale
            yield Part(args, functools.partial(heads_of, place, count), functools.partial(heads_apart, count))


TEMPORAL_ATTENTION = Op(
    "temporal_attention",
    reference=temporal_attention_ref,
    implementations={"triton": Implementation.bound(bind, _reason)},
    fake=_empty_output,
    costs=_costs,
    parts=_parts,
)


def _validate(q: Tensor, k: Tensor, v: Tensor, num_frames: int, num_heads: int) -> None:
    require_floats("temporal_attention", q=q, k=k, v=v)
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[1:] != k.shape[1:]:
        raise _mismatch("q must be [B*F, HW, H*D], k and v [B*Fk, HW, H*D]", q, k, v)
    if k.numel() == 0 and q.numel() > 0:
        raise _mismatch("k and v must not be empty unless q is", q, k, v)
    if num_frames < 1 or q.shape[0] % num_frames:
        raise _mismatch(f"num_frames={num_frames} must divide the B*F={q.shape[0]} rows of q", q, k, v)
    if num_heads < 1 or q.shape[2] % num_heads:
        raise _mismatch(f"num_heads={num_heads} must divide the H*D={q.shape[2]} channels of q", q, k, v)
    samples = q.shape[0] // num_frames
    if k.shape[0] % samples if samples else k.shape[0]:
        raise _mismatch(f"the B={samples} samples of q must divide the B*Fk={k.shape[0]} rows of k", q, k, v)
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"temporal_attention: q, k and v must share a dtype, got {q.dtype}, {k.dtype} and {v.dtype}")


def _mismatch(expected: str, q: Tensor, k: Tensor, v: Tensor) -> ValueError:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    return ValueError(f"temporal_attention: {expected}, got {shapes}")


def compile_ahead(weight: Tensor, num_heads: int) -> None:
    """Begin to compile what will run for clips of foreseen length, whose queries are a projection by ``weight``.

    Args:
        weight: ``[H*D, C]``.
        num_heads: ``H``.
    """
    frames, head_dim = foreseen().frames, len(weight) // num_heads
    most = MAX_FRAMES_FLOAT32 if weight.dtype == torch.float32 else _most_frames(weight)
    if weight.dtype in DTYPES and head_dim % 8 == 0 and head_dim <= MAX_HEAD_DIM and frames <= most:
        x = weight.new_empty(frames, AHEAD_PIXELS, len(weight), device="meta")
        TEMPORAL_ATTENTION.compile_ahead(weight.device, x, x, x, frames, num_heads, 1.0, impl="triton")


def temporal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_frames: int,
    num_heads: int,
    *,
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """``F.scaled_dot_product_attention`` over the frames, for every pixel and head, of rows that stay in place.

    Args:
        q: ``[B*F, HW, H*D]``, fp16 / bf16 / fp32, rows of any strides: a slice of a packed QKV projection will do.
        k: ``[B*Fk, HW, H*D]`` in ``q.dtype``; ``Fk`` follows from ``B`` and need not be ``F``.
        v: As ``k``.
        num_frames: ``F``.
        num_heads: ``H``.
        scale: Factor of the scores; None for ``D ** -0.5``.
        impl: ``"triton"`` or ``"torch"``; None lets the op choose.

    Returns:
        ``[B*F, HW, H*D]``, contiguous, in ``q.dtype``.

    Raises:
        ValueError: The shapes do not fit one another, ``num_frames`` or ``num_heads``; there are queries, but no keys;
            ``impl`` cannot run here.
        TypeError: The dtypes differ.
    """
    _validate(q, k, v, num_frames, num_heads)
    if q.numel() == 0:
        return _empty_output(q)
    if scale is None:
        scale = (q.shape[-1] // num_heads) ** -0.5
    return TEMPORAL_ATTENTION(q, k, v, num_frames, num_heads, scale, impl=impl)
