"""diffusers' ``autoencoders/autoencoder_kl_mochi.py``: the decoder, without pads, copies and permutes.

Stock pads the input of every convolution by a pass of its own, normalises frames that it has copied out of the clip,
and permutes clips for a projection and back. Here clips are rows ``[B, F, H, W, C]`` from the first convolution to the
last (``causal_clip``). The pass that adds a convolution's bias and the residual sums the statistics of the next norm;
``padded_group_norm`` normalises each frame and writes a convolution's input with the frames and pixels that it repeats
around it; ``pixel_shuffle`` puts the channels that a projection made into place.

The decoder is causal. Where memory does not hold a clip, as many latent frames as it does go at once, each
convolution's last two frames carried on to the next chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d, CogVideoXSafeConv3d
from diffusers.models.autoencoders.autoencoder_kl_mochi import (
    MochiChunkedGroupNorm3D,
    MochiDecoder3D,
    MochiMidBlock3D,
    MochiResnetBlock3D,
    MochiUpBlock3D,
)
from torch import Tensor, nn

from vidaccel.blocks.vae.causal_clip import (
    UNPADDED,
    Chunk,
    Halos,
    Sum,
    added_up,
    conv_reason,
    conv_rows,
    decode_in_chunks,
    out_of_memory,
    structure_reason,
    tell_chunk,
    whole_clip_reason,
)
from vidaccel.blocks.vae.tile_batches import TileDecoder
from vidaccel.kernels.conv.padded_clip import Padding
from vidaccel.kernels.conv.pixel_conv import pixel_conv, pixel_conv_ref
from vidaccel.kernels.conv.pixel_shuffle import pixel_shuffle, pixel_shuffle_ref
from vidaccel.kernels.norm.padded_group_norm import padded_group_norm, padded_group_norm_ref
from vidaccel.kernels.norm.rms_norm_silu import rms_norm_silu, rms_norm_silu_ref
from vidaccel.kernels.op import runs_triton
from vidaccel.sites.block import call_site, cut_corner, fuses
from vidaccel.sites.plain import plain_reason

__all__ = ["FusedMochiDecoder3D", "decode_bytes"]

CAUSAL = Padding(before=2, border=1, frame_mode="replicate", pixel_mode="replicate")
CORNER_FRAMES = 3  # what the last one looks back at is handed on (decode_in_chunks)
_MARGIN = 1.1  # the allocator's rounding, the borders, the convolutions' workspaces, all that is small


@fuses(
    MochiDecoder3D,
    {
        "whole_clip": "math-exact",
        "group_norm_silu": "math-exact",
        "conv_epilogue": "math-exact",
        "pixel_shuffle": "math-exact",
        "rms_norm_silu": "math-exact",
        "pixel_conv": "math-exact",
    },
)
class FusedMochiDecoder3D(TileDecoder, MochiDecoder3D):
    """The decoder of Mochi, of a clip or of a tile."""

    conv_in: Any
    block_in: Any
    up_blocks: Any
    block_out: Any
    proj_out: Any

    @classmethod
    def left_alone_reason(cls, module: Any) -> str | None:
        return structure_reason(module, _reasons)

    def forward(self, hidden_states: Tensor, conv_cache: dict[str, Tensor] | None = None) -> Tensor:
        if torch.compiler.is_compiling():
            return MochiDecoder3D.forward(self, hidden_states, conv_cache)
        out: Tensor = call_site(FusedMochiDecoder3D, self, hidden_states, conv_cache)
        return out

    def call_reason(self, hidden_states: Tensor, conv_cache: dict[str, Tensor] | None) -> str | None:
        return whole_clip_reason(self, hidden_states, self.conv_in.weight)

    def bytes_at_once(self, latents: Tensor) -> int:
        return decode_bytes(self, latents, latents.shape[2])

    def corner(self, args: Any, kwargs: Any) -> Any:
        return cut_corner((args[0][:1, :, :CORNER_FRAMES], None), {}, most_whole=0)

    def fused_forward(self, hidden_states: Tensor, conv_cache: dict[str, Tensor] | None) -> tuple[Tensor, Any]:
        """The cache that comes is not read and the one that goes is empty: stock's is, where frames are repeated."""
        blocks = {"block_in": self.block_in, "block_out": self.block_out}
        blocks |= {f"up_block_{at}": block for at, block in enumerate(self.up_blocks)}
        cache = {
            name: {f"resnet_{at}": {"conv1": None, "conv2": None} for at in range(len(block.resnets))}
            for name, block in blocks.items()
        }
        return _Decode(self).run(hidden_states), cache


class _Decode:
    """One decode of latents by the modules of a decoder."""

    def __init__(self, decoder: FusedMochiDecoder3D) -> None:
        self._decoder = decoder
        self._norm_op = padded_group_norm if decoder.runs("group_norm_silu") else padded_group_norm_ref

    def run(self, latents: Tensor) -> Tensor:
        decoder = self._decoder
        samples, _, frames, height, width = latents.shape
        rate, scale = 1, 1
        for block in decoder.up_blocks:
            rate, scale = rate * block.temporal_expansion, scale * block.spatial_expansion
        height, width = height * scale, width * scale
        pixels = latents.new_empty(samples, len(decoder.proj_out.weight), frames * rate, height, width)
        halos: Halos = {}

        def decode(start: int, end: int) -> None:
            nonlocal halos
            out = pixels[:, :, start * rate : end * rate]
            halos = self._chunk(latents[:, :, start:end], halos, out, end < frames)

        needs = partial(decode_bytes, decoder, latents)
        step = decode_in_chunks(
            frames, latents.device, needs, decode, partial(out_of_memory, samples, height, width)
        )  # fmt: skip
        tell_chunk(decoder, step, frames)
        return pixels

    def _chunk(self, latents: Tensor, halos: Halos, out: Tensor, keep: bool) -> Halos:
        decoder = self._decoder
        rows = latents.permute(0, 2, 3, 4, 1).contiguous()
        chunk = Chunk(Sum(conv_rows(rows, decoder.conv_in), decoder.conv_in.bias), halos, keep)
        for block in (decoder.block_in, *decoder.up_blocks, decoder.block_out):
            for resnet in block.resnets:
                self._resnet(chunk, resnet)
            if isinstance(block, MochiUpBlock3D):
                self._upsample(chunk, block)
        flow, norm = chunk.flow, rms_norm_silu if decoder.runs("rms_norm_silu") else rms_norm_silu_ref
        _, rows = norm(flow.x, bias=flow.bias, residual=flow.residual, kind="none", keep=False)
        del chunk.flow, flow
        run = pixel_conv if decoder.runs("pixel_conv") else pixel_conv_ref
        out.copy_(run(rows, decoder.proj_out.weight[:, :, None, None, None], decoder.proj_out.bias))
        return chunk.following

    def _add_up(self, chunk: Chunk, *, statistics: bool = True) -> None:
        """Let what flows be the sum, with the statistics of its frames if the kernel of a norm wants them."""
        decoder, x = self._decoder, chunk.flow.x
        wanted = statistics and decoder.runs("group_norm_silu") and runs_triton("padded_group_norm", x)
        chunk.flow = added_up(chunk.flow, fused=decoder.runs("conv_epilogue"), statistics=wanted)

    def _conv(self, chunk: Chunk, norm: Any, conv: Any) -> Tensor:
        """What flows, through a norm, SiLU and a convolution, whose bias is left out."""
        flow, group_norm = chunk.flow, norm.norm_layer
        buffer = self._norm_op(
            flow.x, group_norm.weight, group_norm.bias, group_norm.num_groups, group_norm.eps, addend=flow.bias,
            halo=chunk.halos.get(conv), padding=CAUSAL, span=1, statistics=flow.statistics,
        )  # fmt: skip
        del chunk.flow, flow
        chunk.keep_of(conv, buffer[:, :, 1:-1, 1:-1], CAUSAL.before)
        return conv_rows(buffer, conv.conv, padding=UNPADDED)

    def _resnet(self, chunk: Chunk, resnet: Any) -> None:
        self._add_up(chunk)
        residual = chunk.flow.x
        chunk.flow = Sum(self._conv(chunk, resnet.norm1, resnet.conv1), resnet.conv1.conv.bias)
        made = self._conv(chunk, resnet.norm2, resnet.conv2)
        chunk.flow = Sum(made, resnet.conv2.conv.bias, residual)

    def _upsample(self, chunk: Chunk, block: Any) -> None:
        self._add_up(chunk, statistics=False)
        cell = block.temporal_expansion, block.spatial_expansion, block.spatial_expansion
        # stock's channels are those of a pixel's cell for each channel; here those of a pixel are together
        weight, bias = (
            x.unflatten(0, (-1, cell[0] * cell[1] * cell[2])).transpose(0, 1).flatten(0, 1)
            for x in (block.proj.weight, block.proj.bias)
        )
        made = F.linear(chunk.flow.x, weight)
        del chunk.flow
        run = pixel_shuffle if self._decoder.runs("pixel_shuffle") else pixel_shuffle_ref
        chunk.flow = Sum(run(made, bias, cell=cell))


def decode_bytes(decoder: Any, latents: Tensor, frames: int) -> int:
    """Most memory that the layers hold at once, for so many latent frames of a clip."""
    pixels = latents.shape[0] * latents.shape[3] * latents.shape[4]
    channels = frames * max(_channels_held(decoder))
    if frames < latents.shape[2]:
        channels += 2 * _halo_channels(decoder)  # those of the chunk before, and those for the next
    return int(channels * pixels * latents.element_size() * _MARGIN)


def _blocks(decoder: Any) -> Iterator[tuple[Any, int, int]]:
    """Every block, and how many pixels and frames a latent pixel and a latent frame are to it."""
    area, rate = 1, 1
    for block in (decoder.block_in, *decoder.up_blocks, decoder.block_out):
        yield block, area, rate
        if isinstance(block, MochiUpBlock3D):
            area, rate = area * block.spatial_expansion**2, rate * block.temporal_expansion


def _halo_channels(decoder: Any) -> int:
    """How many channels' worth the frames are that a chunk leaves to the next, in units of a latent pixel."""
    resnets = ((resnet, area) for block, area, _ in _blocks(decoder) for resnet in block.resnets)
    return CAUSAL.before * sum(2 * area * resnet.out_channels for resnet, area in resnets)


def _channels_held(decoder: Any) -> Iterator[int]:
    """For every layer: how many channels' worth of tensors it holds at its worst, in units of a latent pixel."""
    for block, area, rate in _blocks(decoder):
        for resnet in block.resnets:
            yield area * rate * 3 * resnet.out_channels  # a residual, a convolution's input and output
        if isinstance(block, MochiUpBlock3D):
            projected = block.proj.out_features
            yield area * rate * (projected + max(block.proj.in_features, projected))  # behind or before it is in place


def _reasons(decoder: Any) -> Iterator[str | None]:
    yield plain_reason(decoder.nonlinearity, nn.SiLU)
    yield conv_reason(decoder.conv_in, nn.Conv3d, (1,) * 3, (0,) * 3)
    for block in (decoder.block_in, *decoder.up_blocks, decoder.block_out):
        if block in (decoder.block_in, decoder.block_out):
            yield plain_reason(block, MochiMidBlock3D)
            if any(attention is not None for attention in block.attentions):
                yield "it has attention, as only encoders do"
            if not len(block.resnets) == len(block.attentions) == len(block.norms):  # stock code goes by the shortest
                yield "it has not as many resnets as attentions and norms"
        else:
            yield plain_reason(block, MochiUpBlock3D)
            yield _linear_reason(block.proj)
        for resnet in block.resnets:
            yield plain_reason(resnet, MochiResnetBlock3D)
            yield plain_reason(resnet.nonlinearity, nn.SiLU)
            for norm, conv in ((resnet.norm1, resnet.conv1), (resnet.norm2, resnet.conv2)):
                yield plain_reason(norm, MochiChunkedGroupNorm3D)
                yield plain_reason(norm.norm_layer, nn.GroupNorm)
                yield _causal_reason(conv)
            if resnet.in_channels != resnet.out_channels:
                yield "a resnet changes the number of channels"
    yield _linear_reason(decoder.proj_out)


def _linear_reason(layer: Any) -> str | None:
    return plain_reason(layer, nn.Linear) or ("a projection has no bias" if layer.bias is None else None)


def _causal_reason(conv: Any) -> str | None:
    if reason := plain_reason(conv, CogVideoXCausalConv3d):
        return reason
    if conv.pad_mode != "replicate" or tuple(conv.time_causal_padding) != (1, 1, 1, 1, 2, 0):
        return "a convolution is not padded by what it repeats (framewise decoding)"
    return conv_reason(conv.conv, CogVideoXSafeConv3d, (3,) * 3, (0,) * 3)
