"""Attention forward for Hopper in Gluon: warpgroups that own rows, and a warp that feeds them by TMA.

    out[b, :, h] = softmax(q[b, :, h] @ k[b, :, h].T * scale) @ v[b, :, h]

A program is persistent and has ``CONSUMERS`` consumer warpgroups, each with a tile of query rows of its own, and one
producer warp. Every consumer works through the same blocks of k and v, which pass through two rings in shared memory.
The last block comes first: it alone may be ragged, so only the code before the loop masks.

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

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

__all__ = ["spatial_attention_gluon_kernel"]


@gluon.jit
def _place(tile, tiles_per_head, num_heads, TILE_ROWS: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Batch entry, first row and first channel of a tile; tiles of one head are neighbours, so its k, v stay in L2."""
    head = tile // tiles_per_head
    return head // num_heads, tile % tiles_per_head * TILE_ROWS, head % num_heads * HEAD_DIM


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
def _load(desc, batch, row, channel, ready, target):
    mbarrier.expect(ready, desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [batch, row, channel], ready, target)


@gluon.jit
def _producer(descs, tiles, barriers, sizes, CONSUMERS: gl.constexpr, STAGES: gl.constexpr):
    q_desc, k_desc, v_desc, out_desc = descs
    q_smem, k_smem, v_smem, out_smem = tiles
    q_ready, q_free, k_ready, k_free, v_ready, v_free, turns = barriers
    num_tiles, tiles_per_head, num_heads, blocks, seq_kv, kv_batch_step = sizes
    ROWS: gl.constexpr = q_desc.block_shape[1]
    BLOCK_N: gl.constexpr = k_desc.block_shape[1]
    HEAD_DIM: gl.constexpr = k_desc.block_shape[2]

    tiles_done = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        batch, row, channel = _place(tile, tiles_per_head, num_heads, CONSUMERS * ROWS, HEAD_DIM)
        for consumer in gl.static_range(CONSUMERS):
            mbarrier.wait(q_free.index(consumer), (tiles_done & 1) ^ 1)
            _load(q_desc, batch, row + consumer * ROWS, channel, q_ready.index(consumer), q_smem.index(consumer))
        first = tiles_done * blocks
        for block in range(blocks + 1):  # in the order of use: k runs one block ahead of v
            if block < blocks:
                stage, turn = (first + block) % STAGES, (first + block) // STAGES
                mbarrier.wait(k_free.index(stage), (turn & 1) ^ 1)
                start = (blocks - 1 - block) * BLOCK_N
                _load(k_desc, batch * kv_batch_step, start, channel, k_ready.index(stage), k_smem.index(stage))
            if block > 0:
                stage, turn = (first + block - 1) % STAGES, (first + block - 1) // STAGES
                mbarrier.wait(v_free.index(stage), (turn & 1) ^ 1)
                start = (blocks - block) * BLOCK_N
                _load(v_desc, batch * kv_batch_step, start, channel, v_ready.index(stage), v_smem.index(stage))
        tiles_done += 1


@gluon.jit
def _consumer(
    descs, tiles, barriers, sizes, scale_log2,
    CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PING_PONG: gl.constexpr,
):  # fmt: skip
    q_desc, k_desc, v_desc, out_desc = descs
    q_smem, k_smem, v_smem, out_smem = tiles
    q_ready, q_free, k_ready, k_free, v_ready, v_free, turns = barriers
    num_tiles, tiles_per_head, num_heads, blocks, seq_kv, kv_batch_step = sizes
    dtype: gl.constexpr = out_desc.dtype
    ROWS: gl.constexpr = out_desc.block_shape[1]
    HEAD_DIM: gl.constexpr = out_desc.block_shape[2]
    BLOCK_N: gl.constexpr = k_smem.shape[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    PROBABILITIES: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)

    q = q_smem.index(CONSUMER).reshape([ROWS, HEAD_DIM])
    out = out_smem.index(CONSUMER)
    zeros = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, SCORES)
    n = 0  # blocks behind this consumer, over all its tiles
    tiles_done = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        mbarrier.wait(q_ready.index(CONSUMER), tiles_done & 1)
        stage = n % STAGES
        mbarrier.wait(k_ready.index(stage), n // STAGES & 1)
        k = k_smem.index(stage).reshape([BLOCK_N, HEAD_DIM])
        s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))  # [ROWS, BLOCK_N]
        mbarrier.arrive(k_free.index(stage))
        offs_n = (blocks - 1) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
        s = gl.where((offs_n < seq_kv)[None, :], s, float("-inf"))
        m_i = gl.max(s, 1) * scale_log2
        p = gl.exp2(s * scale_log2 - m_i[:, None])
        l_i = gl.sum(p, 1)
        p = gl.convert_layout(p.to(dtype), PROBABILITIES)
        acc = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, OUTPUT)

        for block in range(1, blocks):
            k_stage, v_stage = (n + 1) % STAGES, n % STAGES
            mbarrier.wait(k_ready.index(k_stage), (n + 1) // STAGES & 1)
            if PING_PONG:
                # one turn a block but the first of each tile
                mbarrier.wait(turns.index(CONSUMER), (n - tiles_done & 1) ^ (1 if CONSUMER == 0 else 0))
            k = k_smem.index(k_stage).reshape([BLOCK_N, HEAD_DIM])
            s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
            mbarrier.wait(v_ready.index(v_stage), n // STAGES & 1)
            v = v_smem.index(v_stage).reshape([BLOCK_N, HEAD_DIM])
            acc = warpgroup_mma(p, v, acc, is_async=True)
            if PING_PONG:
                mbarrier.arrive(turns.index((CONSUMER + 1) % CONSUMERS))
            s = warpgroup_mma_wait(1, deps=(s,))
            mbarrier.arrive(k_free.index(k_stage))
            m_new = gl.maximum(m_i, gl.max(s, 1) * scale_log2)
            alpha = gl.exp2(m_i - m_new)
            m_i = m_new
            p_next = gl.exp2(s * scale_log2 - m_new[:, None])
            l_i = _finished(l_i * alpha + gl.sum(p_next, 1))
            # p is among the dependencies because the product reads it from registers until now
            acc, p = warpgroup_mma_wait(0, deps=(acc, p))
            mbarrier.arrive(v_free.index(v_stage))
            acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUTPUT))[:, None]
            p = gl.convert_layout(p_next.to(dtype), PROBABILITIES)
            n += 1
        mbarrier.arrive(q_free.index(CONSUMER))

        stage = n % STAGES
        mbarrier.wait(v_ready.index(stage), n // STAGES & 1)
        v = v_smem.index(stage).reshape([BLOCK_N, HEAD_DIM])
        acc = warpgroup_mma(p, v, acc, is_async=True)
        acc, p = warpgroup_mma_wait(0, deps=(acc, p))
        mbarrier.arrive(v_free.index(stage))
        acc = acc * gl.convert_layout(1.0 / l_i, gl.SliceLayout(1, OUTPUT))[:, None]
        tma.store_wait(0)  # of the tile before
        out.reshape([ROWS, HEAD_DIM]).store(acc.to(dtype))
        fence_async_shared()
        batch, row, channel = _place(tile, tiles_per_head, num_heads, CONSUMERS * ROWS, HEAD_DIM)
        tma.async_copy_shared_to_global(out_desc, [batch, row + CONSUMER * ROWS, channel], out)  # clips rows past the end
        n += 1
        tiles_done += 1
    tma.store_wait(0)


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def spatial_attention_gluon_kernel(
    q_desc, k_desc, v_desc, out_desc,
    num_tiles, tiles_per_head, num_heads, seq_kv, kv_batch_step,
    scale_log2,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PING_PONG: gl.constexpr, REGISTERS: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """All tiles of ``CONSUMERS`` times the rows of ``q_desc``'s block; launch at most as many programs as fit at once.

    The descriptors see ``[B, S, H*D]`` in blocks of one head: ``[1, rows, D]``. ``kv_batch_step`` is 0 where all batch
    entries share one k and v (whose descriptors then have a batch of 1), else 1.
    """
    ROWS: gl.constexpr = q_desc.block_shape[1]
    BLOCK_N: gl.constexpr = k_desc.block_shape[1]
    HEAD_DIM: gl.constexpr = k_desc.block_shape[2]
    descs = (q_desc, k_desc, v_desc, out_desc)
    tiles = (
        gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, ROWS, HEAD_DIM], q_desc.layout),
        gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, BLOCK_N, HEAD_DIM], k_desc.layout),
        gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, BLOCK_N, HEAD_DIM], v_desc.layout),
        gl.allocate_shared_memory(out_desc.dtype, [CONSUMERS, 1, ROWS, HEAD_DIM], out_desc.layout),
    )
    barriers = (
        _barriers(CONSUMERS, 1),  # q_ready
        _barriers(CONSUMERS, 1),  # q_free
        _barriers(STAGES, 1),  # k_ready
        _barriers(STAGES, CONSUMERS),  # k_free
        _barriers(STAGES, 1),  # v_ready
        _barriers(STAGES, CONSUMERS),  # v_free
        _barriers(CONSUMERS, 1),  # turns
    )
    fence_async_shared()
    sizes = (num_tiles, tiles_per_head, num_heads, gl.cdiv(seq_kv, BLOCK_N), seq_kv, kv_batch_step)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consumer, (descs, tiles, barriers, sizes, scale_log2, 0, CONSUMERS, STAGES, PING_PONG)),
                (_consumer, (descs, tiles, barriers, sizes, scale_log2, 1, CONSUMERS, STAGES, PING_PONG)),
                (_producer, (descs, tiles, barriers, sizes, CONSUMERS, STAGES)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
    else:
        gl.static_assert(CONSUMERS == 3)
        gl.warp_specialize(
            [
                (_consumer, (descs, tiles, barriers, sizes, scale_log2, 0, CONSUMERS, STAGES, PING_PONG)),
                (_consumer, (descs, tiles, barriers, sizes, scale_log2, 1, CONSUMERS, STAGES, PING_PONG)),
                (_consumer, (descs, tiles, barriers, sizes, scale_log2, 2, CONSUMERS, STAGES, PING_PONG)),
                (_producer, (descs, tiles, barriers, sizes, CONSUMERS, STAGES)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )
