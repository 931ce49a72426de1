"""A linear layer with GEGLU after it: two steps, or one where ours is measured faster.

    y = value * gelu(gate),   value = x @ W[:D].T + b[:D],   gate = x @ W[D:].T + b[D:]

* ``two-step``: ``F.linear``, then the op ``geglu``. The projection, twice as wide as y, is written and read.
* ``gluon``: ours for Hopper, in ``linear_geglu_gluon.py``: the product in the GEMM's epilogue.

Both round value, gate and GELU where eager does. Fidelity: math-exact. Bound by the tensor cores.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidaccel.kernels.arguments import require_one_dtype
from vidaccel.kernels.check import Part, cuts, lean, row_parts
from vidaccel.kernels.ffn.geglu import GEGLU, geglu, geglu_ref
from vidaccel.kernels.hopper import aligned, gluon_reason
from vidaccel.kernels.op import DTYPES, Costs, Implementation, Op, tensors_reason

__all__ = ["LINEAR_GEGLU", "TWO_STEP", "compile_ahead", "linear_geglu", "linear_geglu_ref"]

TWO_STEP = "two-step"
AHEAD_ROWS = 128  # any number that the kernels take
MEASURED_PRODUCTS = 4e9  # M * K * D; fewer take too little of a model's time


def linear_geglu_ref(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The specification. Pass float64 inputs for gold values."""
    return geglu_ref(F.linear(x, weight, bias))


def _two_step(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return geglu(F.linear(x, weight, bias))


def _bind(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[..., Tensor]:
    from vidaccel.kernels.ffn.linear_geglu_gluon import prepare

    rows, in_features, dim = _sizes(x, weight)
    launch, shape = prepare(rows, in_features, dim, x.dtype, x.device), (*x.shape[:-1], dim)

    def run(x, weight, bias):
        out = x.new_empty(shape)
        x, weight, bias = aligned(x, weight, bias)
        launch(x, weight, bias, out)
        return out

    return run


def _gluon_reason(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    if reason := gluon_reason(x):
        return reason
    if torch.is_autocast_enabled("cuda"):
        return "autocast decides the dtype of a linear layer"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"the kernel takes float16 and bfloat16, x is {x.dtype}"
    if not (x.is_contiguous() and weight.is_contiguous() and bias.is_contiguous()):
        return "TMA takes contiguous rows"
    return _shape_reason(*_sizes(x, weight)) or tensors_reason(x, weight, bias)


def _shape_reason(rows: int, in_features: int, dim: int) -> str | None:
    from vidaccel.kernels.ffn.linear_geglu_gluon import TILE_ROWS, choose_config

    if choose_config(dim, in_features) is None:
        return f"the kernel takes D in steps of 64 and a K up to 640 in steps of 64, got D={dim}, K={in_features}"
    if rows <= TILE_ROWS:
        return f"the kernel takes more than {TILE_ROWS} rows"
    return None


def _sizes(x: Tensor, weight: Tensor) -> tuple[int, int, int]:
    """M, K, D."""
    return math.prod(x.shape[:-1]), weight.shape[1], weight.shape[0] // 2


def _empty_output(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))


def _costs(x: Tensor, weight: Tensor, bias: Tensor) -> Costs:
    rows, in_features, dim = _sizes(x, weight)
    return Costs(
        bytes=x.nbytes + weight.nbytes + bias.nbytes + rows * dim * x.itemsize, flops=4 * rows * in_features * dim
    )


def _parts(x: Tensor, weight: Tensor, bias: Tensor) -> Iterator[Part]:
    _, in_features, dim = _sizes(x, weight)
    pairs, biases = weight.unflatten(0, (2, dim)), bias.unflatten(0, (2, dim))
    for columns in cuts(dim, 2 * in_features):  # a view of the weight, where all of them are one part
        value_and_gate = pairs[:, columns].flatten(0, 1), biases[:, columns].flatten()
        for rows, of in row_parts(x, max(in_features, 2 * (columns.stop - columns.start)), lean(x)):
            yield Part((rows, *value_and_gate), functools.partial(_columns_of, of, columns))


def _columns_of(
    of: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]], columns: slice, outputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(out[..., columns] for out in of(outputs))


def _measures(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    return x.is_cuda and math.prod(_sizes(x, weight)) >= MEASURED_PRODUCTS


def _key(x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Any]:
    rows, in_features, dim = _sizes(x, weight)
    return {"dtype": str(x.dtype), "rows": rows, "in_features": in_features, "out_features": dim}


def _validate(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if weight.ndim != 2 or weight.shape[0] % 2 or bias.shape != weight.shape[:1] or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            "linear_geglu: x must be [..., K], weight [2 * D, K], bias [2 * D], "
            f"got x {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {tuple(bias.shape)}"
        )
    require_one_dtype("linear_geglu", x=x, weight=weight, bias=bias)


LINEAR_GEGLU = Op(
    "linear_geglu",
    reference=linear_geglu_ref,
    implementations={
        "gluon": Implementation.bound(_bind, _gluon_reason),
        TWO_STEP: Implementation(_two_step),
    },
    fake=_empty_output,
    costs=_costs,
    parts=_parts,
    measures=_measures,
    key=_key,
    default=lambda *args: TWO_STEP,
    validate=_validate,
)


def compile_ahead(weight: Tensor) -> None:
    """Begin to compile what may run for a layer of this ``weight``, ``[2 D, K]``."""
    if weight.dtype not in DTYPES:
        return
    x = weight.new_empty(AHEAD_ROWS, weight.shape[1], device="meta")
    GEGLU.compile_ahead(weight.device, x.new_empty(len(x), len(weight)), impl="triton")
    if gluon_reason(weight) or weight.dtype == torch.float32 or _shape_reason(*_sizes(x, weight)):
        return
    LINEAR_GEGLU.compile_ahead(weight.device, x, x.new_empty(weight.shape), x.new_empty(len(weight)), impl="gluon")


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor, *, impl: str | None = None) -> Tensor:
    """``value * F.gelu(gate)`` with ``value, gate = F.linear(x, weight, bias).chunk(2, dim=-1)``.

    Args:
        x: ``[..., K]``, any float dtype.
        weight: ``[2 * D, K]``, in the dtype of ``x`` unless autocast is on.
        bias: ``[2 * D]``, in the same.
        impl: ``"gluon"``, ``"two-step"`` or ``"torch"``; None for two steps, or what is measured faster.

    Returns:
        ``[..., D]``, contiguous, in the dtype of ``F.linear``'s result.

    Raises:
        ValueError: The shapes do not fit one another; ``impl`` is unknown or cannot run here.
        TypeError: ``x`` is not floating-point; the dtypes differ.
    """
    return LINEAR_GEGLU(x, weight, bias, impl=impl)
