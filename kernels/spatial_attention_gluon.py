"""Attention forward for Hopper in Gluon: warpgroups that own rows, and a warp that feeds them by TMA.

    out[b, :, h] = softmax(q[b, :, h] @ k[b, :, h].T * scale) @ v[b, :, h]

A program is persistent and has ``CONSUMERS`` consumer warpgroups, each with a tile of query rows of its own, and one
producer warp. Every consumer works through the same blocks of k and v, which pass through two rings in shared memory.
The last block comes first: it alone may be ragged, so only the code before the loop masks.

Heads are padded in shared memory, by TMA: its descriptors end where a head ends, so what a block has beyond is read as
zeros and not written. A head of 64 or 128 is one tile, others are two where that is less to multiply: 80 is 64 and 16.
Scores are then the sum of two products, and there are two accumulators for the output.

What overlaps: the scores of the next block and the values of this one are given to the tensor cores together, and the
softmax of the next block runs while the values are still being multiplied; with ``PING_PONG`` the consumers take turns
to issue, so that one's softmax meets the other's products. Scores, softmax and sums are float32; probabilities are
rounded to the input dtype before they meet v. Fidelity: math-exact.

Who waits for whom (every barrier completes a phase per use; a wait names the parity of the phase it waits for, and a
wait for the odd parity of a fresh barrier passes at once):

* ``q_ready[c]``, ``k_ready[s]``, ``v_ready[s]``: the producer announces a tile's bytes, TMA completes the phase when
  they have arrived, consumers wait. One arrival a phase: the announcement.
* ``q_free[c]``: consumer c arrives once a tile, after its last product that reads q. One arrival a phase.
* ``k_free[s]``, ``v_free[s]``: each consumer arrives when its products that read the block have finished; the producer
  waits before it overwrites the block. ``CONSUMERS`` arrivals a phase, so none can run a whole ring ahead of another.
* ``turns[c]``: consumer c waits before it issues a pair of products and hands the turn to the next one after it. All
  consumers do so equally often, whether or not their rows exist, so the ring of turns never stalls; consumer 0 has the
  first turn. A hint to the scheduler: no data depends on it.

The n-th block of a program lies in stage ``n % STAGES`` and belongs to phase ``n // STAGES`` of that stage's barriers:
consumers wait for parity ``n // STAGES & 1`` of "ready", the producer for the opposite one of "free". TMA and wgmma
read and write through the same proxy, so only the output tile, which threads write and TMA reads, needs a fence.

Sources: FlashAttention-3 (https://arxiv.org/abs/2407.08608).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = ["HEAD_DIMS", "Config", "choose_config", "gluon_configs", "launch", "spatial_attention_gluon_kernel"]

CONSUMER_ROWS = 64  # what one wgmma takes
HEAD_DIMS = range(8, 129, 8)  # TMA takes strides of whole 16 bytes
DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


@gluon.jit
def _place(tile, tiles_per_head, num_heads, TILE_ROWS: gl.constexpr):
    """Batch entry, first row and head of a tile; tiles of one head are neighbours, so its k and v stay in L2."""
    head = tile // tiles_per_head
    return head // num_heads, tile % tiles_per_head * TILE_ROWS, head % num_heads


@gluon.jit
def _finished(x):
    """``x``, a tensor of no negative numbers, by way of code that nothing can be moved across before ``x`` is known.

    ptxas puts the wait for a product as early as it can, here before the softmax that is to overlap with it. The
    branch, never taken, depends on the softmax and holds it back.
    """
    return gl.inline_asm_elementwise(
        "{.reg .pred p; setp.lt.f32 p, $2, 0f00000000; @p nanosleep.u32 1; mov.b32 $0, $2; mov.b32 $1, $3;}",
        "=f,=f,f,f",
        [x],
        dtype=gl.float32,
        is_pure=False,
        pack=2,
    )


@gluon.jit
def _matrix(smem, index):
    """A tile in shared memory, ``[rows, channels]``."""
    tile = smem.index(index)
    return tile.reshape([tile.shape[1], tile.shape[3]])


@gluon.jit
def _load(desc, smem, index, batch, row, head, ready):
    """Every part of a tile."""
    REST: gl.constexpr = desc[1].block_type.nbytes if len(desc) == 2 else 0
    mbarrier.expect(ready, desc[0].block_type.nbytes + REST)
    tma.async_copy_global_to_shared(desc[0], [batch, row, head, 0], ready, smem[0].index(index))
    if len(desc) == 2:
        channel: gl.constexpr = desc[0].block_shape[3]
        tma.async_copy_global_to_shared(desc[1], [batch, row, head, channel], ready, smem[1].index(index))


@gluon.jit
def _store(desc, smem, index, batch, row, head):
    """Every part of a tile; TMA clips rows and channels past the end."""
    tma.async_copy_shared_to_global(desc[0], [batch, row, head, 0], smem[0].index(index))
    if len(desc) == 2:
        channel: gl.constexpr = desc[0].block_shape[3]
        tma.async_copy_shared_to_global(desc[1], [batch, row, head, channel], smem[1].index(index))


@gluon.jit
def _start_scores(q_smem, consumer, k_smem, stage, zeros):
    """``q @ k.T``, the sum over the parts; to be waited for."""
    k = _matrix(k_smem[0], stage).permute((1, 0))
    s = warpgroup_mma(_matrix(q_smem[0], consumer), k, zeros, use_acc=False, is_async=True)
    if len(k_smem) == 2:
        k = _matrix(k_smem[1], stage).permute((1, 0))
        s = warpgroup_mma(_matrix(q_smem[1], consumer), k, s, is_async=True)
    return s


@gluon.jit
def _start_values(p, v_smem, stage, acc):
    """``acc + p @ v`` for every part; to be waited for."""
    first = warpgroup_mma(p, _matrix(v_smem[0], stage), acc[0], is_async=True)
    if len(acc) == 2:
        return first, warpgroup_mma(p, _matrix(v_smem[1], stage), acc[1], is_async=True)
    else:
        return (first,)


@gluon.jit
def _finish_values(acc, p):
    """Wait; p is among the dependencies because the products read it from registers until now."""
    if len(acc) == 2:
        first, second, p = warpgroup_mma_wait(0, deps=(acc[0], acc[1], p))
        return first, second
    else:
        first, p = warpgroup_mma_wait(0, deps=(acc[0], p))
        return (first,)


@gluon.jit
def _scaled_rows(x, factor):
    return x * gl.convert_layout(factor, gl.SliceLayout(1, x.type.layout))[:, None]


@gluon.jit
def _scaled(acc, factor):
    if len(acc) == 2:
        return _scaled_rows(acc[0], factor), _scaled_rows(acc[1], factor)
    else:
        return (_scaled_rows(acc[0], factor),)


@gluon.jit
def _zeros(ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """An accumulator."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    return gl.full([ROWS, COLUMNS], 0.0, gl.float32, LAYOUT)


@gluon.jit
def _no_values(desc):
    """An accumulator for every part of the output."""
    ROWS: gl.constexpr = desc[0].block_shape[1]
    first = _zeros(ROWS, desc[0].block_shape[3])
    if len(desc) == 2:
        return first, _zeros(ROWS, desc[1].block_shape[3])
    else:
        return (first,)


@gluon.jit
def _producer(load, CONSUMERS: gl.constexpr, STAGES: gl.constexpr):
    descs, tiles, ready, free, sizes, kv_batch_step = load
    q_desc, k_desc, v_desc = descs
    q_smem, k_smem, v_smem = tiles
    q_ready, k_ready, v_ready = ready
    q_free, k_free, v_free = free
    num_tiles, tiles_per_head, num_heads, blocks = sizes
    ROWS: gl.constexpr = q_desc[0].block_shape[1]
    BLOCK_N: gl.constexpr = k_desc[0].block_shape[1]

    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        tiles_done = tile // gl.num_programs(0)
        batch, row, head = _place(tile, tiles_per_head, num_heads, CONSUMERS * ROWS)
        kv_batch = batch * kv_batch_step
        for consumer in gl.static_range(CONSUMERS):
            mbarrier.wait(q_free.index(consumer), (tiles_done & 1) ^ 1)
            _load(q_desc, q_smem, consumer, batch, row + consumer * ROWS, head, q_ready.index(consumer))
        for block in range(blocks + 1):  # in the order of use: k runs one block ahead of v
            n = tiles_done * blocks + block
            if block < blocks:
                stage = n % STAGES
                mbarrier.wait(k_free.index(stage), (n // STAGES & 1) ^ 1)
                _load(k_desc, k_smem, stage, kv_batch, (blocks - 1 - block) * BLOCK_N, head, k_ready.index(stage))
            if block > 0:
                stage = (n - 1) % STAGES
                mbarrier.wait(v_free.index(stage), ((n - 1) // STAGES & 1) ^ 1)
                _load(v_desc, v_smem, stage, kv_batch, (blocks - block) * BLOCK_N, head, v_ready.index(stage))


@gluon.jit
def _consumer(work, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PING_PONG: gl.constexpr):
    out_desc, out_smem, tiles, ready, free, turns, sizes, seq_kv, scale_log2 = work
    q_smem, k_smem, v_smem = tiles
    q_ready, k_ready, v_ready = ready
    q_free, k_free, v_free = free
    num_tiles, tiles_per_head, num_heads, blocks = sizes
    PARTS: gl.constexpr = len(out_desc)
    dtype: gl.constexpr = out_desc[0].dtype
    ROWS: gl.constexpr = out_desc[0].block_shape[1]
    BLOCK_N: gl.constexpr = k_smem[0].shape[2]
    zeros = _zeros(ROWS, BLOCK_N)
    SCORES: gl.constexpr = zeros.type.layout
    PROBABILITIES: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)

    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        tiles_done = tile // gl.num_programs(0)
        n = tiles_done * blocks
        mbarrier.wait(q_ready.index(CONSUMER), tiles_done & 1)
        stage = n % STAGES
        mbarrier.wait(k_ready.index(stage), n // STAGES & 1)
        s = _start_scores(q_smem, CONSUMER, k_smem, stage, zeros)
        s = warpgroup_mma_wait(0, deps=(s,))  # [ROWS, BLOCK_N]
        mbarrier.arrive(k_free.index(stage))
        offs_n = (blocks - 1) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
        s = gl.where((offs_n < seq_kv)[None, :], s, float("-inf"))
        m_i = gl.max(s, 1) * scale_log2
        p = gl.exp2(s * scale_log2 - m_i[:, None])
        l_i = gl.sum(p, 1)
        p = gl.convert_layout(p.to(dtype), PROBABILITIES)
        acc = _no_values(out_desc)

        for block in range(1, blocks):
            n = tiles_done * blocks + block - 1
            k_stage, v_stage = (n + 1) % STAGES, n % STAGES
            mbarrier.wait(k_ready.index(k_stage), (n + 1) // STAGES & 1)
            if PING_PONG:
                # one turn a block but the first of each tile
                mbarrier.wait(turns.index(CONSUMER), (n - tiles_done & 1) ^ (1 if CONSUMER == 0 else 0))
            s = _start_scores(q_smem, CONSUMER, k_smem, k_stage, zeros)
            mbarrier.wait(v_ready.index(v_stage), n // STAGES & 1)
            acc = _start_values(p, v_smem, v_stage, acc)
            if PING_PONG:
                mbarrier.arrive(turns.index((CONSUMER + 1) % CONSUMERS))
            s = warpgroup_mma_wait(PARTS, deps=(s,))
            mbarrier.arrive(k_free.index(k_stage))
            m_new = gl.maximum(m_i, gl.max(s, 1) * scale_log2)
            alpha = gl.exp2(m_i - m_new)
            m_i = m_new
            p_next = gl.exp2(s * scale_log2 - m_new[:, None])
            l_i = _finished(l_i * alpha + gl.sum(p_next, 1))
            acc = _finish_values(acc, p)
            mbarrier.arrive(v_free.index(v_stage))
            acc = _scaled(acc, alpha)
            p = gl.convert_layout(p_next.to(dtype), PROBABILITIES)
        mbarrier.arrive(q_free.index(CONSUMER))

        n = (tiles_done + 1) * blocks - 1
        stage = n % STAGES
        mbarrier.wait(v_ready.index(stage), n // STAGES & 1)
        acc = _finish_values(_start_values(p, v_smem, stage, acc), p)
        mbarrier.arrive(v_free.index(stage))
        acc = _scaled(acc, 1.0 / l_i)
        tma.store_wait(0)  # of the tile before
        for part in gl.static_range(PARTS):
            _matrix(out_smem[part], CONSUMER).store(acc[part].to(dtype))
        fence_async_shared()
        batch, row, head = _place(tile, tiles_per_head, num_heads, CONSUMERS * ROWS)
        _store(out_desc, out_smem, CONSUMER, batch, row + CONSUMER * ROWS, head)
    tma.store_wait(0)


@gluon.jit
def _part(desc, COUNT: gl.constexpr):
    SHAPE: gl.constexpr = [COUNT, 1, desc.block_shape[1], 1, desc.block_shape[3]]
    return gl.allocate_shared_memory(desc.dtype, SHAPE, desc.layout)


@gluon.jit
def _tiles(desc, COUNT: gl.constexpr):
    """Shared memory for ``COUNT`` tiles, by parts."""
    if len(desc) == 2:
        return _part(desc[0], COUNT), _part(desc[1], COUNT)
    else:
        return (_part(desc[0], COUNT),)


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit(do_not_specialize=["num_tiles", "tiles_per_head", "num_heads", "seq_kv", "kv_batch_step"])
def spatial_attention_gluon_kernel(
    q_desc, k_desc, v_desc, out_desc, q_rest_desc, k_rest_desc, v_rest_desc, out_rest_desc,
    num_tiles, tiles_per_head, num_heads, seq_kv, kv_batch_step,
    scale_log2,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PING_PONG: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """All tiles of ``CONSUMERS`` times the rows of ``q_desc``'s block; launch at most as many programs as fit at once.

    The descriptors see ``[B, S, H, D]`` in blocks ``[1, rows, 1, channels]``: the first channels of a head, and in the
    second four descriptors the rest, or None. ``kv_batch_step`` is 0 where all batch entries share one k and v (whose
    descriptors then have a batch of 1), else 1.
    """
    if k_rest_desc is None:
        q_desc, k_desc, v_desc, out_desc = (q_desc,), (k_desc,), (v_desc,), (out_desc,)
    else:
        q_desc, k_desc, v_desc = (q_desc, q_rest_desc), (k_desc, k_rest_desc), (v_desc, v_rest_desc)
        out_desc = (out_desc, out_rest_desc)
    tiles = _tiles(q_desc, CONSUMERS), _tiles(k_desc, STAGES), _tiles(v_desc, STAGES)
    out_smem = _tiles(out_desc, CONSUMERS)
    ready = (_barriers(CONSUMERS, 1), _barriers(STAGES, 1), _barriers(STAGES, 1))
    free = (_barriers(CONSUMERS, 1), _barriers(STAGES, CONSUMERS), _barriers(STAGES, CONSUMERS))
    turns = _barriers(CONSUMERS, 1)
    fence_async_shared()
    sizes = (num_tiles, tiles_per_head, num_heads, gl.cdiv(seq_kv, k_desc[0].block_shape[1]))
    work = (out_desc, out_smem, tiles, ready, free, turns, sizes, seq_kv, scale_log2)
    load = ((q_desc, k_desc, v_desc), tiles, ready, free, sizes, kv_batch_step)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consumer, (work, 0, CONSUMERS, STAGES, PING_PONG)),
                (_consumer, (work, 1, CONSUMERS, STAGES, PING_PONG)),
                (_producer, (load, CONSUMERS, STAGES)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
    else:
        gl.static_assert(CONSUMERS == 3)
        gl.warp_specialize(
            [
                (_consumer, (work, 0, CONSUMERS, STAGES, PING_PONG)),
                (_consumer, (work, 1, CONSUMERS, STAGES, PING_PONG)),
                (_consumer, (work, 2, CONSUMERS, STAGES, PING_PONG)),
                (_producer, (load, CONSUMERS, STAGES)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )


class Config(NamedTuple):
    """How the kernel cuts its work.

    ``consumers`` warpgroups of 64 query rows each; k and v in blocks of ``columns`` rows, ``stages`` of them in flight.
    ``split`` pads a head to a sum of two powers of two, not to one.
    """

    consumers: int
    columns: int
    stages: int
    ping_pong: bool
    split: bool

    @property
    def registers(self) -> int:
        """Of every consumer's threads: what is left of 65536 by a producer warpgroup that keeps 24."""
        return 240 if self.consumers == 2 else 160


def choose_config(head_dim: int) -> Config:
    """The configuration the kernel runs with."""
    return gluon_configs(head_dim)[0]


def gluon_configs(head_dim: int) -> list[Config]:
    """Every configuration worth trying; the first is the one that runs.

    At head_dim 64 an H100 is 5 % faster with turns (476 TFLOP/s over 9216 keys, cuDNN 458), at 128 without.
    """
    configs = []
    for split in (True, False) if _parts(head_dim, split=True)[1] else (False,):
        padded = sum(_parts(head_dim, split))
        if padded <= 64:
            shapes = [(3, 128, 4), (2, 128, 4), (2, 128, 2), (3, 64, 6)]
        elif padded < 128:
            shapes = [(2, 128, 3), (3, 64, 4)]
        else:
            shapes = [(2, 128, 2), (3, 64, 3), (2, 64, 4)]
        turns = (True, False) if padded <= 64 else (False, True)
        configs += [Config(*shape, ping_pong, split) for shape in shapes for ping_pong in turns]
    return configs


def _parts(head_dim: int, split: bool) -> tuple[int, int]:
    """How many channels the two parts of a head have in shared memory, the second 0 if there is but one."""
    whole = max(16, triton.next_power_of_2(head_dim))
    first, rest = whole // 2, max(16, triton.next_power_of_2(head_dim - whole // 2))
    return (first, rest) if split and rest < first else (whole, 0)


def launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, num_heads: int, scale: float, *, config: Config | None = None
) -> None:
    """Write the attention of ``q``, ``k`` and ``v``, ``[B, S, H*D]``, to ``out``; see ``spatial_attention``."""
    (batch, seq_q, channels), seq_kv = q.shape, k.shape[1]
    config = config or choose_config(channels // num_heads)
    tiles_per_head = triton.cdiv(seq_q, config.consumers * CONSUMER_ROWS)
    num_tiles = batch * num_heads * tiles_per_head
    shared_kv = k.stride(0) == 0
    if shared_kv:
        k, v = k[:1], v[:1]
    rows = ((q, CONSUMER_ROWS), (k, config.columns), (v, config.columns), (out, CONSUMER_ROWS))
    parts = _parts(channels // num_heads, config.split)
    descriptors = [_descriptor(x, num_heads, block_rows, part) for part in parts for x, block_rows in rows]
    with torch.cuda.device_of(q):
        spatial_attention_gluon_kernel[(min(num_tiles, _multiprocessors(q.device)),)](
            *descriptors,
            num_tiles, tiles_per_head, num_heads, seq_kv, 0 if shared_kv else 1,
            scale * math.log2(math.e),
            CONSUMERS=config.consumers, STAGES=config.stages, PING_PONG=config.ping_pong, REGISTERS=config.registers,
            num_warps=4,
        )  # fmt: skip


def _descriptor(x: Tensor, num_heads: int, rows: int, channels: int) -> TensorDescriptor | None:
    """``[B, S, H*D]`` as ``[B, S, H, D]``: TMA reads what a block has beyond D as zeros, and does not write it."""
    if channels == 0:
        return None
    head_dim = x.shape[2] // num_heads
    block = [1, rows, 1, channels]
    # the stride of a batch of one is anything, 0 where it was expanded
    batch_stride = x.stride(0) if x.shape[0] > 1 else x.shape[1] * x.stride(1)
    layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[x.dtype])
    shape, strides = [*x.shape[:2], num_heads, head_dim], [batch_stride, x.stride(1), head_dim, 1]
    return TensorDescriptor(x, shape, strides, block, layout)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
