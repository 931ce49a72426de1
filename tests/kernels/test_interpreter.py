"""What ``tests/interpreter.py`` makes faster does what Triton says of it, in the interpreter and compiled."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(
    not triton.__version__.startswith("3.6."), reason="made faster is Triton 3.6's; 3.8's reduces along an axis only"
)


@triton.jit
def _larger(value, place, other, other_place):
    other_wins = (other > value) | ((other == value) & (other_place < place))
    return tl.where(other_wins, other, value), tl.where(other_wins, other_place, place)


@triton.jit
def _product(a, b):
    return a * b


@triton.jit
def _reductions_kernel(
    x_ptr, value_ptr, place_ptr, product_ptr, AXIS: tl.constexpr, KEEP: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    at = COLUMNS * tl.arange(0, ROWS)[:, None] + tl.arange(0, COLUMNS)[None, :]
    x = tl.load(x_ptr + at)
    value, place = tl.reduce((x, at), AXIS, _larger, keep_dims=KEEP)
    out = tl.arange(0, OUT)
    if KEEP:
        value, place = tl.reshape(value, (OUT,)), tl.reshape(place, (OUT,))
    tl.store(value_ptr + out, value)
    tl.store(place_ptr + out, place)
    tl.store(product_ptr + out, tl.reshape(tl.reduce(x, AXIS, _product, keep_dims=True), (OUT,)))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("shape", [(16, 4), (1, 8), (4, 1)])
def test_a_reduction_by_a_function_of_ours(
    shape: tuple[int, int], axis: int | None, keep: bool, device: torch.device
) -> None:
    x = torch.randint(
        -3, 4, shape, dtype=torch.float32, device=device, generator=torch.Generator(device).manual_seed(0)
    )
    at = torch.arange(x.numel(), device=device).view(shape)
    rows, columns = (
        (x.reshape(1, -1), at.reshape(1, -1)) if axis is None else (x.movedim(axis, -1), at.movedim(axis, -1))
    )
    value = rows.amax(-1)
    place = columns.where(rows == value[:, None], x.numel()).amin(-1)
    outs = [torch.empty(len(rows), dtype=dtype, device=device) for dtype in (x.dtype, torch.int32, x.dtype)]
    _reductions_kernel[(1,)](x, *outs, AXIS=axis, KEEP=keep, ROWS=shape[0], COLUMNS=shape[1], OUT=len(rows))
    assert torch.equal(outs[0], value)
    assert torch.equal(outs[1], place.int())
    assert torch.equal(outs[2], rows.prod(-1))


@triton.jit
def _rising(x):
    return tl.cumsum(tl.where(x > 0, x, 0.0), 0)


@triton.jit
def _nested_kernel(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, _rising(x) + tl.sum(x) + tl.max(x) + tl.program_id(0))


def test_device_functions_at_every_launch(device: torch.device) -> None:
    for n in (16, 32):
        x = torch.arange(n, dtype=torch.float32, device=device) - 5
        y = torch.empty_like(x)
        _nested_kernel[(1,)](x, y, N=n)
        assert torch.equal(y, x.clamp(min=0).cumsum(0) + x.sum() + x.max())
