"""A kernel whose warps run partitions that share nothing: a control of ``sanitize.py``."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _store(out, PLACE: gl.constexpr):
    gl.store(out + PLACE, gl.program_id(0))


@gluon.jit
def _partitions_kernel(out):
    place = out + 4 * gl.program_id(0)
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
