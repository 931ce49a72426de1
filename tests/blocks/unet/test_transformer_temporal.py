"""Transformers over frames (ModelScope's and AnimateDiff's) against the originals, and when they step back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from block_checks import frozen, fused, relative_error, tensor_of
from diffusers.models.attention import FreeNoiseTransformerBlock
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import Tensor, nn

from vidaccel.blocks.unet.transformer_temporal import FusedTransformerTemporalModel
from vidaccel.blocks.unet.unet_motion_model import FusedAnimateDiffTransformer3D
from vidaccel.sites.rules import Swap

CHANNELS = 32
FUSED = {
    TransformerTemporalModel: FusedTransformerTemporalModel,
    AnimateDiffTransformer3D: FusedAnimateDiffTransformer3D,
}
KINDS = ["modelscope", "animatediff"]
SHAPES = [
    pytest.param(2, 2, (1, 4), id="two-clips"),
    pytest.param(1, 5, (1, 3), id="prime-frames-odd-pixels"),
    pytest.param(1, 1, (2, 2), id="one-frame"),
    pytest.param(2, 17, (1, 1), id="more-frames-than-a-tile-has-rows"),
]
ORDERS = pytest.mark.parametrize(
    "order", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"]
)


def transformer(kind: str, *, heads: int = 2, head_dim: int = 16, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    if kind == "modelscope":  # with an inner width of its own, as transformer_in has
        return frozen(TransformerTemporalModel(heads, head_dim, in_channels=CHANNELS, **options))
    options = {"positional_embeddings": "sinusoidal", "num_positional_embeddings": 17} | options
    return frozen(AnimateDiffTransformer3D(heads, head_dim, in_channels=CHANNELS, **options))


def draw(clips: int, num_frames: int, size: tuple[int, int], order: torch.memory_format) -> Tensor:
    return torch.randn(clips * num_frames, CHANNELS, *size).contiguous(memory_format=order)


@torch.no_grad()
def call(module: nn.Module, x: Tensor, num_frames: int, **options: Any) -> Tensor:
    return tensor_of(module(x, num_frames=num_frames, **options))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("clips", "num_frames", "size"), SHAPES)
@ORDERS
def test_equals_the_original(
    kind: str,
    clips: int,
    num_frames: int,
    size: tuple[int, int],
    order: torch.memory_format,
    impl: str,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", impl)
    device = device if impl == "triton" else torch.device("cpu")
    module, x = transformer(kind).to(device), draw(clips, num_frames, size, order).to(device)
    expected = call(module, x, num_frames)
    with fused(module, FUSED[type(module)]) as sites:
        out = call(module, x, num_frames)
        assert torch.equal(call(module, x, num_frames), out)
    assert relative_error(out, expected) <= 1e-5
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert not any(site.fallbacks or site.reason for site in sites.values())
    assert {sites[op].implementation for op in ("temporal_attention", "add_layer_norm")} == {impl}
    assert torch.equal(call(module, x, num_frames), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 40), (1, 80), (1, 160)], ids=["d40", "d80", "d160"])
def test_head_dims_of_animatediff(kind: str, heads: int, head_dim: int, device: torch.device) -> None:
    module, x = transformer(kind, heads=heads, head_dim=head_dim).to(device), draw(1, 4, (1, 3), torch.channels_last)
    expected = call(module, x.to(device), 4)
    with fused(module, FUSED[type(module)]) as sites:
        assert relative_error(call(module, x.to(device), 4), expected) <= 1e-5
    assert sites["temporal_attention"].implementation == "triton"


def test_positions_change_the_result(plain_pytorch: None) -> None:
    """Else a forgotten embedding would pass the tests above."""
    module, x = transformer("animatediff"), draw(1, 5, (2, 2), torch.channels_last)
    with_positions = call(module, x, 5)
    module.transformer_blocks[0].pos_embed = None
    assert relative_error(call(module, x, 5), with_positions) > 1e-3


def test_the_frame_count_is_not_remembered(plain_pytorch: None) -> None:
    """The same tensor may be two clips of three frames or one of six."""
    module, x = transformer("animatediff"), draw(2, 3, (2, 2), torch.channels_last)
    expected = [call(module, x, num_frames) for num_frames in (3, 6)]
    with fused(module, FUSED[type(module)]):
        for num_frames, wanted in zip((3, 6), expected, strict=True):
            assert relative_error(call(module, x, num_frames), wanted) <= 1e-5


def chunk_feed_forward(module: nn.Module) -> None:
    module.transformer_blocks[0].set_chunk_feed_forward(1, 1)


def own_processor(module: nn.Module) -> None:
    module.transformer_blocks[0].attn2.set_processor(AttnProcessor())


def offload_norm(module: nn.Module) -> None:
    norm = module.transformer_blocks[0].norm2
    norm.forward = partial(norm.forward)


def watch_attention(module: nn.Module) -> None:
    module.transformer_blocks[0].attn1.register_forward_hook(lambda *_: None)


def watch_block(module: nn.Module) -> None:
    module.transformer_blocks[0].register_forward_hook(lambda *_: None)


def free_noise(module: nn.Module) -> None:
    dim = module.transformer_blocks[0].dim
    block = FreeNoiseTransformerBlock(dim, 2, 16, double_self_attention=True, context_length=3, context_stride=2)
    module.transformer_blocks[0] = frozen(block)


CHANGES = [
    (chunk_feed_forward, "the feed-forward is chunked"),
    (own_processor, "it has a processor of its own, AttnProcessor"),
    (offload_norm, "a hook replaced the forward of a LayerNorm (offload, casting or cache)"),
    (watch_attention, "a Attention has forward hooks, which only a call of it runs"),
    (watch_block, "a BasicTransformerBlock has forward hooks, which only a call of it runs"),
    (free_noise, "a BasicTransformerBlock was replaced by FreeNoiseTransformerBlock"),
]


@pytest.mark.parametrize(("change", "reason"), CHANGES, ids=[change.__name__ for change, _ in CHANGES])
def test_steps_back_for_a_changed_block(change: Callable[[nn.Module], None], reason: str, plain_pytorch: None) -> None:
    module, x = transformer("animatediff"), draw(1, 4, (2, 2), torch.contiguous_format)
    with fused(module, FUSED[type(module)]) as sites:
        change(module)
        out = call(module, x, 4)
    assert [dict(site.fallbacks) for site in sites.values()] == [{reason: 1}] * len(sites)
    assert torch.equal(out, call(module, x, 4))


def test_steps_back_for_arguments_it_does_not_serve(plain_pytorch: None) -> None:
    module, x = transformer("modelscope"), draw(1, 3, (1, 2), torch.contiguous_format)
    context = torch.randn(2, 5, CHANNELS)
    expected = call(module, x, 3, encoder_hidden_states=context)
    with fused(module, FUSED[type(module)]) as sites:
        assert torch.equal(call(module, x, 3, encoder_hidden_states=context), expected)
        call(module, x, 3, cross_attention_kwargs={"scale": 1.0})
        call(module, x, 3, cross_attention_kwargs={})
    reasons = {"a context was passed": 1, "cross_attention_kwargs were passed": 1}
    assert dict(sites["add_layer_norm"].fallbacks) == reasons


def test_positions_of_another_dtype(plain_pytorch: None) -> None:
    module, x = transformer("animatediff"), draw(1, 3, (2, 2), torch.contiguous_format)
    module.transformer_blocks[0].pos_embed.half()
    expected = call(module, x, 3)
    with fused(module, FUSED[type(module)]) as sites:
        assert torch.equal(call(module, x, 3), expected)
    assert list(sites["add_layer_norm"].fallbacks) == [
        "its positional embedding is torch.float16 on cpu, its input torch.float32 on cpu"
    ]


def test_more_frames_than_positions_is_the_original_error(plain_pytorch: None) -> None:
    """34 frames are twice the 17 positions, which could be taken in turn."""
    module, x = transformer("animatediff"), draw(1, 34, (1, 1), torch.contiguous_format)
    with pytest.raises(RuntimeError, match="must match the size"):
        call(module, x, 34)
    with (
        fused(module, FUSED[type(module)]) as sites,
        pytest.raises(RuntimeError, match="must match the size"),
    ):
        call(module, x, 34)
    assert list(sites["add_layer_norm"].fallbacks) == ["its positional embedding is for up to 17 frames, got 34"]


@pytest.mark.parametrize("kind", KINDS)
def test_one_attention_only(kind: str, plain_pytorch: None) -> None:
    """As in SparseCtrl."""
    module, x = transformer(kind, double_self_attention=False), draw(2, 3, (2, 4), torch.channels_last)
    expected = call(module, x, 3)
    with fused(module, FUSED[type(module)]) as sites:
        assert relative_error(call(module, x, 3), expected) <= 1e-5
    assert not any(site.fallbacks or site.reason for site in sites.values())


@pytest.mark.parametrize("kind", KINDS)
def test_attention_to_a_context_is_left_alone(kind: str) -> None:
    module = transformer(kind, double_self_attention=False, cross_attention_dim=16)
    assert Swap(FUSED[type(module)]).left_alone_reason(module) == "it attends to a context"
