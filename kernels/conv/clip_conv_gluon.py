"""A convolution of clips to 96 channels for Hopper, in Gluon: an implicit GEMM, fed by TMA.

    out[b, f, y, x] = sum over t, i, j of rows[b, f + t, y + i - 1, x + j - 1] @ weight[:, t, i, j].T

A program is persistent and has a producer warp and two consumer warpgroups. A tile is 16 x 16 pixels of one frame, half
of them a consumer's, and all 96 channels: the products of a tile are 256 pixels x 96 channels x (9 T C). They are done
in steps of one tap and 32 channels, which pass through a ring in shared memory. TMA shifts the pixels by the tap as it
loads them, and reads zeros outside the picture, so that nothing is laid out beforehand. 96 is no power of two: the sums
are one product of 64 channels and one of 32, of the same pixels. Fidelity: math-exact, float32 sums.

Programs that run at the same time have the tiles of neighbouring frames at one place, so each pixel comes from L2 but
for the first time, though taps read it 9 T times.

Bound by shared memory, rather than by the tensor cores: 128 bytes a clock, of which the two products of a step read 146
in the time that the tensor cores need, and TMA writes 57. What was tried on an H200 (clip-conv-variants-h200.json):
pixels from registers (less to read, more to wait for), and sums of three frames at once while frames are streamed past
them (a third of the loads for pixels, three times those for weights). Neither is faster.

Who waits for whom: there is one ring, see ``gluon_parts.py``. Every step is of both consumers, so two arrivals free it.
"""

from __future__ import annotations

import torch
import triton
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

__all__ = ["BLOCK_K", "CHANNELS", "clip_conv_gluon_kernel", "prepare"]

CHANNELS = 96  # that come out
WIDE, NARROW = gl.constexpr(64), gl.constexpr(32)  # parts of them
BLOCK_K = 32  # channels of a step: 64 bytes of a pixel
ROWS, COLUMNS = 8, 16  # pixels of a consumer's half of a tile
CONSUMERS = gl.constexpr(2)
STAGES = 8  # what fits into 227 KiB beside the output
REGISTERS = CONSUMER_REGISTERS[CONSUMERS.value]


@gluon.jit
def _place(tile, frames, across, down, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Sample, frame, first row and first column of a tile; tiles of neighbouring frames are neighbours."""
    block = tile // frames
    place = block // across
    return place // down, tile % frames, place % down * ROWS, block % across * COLUMNS


@gluon.jit
def _producer(load, TAPS: gl.constexpr, CHUNKS: gl.constexpr):
    descs, smem, ready, free, sizes = load
    rows_desc, wide_desc, narrow_desc = descs
    rows_smem, wide_smem, narrow_smem = smem
    num_tiles, frames, across, down = sizes
    ROWS: gl.constexpr = rows_desc.block_shape[1]
    COLUMNS: gl.constexpr = rows_desc.block_shape[2]
    BLOCK_K: gl.constexpr = rows_desc.block_shape[3]
    PIXELS: gl.constexpr = CONSUMERS * rows_desc.block_type.nbytes
    WEIGHTS: gl.constexpr = wide_desc.block_type.nbytes + narrow_desc.block_type.nbytes
    STAGES: gl.constexpr = free.shape[0]

    n = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        sample, frame, y, x = _place(tile, frames, across, down, CONSUMERS * ROWS, COLUMNS)
        plane = sample * (frames + TAPS // 9 - 1) + frame
        for tap in range(TAPS):
            place = plane + tap // 9, y + tap % 9 // 3 - 1, x + tap % 3 - 1
            for chunk in gl.static_range(CHUNKS):
                stage, k = n % STAGES, (tap * CHUNKS + chunk) * BLOCK_K
                wait_free(free, n)
                mbarrier.expect(ready.index(stage), PIXELS + WEIGHTS)
                for consumer in gl.static_range(CONSUMERS):
                    start = [place[0], place[1] + consumer * ROWS, place[2], chunk * BLOCK_K]
                    target = rows_smem.index(CONSUMERS * stage + consumer)
                    tma.async_copy_global_to_shared(rows_desc, start, ready.index(stage), target)
                tma.async_copy_global_to_shared(wide_desc, [0, k], ready.index(stage), wide_smem.index(stage))
                tma.async_copy_global_to_shared(narrow_desc, [WIDE, k], ready.index(stage), narrow_smem.index(stage))
                n += 1


@gluon.jit
def _multiply(smem, stage, wide, narrow, CONSUMER: gl.constexpr):
    """Begin to add the products of a step."""
    rows_smem, wide_smem, narrow_smem = smem
    pixels = matrix(rows_smem.index(CONSUMERS * stage + CONSUMER))
    wide = warpgroup_mma(pixels, wide_smem.index(stage).permute((1, 0)), wide, is_async=True)
    narrow = warpgroup_mma(pixels, narrow_smem.index(stage).permute((1, 0)), narrow, is_async=True)
    return wide, narrow


@gluon.jit
def _consumer(work, CONSUMER: gl.constexpr, TAPS: gl.constexpr, CHUNKS: gl.constexpr):
    descs, smem, out_smem, ready, free, sizes = work
    wide_desc, narrow_desc = descs
    wide_out, narrow_out = out_smem[0].index(CONSUMER), out_smem[1].index(CONSUMER)
    num_tiles, frames, across, down = sizes
    ROWS: gl.constexpr = wide_desc.block_shape[1]
    COLUMNS: gl.constexpr = wide_desc.block_shape[2]

    n = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        wide = gl.zeros([ROWS * COLUMNS, WIDE], gl.float32, sums_layout(WIDE))
        narrow = gl.zeros([ROWS * COLUMNS, NARROW], gl.float32, sums_layout(NARROW))
        wide, narrow = _multiply(smem, wait_ready(ready, n), wide, narrow, CONSUMER)
        wide, narrow = warpgroup_mma_wait(2, deps=(wide, narrow))  # waits for nothing, makes them tensors
        for _ in range(1, TAPS * CHUNKS):
            n += 1
            wide, narrow = _multiply(smem, wait_ready(ready, n), wide, narrow, CONSUMER)
            wide, narrow = warpgroup_mma_wait(2, deps=(wide, narrow))  # the two of the step before have finished
            release(free, n - 1)
        wide, narrow = warpgroup_mma_wait(0, deps=(wide, narrow))
        release(free, n)
        n += 1

        sample, frame, y, x = _place(tile, frames, across, down, CONSUMERS * ROWS, COLUMNS)
        plane, y = sample * frames + frame, y + CONSUMER * ROWS
        tma.store_wait(0)  # of the tile before
        matrix(wide_out).store(wide.to(wide_desc.dtype))
        matrix(narrow_out).store(narrow.to(narrow_desc.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(wide_desc, [plane, y, x, 0], wide_out)  # clips pixels past the edges
        tma.async_copy_shared_to_global(narrow_desc, [plane, y, x, WIDE], narrow_out)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_tiles", "frames", "across", "down"])
def clip_conv_gluon_kernel(
    rows_desc, wide_weight_desc, narrow_weight_desc, wide_out_desc, narrow_out_desc,
    num_tiles, frames, across, down,
    TAPS: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """All tiles; launch at most as many programs as fit at once.

    The descriptors see the clip as ``[B * (F + T - 1), H, W, C]``, the weight as ``[96, 9 T C]``, the output as
    ``[B * F, H, W, 96]``. ``TAPS`` is 9 T, ``CHUNKS`` the steps that make up C; ``across`` and ``down`` count the tiles
    of a frame.
    """
    smem = (tiles(rows_desc, CONSUMERS * STAGES), tiles(wide_weight_desc, STAGES), tiles(narrow_weight_desc, STAGES))
    out_smem = (tiles(wide_out_desc, CONSUMERS), tiles(narrow_out_desc, CONSUMERS))
    ready, free = barriers(STAGES, 1), barriers(STAGES, CONSUMERS)
    fence_async_shared()
    sizes = (num_tiles, frames, across, down)
    work = ((wide_out_desc, narrow_out_desc), smem, out_smem, ready, free, sizes)
    load = ((rows_desc, wide_weight_desc, narrow_weight_desc), smem, ready, free, sizes)
    gl.warp_specialize(
        [
            (_consumer, (work, 0, TAPS, CHUNKS)),
            (_consumer, (work, 1, TAPS, CHUNKS)),
            (_producer, (load, TAPS, CHUNKS)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


def prepare(shape: tuple[int, ...], frames_seen: int, dtype: torch.dtype, device: torch.device) -> TileLaunch:
    """What writes ``clip_conv`` of such tensors, contiguous and aligned: ``launch(rows, weight, weight, out, out)``.

    Args:
        shape: ``[B, F + T - 1, H, W, C]`` of the rows, C in steps of 32. The weight's memory is ``[96, T, 3, 3, C]``.
        frames_seen: T.
        dtype: Of all of them.
        device: Where they are.
    """
    samples, padded_frames, height, width, channels = shape
    frames = padded_frames - frames_seen + 1
    across, down = triton.cdiv(width, COLUMNS), triton.cdiv(height, CONSUMERS.value * ROWS)
    num_tiles = samples * frames * across * down
    programs = min(num_tiles, multiprocessors(device))
    taps = 9 * frames_seen
    pixels = [1, ROWS, COLUMNS]
    parts = [part.value for part in (WIDE, NARROW)]
    rows = Described([samples * padded_frames, height, width, channels], [*pixels, BLOCK_K], dtype)
    weights = [Described([CHANNELS, taps * channels], [part, BLOCK_K], dtype) for part in parts]
    outs = [Described([samples * frames, height, width, CHANNELS], [*pixels, part], dtype) for part in parts]
    return TileLaunch(
        clip_conv_gluon_kernel, programs, [rows, *weights, *outs],
        num_tiles, frames, across, down,
        TAPS=taps, CHUNKS=channels // BLOCK_K, STAGES=STAGES, REGISTERS=REGISTERS, num_warps=4,
    )  # fmt: skip
