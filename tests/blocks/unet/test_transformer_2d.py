"""The spatial transformer and its text block: both kinds of projection, odd shapes, no copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_checks import all_fused, frozen, relative_error
from copy_checks import Copies
from diffusers import Transformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from vidaccel.blocks.unet.attention import FusedTextTransformerBlock
from vidaccel.blocks.unet.transformer_2d import FusedTransformer2DModel
from vidaccel.sites.block import SITES
from vidaccel.sites.rules import Swap

pytestmark = pytest.mark.usefixtures("plain_pytorch")

CHANNELS, TEXT = 64, 24
FUSED = FusedTransformer2DModel, FusedTextTransformerBlock


def transformer(**options: Any) -> Any:
    torch.manual_seed(0)
    config = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": CHANNELS, "norm_num_groups": 8}
    return frozen(Transformer2DModel(**config | {"cross_attention_dim": TEXT} | options))


@torch.no_grad()
def call(model: nn.Module, x: Tensor, text: Tensor, **options: Any) -> Tensor:
    return model(x, text, return_dict=False, **options)[0]


def image(frames: int, height: int, width: int) -> Tensor:
    x = torch.randn(frames, CHANNELS, height, width, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last)


def text_of(frames: int, tokens: int = 7) -> Tensor:
    return torch.randn(frames, tokens, TEXT, generator=torch.Generator().manual_seed(1))


BOTH_PROJECTIONS = pytest.mark.parametrize("linear", [False, True], ids=["conv", "linear"])


@BOTH_PROJECTIONS
@pytest.mark.parametrize("tokens", [77, 1, 145])
@pytest.mark.parametrize("shape", [(3, 5, 3), (1, 1, 1), (4, 8, 8)], ids=str)
def test_same_result_in_channels_last(linear: bool, tokens: int, shape: tuple[int, int, int]) -> None:
    model = transformer(use_linear_projection=linear, num_layers=2)
    x, text = image(*shape), text_of(shape[0], tokens)
    expected = call(model, x, text)
    with all_fused(model, *FUSED) as sites:
        out = call(model, x, text)
        assert torch.equal(model(x, text).sample, out)
        assert relative_error(call(model, x.contiguous(), text), expected) <= 1e-5
    assert relative_error(out, expected) <= 1e-5
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert not any(site.reason or site.fallbacks for site in sites)


@BOTH_PROJECTIONS
def test_no_copies(linear: bool) -> None:
    model = transformer(use_linear_projection=linear)
    model.norm = nn.Identity()  # stock GroupNorm answers in NCHW on a CPU, and is not what this is about
    x, text = image(2, 8, 8), text_of(2)
    with Copies(smallest=x.numel()) as copies:
        call(model, x, text)
    assert copies.found
    with all_fused(model, *FUSED):
        call(model, x, text)
        with Copies(smallest=x.numel()) as copies:
            call(model, x, text)
    assert not copies.found


def test_masks_and_missing_text_fall_back() -> None:
    model = transformer()
    x, text, mask = image(2, 4, 4), text_of(2), torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    expected = call(model, x, text, encoder_attention_mask=mask)
    with all_fused(model, *FUSED) as sites:
        assert torch.equal(call(model, x, text, encoder_attention_mask=mask), expected)
        assert all(site.fallbacks["an attention mask was passed"] == 1 for site in sites)
        with pytest.raises(RuntimeError):  # as of the stock block: its keys take no image features
            model.transformer_blocks[0](torch.randn(2, 16, CHANNELS))
    assert any("no text was passed" in reason for site in sites for reason in site.fallbacks)


def test_too_few_texts_are_the_original_error() -> None:
    """As where somebody has not repeated a text for all frames: no frame may get that of another one."""
    model = transformer()
    x, text = image(4, 4, 4), text_of(2)
    with pytest.raises(RuntimeError, match="must match the size"):
        call(model, x, text)
    with all_fused(model, *FUSED) as sites:
        for block in model.transformer_blocks:
            getattr(block, SITES).checks = False
        with pytest.raises(RuntimeError, match="must match the size"):
            call(model, x, text)
    assert {reason for site in sites for reason in site.fallbacks} >= {"the contexts are not as many as the images"}


def test_chunked_feed_forward_and_attention_arguments_fall_back() -> None:
    model = transformer()
    x, text = image(2, 4, 4), text_of(2)
    expected = call(model, x, text)
    with all_fused(model, *FUSED) as sites:
        model.transformer_blocks[0].set_chunk_feed_forward(1, 0)
        assert relative_error(call(model, x, text), expected) <= 1e-5
        model.transformer_blocks[0].set_chunk_feed_forward(None)
        call(model, x, text, cross_attention_kwargs={"unknown": 1})
    reasons = {reason for site in sites for reason in site.fallbacks}
    assert reasons == {"the feed-forward is chunked", "cross_attention_kwargs were passed"}


def test_which_modules_are_meant() -> None:
    """Blocks that attend over frames are of the same class, and are not this one's."""
    cross = BasicTransformerBlock(CHANNELS, 2, 32, cross_attention_dim=TEXT)
    frames = BasicTransformerBlock(CHANNELS, 2, 32, double_self_attention=True)
    alone = BasicTransformerBlock(CHANNELS, 2, 32)
    rule = Swap(FusedTextTransformerBlock)
    assert [rule.matches("block", block) for block in (cross, frames, alone)] == [True, False, False]
    ada = BasicTransformerBlock(
        CHANNELS, 2, 32, cross_attention_dim=TEXT, norm_type="ada_norm_single", norm_elementwise_affine=False
    )
    assert rule.left_alone_reason(ada) == "it is not a plain LayerNorm block"
    patches = Transformer2DModel(2, 32, in_channels=4, patch_size=2, sample_size=8, norm_type="ada_norm_single")
    assert Swap(FusedTransformer2DModel).left_alone_reason(patches) == "its input is not an image of features"
