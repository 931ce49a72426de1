"""Which convolutions may read float16: those whose weights say that it holds all that they can make."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vidaccel.blocks.vae.half_operands import float16_convolutions, takes_tf32


def draw() -> tuple[torch.Tensor, nn.Conv3d]:
    torch.manual_seed(0)
    return torch.ones(16), nn.Conv3d(16, 8, 3)


@torch.no_grad()
def test_the_bound_holds_for_the_worst_clip() -> None:
    gamma, conv = draw()
    conv.weight.mul_(30000.0 / (conv.weight.flatten(1).norm(dim=1).amax() * conv.weight[0].numel() ** 0.5))
    assert float16_convolutions([(gamma, conv)]) == {0}
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
    assert float16_convolutions(pairs) == {0, 1}
    (gamma if which == "gamma" else conv.weight).data.mul_(factor)  # of which no version counter tells
    assert float16_convolutions(pairs) == {1}


def test_a_cpu_has_no_tf32() -> None:
    assert not takes_tf32(torch.ones(1))
