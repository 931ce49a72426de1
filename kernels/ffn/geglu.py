"""GEGLU's product of value and GELU of gate, in one pass over the projection's output.

    y[..., d] = x[..., d] * gelu(x[..., D + d]),   gelu(g) = g / 2 * (1 + erf(g / sqrt(2)))

Rows of ``2 D`` numbers, value before gate (Shazeer 2020, https://arxiv.org/abs/2002.05202). Computed in float32; the
GELU is rounded to the input dtype before the product, where eager PyTorch stores it. Fidelity: math-exact (it is the
device's erf that decides the last place). Bound by memory: reads ``2 D``, writes ``D``; eager moves ``5 D``.
``swiglu.py`` is the same with SiLU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vidaccel.kernels.check import Part, row_parts
from vidaccel.kernels.launch import Launch
from vidaccel.kernels.op import Costs, Implementation, Op, device_reason, tensors_reason

__all__ = ["GEGLU", "gated_op", "geglu", "geglu_ref"]

BLOCK = 2048
NUM_WARPS = 4


def geglu_ref(x: Tensor) -> Tensor:
    """The specification. Pass a float64 input for gold values."""
    value, gate = x.chunk(2, dim=-1)
    return (value * F.gelu(gate)).contiguous()


@triton.jit
def _geglu_kernel(
    x_ptr, y_ptr,
    dim, size,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # blocks of the output may begin and end inside a row, so that no lane is idle whatever D is
    start = tl.program_id(0).to(tl.int64) * BLOCK
    first_row = start // dim
    # 32 bits are enough from the first row on, and make the division of every lane cheap
    column = (start - first_row * dim).to(tl.int32) + tl.arange(0, BLOCK)
    offs_y = start + tl.arange(0, BLOCK)
    offs_x = first_row * 2 * dim + (column + column // dim * dim)
    mask = offs_y < size
    value = tl.load(x_ptr + offs_x, mask=mask).to(tl.float32)
    gate = tl.load(x_ptr + offs_x + dim, mask=mask).to(tl.float32)
    if ACTIVATION == "gelu":
        gate = gate * 0.5 * (1.0 + tl.math.erf(gate * 0.7071067811865476))
    else:
        gate = gate / (1.0 + tl.exp(-gate))
    tl.store(y_ptr + offs_y, value * gate.to(y_ptr.dtype.element_ty).to(tl.float32), mask=mask)


def _bind(x: Tensor, *, activation: str) -> Callable[[Tensor], Tensor]:
    size, dim = x.numel() // 2, x.shape[-1] // 2
    grid, options = (triton.cdiv(size, BLOCK),), {"BLOCK": BLOCK, "num_warps": NUM_WARPS}
    launch = Launch(_geglu_kernel, grid, dim, size, ACTIVATION=activation, **options)

    def run(x: Tensor) -> Tensor:
        y = _empty_output(x)
        launch(x.contiguous(), y)
        return y

    return run


def _empty_output(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _reason(x: Tensor) -> str | None:
    if x.numel() == 0:
        return "there is nothing to multiply"
    return device_reason(x) or tensors_reason(x)


def _costs(x: Tensor) -> Costs:
    return Costs(bytes=x.nbytes * 3 // 2)


def _parts(x: Tensor) -> Iterator[Part]:
    for rows, of in row_parts(x):
        yield Part((rows,), of)


def _validate(x: Tensor, *, name: str) -> None:
    if x.ndim == 0 or x.shape[-1] % 2:
        raise ValueError(f"{name}: x must be [..., 2 * D], got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: x must be floating-point, got {x.dtype}")


def gated_op(name: str, activation: str, reference: Callable[[Tensor], Tensor]) -> Op:
    """The product of value and ``activation`` (``"gelu"``, ``"silu"``) of gate."""
    return Op(
        name,
        reference=reference,
        implementations={"triton": Implementation.bound(functools.partial(_bind, activation=activation), _reason)},
        fake=_empty_output,
        costs=_costs,
        parts=_parts,
        validate=functools.partial(_validate, name=name),
    )


GEGLU = gated_op("geglu", "gelu", geglu_ref)


def geglu(x: Tensor, *, impl: str | None = None) -> Tensor:
    """``value * F.gelu(gate)`` with ``value, gate = x.chunk(2, dim=-1)``.

    Args:
        x: ``[..., 2 * D]``, fp16 / bf16 / fp32; made contiguous if it is not.
        impl: ``"triton"`` or ``"torch"``; None lets the op choose.

    Returns:
        ``[..., D]`` in ``x.dtype``, contiguous.

    Raises:
        ValueError: The last dim of ``x`` is odd or missing; ``impl`` cannot run here.
        TypeError: ``x`` is not floating-point.
    """
    return GEGLU(x, impl=impl)
