"""ModelScope's temporal convolutions against the originals, and when they step back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from block_checks import frozen, fused, relative_error
from diffusers.models.resnet import TemporalConvLayer
from kernel_checks import pairwise
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vidaccel.blocks.unet.resnet import FusedTemporalConvLayer

CHANNELS = 32
SHAPES = [
    pytest.param(2, 3, (2, 2), id="two-clips"),
    pytest.param(1, 7, (1, 5), id="prime-frames-odd-pixels"),
    pytest.param(1, 1, (2, 3), id="one-frame"),
    pytest.param(2, 4, (1, 1), id="one-pixel"),
]
ORDERS = [
    pytest.param(torch.contiguous_format, id="contiguous"),
    pytest.param(torch.channels_last, id="channels-last"),
]


@pytest.fixture
def layer() -> nn.Module:
    torch.manual_seed(0)
    return frozen(TemporalConvLayer(CHANNELS, dropout=0.1, norm_num_groups=2))


def draw(clips: int, num_frames: int, size: tuple[int, int], order: torch.memory_format) -> Tensor:
    return torch.randn(clips * num_frames, CHANNELS, *size).contiguous(memory_format=order)


@torch.no_grad()
def call(layer: nn.Module, x: Tensor, num_frames: int) -> Tensor:
    return layer(x, num_frames=num_frames)


@pairwise({"order": ORDERS, "clips, num_frames, size": SHAPES, "impl": ["torch", "triton"]})
def test_equals_the_original(
    layer: nn.Module,
    clips: int,
    num_frames: int,
    size: tuple[int, int],
    order: torch.memory_format,
    impl: str,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", impl)
    device = device if impl == "triton" else torch.device("cpu")
    layer, x = layer.to(device), draw(clips, num_frames, size, order).to(device)
    expected, before = call(layer, x, num_frames), x.clone()
    with fused(layer, FusedTemporalConvLayer) as sites:
        out = call(layer, x, num_frames)
        assert torch.equal(call(layer, x, num_frames), out)
    assert relative_error(out, expected) <= 1e-5
    assert torch.equal(x, before), "the residual was overwritten"
    assert not any(site.fallbacks or site.reason for site in sites.values())
    assert sites["group_norm_silu"].implementation == impl
    assert sites["temporal_conv"].implementation == impl
    assert torch.equal(call(layer, x, num_frames), expected)


def test_the_last_layer_counts(layer: nn.Module) -> None:
    """It starts at zero, and would hide what comes before it."""
    x = draw(1, 3, (2, 2), torch.channels_last)
    assert relative_error(call(layer, x, 3), x) > 1e-2


def test_stays_channels_last(layer: nn.Module, device: torch.device) -> None:
    """The next layer is to find a view of what it wants."""
    layer, x = layer.to(device), draw(2, 3, (2, 4), torch.channels_last).to(device)
    with fused(layer, FusedTemporalConvLayer):
        assert call(layer, x, 3).is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_every_bias_rides_with_a_kernel(layer: nn.Module, device: torch.device) -> None:
    layer, x = layer.to(device), draw(1, 3, (2, 2), torch.channels_last).to(device)
    with fused(layer, FusedTemporalConvLayer) as sites:
        call(layer, x, 3)
        with Biases() as biases:
            call(layer, x, 3)
    assert biases.found == [False] * 4
    assert sites["temporal_conv"].implementation in ("torch", "cudnn"), "what is not measured runs in the library"


class Biases(TorchDispatchMode):
    """Notes whether convolutions add a bias themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.convolution:
            self.found.append(args[2] is not None)
        return func(*args, **(kwargs or {}))


def replace_norm(layer: nn.Module) -> None:
    layer.conv3[0] = nn.Identity()


def replace_activation(layer: nn.Module) -> None:
    layer.conv3[1] = nn.GELU()


def watch_stage(layer: nn.Module) -> None:
    layer.conv1.register_forward_hook(lambda *_: None)


def offload_norm(layer: nn.Module) -> None:
    layer.conv2[0].forward = partial(layer.conv2[0].forward)


CHANGES = [
    (replace_norm, "a GroupNorm was replaced by Identity"),
    (replace_activation, "a SiLU was replaced by GELU"),
    (watch_stage, "a Sequential has forward hooks, which only a call of it runs"),
    (offload_norm, "a hook replaced the forward of a GroupNorm (offload, casting or cache)"),
]


@pytest.mark.parametrize(("change", "reason"), CHANGES, ids=[change.__name__ for change, _ in CHANGES])
def test_steps_back_for_a_changed_layer(
    layer: nn.Module, change: Callable[[nn.Module], None], reason: str, plain_pytorch: None
) -> None:
    x = draw(1, 3, (2, 2), torch.contiguous_format)
    with fused(layer, FusedTemporalConvLayer) as sites:
        change(layer)
        out = call(layer, x, 3)
    assert [dict(site.fallbacks) for site in sites.values()] == [{reason: 1}] * 4
    assert torch.equal(out, call(layer, x, 3))
