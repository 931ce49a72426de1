from __future__ import annotations

import pytest
import torch
from block_checks import frozen, fused, relative_error
from diffusers.models.activations import GEGLU
from torch import Tensor, nn

from vidaccel.blocks.unet.activations import FusedGEGLU


class AddsAdapter(nn.Module):
    """What LoRA makes of a linear layer: the weight is still there, and no longer all there is."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.adapter = frozen(nn.Linear(base.in_features, base.out_features))
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.adapter(x)


@pytest.fixture
def block() -> nn.Module:
    torch.manual_seed(0)
    return frozen(GEGLU(16, 24))


@pytest.fixture
def never_in_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vidaccel.blocks.unet.activations.linear_geglu", None)


def test_same_output_and_exact_restore(block: nn.Module, device: torch.device) -> None:
    block, x = block.to(device), torch.randn(2, 5, 16, device=device)
    expected = block(x)
    with fused(block, FusedGEGLU) as sites:
        assert relative_error(block(x), expected) <= 1e-5
    assert not sites["geglu"].fallbacks and sites["geglu"].implementations
    assert torch.equal(block(x), expected)


@pytest.mark.usefixtures("never_in_one_step")
@pytest.mark.parametrize("change", ["adapter", "hook", "no-bias"])
def test_a_projection_that_only_a_call_runs_is_called(change: str, block: nn.Module) -> None:
    if change == "adapter":
        block.proj = AddsAdapter(block.proj)
    elif change == "hook":
        block.proj.register_forward_hook(lambda module, args, out: 2 * out)
    else:
        block.proj.bias = None
    x = torch.randn(2, 5, 16)
    expected = block(x)
    with fused(block, FusedGEGLU) as sites:
        assert relative_error(block(x), expected) <= 1e-5
    assert not sites["geglu"].reason


def test_compiles_fullgraph(block: nn.Module) -> None:
    x = torch.randn(2, 5, 16)
    expected = block(x)
    with fused(block, FusedGEGLU), torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        assert relative_error(compiled(x), expected) <= 1e-5
