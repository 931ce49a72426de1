"""How far a fused site may be from the code it replaces, by fidelity class and dtype."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["disagreement"]

# A block chains a dozen roundings; two correct orders of the same maths differ by a few units in the last place.
UNITS_IN_LAST_PLACE = 8
# Matrix products whose shape or layout changes go through other accumulation orders; with TF32 inputs are cut to
# 10 bits before the first multiplication.
TF32_EPS = 2.0**-10
FP32_REORDERING_EPS = 2.0**-20
FP64_REORDERING_EPS = 2.0**-49


def disagreement(out: Tensor, expected: Tensor, fidelity: str) -> str | None:
    """One line on why ``out`` is not an acceptable stand-in for ``expected``, or None if it is.

    ``bit-exact`` wants equal bits (NaN equals NaN). ``math-exact`` and ``lossy`` bound the relative L2 error over the
    places where the original is finite, so that an overflow in the original is not held against the fused code.
    """
    if out.shape != expected.shape or out.dtype != expected.dtype:
        return f"returned {_describe(out)} where the original returned {_describe(expected)}"
    if out.numel() == 0:
        return None
    if fidelity == "bit-exact":
        same = torch.equal(out.nan_to_num(), expected.nan_to_num()) and torch.equal(out.isnan(), expected.isnan())
        return None if same else "differs from the original code in some bits, and the site is declared bit-exact"
    error, budget = _relative_error(out, expected), UNITS_IN_LAST_PLACE * _eps(expected)
    if fidelity == "lossy":
        budget *= 16
    return None if error <= budget else f"relative error {error:.1e} against the original code exceeds {budget:.1e}"


def _relative_error(out: Tensor, expected: Tensor) -> float:
    finite = expected.isfinite()
    difference = torch.where(finite, out - expected, 0)
    dtype = torch.promote_types(expected.dtype, torch.float32)
    norm = torch.linalg.vector_norm(torch.where(finite, expected, 0), dtype=dtype)
    error = torch.linalg.vector_norm(difference, dtype=dtype)
    return float(error / norm.clamp_min(torch.finfo(torch.float32).tiny))


def _eps(x: Tensor) -> float:
    if x.dtype == torch.float64:
        return FP64_REORDERING_EPS
    if x.dtype != torch.float32:
        return torch.finfo(x.dtype).eps
    tf32 = x.is_cuda and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
    return TF32_EPS if tf32 else FP32_REORDERING_EPS


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
