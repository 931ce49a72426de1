"""Attention forward for Hopper in Gluon: warpgroups that own rows, and a warp that feeds them by TMA.

    out[b, :, h] = softmax(q[b, :, h] @ k[b, :, h].T * scale) @ v[b, :, h]

A program is persistent and has ``CONSUMERS`` consumer warpgroups, each with a tile of query rows of its own, and one
producer warp. Every consumer works through the same blocks of k and v, which pass through two rings in shared memory.
The last block comes first: it alone may be ragged, so only the code before the loop masks.

Heads are padded in shared memory, by TMA: its descriptors end where a head ends, so what a block has beyond is read as
zeros and not written. Heads of up to 64 channels take the time of 64, larger ones that of 128. (Parts of 32 + 16 for 40
and of 64 + 16 for 80 multiply less; on an H100 they were no faster.)

What overlaps: the scores of the next block and the values of this one are given to the tensor cores together, and the
softmax of the next block runs while the values are still being multiplied. Scores, softmax and sums are float32;
probabilities are rounded to the input dtype before they meet v. Fidelity: math-exact.

What the loop leaves out: sums of rows stay apart in the four threads that share a row until the tile ends, and the
accumulator is multiplied only in warps of which a row has found a larger score. On an H200 both were worth 5 %,
measured beside releases by named barriers and probabilities rounded in pairs, which alone gained nothing. Slower there:
consumers that take turns to issue (by mbarriers or named barriers), queries read from registers. Without the softmax
the products alone run at 787 TFLOP/s (head_dim 128), with k and v loaded once at 689, as it is at about 650: what is
left is the softmax. The record: samples/benchmarks/attention-variants-h200.json.

Who waits for whom: blocks of k and of v pass through a ring each, see ``gluon_parts.py``. A consumer's tile of q has a
place of its own, filled once a tile, with two barriers used in the same way.

* ``q_ready[c]``, ``k_ready[s]``, ``v_ready[s]``: one arrival a phase, the producer's announcement.
* ``q_free[c]``: consumer c arrives once a tile, after its last product that reads q. One arrival a phase.
* ``k_free[s]``, ``v_free[s]``: ``CONSUMERS`` arrivals a phase, so none can run a whole ring ahead of another.

TMA and wgmma read and write through the same proxy, so only the output tile, which threads write and TMA reads, needs a
fence.

Sources: FlashAttention-3 (https://arxiv.org/abs/2407.08608).
"""

from __future__ import annotations

import math
from typing import NamedTuple

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

from vidaccel.kernels.gluon_parts import (
    CONSUMER_REGISTERS,
    Described,
    TileLaunch,
    barriers,
    matrix,
    release,
    sums_layout,
    tiles,
    wait_free,
    wait_ready,
)
from vidaccel.kernels.launch import multiprocessors

__all__ = [
    "HEAD_DIMS",
    "Config",
    "bind",
    "choose_config",
    "gluon_configs",
    "spatial_attention_gluon_kernel",
]

HEAD_DIMS = range(8, 129, 8)  # TMA takes strides of whole 16 bytes
CONSUMER_ROWS = 64  # what one wgmma takes


@gluon.jit
def _place(tile, tiles_per_head, num_heads, TILE_ROWS: gl.constexpr):
    """Batch entry, first row and head of a tile; tiles of one head are neighbours, so its k and v stay in L2."""
    head = tile // tiles_per_head
    return head // num_heads, tile % tiles_per_head * TILE_ROWS, head % num_heads


@gluon.jit
def _finished(x):
    """``x``, a tensor of no negative numbers, by way of code that nothing can be moved across before ``x`` is known.

    ptxas puts the wait for a product as early as it can, here before the softmax that is to overlap with it. The
    branch, never taken, depends on the softmax of both rows of a thread and holds it back.
    """
    return gl.inline_asm_elementwise(
        "{.reg .pred p; setp.lt.f32 p, $2, 0f00000000; setp.lt.or.f32 p, $3, 0f00000000, p;"
        " @p nanosleep.u32 1; mov.b32 $0, $2; mov.b32 $1, $3;}",
        "=f,=f,f,f",
        [x],
        dtype=gl.float32,
        is_pure=False,
        pack=2,
    )


@gluon.constexpr_function
def _rescale_asm(count):
    """PTX for ``acc *= alpha`` over ``count`` registers of a thread, branched around where a warp's alphas are all 1.

    Registers of an accumulator belong to the thread's two rows by turns, two at a time, and so do those of alpha.
    """
    low, high = f"${2 * count}", f"${2 * count + 2}"
    lines = [
        "{.reg .pred p;",
        f"setp.neu.f32 p, {low}, 0f3F800000;",
        f"setp.neu.or.f32 p, {high}, 0f3F800000, p;",
        "vote.sync.any.pred p, p, 0xffffffff;",
        "@!p bra KEEP;",
        *(f"mul.f32 ${i}, ${i}, {(low, high)[i >> 1 & 1]};" for i in range(count)),
        "KEEP:}",
    ]
    return "\n".join(lines)


@gluon.constexpr_function
def _rescale_constraints(count):
    # the results are the accumulator's own registers: other ones would double it
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f"] * count)


@gluon.jit
def _rescaled(acc, alpha, COUNT: gl.constexpr):
    """``acc * alpha``, of which a thread holds ``COUNT`` numbers; the same bits, for a multiplication by 1 has none."""
    alpha, acc = gl.broadcast(alpha, acc)
    return gl.inline_asm_elementwise(
        _rescale_asm(COUNT), _rescale_constraints(COUNT), [acc, alpha], dtype=gl.float32, is_pure=True, pack=COUNT
    )


@gluon.jit
def _parted_sums(p):
    """Sums of rows over what each thread holds, ``[rows, 4]``: those of the four threads of a row apart."""
    return gl.sum(gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def _load(desc, batch, row, head, ready, target):
    mbarrier.expect(ready, desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [batch, row, head, 0], ready, target)


@gluon.jit
def _producer(load, CONSUMERS: gl.constexpr):
    descs, smem, ready, free, sizes, kv_batch_step = load
    q_desc, k_desc, v_desc = descs
    q_smem, k_smem, v_smem = smem
    q_ready, k_ready, v_ready = ready
    q_free, k_free, v_free = free
    num_tiles, tiles_per_head, num_heads, blocks = sizes
    ROWS: gl.constexpr = q_desc.block_shape[1]
    BLOCK_N: gl.constexpr = k_desc.block_shape[1]

    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        tiles_done = tile // gl.num_programs(0)
        batch, row, head = _place(tile, tiles_per_head, num_heads, CONSUMERS * ROWS)
        kv_batch = batch * kv_batch_step
        for consumer in gl.static_range(CONSUMERS):
            mbarrier.wait(q_free.index(consumer), (tiles_done & 1) ^ 1)
            _load(q_desc, batch, row + consumer * ROWS, head, q_ready.index(consumer), q_smem.index(consumer))
        for block in range(blocks + 1):  # in the order of use: k runs one block ahead of v
            n = tiles_done * blocks + block
            if block < blocks:
                stage = wait_free(k_free, n)
                start = (blocks - 1 - block) * BLOCK_N
                _load(k_desc, kv_batch, start, head, k_ready.index(stage), k_smem.index(stage))
            if block > 0:
                stage = wait_free(v_free, n - 1)
                start = (blocks - block) * BLOCK_N
                _load(v_desc, kv_batch, start, head, v_ready.index(stage), v_smem.index(stage))


@gluon.jit
def _consumer(work, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    out_desc, out_smem, smem, ready, free, sizes, seq_kv, scale_log2 = work
    q_smem, k_smem, v_smem = smem
    q_ready, k_ready, v_ready = ready
    q_free, k_free, v_free = free
    num_tiles, tiles_per_head, num_heads, blocks = sizes
    dtype: gl.constexpr = out_desc.dtype
    ROWS: gl.constexpr = out_desc.block_shape[1]
    HEAD_DIM: gl.constexpr = out_desc.block_shape[3]  # padded
    BLOCK_N: gl.constexpr = k_smem.shape[2]
    STAGES: gl.constexpr = k_smem.shape[0]
    SCORES: gl.constexpr = sums_layout(BLOCK_N)
    OUTPUT: gl.constexpr = sums_layout(HEAD_DIM)
    PROBABILITIES: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)

    q = matrix(q_smem.index(CONSUMER))
    out = out_smem.index(CONSUMER)
    zeros = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, SCORES)
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        tiles_done = tile // gl.num_programs(0)
        n = tiles_done * blocks
        mbarrier.wait(q_ready.index(CONSUMER), tiles_done & 1)
        k = matrix(k_smem.index(wait_ready(k_ready, n)))
        s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))  # [ROWS, BLOCK_N]
        release(k_free, n)
        offs_n = (blocks - 1) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
        s = gl.where((offs_n < seq_kv)[None, :], s, float("-inf"))
        m_i = gl.max(s, 1) * scale_log2
        p = gl.exp2(s * scale_log2 - m_i[:, None])
        l_i = _parted_sums(p)
        p = gl.convert_layout(p.to(dtype), PROBABILITIES)
        acc = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, OUTPUT)

        for block in range(1, blocks):
            n = tiles_done * blocks + block - 1
            k_stage, v_stage = (n + 1) % STAGES, n % STAGES  # before the waits, which nothing is moved across
            wait_ready(k_ready, n + 1)
            k = matrix(k_smem.index(k_stage))
            s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
            wait_ready(v_ready, n)
            v = matrix(v_smem.index(v_stage))
            acc = warpgroup_mma(p, v, acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
            release(k_free, n + 1)
            m_new = gl.maximum(m_i, gl.max(s, 1) * scale_log2)
            alpha = gl.exp2(m_i - m_new)
            m_i = m_new
            p_next = gl.exp2(s * scale_log2 - m_new[:, None])
            alpha_i = gl.convert_layout(alpha, gl.SliceLayout(1, l_i.type.layout))[:, None]
            l_i = _finished(l_i * alpha_i + _parted_sums(p_next))
            # p is among the dependencies because the product reads it from registers until now
            acc, p = warpgroup_mma_wait(0, deps=(acc, p))
            release(v_free, n)
            alpha = gl.convert_layout(alpha, gl.SliceLayout(1, OUTPUT))[:, None]
            acc = _rescaled(acc, alpha, ROWS * HEAD_DIM // 128)
            p = gl.convert_layout(p_next.to(dtype), PROBABILITIES)
        mbarrier.arrive(q_free.index(CONSUMER))

        n = (tiles_done + 1) * blocks - 1
        v = matrix(v_smem.index(wait_ready(v_ready, n)))
        acc = warpgroup_mma(p, v, acc, is_async=True)
        acc, p = warpgroup_mma_wait(0, deps=(acc, p))
        release(v_free, n)
        acc = acc * gl.convert_layout(1.0 / gl.sum(l_i, 1), gl.SliceLayout(1, OUTPUT))[:, None]
        tma.store_wait(0)  # of the tile before
        matrix(out).store(acc.to(dtype))
        fence_async_shared()
        batch, row, head = _place(tile, tiles_per_head, num_heads, CONSUMERS * ROWS)
        place = [batch, row + CONSUMER * ROWS, head, 0]
        tma.async_copy_shared_to_global(out_desc, place, out)  # clips rows and channels past the end
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_tiles", "tiles_per_head", "num_heads", "seq_kv", "kv_batch_step"])
def spatial_attention_gluon_kernel(
    q_desc, k_desc, v_desc, out_desc,
    num_tiles, tiles_per_head, num_heads, seq_kv, kv_batch_step,
    scale_log2,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """All tiles of ``CONSUMERS`` times the rows of ``q_desc``'s block; launch at most as many programs as fit at once.

    The descriptors see ``[B, S, H, D]`` in blocks ``[1, rows, 1, D padded]``. ``kv_batch_step`` is 0 where all batch
    entries share one k and v (whose descriptors then have a batch of 1), else 1.
    """
    smem = (tiles(q_desc, CONSUMERS), tiles(k_desc, STAGES), tiles(v_desc, STAGES))
    out_smem = tiles(out_desc, CONSUMERS)
    ready = (barriers(CONSUMERS, 1), barriers(STAGES, 1), barriers(STAGES, 1))
    free = (barriers(CONSUMERS, 1), barriers(STAGES, CONSUMERS), barriers(STAGES, CONSUMERS))
    fence_async_shared()
    sizes = (num_tiles, tiles_per_head, num_heads, gl.cdiv(seq_kv, k_desc.block_shape[1]))
    work = (out_desc, out_smem, smem, ready, free, sizes, seq_kv, scale_log2)
    load = ((q_desc, k_desc, v_desc), smem, ready, free, sizes, kv_batch_step)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consumer, (work, 0, CONSUMERS)),
                (_consumer, (work, 1, CONSUMERS)),
                (_producer, (load, CONSUMERS)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
    else:
        gl.static_assert(CONSUMERS == 3)
        gl.warp_specialize(
            [
                (_consumer, (work, 0, CONSUMERS)),
                (_consumer, (work, 1, CONSUMERS)),
                (_consumer, (work, 2, CONSUMERS)),
                (_producer, (load, CONSUMERS)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )


class Config(NamedTuple):
    """How the kernel cuts its work.

    ``consumers`` warpgroups of 64 query rows each; k and v in blocks of ``columns`` rows, ``stages`` of them in flight.
    """

    consumers: int
    columns: int
    stages: int

    @property
    def registers(self) -> int:
        """Of every consumer's threads."""
        return CONSUMER_REGISTERS[self.consumers]


def choose_config(head_dim: int) -> Config:
    """The configuration the kernel runs with."""
    return gluon_configs(head_dim)[0]


def gluon_configs(head_dim: int) -> list[Config]:
    """Every configuration worth trying; the first is the one that runs."""
    narrow = _padded(head_dim) == 64
    shapes = [(3, 128, 4), (2, 128, 4), (2, 128, 2), (3, 64, 6)] if narrow else [(2, 128, 2), (3, 64, 3), (2, 64, 4)]
    return [Config(*shape) for shape in shapes]


def _padded(head_dim: int) -> int:
    """How many channels of shared memory a head takes."""
    return 64 if head_dim <= 64 else 128


def bind(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float, *, config: Config | None = None) -> TileLaunch:
    """Prepare for q, k and v, ``[B, S, H*D]``, of these sizes and strides; see ``spatial_attention``.

    Returns:
        Takes q, k, v and a contiguous tensor that the attention is written to, all at multiples of 16 bytes.
    """
    (batch, seq_q, channels), seq_kv = q.shape, k.shape[1]
    config = config or choose_config(channels // num_heads)
    tiles_per_head = triton.cdiv(seq_q, config.consumers * CONSUMER_ROWS)
    num_tiles = batch * num_heads * tiles_per_head
    shared_kv = k.stride(0) == 0
    tensors = [
        _described(q, q.stride(), num_heads, CONSUMER_ROWS),
        *(_described(x[:1] if shared_kv else x, x.stride(), num_heads, config.columns) for x in (k, v)),
        _described(q, (seq_q * channels, channels), num_heads, CONSUMER_ROWS),
    ]
    return TileLaunch(
        spatial_attention_gluon_kernel, min(num_tiles, multiprocessors(q.device)), tensors,
        num_tiles, tiles_per_head, num_heads, seq_kv, 0 if shared_kv else 1, scale * math.log2(math.e),
        CONSUMERS=config.consumers, STAGES=config.stages, REGISTERS=config.registers, num_warps=4,
    )  # fmt: skip


def _described(x: Tensor, strides: tuple[int, ...], num_heads: int, rows: int) -> Described:
    """``[B, S, H*D]`` as ``[B, S, H, D]``: TMA reads what a block has beyond D as zeros, and does not write it."""
    batch, seq, channels = x.shape
    head_dim = channels // num_heads
    # the stride of a batch of one is anything, 0 where it was expanded
    batch_stride = strides[0] if batch > 1 else seq * strides[1]
    block, strides_of_heads = [1, rows, 1, _padded(head_dim)], [batch_stride, strides[1], head_dim, 1]
    return Described([batch, seq, num_heads, head_dim], block, x.dtype, strides_of_heads)
