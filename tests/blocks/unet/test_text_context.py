"""The text's keys and values in the UNets that repeat their text themselves, and in a captured graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import I2VGenXLUNet, UNet3DConditionModel
from tiny_models import tiny_motion_unet
from torch import Tensor, nn

from vidaccel import patch_module
from vidaccel.blocks.unet import text_context
from vidaccel.blocks.unet.attention import FusedTextTransformerBlock
from vidaccel.blocks.unet.text_context import LastResult, TextSource
from vidaccel.sites.rules import Swap
from vidaccel.sites.site import Site

BATCH, FRAMES, TEXT = 2, 3, 32


@pytest.fixture(autouse=True)
def plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The PyTorch implementations: this is about what is projected when."""
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")


def _sample(seed: int) -> Tensor:
    return torch.randn(BATCH, 4, FRAMES, 8, 8, generator=torch.Generator().manual_seed(seed))


def _text(seed: int) -> Tensor:
    return torch.randn(BATCH, 7, TEXT, generator=torch.Generator().manual_seed(seed))


def _unet_3d() -> tuple[nn.Module, Callable[[nn.Module, int, Tensor], Tensor]]:
    unet = UNet3DConditionModel(
        down_block_types=("CrossAttnDownBlock3D",),
        up_block_types=("CrossAttnUpBlock3D",),
        block_out_channels=(64,),
        layers_per_block=1,
        cross_attention_dim=TEXT,
        attention_head_dim=32,
    )
    return unet, lambda unet, step, text: unet(_sample(step), step, text).sample


def _i2vgen_xl() -> tuple[nn.Module, Callable[[nn.Module, int, Tensor], Tensor]]:
    unet = I2VGenXLUNet(
        down_block_types=("CrossAttnDownBlock3D",),
        up_block_types=("CrossAttnUpBlock3D",),
        block_out_channels=(64,),
        layers_per_block=1,
        cross_attention_dim=TEXT,
        attention_head_dim=32,
    )
    image = {"image_latents": _sample(9), "image_embeddings": _text(9)[:, :1]}
    return (
        unet,
        lambda unet, step, text: (
            unet(_sample(step), step, torch.full((BATCH,), 8), encoder_hidden_states=text, **image).sample
        ),
    )


def _patch(unet: nn.Module) -> tuple[list[Site], Callable[[], None]]:
    """The rules that a family of text-conditioned UNets lists for this."""
    sites: list[Site] = []
    undo: list[Callable[[], None]] = []
    for rule in (TextSource(type(unet), repeats_text=True), Swap(FusedTextTransformerBlock)):
        for path, module in list(unet.named_modules()):
            if rule.matches(path, module) and not rule.why_left_alone(module):
                new = [Site(path, op, fidelity) for op, fidelity in rule.ops.items()]
                memo = rule.apply(module, new, False)
                undo.append(lambda rule=rule, module=module, memo=memo: rule.undo(module, memo))
                sites += new
    return sites, lambda: [one() for one in undo] and None


@pytest.mark.parametrize(
    ("build", "rows"),
    # I2VGenXL joins its text with image tokens anew at every step
    [(_unet_3d, [BATCH, BATCH]), (_i2vgen_xl, [BATCH] * 4)],
    ids=["unet-3d", "i2vgen-xl"],
)
@torch.no_grad()
def test_what_the_model_repeats_is_projected_once(build: Callable[[], Any], rows: list[int]) -> None:
    torch.manual_seed(0)
    unet, call = build()
    unet.eval().requires_grad_(False)
    texts = [_text(0), _text(0), _text(1), _text(1)]
    texts[1], texts[3] = texts[0], texts[2]
    expected = [call(unet, step, text) for step, text in enumerate(texts)]
    sites, restore = _patch(unet)
    blocks = [module for module in unet.modules() if type(module) is FusedTextTransformerBlock]
    assert blocks and all(block.attn2.is_cross_attention for block in blocks)
    projected: list[int] = []
    _count(blocks[0].attn2, projected)
    for step, text in enumerate(texts):
        out = call(unet, step, text)
        assert (out - expected[step]).norm() <= 1e-5 * expected[step].norm()
    assert projected == rows
    assert not any(site.fallbacks for site in sites)
    restore()
    assert torch.equal(call(unet, 0, texts[0]), expected[0])
    assert not unet._forward_hooks and not unet._forward_pre_hooks


def _count(attn: Any, projected: list[int]) -> None:
    class Counted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            projected.append(x.shape[0])
            return super().forward(x)

    attn.to_k.__class__ = Counted


@torch.no_grad()
def test_a_captured_graph_projects_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = tiny_motion_unet()
    text = _text(0).repeat_interleave(FRAMES, dim=0)
    expected = unet(_sample(0), 0, text).sample
    with patch_module(unet, only="text_keys_values", self_check=False) as report:
        unet(_sample(0), 0, text)
        monkeypatch.setattr(text_context, "_is_capturing", lambda x: True)
        projected: list[int] = []
        _count(unet.mid_block.attentions[0].transformer_blocks[0].attn2, projected)
        for _ in range(2):
            out = unet(_sample(0), 0, text).sample
            assert (out - expected).norm() <= 1e-5 * expected.norm()
        # whether frames share a text would have to be read back, which a capture forbids
        assert projected == [BATCH * FRAMES] * 2
        assert {reason.partition(",")[0] for _, _, reason in report.fallbacks} == {"a CUDA graph is being captured"}


def test_last_result() -> None:
    last, x, made = LastResult(), torch.ones(3), []

    def compute() -> float:
        made.append(1)
        return float(x.sum())

    assert [last.of(x, compute), last.of(x, compute), len(made)] == [3.0, 3.0, 1]
    assert [last.of(x, compute, "another key"), len(made)] == [3.0, 2]
    x.add_(1)
    assert [last.of(x, compute), len(made)] == [6.0, 3]
    x.data = torch.zeros(3)
    assert [last.of(x, compute), len(made)] == [0.0, 4]
    same = x.clone()
    assert [last.of(same, compute), len(made)] == [0.0, 5]
    del same
    assert last._entry is None
