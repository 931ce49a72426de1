"""Wan's decoder and encoder: the memory that they hold, what is copied in them, and what a check of them finds."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from block_checks import OfPyTorch, relative_error
from copy_checks import Copies, Held, hollow_out
from diffusers import AutoencoderKLWan
from tiny_models import tiny_autoencoder_kl_wan
from torch import Tensor, nn
from vae_checks import PIXEL_FAULTS, assert_no_worse, check_fault_found, decode, encode, ran

from vidaccel import patch_module
from vidaccel.blocks.vae import causal_clip, wan_layers, wan_structure
from vidaccel.blocks.vae.autoencoder_kl_wan import FusedWanDecoder3d, FusedWanEncoder3d
from vidaccel.blocks.vae.wan_structure import decode_bytes, encode_bytes

WAN_22 = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}


def wide_vae() -> AutoencoderKLWan:
    """Two ResNet blocks to a level, as wide as a kernel of the upsampler needs it."""
    return tiny_autoencoder_kl_wan(base_dim=16, num_res_blocks=2)


def draw(frames: int = 3, side: int = 4) -> Tensor:
    return torch.randn(1, 4, frames, side, side, generator=torch.Generator().manual_seed(0))


def draw_clip(frames: int, side: int) -> Tensor:
    return torch.rand(1, 3, frames, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def hollow(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel and no causal convolution runs: they leave memory in the order that a GPU's have."""
    hollow_out(monkeypatch)


def in_pieces(monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    """Let the last up-blocks work on so many numbers at once."""
    monkeypatch.setattr(wan_structure, "TILE_CHANNELS", 1)
    monkeypatch.setattr(wan_structure, "MOST_NUMBERS", numbers)


@pytest.mark.parametrize(
    ("fit", "numbers"),
    [(9, 2**31), (4, 2**31), (2, 2**31), (9, 700_000)],
    ids=["whole", "halves", "quarters", "whole-in-pieces"],
)
@pytest.mark.parametrize("options", [{}, WAN_22], ids=["wan2.1", "wan2.2"])
def test_memory_held(
    options: dict[str, Any], fit: int, numbers: int, hollow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted without the workspaces of convolutions, and the pixels."""
    in_pieces(monkeypatch, numbers)
    vae, z = tiny_autoencoder_kl_wan(base_dim=16, num_res_blocks=2, **options), draw(frames=9, side=8)
    needed = decode_bytes(vae.decoder, z, fit)
    monkeypatch.setattr(causal_clip, "free_bytes", lambda _: needed)
    with patch_module(vae, self_check=False) as report:
        pixels = decode(vae, z)
        with Held() as held:
            decode(vae, z)
    went = ran(report)
    step = int(min(went).split()[0])
    assert step <= fit and len(went) == 1
    assert 0.8 * decode_bytes(vae.decoder, z, step) <= held.most - pixels.nbytes <= needed


@pytest.mark.parametrize("fit", [32, 16, 8], ids=["whole", "halves", "quarters"])
@pytest.mark.parametrize("options", [{}, WAN_22], ids=["wan2.1", "wan2.2"])
def test_memory_held_by_the_encoder(
    options: dict[str, Any], fit: int, hollow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted without the workspaces of convolutions, the clip, and the same in patches."""
    side = 64 * options.get("patch_size", 1)
    vae, clip = tiny_autoencoder_kl_wan(base_dim=16, num_res_blocks=2, **options), draw_clip(33, side)
    read = torch.empty(1, options.get("in_channels", 3), 33, 64, 64)
    needed = encode_bytes(vae.encoder, read, fit)
    monkeypatch.setattr(causal_clip, "free_bytes", lambda _: needed)
    with patch_module(vae, self_check=False) as report:
        encode(vae, clip)
        with Held() as held:
            encode(vae, clip)
    assert f"{fit} of 32 frames behind the first" in ran(report)
    assert 0.8 * needed <= held.most - (2 if options else 1) * read.nbytes <= needed


def test_no_large_tensor_is_copied(hollow: None) -> None:
    vae, z = wide_vae(), draw(frames=5, side=8)
    with patch_module(vae, self_check=False):
        pixels = decode(vae, z)
        with Copies(smallest=2 * pixels.numel()) as copies:
            decode(vae, z)
    assert not [found for found in copies.found if "of another memory order" not in found]


@pytest.mark.parametrize("fault", PIXEL_FAULTS)
def test_what_the_decoder_does_wrong_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")
    check_fault_found(tiny_autoencoder_kl_wan(), draw(), FusedWanDecoder3d, fault, monkeypatch)


@pytest.mark.parametrize("fault", PIXEL_FAULTS)
def test_what_the_encoder_does_wrong_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")
    vae = tiny_autoencoder_kl_wan()
    check_fault_found(vae, draw_clip(5, 16), FusedWanEncoder3d, fault, monkeypatch, encode)


@pytest.mark.parametrize("seed", [9, 12, 43])
def test_few_channels_are_no_fault(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm of two channels may be of next to nothing, of which both decoders make roundings."""
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")
    vae = tiny_autoencoder_kl_wan(seed, base_dim=2)
    with patch_module(vae) as report:
        decode(vae, draw())
        assert {site.state for site in report.sites} == {"active"}, str(report)


@pytest.mark.parametrize("options", [{}, WAN_22], ids=["wan2.1", "wan2.2"])
@pytest.mark.slow
def test_with_the_kernels(options: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one go, in pieces, and in chunks."""
    vae, z = tiny_autoencoder_kl_wan(base_dim=16, **options).to(device), draw(frames=2, side=1).to(device)
    with torch.backends.cudnn.flags(allow_tf32=False):
        expected = decode(vae, z)
        with patch_module(vae, self_check=False) as report:
            assert relative_error(decode(vae, z), expected) <= 1e-5
            with pytest.MonkeyPatch.context() as patch:
                in_pieces(patch, 0)
                assert relative_error(decode(vae, z), expected) <= 1e-5
                assert "2 of 2 frames, 1 of 5 in the last up-blocks" in str(report)
                patch.setattr(causal_clip, "free_bytes", lambda _: 0)
                assert relative_error(decode(vae, z), expected) <= 1e-5
            monkeypatch.setattr(causal_clip, "free_bytes", lambda _: 0)
            assert relative_error(decode(vae, z), expected) <= 1e-5
    assert not report.fallbacks, str(report)
    ways = {site.op: site.implementations for site in report.sites if site.path != "encoder"}
    assert "triton" in ways["rms_norm_silu"] & ways["conv_epilogue"] and ways["upsample_conv"] & {"whole", "halves"}
    assert {"2 of 2 frames", "1 of 2 frames"} < ways["whole_clip"]


def convolve_as_a_gpu(exact: Any, x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Float32 is rounded to the 10 bits of TF32; all is summed in float32."""
    operands = (x, weight)
    if x.dtype == torch.float32:
        bits = ((operand.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF for operand in operands)
        operands = tuple(operand.view(torch.float32) for operand in bits)
    return exact(*(operand.float() for operand in operands), *args, **kwargs).to(x.dtype)


@pytest.mark.parametrize("options", [{}, WAN_22], ids=["wan2.1", "wan2.2"])
@pytest.mark.parametrize(
    ("run", "clip"), [(decode, draw(frames=3, side=4)), (encode, 50 * draw_clip(9, 64))], ids=["decode", "encode"]
)
def test_float16_operands_lose_no_more_than_tf32(
    run: Callable[[Any, Tensor], Tensor], clip: Tensor, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does to float32, modelled on a CPU: of every frame, at most twice the error of stock's."""
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")
    vae = tiny_autoencoder_kl_wan(base_dim=16, num_res_blocks=2, **options)
    gold = run(copy.deepcopy(vae).double(), clip.double())
    for name in ("conv2d", "conv3d"):
        monkeypatch.setattr(F, name, OfPyTorch(functools.partial(convolve_as_a_gpu, getattr(F, name))))
    for kind, name in ((nn.Conv3d, "conv3d"), (nn.Conv2d, "conv2d")):
        monkeypatch.setattr(kind, "_conv_forward", functools.partialmethod(convolve_by, name))
    stock = run(vae, clip)
    monkeypatch.setattr(wan_structure, "takes_tf32", lambda clip: True)
    with patch_module(vae, self_check=False) as report:
        out = run(vae, clip)
    assert not report.fallbacks, str(report)
    assert {"float16"} in [site.implementations for site in report.sites if site.op == "half_operands"]
    assert_no_worse(out, stock, gold)


def convolve_by(conv: Any, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As ``_conv_forward``, by a function of ``torch.nn.functional`` that may have been replaced."""
    return getattr(F, name)(x, weight, bias, stride=conv.stride, padding=conv.padding)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("fit", "numbers"), [(9, 2**31), (3, 2**31), (9, 0)], ids=["whole", "chunks", "frame-by-frame-at-last"]
)
@pytest.mark.parametrize(
    ("options", "latents"),
    [({}, (1, 16, 9, 30, 52)), ({**WAN_22, "z_dim": 48, "decoder_base_dim": 256}, (1, 48, 9, 12, 20))],
    ids=["wan2.1", "wan2.2"],
)
def test_as_wide_as_released(
    options: dict[str, Any],
    latents: tuple[int, ...],
    fit: int,
    numbers: int,
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error of every frame to float32 without TF32, seams between chunks and pieces among them, beside stock's."""
    in_pieces(monkeypatch, numbers)
    with torch.device(device):
        vae = AutoencoderKLWan(**options).eval()
        z = torch.randn(latents)
    with torch.backends.cudnn.flags(allow_tf32=False):
        gold = decode(vae, z)
    vae, z = vae.to(dtype), z.to(dtype)
    stock = decode(vae, z)
    monkeypatch.setattr(wan_layers, "decode_bytes", lambda decoder, latents, frames: frames)
    monkeypatch.setattr(causal_clip, "free_bytes", lambda _: fit)
    with patch_module(vae) as report:
        out = decode(vae, z)
    assert not report.fallbacks, str(report)
    operands = {way for site in report.sites if site.op == "half_operands" for way in site.implementations}
    assert operands == {"bfloat16" if dtype == torch.bfloat16 else "float16"}
    if not options:
        assert {"gemm"} in [site.implementations for site in report.sites if site.op == "spatial_attention"]
    assert_no_worse(out, stock, gold)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fit", [16, 4], ids=["whole", "chunks"])
@pytest.mark.parametrize(
    ("options", "clip"),
    [
        ({}, (1, 3, 17, 120, 208)),
        ({**WAN_22, "z_dim": 48, "base_dim": 160, "decoder_base_dim": 256}, (1, 3, 17, 128, 224)),
    ],
    ids=["wan2.1", "wan2.2"],
)
def test_encoder_as_wide_as_released(
    options: dict[str, Any],
    clip: tuple[int, ...],
    fit: int,
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error of every latent frame to float64, seams between chunks among them, beside stock's."""
    with torch.device(device):
        vae = AutoencoderKLWan(**options).eval().to(dtype)
        x = (torch.rand(clip) * 2 - 1).to(dtype)
    gold = encode(copy.deepcopy(vae).double(), x.double())
    stock = encode(vae, x)
    monkeypatch.setattr(wan_layers, "encode_bytes", lambda encoder, clip, frames: frames)
    monkeypatch.setattr(causal_clip, "free_bytes", lambda _: fit)
    with patch_module(vae) as report:
        out = encode(vae, x)
    assert not report.fallbacks, str(report)
    assert f"{fit} of 16 frames behind the first" in ran(report)
    operands = {way for site in report.sites if site.op == "half_operands" for way in site.implementations}
    assert operands == {"bfloat16" if dtype == torch.bfloat16 else "float16"}
    assert_no_worse(out, stock, gold)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_encoder_memory_on_a_gpu(dtype: torch.dtype, device: torch.device) -> None:
    """The workspaces of convolutions among it; nothing stays behind."""
    with torch.device(device):
        vae = AutoencoderKLWan().to(dtype).eval()
        x = torch.rand(1, 3, 17, 240, 416, dtype=dtype)
    with patch_module(vae, self_check=False):
        for _ in range(2):
            encode(vae, x)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        latents = encode(vae, x)
        peak = torch.cuda.max_memory_allocated(device) - before
        assert peak <= encode_bytes(vae.encoder, x, 16) + x.nbytes
        assert torch.cuda.memory_allocated(device) - before <= 2 * latents.nbytes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_memory_on_a_gpu(dtype: torch.dtype, device: torch.device) -> None:
    """The workspaces of convolutions among it; nothing stays behind."""
    with torch.device(device):
        vae = AutoencoderKLWan().to(dtype).eval()
        z = torch.randn(1, 16, 9, 30, 52, dtype=dtype)
    with patch_module(vae, self_check=False):
        for _ in range(2):
            decode(vae, z)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        pixels = decode(vae, z)
        peak = torch.cuda.max_memory_allocated(device) - before - pixels.nbytes
        assert torch.cuda.memory_allocated(device) - before <= 1.01 * pixels.nbytes
        estimate = decode_bytes(vae.decoder, z)
    assert 0.7 * estimate <= peak <= 1.2 * estimate, f"{peak / 2**20:.0f} MiB, not {estimate / 2**20:.0f} MiB"
