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
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from vidaccel.kernels import compile_ahead
from vidaccel.kernels.launch import DIRECT, ahead_on

__all__ = [
    "CONSUMER_REGISTERS",
    "Described",
    "TileLaunch",
    "barriers",
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


class Described:
    """What tells TMA of a tensor, which it moves block by block.

    Args:
        shape: As which the kernel sees the tensor's memory.
        block: Of that shape, what a tile has.
        dtype: Of the tensor.
        strides: Of that shape; None for dense memory.
    """

    def __init__(
        self, shape: list[int], block: list[int], dtype: torch.dtype, strides: list[int] | None = None
    ) -> None:
        dense = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
        self._layout = shape, dense if strides is None else strides, block, shared_layout(block, dtype)
        self.dtype, self.kind = dtype, (*block, dtype)

    def __call__(self, x: Any) -> TensorDescriptor:
        return TensorDescriptor(x, *self._layout)


class TileLaunch:
    """``kernel[programs]`` of tensors whose tiles TMA moves: what a ``Launch`` is to kernels that take addresses.

    Args:
        kernel: What ``gluon.jit`` made; its parameters are tensors, then numbers, then constexprs.
        programs: How many.
        tensors: What tells TMA of each tensor; a dtype for one that is an address to the kernel.
        numbers: The kernel's integers and floats, in order.
        constants: All its constexprs, and options of the compiler (``num_warps``).
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        tensors: Sequence[Described | torch.dtype],
        *numbers: float,
        **constants: Any,
    ) -> None:
        self._kernel, self._launch = kernel, kernel[(programs,)]
        self._tensors, self._numbers, self._constants = tensors, numbers, constants
        self._has_launched = False

    def __call__(self, *tensors: Tensor) -> None:
        """Launch on the device of the tensors, which are as they were described, at multiples of 16 bytes."""
        if ahead := ahead_on():
            self._compile_ahead(ahead)
            return
        if not self._has_launched:
            compile_ahead.finish(self._name())
            self._has_launched = True
        with torch.cuda.device_of(tensors[0]):
            self._launch(*self._arguments(tensors), *self._numbers, **self._constants)

    def _compile_ahead(self, device: torch.device) -> None:
        if DIRECT and device.type == "cuda":
            from triton.runtime.jit import MockTensor

            mocks = [MockTensor(as_.dtype) if isinstance(as_, Described) else as_ for as_ in self._tensors]
            arguments = (*self._arguments(mocks), *self._numbers)
            compile_ahead.begin(self._name(), self._kernel, device, arguments, self._constants)

    def _arguments(self, tensors: Any) -> list[Any]:
        told = zip(self._tensors, tensors, strict=True)
        return [as_(tensor) if isinstance(as_, Described) else tensor for as_, tensor in told]

    def _name(self) -> Hashable:
        kinds = (as_.kind if isinstance(as_, Described) else as_ for as_ in self._tensors)
        return self._kernel, *kinds, *sorted(self._constants.items())


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
