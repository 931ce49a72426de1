"""A linear layer and the GEGLU after it for Hopper, in Gluon: the product of value and GELU in the GEMM's epilogue.

    value = x @ W[:D].T + b[:D],   gate = x @ W[D:].T + b[D:],   out = value * gelu(gate)

K is short here (320, 640), so a program keeps all of ``COLUMNS`` value and ``COLUMNS`` gate rows of W in shared memory
and streams rows of x past them: the least traffic there is. A tile is 64 rows of x times these columns. A program has a
producer warp and two consumer warpgroups, and consumer c computes its c-th, (c+2)-th, ... tile alone. The steps of all
tiles pass through one ring in order, so while one consumer is in its epilogue the other one has the ring and the tensor
cores to itself. Accumulation from the bias on and GELU in float32; value, gate and GELU are rounded where eager stores
them. Fidelity: math-exact.

Tiles are numbered column by column; a program owns a run of neighbours and reloads W where the run enters a new column.
With a multiple of the number of columns for programs, all columns walk over the same rows of x at the same time, which
then come from L2. It has to give 32 bytes a clock to every multiprocessor to keep its tensor cores busy with 64
columns, which is about what it can, and half as much with 128.

The epilogue takes 13 instructions for each output: 3 for the rounding, and for ``gelu(g) = max(g, 0) - |g| tail(|g|)``
10, of which one goes to the special function unit: the logarithm of the normal distribution's tail is so smooth that a
polynomial of degree 6 gives GELU to 1/50 of float16's rounding, and small ones better than ``1 + erf`` does.

Who waits for whom. Steps of x pass through a ring, columns of W through one of a single stage, see ``gluon_parts.py``.
A wait names only the parity of a phase: phases 1, 3 and 5 look alike. So a wait is right only where the phase before
is known to be complete, and the one after it is known not to be.

* ``x_ready[s]``: the consumer whose tile it is waits. One arrival a phase: the producer's announcement.
* ``x_free[s]``: that consumer's arrival is the only one of a phase.
* ``turns[c]``: consumer c waits before each of its tiles until the other one has seen every step of the tile before
  arrive. More than a hint: it is how c knows that the phases of ``x_ready`` before its own are complete, those of steps
  that it never looks at. None is two phases ahead either: a stage is only filled anew when its step has been used.
* ``w_ready``: a phase per column of the program's run, completed by TMA. Both consumers wait for every phase, also for
  that of a first column in which they have no tile.
* ``w_free``: a phase per column but the last, two arrivals: each consumer's, when it has left the column, or at the end
  of its tiles if the last column has none for it. So the producer, which waits before it loads the next column, always
  goes on. A column between two others has at least two tiles, one for each consumer, which cannot arrive for it before
  the producer has seen both leave the column before: so a launch needs two tiles to a column.

Nobody waits for what comes later in the order of tiles: the producer for consumers of earlier steps, a consumer for its
data, which the producer gives in the order of use, and for the tile before to have its own. TMA and wgmma read and
write through the same proxy, so only the output tile, which threads write and TMA reads, needs a fence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
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
    release,
    sums_layout,
    tiles,
    wait_free,
    wait_ready,
)
from vidaccel.kernels.launch import multiprocessors

__all__ = ["Config", "choose_config", "gluon_configs", "linear_geglu_gluon_kernel", "prepare"]

TILE_ROWS = 64  # what one wgmma takes
BLOCK_K = 64  # 128 bytes of a row: the widest swizzle
CONSUMERS = gl.constexpr(2)
REGISTERS = CONSUMER_REGISTERS[CONSUMERS.value]
OUT_COLUMNS = 64  # the same of the output: wider tiles leave in parts, through one buffer
SHARED_MEMORY = 226 * 1024  # of a block's 227 KiB; the rest is for barriers
STAGES = range(3, 9)

# log2 of the tail of the normal distribution from 0 to TAIL_END, where nothing is left of it: the least error of GELU
# against float16's step
TAIL_END = gl.constexpr(8.0)
C0 = gl.constexpr(-1.0000057420549444)
C1 = gl.constexpr(-1.151070821373982)
C2 = gl.constexpr(-0.4590740956341401)
C3 = gl.constexpr(-0.053151050149730435)
C4 = gl.constexpr(0.007988360683049414)
C5 = gl.constexpr(-0.0007582489878910272)
C6 = gl.constexpr(3.322692114462433e-05)
PROPAGATE_NAN = gl.constexpr(tl.PropagateNan.ALL)


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _rounded(x, desc):
    """``x`` in the dtype of ``desc``, by pairs.

    Where ptxas has to find the pairs itself, it gives up the overlap of products that accumulate in ``x`` (C7514).
    """
    HALF: gl.constexpr = desc.dtype == gl.float16
    ASM: gl.constexpr = "cvt.rn.f16x2.f32 $0, $2, $1;" if HALF else "cvt.rn.bf16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(ASM, "=r,f,f", [x], dtype=desc.dtype, is_pure=True, pack=2)


@gluon.jit
def _gelu(gate):
    x = gl.minimum(gl.abs(gate), TAIL_END)
    tail = _exp2(C0 + x * (C1 + x * (C2 + x * (C3 + x * (C4 + x * (C5 + x * C6))))))
    return gl.maximum(gate, 0.0, propagate_nan=PROPAGATE_NAN) - x * tail


@gluon.jit
def _halves(x, HALF: gl.constexpr):
    """The left and the right half of a tile."""
    left, right = x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute((0, 2, 1)).split()
    return gl.convert_layout(left, HALF, assert_trivial=True), gl.convert_layout(right, HALF, assert_trivial=True)


@gluon.jit
def _place(tile, tiles_per_column, COLUMNS: gl.constexpr, ROWS: gl.constexpr):
    """First row and first channel of a tile."""
    return tile % tiles_per_column * ROWS, tile // tiles_per_column * COLUMNS


@gluon.jit
def _run(num_tiles):
    """First tile of this program, and the first one after it."""
    program, programs = gl.program_id(0).to(gl.int64), gl.num_programs(0)
    first = (program * num_tiles // programs).to(gl.int32)
    return first, ((program + 1) * num_tiles // programs).to(gl.int32)


@gluon.jit
def _producer(load):
    x_desc, w_desc, x_smem, w_smem, ready, free, num_tiles, tiles_per_column = load
    x_ready, w_ready = ready
    x_free, w_free = free
    ROWS: gl.constexpr = x_desc.block_shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_shape[1]
    COLUMNS: gl.constexpr = w_desc.block_shape[1]
    STEPS: gl.constexpr = w_smem.shape[0]

    first, end = _run(num_tiles)
    loaded = first // tiles_per_column - 1  # the column whose rows of W were asked for last
    n = 0
    for tile in range(first, end):
        row, channel = _place(tile, tiles_per_column, COLUMNS, ROWS)
        column = tile // tiles_per_column
        if column != loaded:
            wait_free(w_free, column - first // tiles_per_column)
            mbarrier.expect(w_ready.index(0), STEPS * w_desc.block_type.nbytes)
            for step in gl.static_range(STEPS):
                target = w_smem.index(step)
                tma.async_copy_global_to_shared(w_desc, [0, channel, step * BLOCK_K], w_ready.index(0), target)
            loaded = column
        for step in range(STEPS):
            stage = wait_free(x_free, n)
            mbarrier.expect(x_ready.index(stage), x_desc.block_type.nbytes)
            target = x_smem.index(stage)
            tma.async_copy_global_to_shared(x_desc, [row, step * BLOCK_K], x_ready.index(stage), target)
            n += 1


@gluon.jit
def _write(value, gate, out, out_desc, row, channel):
    """Value times GELU of the gate, through the buffer ``out``."""
    product = _rounded(value, out_desc) * _rounded(_gelu(_rounded(gate, out_desc).to(gl.float32)), out_desc)
    tma.store_wait(0)  # of what it held before
    out.store(product)
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [row, channel], out)  # clips rows past the end


@gluon.jit
def _consumer(work, CONSUMER: gl.constexpr):
    out_desc, bias_ptr, dim, x_smem, w_smem, out_smem, ready, free, turns, num_tiles, tiles_per_column = work
    x_ready, w_ready = ready
    x_free, w_free = free
    ROWS: gl.constexpr = out_desc.block_shape[0]
    OUT_COLUMNS: gl.constexpr = out_desc.block_shape[1]
    STEPS: gl.constexpr = w_smem.shape[0]
    COLUMNS: gl.constexpr = w_smem.shape[2]
    BLOCK_K: gl.constexpr = w_smem.shape[3]
    BOTH: gl.constexpr = sums_layout(2 * COLUMNS)
    HALF: gl.constexpr = sums_layout(COLUMNS)
    QUARTER: gl.constexpr = sums_layout(COLUMNS // 2)

    first, end = _run(num_tiles)
    first_column = first // tiles_per_column
    left = 0  # columns that this consumer is through with
    out = out_smem.index(CONSUMER)
    offs = gl.arange(0, 2 * COLUMNS, gl.SliceLayout(0, BOTH))
    bias_ptrs = bias_ptr + offs // COLUMNS * dim + offs % COLUMNS
    for tile in range(first + CONSUMER, end, CONSUMERS):
        row, channel = _place(tile, tiles_per_column, COLUMNS, ROWS)
        bias = gl.load(bias_ptrs + channel)  # long before it is needed
        entered = tile // tiles_per_column - first_column
        if entered > left:
            wait_ready(w_ready, left)  # had it no tile there, it has not waited yet
            release(w_free, left)
            left = entered
        wait_ready(w_ready, entered)

        acc = bias.to(gl.float32)[None, :].broadcast_to([ROWS, 2 * COLUMNS])
        # consumer 0 has the first turn without being given it
        mbarrier.wait(turns.index(CONSUMER), ((tile - first) // CONSUMERS & 1) ^ (1 if CONSUMER == 0 else 0))

        n = (tile - first) * STEPS
        x = x_smem.index(wait_ready(x_ready, n))
        w = w_smem.index(0).reshape([2 * COLUMNS, BLOCK_K])
        acc = warpgroup_mma(x, w.permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))  # waits for nothing, makes it a tensor
        for step in range(1, STEPS):
            n += 1
            x = x_smem.index(wait_ready(x_ready, n))
            w = w_smem.index(step).reshape([2 * COLUMNS, BLOCK_K])
            acc = warpgroup_mma(x, w.permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            release(x_free, n - 1)
        mbarrier.arrive(turns.index(1 - CONSUMER))
        acc = warpgroup_mma_wait(0, deps=(acc,))  # [ROWS, 2 * COLUMNS], value before gate
        release(x_free, n)

        value, gate = _halves(acc, HALF)
        if COLUMNS == OUT_COLUMNS:
            _write(value, gate, out, out_desc, row, channel)
        else:
            gl.static_assert(COLUMNS == 2 * OUT_COLUMNS)
            left_value, right_value = _halves(value, QUARTER)
            left_gate, right_gate = _halves(gate, QUARTER)
            _write(left_value, left_gate, out, out_desc, row, channel)
            _write(right_value, right_gate, out, out_desc, row, channel + OUT_COLUMNS)
    if (end - 1) // tiles_per_column - first_column > left:
        release(w_free, left)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_tiles", "tiles_per_column"])
def linear_geglu_gluon_kernel(
    x_desc, w_desc, bias_ptr, out_desc,
    dim, num_tiles, tiles_per_column,
    STEPS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """All tiles; launch at most as many programs as fit at once, and as there are tiles.

    The descriptors see x as ``[M, K]``, W as ``[2, D, K]`` (value, gate) and the output as ``[M, D]``; ``STEPS`` blocks
    make up K.
    """
    x_smem, w_smem, out_smem = tiles(x_desc, STAGES), tiles(w_desc, STEPS), tiles(out_desc, CONSUMERS)
    ready = (barriers(STAGES, 1), barriers(1, 1))
    free = (barriers(STAGES, 1), barriers(1, CONSUMERS))
    turns = barriers(CONSUMERS, 1)
    fence_async_shared()
    work = (out_desc, bias_ptr, dim, x_smem, w_smem, out_smem, ready, free, turns, num_tiles, tiles_per_column)
    load = (x_desc, w_desc, x_smem, w_smem, ready, free, num_tiles, tiles_per_column)
    gl.warp_specialize(
        [(_consumer, (work, 0)), (_consumer, (work, 1)), (_producer, (load,))], [4, 1], [REGISTERS, 24]
    )  # fmt: skip


class Config(NamedTuple):
    """How the kernel cuts its work: columns of a tile, and steps of x in flight.

    ``aligned`` launches a multiple of the number of columns, so that all walk over the same rows at the same time.
    """

    columns: int
    stages: int
    aligned: bool


def choose_config(out_features: int, in_features: int) -> Config | None:
    """The configuration the kernel runs with, or None where it does not serve."""
    return next(iter(gluon_configs(out_features, in_features)), None)


def gluon_configs(out_features: int, in_features: int) -> list[Config]:
    """Every configuration worth trying, the likely best first.

    Args:
        out_features: ``D``, half the rows of W.
        in_features: ``K``.
    """
    configs = []
    # x is read once for each column of tiles: wide ones first, where enough of x fits beside W. On an H100, 258048 rows
    # of 320 take 696 us in columns of 128, 783 in columns of 64.
    for columns in (128, 64):
        stages = _stages(columns, in_features)
        fits = out_features % columns == 0 and in_features % BLOCK_K == 0 and stages >= STAGES.start
        if fits and out_features and in_features:
            configs += [Config(columns, min(stages, STAGES.stop - 1), aligned) for aligned in (True, False)]
    return configs


def _stages(columns: int, in_features: int) -> int:
    """How many steps of x fit in shared memory beside W and a part of the output for each consumer."""
    resident = 2 * columns * in_features + CONSUMERS.value * TILE_ROWS * OUT_COLUMNS
    return (SHARED_MEMORY // 2 - resident) // (TILE_ROWS * BLOCK_K)


def _programs(columns: int, multiprocessors: int, aligned: bool) -> int:
    """How many programs to launch for an output of so many columns of tiles."""
    return multiprocessors // columns * columns if aligned and columns <= multiprocessors else multiprocessors


def prepare(
    rows: int,
    in_features: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
    config: Config | None = None,
) -> TileLaunch:
    """What writes ``linear_geglu`` of tensors of these sizes, contiguous and aligned: ``launch(x, weight, bias, out)``.

    Args:
        rows: M, more than 64.
        in_features: K; x has M * K numbers.
        dim: D; the output has M * D numbers.
        dtype: Of all of them.
        device: Where they are.
        config: None for the likely best.
    """
    config = config or choose_config(dim, in_features)
    if config is None or rows <= TILE_ROWS:
        raise ValueError(f"linear_geglu: the kernel does not serve M={rows}, K={in_features}, D={dim}")
    columns = dim // config.columns
    tiles_per_column = triton.cdiv(rows, TILE_ROWS)
    num_tiles = columns * tiles_per_column
    programs = min(num_tiles, _programs(columns, multiprocessors(device), config.aligned))
    x, w, out = (
        Described(shape, block, dtype)
        for shape, block in (
            ([rows, in_features], [TILE_ROWS, BLOCK_K]),
            ([2, dim, in_features], [2, config.columns, BLOCK_K]),
            ([rows, dim], [TILE_ROWS, OUT_COLUMNS]),
        )
    )
    return TileLaunch(
        linear_geglu_gluon_kernel, programs, [x, w, dtype, out],
        dim, num_tiles, tiles_per_column,
        STEPS=in_features // BLOCK_K, STAGES=config.stages, REGISTERS=REGISTERS, num_warps=4,
    )  # fmt: skip
