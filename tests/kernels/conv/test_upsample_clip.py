from __future__ import annotations

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoUpsampleCausal3D
from torch import Tensor

from vidaccel.kernels.conv.padded_clip import pad_clip
from vidaccel.kernels.conv.upsample_clip import upsample_clip, upsample_clip_padding, upsample_clip_ref

SHAPES = [
    pytest.param((1, 1, 1, 1, 8), id="one-pixel"),
    pytest.param((2, 2, 3, 1, 8), id="batch"),
    pytest.param((1, 4, 2, 5, 16), id="clip"),
]


def upsampler_and_clip(
    shape: tuple[int, ...], factor_t: int, dtype: torch.dtype, device: torch.device
) -> tuple[HunyuanVideoUpsampleCausal3D, Tensor]:
    torch.manual_seed(0)
    channels = shape[-1]
    upsampler = HunyuanVideoUpsampleCausal3D(channels, 2 * channels, upsample_factor=(factor_t, 2, 2))
    return upsampler.to(device, dtype).requires_grad_(False), torch.randn(shape, device=device).to(dtype)


def merged(upsampler: HunyuanVideoUpsampleCausal3D, rows: Tensor, factor_t: int) -> Tensor:
    padded = pad_clip(rows, None, upsample_clip_padding(factor_t))
    return upsample_clip(padded, upsampler.conv.conv.weight, upsampler.conv.conv.bias, factor_t=factor_t)


@pytest.mark.parametrize("factor_t", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_upsampler_of_diffusers(shape: tuple[int, ...], factor_t: int, device: torch.device) -> None:
    upsampler, rows = upsampler_and_clip(shape, factor_t, torch.float64, device)
    expected = upsampler(rows.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
    conv = upsampler.conv.conv
    for out in (
        merged(upsampler, rows, factor_t),
        upsample_clip_ref(rows, conv.weight, conv.bias, factor_t=factor_t),
    ):
        assert out.is_contiguous()
        torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_rounds_no_worse_than_twice_as_often(dtype: torch.dtype, device: torch.device) -> None:
    upsampler, rows = upsampler_and_clip((1, 3, 4, 5, 64), 2, dtype, device)
    out, conv = merged(upsampler, rows, 2), upsampler.conv.conv
    stock = upsample_clip_ref(rows, conv.weight, conv.bias, factor_t=2)
    gold = upsample_clip_ref(rows.double(), conv.weight.double(), conv.bias.double(), factor_t=2)
    error, own = ((x.double() - gold).norm() for x in (out, stock))
    assert error <= 2 * own


def test_weights_changed_in_place_are_seen(device: torch.device) -> None:
    upsampler, rows = upsampler_and_clip((1, 2, 2, 2, 8), 2, torch.float32, device)
    merged(upsampler, rows, 2)
    weight = upsampler.conv.conv.weight
    weight.data.mul_(-2)  # which no version counter tells of
    expected = upsample_clip_ref(rows, weight, upsampler.conv.conv.bias, factor_t=2)
    torch.testing.assert_close(merged(upsampler, rows, 2), expected, rtol=1e-2, atol=1e-2)
