from __future__ import annotations

import pytest
import torch
from kernel_checks import FAULTS, assert_close_to_gold, planted
from torch import Tensor

from vidaccel.kernels.conv.padded_channels import PADDED_CHANNELS, padded_channels, padded_channels_ref
from vidaccel.kernels.op import listening

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GEOMETRY = ((1, 1), (1, 1))


def draw(channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    sizes = ((3, channels, 9, 7), (16, channels, 3, 3), (16,))
    x, weight, bias = (torch.randn(size, device=device).to(dtype) for size in sizes)
    return x.to(memory_format=torch.channels_last), weight, bias


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("geometry", [GEOMETRY, ((2, 1), (0, 2))], ids=["same", "strided"])
def test_matches_reference(
    geometry: tuple[tuple[int, int], tuple[int, int]],
    with_bias: bool,
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    x, weight, bias = draw(channels, dtype, device)
    addend = bias if with_bias else None
    out = padded_channels(x, weight, addend, *geometry, impl="padded")
    gold = padded_channels_ref(x.double(), weight.double(), bias.double() if with_bias else None, *geometry)
    assert_close_to_gold(out, gold, padded_channels_ref(x, weight, addend, *geometry))


@torch.no_grad()
@pytest.mark.parametrize(("channels", "implementation"), [(3, "padded"), (4, "padded"), (8, "torch"), (320, "torch")])
def test_padded_where_a_pixel_is_not_aligned(channels: int, implementation: str, device: torch.device) -> None:
    with listening() as events:
        padded_channels(*draw(channels, torch.float16, device), *GEOMETRY)
    assert [event.implementation for event in events] == [implementation]


def test_gradients_flow(device: torch.device) -> None:
    x, weight, bias = draw(3, torch.float32, device)
    with listening() as events:
        padded_channels(x, weight.requires_grad_(), bias, *GEOMETRY).sum().backward()
    assert "no backward pass" in events[0].reason and weight.grad is not None


@torch.no_grad()
def test_other_strides_and_no_images(device: torch.device) -> None:
    x, weight, bias = draw(3, torch.float32, device)
    for some in (x.contiguous(), x[..., ::2], x[:0]):
        out = padded_channels(some, weight, bias, *GEOMETRY, impl="padded")
        torch.testing.assert_close(out, padded_channels_ref(some, weight, bias, *GEOMETRY))


@torch.no_grad()
@pytest.mark.parametrize("fault", FAULTS)
def test_the_check(fault: str, device: torch.device) -> None:
    tensors = draw(3, torch.float16, device)
    spoil = FAULTS[fault]
    with planted(PADDED_CHANNELS, "padded", lambda out: spoil(out.movedim(1, -1))), listening(checks=True) as events:
        out = padded_channels(*tensors, *GEOMETRY)
    assert events[0].problem and torch.equal(out, padded_channels_ref(*tensors, *GEOMETRY))


@pytest.mark.parametrize("weight", [torch.ones(8, 4, 3, 3), torch.ones(8, 3, 3)], ids=["channels", "dimensions"])
def test_rejects(weight: Tensor) -> None:
    with pytest.raises(ValueError, match="padded_channels: x must be"):
        padded_channels(torch.ones(1, 3, 8, 8), weight, None, *GEOMETRY)


@torch.no_grad()
def test_compiles_fullgraph(device: torch.device) -> None:
    tensors = draw(3, torch.float32, device)
    out = torch.compile(padded_channels, fullgraph=True, backend="aot_eager")(*tensors, *GEOMETRY)
    torch.testing.assert_close(out, padded_channels_ref(*tensors, *GEOMETRY))
