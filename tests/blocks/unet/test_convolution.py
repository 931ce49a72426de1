"""The padded first convolution by itself: when it pads, what it leaves alone, what it falls back for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from block_checks import frozen, fused, relative_error
from tiny_models import tiny_autoencoder_kl, tiny_motion_unet
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vidaccel import patch_module
from vidaccel.blocks.unet.convolution import FusedFewChannelConv2d
from vidaccel.sites.rules import Swap


def conv_in(channels: int, dtype: torch.dtype, **options: object) -> nn.Conv2d:
    torch.manual_seed(0)
    return frozen(nn.Conv2d(channels, 32, 3, **{"padding": 1, **options})).to(dtype)


def image(channels: int, dtype: torch.dtype, order: torch.memory_format = torch.contiguous_format) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, channels, 5, 6, generator=generator).to(dtype).contiguous(memory_format=order)


class Convolved(TorchDispatchMode):
    """Notes what is convolved with what."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.convolution:
            self.operands.append(args[:2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"])
@pytest.mark.parametrize(
    ("channels", "dtype", "padded_to"),
    [(3, torch.float16, 8), (4, torch.float16, 8), (9, torch.bfloat16, 16), (3, torch.float32, 4)],
    ids=str,
)
def test_pads_to_16_bytes(
    channels: int,
    dtype: torch.dtype,
    padded_to: int,
    order: torch.memory_format,
    device: torch.device,
) -> None:
    conv, x = conv_in(channels, dtype).to(device), image(channels, dtype, order).to(device)
    expected = conv(x)
    with fused(conv, FusedFewChannelConv2d) as sites:
        first = conv(x)
        with Convolved() as convolved:
            outs = [first, conv(x)]
    assert sites["padded_channels"].implementations == {"padded"} and not sites["padded_channels"].fallbacks
    [operands] = convolved.operands
    for tensor in operands:
        assert tensor.shape[1] == padded_to and tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor[:, channels:].any()
    budget = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert all(relative_error(out, expected) <= budget for out in outs)


@pytest.mark.parametrize("options", [{"bias": False}, {"stride": 2, "padding": 0}], ids=str)
def test_any_kind_of_convolution(options: dict[str, object], device: torch.device) -> None:
    conv, x = conv_in(3, torch.float32, **options).to(device), image(3, torch.float32).to(device)
    expected = conv(x)
    with fused(conv, FusedFewChannelConv2d) as sites:
        assert relative_error(conv(x), expected) <= 1e-5
    assert sites["padded_channels"].implementations == {"padded"}
    assert torch.equal(conv(x), expected) and type(conv) is nn.Conv2d


def test_aligned_channels_run_the_original(device: torch.device) -> None:
    conv, x = conv_in(4, torch.float32).to(device), image(4, torch.float32).to(device)
    expected = conv(x)
    with fused(conv, FusedFewChannelConv2d) as sites:
        assert torch.equal(conv(x), expected)
    assert sites["padded_channels"].implementations == {"torch"} and not sites["padded_channels"].fallbacks


def test_without_a_gpu_the_original_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")
    conv, x = conv_in(3, torch.float32), image(3, torch.float32)
    expected = conv(x)
    with fused(conv, FusedFewChannelConv2d) as sites:
        assert torch.equal(conv(x), expected)
    assert sites["padded_channels"].implementations == {"torch"}


def test_a_new_weight_is_padded_anew(device: torch.device) -> None:
    conv, x = conv_in(3, torch.float32).to(device), image(3, torch.float32).to(device)
    with fused(conv, FusedFewChannelConv2d):
        before = conv(x)
        conv.weight.mul_(2)
        conv.bias.mul_(2)
        assert relative_error(conv(x), 2 * before) <= 1e-5


def _hooked(conv: nn.Module) -> None:
    conv.forward = partial(conv.forward)


def _quantised(conv: nn.Module) -> None:
    conv.weight = type("PackedParameter", (nn.Parameter,), {})(conv.weight.data, requires_grad=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [(_hooked, "a hook replaced the forward"), (_quantised, "no plain weight")],
    ids=["offload", "quantised"],
)
def test_weights_that_may_not_be_read(change: Callable[[nn.Module], None], reason: str, device: torch.device) -> None:
    conv, x = conv_in(3, torch.float32).to(device), image(3, torch.float32).to(device)
    expected = conv(x)
    with fused(conv, FusedFewChannelConv2d) as sites:
        change(conv)
        assert torch.equal(conv(x), expected)
    [counted] = sites["padded_channels"].fallbacks
    assert reason in counted


def test_bad_input_raises_what_the_original_raises(device: torch.device) -> None:
    conv, bad = conv_in(3, torch.float32).to(device), torch.ones(2, 4, 5, 6, device=device)
    for x in (bad, bad[0, 0], bad[:, :3].half()):
        with pytest.raises(RuntimeError) as stock:
            conv(x)
        with fused(conv, FusedFewChannelConv2d), pytest.raises(RuntimeError) as raised:
            conv(x)
        assert str(raised.value) == str(stock.value)
    unbatched = image(3, torch.float32)[0].to(device)
    with fused(conv, FusedFewChannelConv2d) as sites:
        assert conv(unbatched).shape == (32, 5, 6)
    assert sites["padded_channels"].fallbacks


def test_what_it_stands_for() -> None:
    rule = Swap(FusedFewChannelConv2d, names=("conv_in",))
    assert rule.matches("decoder.conv_in", nn.Conv2d(4, 8, 3))
    others = {"decoder.conv_out": (4, 8, 3), "a.conv_in": (8, 8, 3), "b.conv_in": (4, 8, 1)}
    assert not any(rule.matches(path, nn.Conv2d(*arguments)) for path, arguments in others.items())


@pytest.mark.parametrize("options", [{"padding_mode": "circular"}, {"dilation": 2}], ids=str)
def test_other_convolutions_run_the_original(options: dict[str, object], device: torch.device) -> None:
    conv, x = conv_in(3, torch.float32, **options).to(device), image(3, torch.float32).to(device)
    expected = conv(x)
    with fused(conv, FusedFewChannelConv2d) as sites:
        assert torch.equal(conv(x), expected)
    assert dict(sites["padded_channels"].fallbacks) == {"it is not a plain convolution": 1}


@pytest.mark.parametrize(
    ("make", "paths"),
    [(tiny_autoencoder_kl, {"encoder.conv_in", "decoder.conv_in"}), (tiny_motion_unet, {"conv_in"})],
    ids=["vae", "unet"],
)
@torch.no_grad()
def test_inside_a_model(make: Callable[[], nn.Module], paths: set[str], device: torch.device) -> None:
    model = make().to(device, torch.float16)
    convolutions = [model.get_submodule(path) for path in sorted(paths)]
    inputs = [image(conv.in_channels, torch.float16).to(device) for conv in convolutions]
    expected = [conv(x) for conv, x in zip(convolutions, inputs, strict=True)]
    with patch_module(model) as report:
        for conv, x, gold in zip(convolutions, inputs, expected, strict=True):
            assert relative_error(conv(x), gold) <= 2 * torch.finfo(torch.float16).eps
        sites = {site.path: site.implementation for site in report.sites if site.op == "padded_channels"}
    assert sites == dict.fromkeys(paths, "padded")
    assert all(torch.equal(conv(x), gold) for conv, x, gold in zip(convolutions, inputs, expected, strict=True))
