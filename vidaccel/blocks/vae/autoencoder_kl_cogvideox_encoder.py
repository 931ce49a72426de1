"""diffusers' ``autoencoders/autoencoder_kl_cogvideox.py``: the encoder, without cats, pads and copies.

Stock's caller cuts a clip, or a tile of it, into batches of eight or nine frames and calls the encoder for each; a
cache of the last two frames of every convolution's input goes from call to call. Here a batch is rows ``[B, F, H, W,
C]`` from the first convolution to the last (``causal_clip``). ``padded_group_norm`` writes the input of a convolution
behind the two frames that it looks back at. What a convolution leaves out, its bias and the residual, is added by the
pass that sums the statistics of the next norm. The cache that comes and the one that goes are as stock has them, so
that either may run the next call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import (
    CogVideoXDownBlock3D,
    CogVideoXEncoder3D,
    CogVideoXMidBlock3D,
)
from diffusers.models.downsampling import CogVideoXDownsample3D
from torch import Tensor, nn

from vidaccel.blocks.vae.autoencoder_kl_cogvideox import (
    CAUSAL,
    Cache,
    ResnetRows,
    cache_of,
    causal_reason,
    halos_of,
    resnet_reasons,
)
from vidaccel.blocks.vae.causal_clip import (
    Chunk,
    Sum,
    added_up,
    clip_of,
    conv_reason,
    conv_rows,
    images_of,
    latents_reason,
    structure_reason,
)
from vidaccel.kernels.conv.channels_last_weight import channels_last_weight
from vidaccel.kernels.conv.padded_clip import pad_clip
from vidaccel.kernels.norm.padded_group_norm import padded_group_norm, padded_group_norm_ref
from vidaccel.kernels.op import runs_triton
from vidaccel.sites.block import SITES, FusedBlock, call_site, fuses
from vidaccel.sites.plain import plain_reason

__all__ = ["FusedCogVideoXEncoder3D"]

CORNER_PIXELS = 2  # of latents


@fuses(CogVideoXEncoder3D, {"group_norm_silu": "math-exact", "conv_epilogue": "math-exact"})
class FusedCogVideoXEncoder3D(FusedBlock, CogVideoXEncoder3D):
    """The encoder of CogVideoX, of a batch of frames."""

    conv_in: Any
    down_blocks: Any
    mid_block: Any
    norm_out: Any
    conv_out: Any

    @classmethod
    def left_alone_reason(cls, module: Any) -> str | None:
        return structure_reason(module, _reasons)

    def forward(
        self, sample: Tensor, temb: Tensor | None = None, conv_cache: dict[str, Tensor] | None = None
    ) -> Tensor:  # fmt: skip
        if torch.compiler.is_compiling() or not hasattr(self, SITES):  # restored, and somebody has kept this forward
            return CogVideoXEncoder3D.forward(self, sample, temb, conv_cache)
        out: Tensor = call_site(FusedCogVideoXEncoder3D, self, sample, temb, conv_cache)
        return out

    def call_reason(self, sample: Tensor, temb: Tensor | None, conv_cache: Cache | None) -> str | None:
        if temb is not None:
            return "an embedding of the timestep was passed"
        return latents_reason(sample, self.conv_in.conv.weight, "pixels")

    def corner(self, args: Any, kwargs: Any) -> Any:
        sample, _, cache = args
        side = CORNER_PIXELS * 2 ** len(list(_downsamplers(self)))
        halos = {conv: halo[:1] for conv, halo in halos_of(self, cache or {}).items()}
        for conv, level in _levels(self):
            if halos:
                halos[conv] = halos[conv][:, :, : side >> level, : side >> level]
        return (sample[:1, ..., :side, :side].contiguous(), None, cache_of(self, halos) if halos else None), {}

    def fused_forward(
        self, sample: Tensor, temb: Tensor | None, conv_cache: Cache | None
    ) -> tuple[Tensor, Cache]:  # fmt: skip
        return _Encode(self).run(sample, conv_cache or {})


class _Encode(ResnetRows):
    """One call of the modules of an encoder."""

    def __init__(self, encoder: FusedCogVideoXEncoder3D) -> None:
        self._encoder = encoder
        self._norm_op = padded_group_norm if encoder.runs("group_norm_silu") else padded_group_norm_ref

    def run(self, pixels: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """The latents, and stock's cache for the frames behind them."""
        encoder = self._encoder
        chunk = Chunk(Sum(pixels.permute(0, 2, 3, 4, 1)), halos_of(encoder, cache), keep=True)
        buffer = pad_clip(chunk.flow.x, chunk.halos.get(encoder.conv_in), CAUSAL)
        chunk.keep_of(encoder.conv_in, buffer)
        chunk.flow = Sum(conv_rows(buffer, encoder.conv_in.conv), encoder.conv_in.conv.bias)
        del buffer
        for block in (*encoder.down_blocks, encoder.mid_block):
            for resnet in block.resnets:
                self._resnet(chunk, resnet)
            for downsampler in getattr(block, "downsamplers", None) or ():
                self._downsample(chunk, downsampler)
        self._add_up(chunk)
        buffer = self._norm(chunk, encoder.norm_out, encoder.conv_out)
        del chunk.flow
        conv = encoder.conv_out.conv
        latents = clip_of(conv_rows(buffer, conv) + conv.bias).contiguous()
        return latents, cache_of(encoder, chunk.following)

    def _norm(self, chunk: Chunk, norm: Any, conv: nn.Module) -> Tensor:
        flow = chunk.flow
        buffer = self._norm_op(
            flow.x, norm.weight, norm.bias, norm.num_groups, norm.eps, addend=flow.bias, halo=chunk.halos.get(conv),
            padding=CAUSAL, statistics=flow.statistics,
        )  # fmt: skip
        chunk.keep_of(conv, buffer)
        return buffer

    def _add_up(self, chunk: Chunk, *, statistics: bool = True) -> None:
        encoder, x = self._encoder, chunk.flow.x
        wanted = statistics and encoder.runs("group_norm_silu") and runs_triton("padded_group_norm", x)
        chunk.flow = added_up(chunk.flow, fused=encoder.runs("conv_epilogue"), statistics=wanted)

    def _downsample(self, chunk: Chunk, downsampler: Any) -> None:
        self._add_up(chunk, statistics=False)
        rows, conv = chunk.flow.x, downsampler.conv
        del chunk.flow
        if downsampler.compress_time:
            rows = _halved(rows)
        samples = len(rows)
        images = images_of(F.pad(rows, (0, 0, 0, 1, 0, 1)))  # a row below and a column on the right, of zeros
        del rows
        weight = channels_last_weight(conv.weight.unsqueeze(2), images.dtype).squeeze(2)
        made = F.conv2d(images, weight, None, stride=2).permute(0, 2, 3, 1)
        chunk.flow = Sum(made.contiguous().unflatten(0, (samples, -1)), conv.bias)


def _halved(frames: Tensor) -> Tensor:
    """The means of pairs of frames ``[B, F, ...]``, but for the first of an odd number."""
    apart = frames.shape[1] % 2
    pairs = frames[:, apart:].unflatten(1, (-1, 2)).mean(2)
    return torch.cat([frames[:, :1], pairs], dim=1) if apart else pairs


def _downsamplers(encoder: Any) -> Iterator[Any]:
    for block in encoder.down_blocks:
        yield from block.downsamplers or ()


def _levels(encoder: Any) -> Iterator[tuple[nn.Module, int]]:
    """The convolutions that look back, and how often what they read has been halved."""
    level = 0
    yield encoder.conv_in, level
    for block in (*encoder.down_blocks, encoder.mid_block):
        for resnet in block.resnets:
            yield resnet.conv1, level
            yield resnet.conv2, level
        level += len(getattr(block, "downsamplers", None) or ())
    yield encoder.conv_out, level


def _reasons(encoder: Any) -> Iterator[str | None]:
    yield plain_reason(encoder.conv_act, nn.SiLU)
    yield causal_reason(encoder.conv_in, 3)
    yield plain_reason(encoder.mid_block, CogVideoXMidBlock3D)
    for block in (*encoder.down_blocks, encoder.mid_block):
        for resnet in block.resnets:
            yield from resnet_reasons(resnet, _norm_reasons)
    for block in encoder.down_blocks:
        yield plain_reason(block, CogVideoXDownBlock3D)
        for downsampler in block.downsamplers or ():
            yield plain_reason(downsampler, CogVideoXDownsample3D)
            yield conv_reason(downsampler.conv, nn.Conv2d, (3, 3), (0, 0), (2, 2))
    yield from _norm_reasons(encoder.norm_out)
    yield causal_reason(encoder.conv_out, 3)


def _norm_reasons(norm: Any) -> Iterator[str | None]:
    yield plain_reason(norm, nn.GroupNorm)
