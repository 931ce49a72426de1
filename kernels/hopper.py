"""When the kernels for Hopper run. Ops ask this everywhere, so it imports no Gluon, which not every Triton has."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

__all__ = ["GLUON", "aligned", "gluon_reason", "on_hopper"]

GLUON_VERSIONS = ("3.6.", "3.7.")  # Triton's; Gluon changes from release to release
GLUON = triton.__version__.startswith(GLUON_VERSIONS)
ALIGNMENT = 16  # bytes: of the addresses that TMA takes


def on_hopper(x: Tensor) -> bool:
    """Whether ``x`` is on a Hopper GPU."""
    return x.is_cuda and _is_hopper(x.device)


@torch.compiler.assume_constant_result
def _is_hopper(device: torch.device) -> bool:
    # MI300's capability is 9, too
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def gluon_reason(x: Tensor) -> str | None:
    """Why no kernel in Gluon can run on ``x``'s device, or None."""
    if not on_hopper(x):
        return "the kernel is for Hopper GPUs"
    if not GLUON:
        return f"the kernel is written for Triton {' or '.join(GLUON_VERSIONS)}*, this is {triton.__version__}"
    return None


def aligned(*tensors: Tensor) -> list[Tensor]:
    """The tensors, those that do not start at a multiple of 16 bytes copied.

    A view may start anywhere, and where it does is no part of a signature.
    """
    return [t if t.data_ptr() % ALIGNMENT == 0 else t.clone() for t in tensors]
