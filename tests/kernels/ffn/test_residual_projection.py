from __future__ import annotations

import pytest
import torch
from kernel_checks import FAULTS, assert_close_to_gold, planted
from torch import Tensor

from vidaccel.kernels.ffn.residual_projection import (
    RESIDUAL_PROJECTION,
    residual_projection,
    residual_projection_ref,
)
from vidaccel.kernels.op import listening

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draw(
    shape: tuple[int, ...], channels: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    sizes = (shape, (channels, shape[-1]), (*shape[:-1], channels))
    x, weight, with_bias = (torch.randn(size, device=device).to(dtype) for size in sizes)
    return x, weight, with_bias


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "channels"), [((1, 1), 1), ((2, 7, 5, 24), 40), ((3, 257, 128), 32), ((0, 4, 8), 8)])
def test_matches_reference(shape: tuple[int, ...], channels: int, dtype: torch.dtype, device: torch.device) -> None:
    x, weight, with_bias = draw(shape, channels, dtype, device)
    gold = residual_projection_ref(x.double(), weight.double(), with_bias.double())
    eager = residual_projection_ref(x, weight, with_bias)
    memory = with_bias.data_ptr()
    out = residual_projection(x, weight, with_bias, impl="addmm")
    assert out.data_ptr() == memory, "the sum is made where the residual lies"
    if out.numel():
        assert_close_to_gold(out, gold, eager)


@torch.no_grad()
def test_rows_with_gaps(device: torch.device) -> None:
    x, weight, with_bias = draw((4, 64, 32), 16, torch.float32, device)
    expected = residual_projection_ref(x[:, ::2], weight, with_bias[:, ::2])
    torch.testing.assert_close(
        residual_projection(x[:, ::2], weight, with_bias[:, ::2].contiguous(), impl="addmm"), expected
    )


@torch.no_grad()
def test_a_residual_with_gaps_is_not_overwritten(device: torch.device) -> None:
    x, weight, with_bias = draw((3, 5, 8), 16, torch.float32, device)
    with_bias = with_bias.mT.contiguous().mT
    expected = residual_projection_ref(x, weight, with_bias)
    torch.testing.assert_close(residual_projection(x, weight, with_bias), expected)
    with pytest.raises(ValueError, match="with_bias, which is not contiguous"):
        residual_projection(x, weight, with_bias, impl="addmm")


@torch.no_grad()
def test_one_row_may_come_without_a_dim(device: torch.device) -> None:
    x, weight, with_bias = draw((1, 8), 16, torch.float32, device)
    expected = residual_projection_ref(x[0], weight, with_bias[0])
    torch.testing.assert_close(residual_projection(x[0], weight, with_bias[0], impl="addmm"), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_another_dtype_is_refused(dtype: torch.dtype, device: torch.device) -> None:
    x, weight, with_bias = draw((2, 8), 8, torch.float32, device)
    before = with_bias.clone()
    with torch.no_grad(), listening() as events, pytest.raises(TypeError, match="weight must be"):
        residual_projection(x, weight.to(dtype), with_bias)
    assert not events and torch.equal(with_bias, before)


def test_what_gradients_need_is_not_overwritten(device: torch.device) -> None:
    x, weight, with_bias = draw((2, 8), 8, torch.float32, device)
    before = with_bias.clone()
    residual_projection(x, weight.requires_grad_(), with_bias).sum().backward()
    assert torch.equal(with_bias, before) and weight.grad is not None


@torch.no_grad()
@pytest.mark.parametrize("fault", FAULTS)
def test_the_check(fault: str, device: torch.device) -> None:
    x, weight, with_bias = draw((4, 512, 32), 16, torch.float16, device)
    expected = residual_projection_ref(x, weight, with_bias)
    with planted(RESIDUAL_PROJECTION, "addmm", FAULTS[fault]), listening(checks=True) as events:
        out = residual_projection(x, weight, with_bias)
    assert events[0].problem and torch.equal(out, expected), "the reference had the residual as it was"


@pytest.mark.parametrize(
    "change", [{"weight": torch.ones(4, 5)}, {"with_bias": torch.ones(3, 4)}, {"x": torch.ones([])}]
)
def test_rejects(change: dict[str, Tensor]) -> None:
    arguments = {"x": torch.ones(2, 4), "weight": torch.ones(4, 4), "with_bias": torch.ones(2, 4)}
    with pytest.raises(ValueError, match="residual_projection: x must be"):
        residual_projection(**arguments | change)
