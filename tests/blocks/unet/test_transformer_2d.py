"""The spatial transformer and its text block by themselves: both kinds of projection, odd shapes, no copies."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import Transformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vidaccel.blocks.unet.activations import FusedGEGLU
from vidaccel.blocks.unet.attention import FusedTextTransformerBlock
from vidaccel.blocks.unet.normalization import FusedGroupNorm
from vidaccel.blocks.unet.transformer_2d import FusedTransformer2DModel
from vidaccel.sites.rules import Swap
from vidaccel.sites.site import Site

CHANNELS, TEXT = 64, 24


@pytest.fixture(autouse=True)
def plain_pytorch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The PyTorch implementations, but for the test of the kernels: interpreted they are slow."""
    if "device" not in request.fixturenames:
        monkeypatch.setenv("VIDACCEL_IMPL", "torch")


def _transformer(**options: Any) -> Transformer2DModel:
    torch.manual_seed(0)
    config = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": CHANNELS, "norm_num_groups": 8}
    model = Transformer2DModel(**config | {"cross_attention_dim": TEXT} | options).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def _patch(model: Transformer2DModel, *fused: Any) -> list[Site]:
    """What the rules of a family do to the model's parts, here to the model itself as well."""
    sites: list[Site] = []
    for rule in map(Swap, fused):
        for path, module in list(model.named_modules()):
            if rule.matches(path, module):
                assert rule.why_left_alone(module) is None
                new = [Site(path, op, fidelity) for op, fidelity in rule.ops.items()]
                rule.apply(module, new, True)
                sites += new
    return sites


def _image(frames: int, height: int, width: int) -> Tensor:
    x = torch.randn(frames, CHANNELS, height, width, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last)


def _relative_error(out: Tensor, expected: Tensor) -> float:
    return float((out - expected).norm() / expected.norm())


@pytest.mark.parametrize("linear", [False, True], ids=["conv", "linear"])
@pytest.mark.parametrize("tokens", [77, 1, 145])
@pytest.mark.parametrize("shape", [(3, 5, 3), (1, 1, 1), (4, 8, 8)], ids=str)
@torch.no_grad()
def test_same_result_in_channels_last(linear: bool, tokens: int, shape: tuple[int, int, int]) -> None:
    model = _transformer(use_linear_projection=linear, num_layers=2)
    x = _image(*shape)
    text = torch.randn(shape[0], tokens, TEXT, generator=torch.Generator().manual_seed(1))
    expected = model(x, text).sample
    sites = _patch(model, FusedTransformer2DModel, FusedTextTransformerBlock)
    (out,) = model(x, text, return_dict=False)
    again = model(x, text).sample  # now without the check beside it
    assert _relative_error(out, expected) <= 1e-5 and torch.equal(out, again)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert {site.state for site in sites} == {"active"} and not any(site.fallbacks for site in sites)


@torch.no_grad()
def test_an_image_in_nchw_order_is_served() -> None:
    model = _transformer()
    x, text = _image(2, 4, 6).contiguous(), torch.randn(2, 7, TEXT)
    expected = model(x, text).sample
    _patch(model, FusedTransformer2DModel, FusedTextTransformerBlock)
    assert _relative_error(model(x, text).sample, expected) <= 1e-5


class _Copies(TorchDispatchMode):
    """Counts the operators that copied a tensor of at least ``least`` elements."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.seen = least, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("clone", "copy_", "_to_copy") and out.numel() >= self.least:
            self.seen[func.overloadpacket.__name__] += 1
        return out


@pytest.mark.parametrize("linear", [False, True], ids=["conv", "linear"])
@torch.no_grad()
def test_no_copies(linear: bool) -> None:
    model = _transformer(use_linear_projection=linear)
    model.norm = torch.nn.Identity()  # stock GroupNorm answers in NCHW on a CPU, and is not what this is about
    x, text = _image(2, 8, 8), torch.randn(2, 7, TEXT)
    counts = []
    for fused in ((), (FusedTransformer2DModel, FusedTextTransformerBlock)):
        _patch(model, *fused)
        model(x, text)
        with _Copies(x.numel()) as copies:
            model(x, text)
        counts.append(copies.seen.total())
    assert counts[0] > 0 and counts[1] == 0, counts


@torch.no_grad()
def test_masks_and_missing_text_fall_back() -> None:
    model = _transformer()
    x, text = _image(2, 4, 4), torch.randn(2, 7, TEXT)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    expected = model(x, text, encoder_attention_mask=mask).sample
    sites = _patch(model, FusedTransformer2DModel, FusedTextTransformerBlock)
    assert torch.equal(model(x, text, encoder_attention_mask=mask).sample, expected)
    assert all(site.fallbacks["an attention mask was passed"] == 1 for site in sites)
    block = model.transformer_blocks[0]
    with pytest.raises(RuntimeError):  # as the stock block does: its keys take no image features
        block(torch.randn(2, 16, CHANNELS))
    assert any("no text was passed" in reason for site in sites for reason in site.fallbacks)


@torch.no_grad()
def test_chunked_feed_forward_and_attention_arguments_fall_back() -> None:
    model = _transformer()
    x, text = _image(2, 4, 4), torch.randn(2, 7, TEXT)
    expected = model(x, text).sample
    sites = _patch(model, FusedTransformer2DModel, FusedTextTransformerBlock)
    model.transformer_blocks[0].set_chunk_feed_forward(1, 0)
    assert _relative_error(model(x, text).sample, expected) <= 1e-5
    model.transformer_blocks[0].set_chunk_feed_forward(None)
    model(x, text, cross_attention_kwargs={"unknown": 1})
    reasons = {reason for site in sites for reason in site.fallbacks}
    assert reasons == {"the feed-forward is chunked", "cross_attention_kwargs were passed"}


@torch.no_grad()
def test_hooks_on_a_bypassed_attention_still_run() -> None:
    model, seen = _transformer(), []
    _patch(model, FusedTextTransformerBlock)
    model.transformer_blocks[0].attn2.register_forward_hook(lambda *_: seen.append(1))
    model(_image(2, 4, 4), torch.randn(2, 7, TEXT))
    assert seen == [1]


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
    assert rule.why_left_alone(ada) == "it is not a plain LayerNorm block"
    patches = Transformer2DModel(2, 32, in_channels=4, patch_size=2, sample_size=8, norm_type="ada_norm_single")
    assert Swap(FusedTransformer2DModel).why_left_alone(patches) == "its input is not an image of features"


@pytest.mark.parametrize("linear", [False, True], ids=["conv", "linear"])
@torch.no_grad()
def test_with_the_kernels(device: torch.device, linear: bool) -> None:
    model = _transformer(use_linear_projection=linear).to(device)
    x, text = _image(2, 3, 3).to(device), torch.randn(2, 5, TEXT, device=device)
    expected = model(x, text).sample
    sites = _patch(model, FusedTransformer2DModel, FusedTextTransformerBlock, FusedGroupNorm, FusedGEGLU)
    assert _relative_error(model(x, text).sample, expected) <= 1e-5
    ran = {site.op: site.implementations for site in sites}
    assert all(ran[op] == {"triton"} for op in ("group_norm_silu", "add_layer_norm", "geglu")), ran
    assert not any(site.reason or site.fallbacks for site in sites)
