from __future__ import annotations

import pytest
import torch
from kernel_checks import FAULTS, assert_close_to_gold, planted
from torch import Tensor

from vidaccel.kernels.attention.qkv_projection import QKV_PROJECTION, qkv_projection, qkv_projection_ref
from vidaccel.kernels.op import listening

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    pytest.param((1, 1, 1), 1, 1, id="one-number"),
    pytest.param((2, 7, 5, 24), 40, 16, id="another-width"),
    pytest.param((3, 257, 32), 32, 32, id="self-attention"),
]
OUTPUTS = range(3)


def draw(shape: tuple[int, ...], wide: int, narrow: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    torch.manual_seed(0)
    width = shape[-1]
    sizes = [shape, (wide, width), (narrow, width), (narrow, width)]
    return [torch.randn(size, device=device).to(dtype) for size in sizes]


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "wide", "narrow"), SHAPES)
def test_matches_reference(
    shape: tuple[int, ...], wide: int, narrow: int, dtype: torch.dtype, device: torch.device
) -> None:
    x, *weights = draw(shape, wide, narrow, dtype, device)
    outputs = qkv_projection(x, *weights, impl="merged")
    gold = qkv_projection_ref(x.double(), *(weight.double() for weight in weights))
    for out, right, eager in zip(outputs, gold, qkv_projection_ref(x, *weights), strict=True):
        assert_close_to_gold(out, right, eager)


@torch.no_grad()
def test_merged_where_the_activations_outweigh_the_weights(device: torch.device) -> None:
    with listening() as events:
        for rows in (32, 31):  # rows * channels against 32 * channels^2
            qkv_projection(*draw((32, rows, 32), 32, 32, torch.float32, device))
    assert [event.implementation for event in events] == ["merged", "torch"]


@torch.no_grad()
def test_rows_with_gaps_and_no_rows(device: torch.device) -> None:
    x, *weights = draw((4, 64, 32), 32, 32, torch.float32, device)
    for some in (x[:, ::2], x.transpose(0, 1), x[:0]):
        outputs = qkv_projection(some, *weights, impl="merged")
        for out, expected in zip(outputs, qkv_projection_ref(some, *weights), strict=True):
            torch.testing.assert_close(out, expected)


@torch.no_grad()
def test_a_weight_changed_in_place_is_seen(device: torch.device) -> None:
    x, *weights = draw((32, 32, 32), 32, 32, torch.float32, device)
    qkv_projection(x, *weights)
    weights[1].data.mul_(2)
    torch.testing.assert_close(qkv_projection(x, *weights)[1], qkv_projection_ref(x, *weights)[1])


def test_gradients_flow(device: torch.device) -> None:
    x, *weights = draw((32, 32, 32), 32, 32, torch.float32, device)
    qkv_projection(x, weights[0].requires_grad_(), *weights[1:])[0].sum().backward()
    assert weights[0].grad is not None


@torch.no_grad()
@pytest.mark.parametrize("spoilt", OUTPUTS, ids=["query", "key", "value"])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_check(fault: str, spoilt: int, device: torch.device) -> None:
    x, *weights = draw((4, 512, 32), 32, 32, torch.float16, device)
    with (
        planted(QKV_PROJECTION, "merged", lambda outputs: FAULTS[fault](outputs[spoilt])),
        listening(checks=True) as events,
    ):
        outputs = qkv_projection(x, *weights)
    assert events[0].problem
    assert all(torch.equal(*pair) for pair in zip(outputs, qkv_projection_ref(x, *weights), strict=True))


def test_rejects() -> None:
    x = torch.ones(2, 4)
    for wrong in (torch.ones(4, 5), torch.ones(4)):
        with pytest.raises(ValueError, match="qkv_projection: weights must be"):
            qkv_projection(x, torch.ones(4, 4), wrong, torch.ones(4, 4))


@torch.no_grad()
def test_compiles_fullgraph(device: torch.device) -> None:
    arguments = draw((32, 32, 32), 32, 32, torch.float32, device)
    compiled = torch.compile(qkv_projection, fullgraph=True, backend="aot_eager")
    for out, expected in zip(compiled(*arguments), qkv_projection_ref(*arguments), strict=True):
        torch.testing.assert_close(out, expected)
