"""Linear layers with a shared input, or a residual behind them, as one product each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from tests.block_checks import frozen
from vidaccel.blocks.unet import projections
from vidaccel.blocks.unet.normalization import FusedGroupNorm
from vidaccel.blocks.unet.projections import (
    QKV_PROJECTION,
    RESIDUAL_PROJECTION,
    add_projected,
    last_projection,
    norm_and_residual,
    project_together,
)
from vidaccel.kernels.dispatch import Choice, record_choices
from vidaccel.sites.site import BlockState, Site

CHANNELS = 16


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projections, "runs_triton", lambda op, x: True)


def draw_layers() -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(CHANNELS, out, bias=False).requires_grad_(False) for out in (16, 16, 24)]


def draw_rows(count: int = 32 * CHANNELS) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, count // 2, CHANNELS)


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda *args: None)
    return layer


def test_layers_of_the_same_rows_are_one_product() -> None:
    layers, x = draw_layers(), draw_rows()
    with record_choices() as choices:
        together = project_together(layers, x)
    assert together is not None and choices == [Choice(QKV_PROJECTION, "merged")]
    for layer, out in zip(layers, together, strict=True):
        torch.testing.assert_close(out, layer(x))


def test_weights_are_read_at_every_call() -> None:
    layers, x = draw_layers(), draw_rows()
    project_together(layers, x)
    layers[1].weight.data.mul_(2)  # as fusing a LoRA does, which leaves address and version as they were
    together = project_together(layers, x)
    assert together is not None
    torch.testing.assert_close(together[1], layers[1](x))


@pytest.mark.parametrize(
    "change",
    [
        lambda layers: hooked(layers[1]),
        lambda layers: layers.__setitem__(0, nn.Sequential(layers[0])),
        lambda layers: layers.__setitem__(2, nn.Linear(CHANNELS, CHANNELS)),
        lambda layers: layers[0].to(torch.float16),
    ],
    ids=["hook", "wrapped", "bias", "dtype"],
)
def test_other_layers_are_called(change: Callable[[list[nn.Module]], object]) -> None:
    layers: list[nn.Module] = [*draw_layers()]
    change(layers)
    assert project_together(layers, draw_rows()) is None


def test_few_rows_and_autocast_are_left_alone() -> None:
    assert project_together(draw_layers(), draw_rows(30 * CHANNELS)) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert project_together(draw_layers(), draw_rows()) is None


def draw_feed_forward() -> FeedForward:
    torch.manual_seed(0)
    feed_forward = frozen(FeedForward(CHANNELS, activation_fn="geglu"))
    assert isinstance(feed_forward, FeedForward)
    return feed_forward


def test_residual_joins_the_last_product_of_a_feed_forward() -> None:
    feed_forward, x, residual = draw_feed_forward(), draw_rows(), draw_rows() * 3
    last = last_projection(feed_forward, x)
    assert last is feed_forward.net[2]
    with record_choices() as choices:
        out = add_projected(last, feed_forward.net[0](x), residual + last.bias)
    assert choices == [Choice(RESIDUAL_PROJECTION, "addmm")]
    torch.testing.assert_close(out, feed_forward(x) + residual)


@pytest.mark.parametrize(
    "change",
    [
        lambda ff: hooked(ff),
        lambda ff: hooked(ff.net[1]),
        lambda ff: hooked(ff.net[2]),
        lambda ff: ff.train(),
        lambda ff: ff.net.append(nn.Dropout()),
        lambda ff: ff.net.__setitem__(2, nn.Sequential(ff.net[2])),
        lambda ff: ff.net[2].to(torch.float16),
    ],
    ids=["hook", "dropout-hook", "last-hook", "training", "final-dropout", "wrapped", "dtype"],
)
def test_another_feed_forward_is_called(change: Callable[[FeedForward], object]) -> None:
    feed_forward = draw_feed_forward()
    change(feed_forward)
    assert last_projection(feed_forward, draw_rows()) is None


@pytest.mark.parametrize("kind", [nn.Linear, lambda i, o: nn.Conv2d(i, o, 1)], ids=["linear", "convolution"])
def test_norm_hands_the_residual_on_with_the_bias(kind: Callable[[int, int], nn.Module]) -> None:
    torch.manual_seed(0)
    norm, projection = frozen(nn.GroupNorm(4, 32)), frozen(kind(32, 32))
    image = torch.randn(2, 32, 3, 5).contiguous(memory_format=torch.channels_last)
    assert norm_and_residual(norm, image, projection) is None  # nobody fused it: its site may have been skipped
    expected = norm(image)
    norm.__class__ = FusedGroupNorm
    norm._vidaccel = BlockState([Site("norm", "group_norm_silu", "math-exact")], self_check=False)
    both = norm_and_residual(norm, image, projection)
    assert both is not None
    torch.testing.assert_close(both[0], expected)
    torch.testing.assert_close(both[1], image + projection.bias.view(-1, 1, 1))
    rows = image.permute(0, 2, 3, 1).flatten(1, 2)
    out = add_projected(projection, rows, both[1].permute(0, 2, 3, 1).flatten(1, 2))
    torch.testing.assert_close(out, rows @ projection.weight.flatten(1).T + projection.bias + rows)
    assert norm_and_residual(norm, image, hooked(projection)) is None
