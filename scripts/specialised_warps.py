"""A kernel whose warps run partitions that share nothing: a control of ``sanitize.py``.

As kernels of ours do, it makes barriers in shared memory before. Without them racecheck reports nothing, with them, or
where a partition's own warps wait for one another, it reports how Triton sends the warps their ways.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier


@gluon.jit
def _store(out, PLACE: gl.constexpr):
    gl.store(out + PLACE, gl.program_id(0))


@gluon.jit
def _partitions_kernel(out):
    place = out + 4 * gl.program_id(0)
    barriers = gl.allocate_shared_memory(gl.int64, [8, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(8):
        mbarrier.init(barriers.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [(_store, (place, 0)), (_store, (place, 1)), (_store, (place, 2)), (_store, (place, 3))],
        [4, 4, 1],
        [160, 160, 24],
    )


def run_partitions(programs: int) -> Tensor:
    """int32 ``[programs, 4]``: each partition has written the program's number."""
    out = torch.empty(programs, 4, dtype=torch.int32, device="cuda")
    _partitions_kernel[(programs,)](out, num_warps=4)
    return out
