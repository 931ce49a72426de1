"""What the blocks of video transformers call of an attention."""

from __future__ import annotations

import pytest
import torch
from block_checks import relative_error
from coexistence.families import build
from torch import nn

from vidaccel import patch_module


@torch.no_grad()
@pytest.mark.parametrize("family", ["CogVideoX", "LTX", "Mochi", "Wan 2.1", "AnimateDiff"])
def test_a_third_layer_behind_attention_is_called_by_nobody(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """A user may keep a layer of his own in the list; stock processors call the first two."""
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")
    subject = build(family)
    expected = subject.noise()
    for module in subject.denoiser.modules():
        if isinstance(layers := getattr(module, "to_out", None), nn.ModuleList):
            layers.append(nn.Tanh())
    assert torch.equal(subject.noise(), expected)
    with patch_module(subject.denoiser) as report:
        assert relative_error(subject.noise(), expected) <= 1e-5
        assert not any(site.state == "failed" for site in report.sites), str(report)
