"""Which convolutions may read float16: those whose weights say that it holds all that they can make."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vidaccel.blocks.vae.half_operands import float16_convolutions, scale_to_fit, takes_tf32


def draw() -> tuple[torch.Tensor, nn.Conv3d]:
    torch.manual_seed(0)
    return torch.ones(16), nn.Conv3d(16, 8, 3)


@torch.no_grad()
def test_the_bound_holds_for_the_worst_clip() -> None:
    gamma, conv = draw()
    conv.weight.mul_(30000.0 / (conv.weight.flatten(1).norm(dim=1).amax() * conv.weight[0].numel() ** 0.5))
    assert set(float16_convolutions([(gamma, conv)])) == {0}
    row = conv.weight[conv.weight.flatten(1).norm(dim=1).argmax()]
    worst = 4 * row / row.norm(dim=0, keepdim=True)  # pixels as long as the norm leaves them, along the weight
    assert nn.functional.conv3d(worst[None], conv.weight).half().isfinite().all()


@pytest.mark.parametrize("factor", [1e6, 1e-6, float("nan")], ids=["large", "small", "nan"])
@pytest.mark.parametrize("which", ["gamma", "weight"])
@torch.no_grad()
def test_changed_weights_are_looked_at_again(which: str, factor: float) -> None:
    gamma, conv = draw()
    other_gamma, other = draw()
    pairs = [(gamma, conv), (other_gamma, other)]
    assert set(float16_convolutions(pairs)) == {0, 1}
    (gamma if which == "gamma" else conv.weight).data.mul_(factor)  # of which no version counter tells
    assert set(float16_convolutions(pairs)) == {1}


@torch.no_grad()
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_a_clip_is_scaled_to_fit(size: float) -> None:
    """The worst there is: all numbers are the largest, and have the signs of the weights."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(64, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    row = first.weight.flatten(1).abs().sum(dim=1).argmax()
    clip = size * first.weight[row : row + 1].sign()
    scale = scale_to_fit(clip, torch.tensor(2 * size), [first, second])
    assert torch.equal(torch.exp2(torch.log2(scale).round()), scale)
    scaled = (3 * clip * scale).half()
    middle = nn.functional.conv2d(scaled.float(), first.weight, scale * first.bias, padding=1)
    made = nn.functional.conv2d(middle, second.weight, padding=1)
    assert all(x.half().isfinite().all() for x in (scaled, middle, made))
    assert max(x.abs().amax() for x in (middle, scale * first.bias)) > 32.0, "more than it has to be is lost"


@torch.no_grad()
@pytest.mark.parametrize("number", [0.0, float("nan"), float("inf")])
def test_any_clip_has_a_scale(number: float) -> None:
    scale = scale_to_fit(torch.full([1, 2, 3], number), torch.tensor(0.0), [])
    assert 0 < scale.item() < float("inf")


def test_a_cpu_has_no_tf32() -> None:
    assert not takes_tf32(torch.ones(1))
