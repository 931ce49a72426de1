"""What the Gluon kernels for Hopper share: tiles that TMA moves, and the rings of barriers that they pass through.

A ring has ``STAGES`` places in shared memory and two barriers for each, ``ready`` and ``free``. The n-th step of a
program lies in stage ``n % STAGES`` and belongs to phase ``n // STAGES`` of that stage's barriers. The producer waits
until the stage is free, announces the step's bytes and lets TMA fill it; TMA completes the phase of ``ready``, which
consumers wait for; they arrive at ``free`` when their products that read the step have finished.

Every barrier completes a phase per use. A wait names the parity of the phase it waits for and passes while the barrier
is in a phase of the other parity; before the first phase, a wait for the odd parity passes. So consumers wait for the
parity of the step's phase, the producer for the opposite one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = [
    "CONSUMER_REGISTERS",
    "barriers",
    "described",
    "matrix",
    "release",
    "shared_layout",
    "sums_layout",
    "tiles",
    "wait_free",
    "wait_ready",
]

# By the number of consumer warpgroups: what is left to each thread of 65536 by a producer warpgroup that keeps 24.
CONSUMER_REGISTERS = {2: 240, 3: 160}
DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def shared_layout(block: list[int], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a block of a tensor lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for(block, DTYPES[dtype])


def described(shape: list[int], block: list[int], dtype: torch.dtype) -> Callable[[Tensor], TensorDescriptor]:
    """What describes the memory of a dense tensor as one of this shape to TMA, which moves it block by block."""
    layout = shared_layout(block, dtype)
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return lambda x: TensorDescriptor(x, shape, strides, block, layout)


@gluon.constexpr_function
def _several(count, shape):
    return [count, *shape]


@gluon.jit
def tiles(desc, COUNT: gl.constexpr):
    """Room for ``COUNT`` blocks of ``desc``."""
    return gl.allocate_shared_memory(desc.dtype, _several(COUNT, desc.block_shape), desc.layout)


@gluon.jit
def matrix(tile):
    """A tile ``[1, rows, columns, channels]`` in shared memory as a matrix, a row for each row and column."""
    return tile.reshape([tile.shape[1] * tile.shape[2], tile.shape[3]])


@gluon.constexpr_function
def sums_layout(columns):
    """How a warpgroup holds the sums of a product of so many columns."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """``COUNT`` barriers, a phase of which is complete after so many arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def wait_free(free, n):
    """The stage of the n-th step, after a wait until it may be filled."""
    STAGES: gl.constexpr = free.shape[0]
    stage = n % STAGES
    mbarrier.wait(free.index(stage), (n // STAGES & 1) ^ 1)
    return stage


@gluon.jit
def wait_ready(ready, n):
    """The stage of the n-th step, after a wait until it is filled."""
    STAGES: gl.constexpr = ready.shape[0]
    stage = n % STAGES
    mbarrier.wait(ready.index(stage), n // STAGES & 1)
    return stage


@gluon.jit
def release(free, n):
    """Arrive at the n-th step's barrier: this warpgroup has read it."""
    mbarrier.arrive(free.index(n % free.shape[0]))
