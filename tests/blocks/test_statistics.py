"""Norms whose statistics the kernel before them has computed: through real blocks, by the kernels that are launched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from block_checks import frozen, fused
from diffusers import AutoencoderKLTemporalDecoder
from diffusers.models.resnet import ResnetBlock2D, SpatioTemporalResBlock, TemporalConvLayer
from torch import Tensor, nn

from vidaccel.blocks.unet.resnet import FusedResnetBlock2D, FusedTemporalConvLayer
from vidaccel.kernels.launch import Launch
from vidaccel.kernels.norm.channel_statistics import carried
from vidaccel.patching.patch import patch_module


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each kernel has been launched; the comparison with the original code is off.

    The convolution over frames is the library's: our own computes no statistics.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setenv("VIDACCEL_SELF_CHECK", "0")
    kernels = ("group_norm_silu=triton", "conv_epilogue=triton", "upsample_conv=triton", "temporal_conv=torch")
    monkeypatch.setenv("VIDACCEL_IMPL", ",".join(kernels))
    counts: Counter[str] = Counter()
    launch = Launch.__call__

    def counted(self: Launch, *tensors: Any) -> None:
        counts[self._kernel.__name__] += 1
        launch(self, *tensors)

    monkeypatch.setattr(Launch, "__call__", counted)
    yield counts


def channels_last(*shape: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def resnet(width: int = 32) -> nn.Module:
    return frozen(ResnetBlock2D(in_channels=width, out_channels=width, temb_channels=None, groups=4))


@torch.no_grad()
def test_from_one_resnet_block_to_the_next(launched: Counter[str], device: torch.device) -> None:
    first, second, x = resnet().to(device), resnet().to(device), channels_last(2, 32, 6, 5).to(device)
    expected = second(first(x, None), None)
    with fused(first, FusedResnetBlock2D), fused(second, FusedResnetBlock2D):
        between = first(x, None)
        assert carried(between) is not None
        out = second(between, None)
    assert launched["_apply_kernel"] == 4 and launched["_chunk_stats_kernel"] == 3
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_from_frames_to_clips_and_back(launched: Counter[str], device: torch.device) -> None:
    """A ResNet block of frames, four norms over all frames of a clip, and a norm of frames again."""
    before, after = resnet().to(device), resnet().to(device)
    layer = frozen(TemporalConvLayer(32, 32, norm_num_groups=4)).to(device)
    x = channels_last(6, 32, 4, 5).to(device)
    expected = after(layer(before(x, None), num_frames=3), None)
    with (
        fused(before, FusedResnetBlock2D),
        fused(layer, FusedTemporalConvLayer),
        fused(after, FusedResnetBlock2D),
    ):
        out = after(layer(before(x, None), num_frames=3), None)
    assert launched["_apply_kernel"] == 8 and launched["_chunk_stats_kernel"] == 6
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_decoder_of_clips(launched: Counter[str], device: torch.device) -> None:
    """Statistics from every sum of a block, and from the upsampler."""
    down = ("DownEncoderBlock2D",) * 2
    vae = frozen(AutoencoderKLTemporalDecoder(down_block_types=down, block_out_channels=(32, 32))).to(device)
    blocks = [module for module in vae.decoder.modules() if isinstance(module, SpatioTemporalResBlock)]
    z = channels_last(3, 4, 4, 4).to(device)
    expected = vae.decode(z, num_frames=3).sample
    with patch_module(vae):
        launched.clear()
        out = vae.decode(z, num_frames=3).sample
    norms = launched["_apply_kernel"]
    assert len(blocks) == 5 and norms >= 4 * len(blocks) + 1
    # Of a block the first norm and the third go by what came before them, and so does the last of all; not the very
    # first, nor the one behind the attention, whose residual PyTorch adds.
    assert launched["_chunk_stats_kernel"] <= norms - (2 * len(blocks) + 1) + 2
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
