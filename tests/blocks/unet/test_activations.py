"""The gated GELU: which of its two ops runs (what holds for every block is in test_every_block.py)."""

from __future__ import annotations

import pytest
import torch
from block_checks import frozen, fused, relative_error
from diffusers.models.activations import GEGLU
from torch import nn

from vidaccel.blocks.unet.activations import FusedGEGLU
from vidaccel.kernels.op import listening


@pytest.fixture
def block() -> nn.Module:
    torch.manual_seed(0)
    return frozen(GEGLU(16, 24))


@torch.no_grad()
def test_a_projection_that_only_a_call_runs_is_called(block: nn.Module) -> None:
    x = torch.randn(2, 5, 16)
    with fused(block, FusedGEGLU):
        block(x)
        for bias, op in ((block.proj.bias, "linear_geglu"), (None, "geglu")):
            block.proj.bias = bias
            with listening() as events:
                out = FusedGEGLU.fused_forward(block, x)
            assert events[-1].op == op
            assert relative_error(out, GEGLU.forward(block, x)) <= 1e-5


@torch.no_grad()
def test_a_deprecated_argument_is_for_the_original(block: nn.Module) -> None:
    x = torch.randn(2, 5, 16)
    expected = block(x)
    with fused(block, FusedGEGLU) as sites, pytest.warns(FutureWarning, match="`scale` argument is deprecated"):
        assert torch.equal(block(x, 1.0), expected)
    assert dict(sites["geglu"].fallbacks) == {"deprecated arguments were passed": 1}
