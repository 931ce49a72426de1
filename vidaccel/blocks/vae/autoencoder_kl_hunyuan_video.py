"""diffusers' ``autoencoders/autoencoder_kl_hunyuan_video.py``: decoder and encoder, without pads, copies and a mask.

Stock pads the input of every convolution by a pass of its own, normalises in an order of memory that the convolutions
do not like, stores every upsampled clip, and makes a mask of all pairs of tokens. Here clips are rows ``[B, F, H, W,
C]`` from the first convolution to the last (``causal_clip``). The pass that adds a convolution's bias and the residual
sums the statistics of the next norm; ``padded_group_norm`` writes a convolution's input with the frames and pixels that
it repeats around it; ``upsample_clip`` convolves the small clip instead of the large one. A frame's attention sees the
frames up to it, so each is a product with a longer part of the keys.

A GroupNorm has the statistics of all frames that a coder is given, so these go through it together. What stock's
caller gives it, a whole clip or a tile in time and space, stays what it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import (
    HunyuanVideoCausalConv3d,
    HunyuanVideoDecoder3D,
    HunyuanVideoDownBlock3D,
    HunyuanVideoDownsampleCausal3D,
    HunyuanVideoEncoder3D,
    HunyuanVideoMidBlock3D,
    HunyuanVideoResnetBlockCausal3D,
    HunyuanVideoUpBlock3D,
    HunyuanVideoUpsampleCausal3D,
)
from torch import Tensor, nn

from vidaccel.blocks.unet.attention_processor import attention_reason
from vidaccel.blocks.vae.causal_clip import (
    UNPADDED,
    Chunk,
    Sum,
    added_up,
    clip_of,
    conv_reason,
    conv_rows,
    decode_in_chunks,
    dropout_reason,
    out_of_memory,
    structure_reason,
    tell_chunk,
    upsamplers_of,
    whole_clip_reason,
)
from vidaccel.blocks.vae.tile_batches import TileDecoder
from vidaccel.kernels.attention.spatial_attention import spatial_attention, spatial_attention_ref
from vidaccel.kernels.conv.channels_last_weight import channels_last_weight
from vidaccel.kernels.conv.padded_clip import NO_PADDING, Padding, pad_clip
from vidaccel.kernels.conv.pixel_conv import pixel_conv, pixel_conv_ref
from vidaccel.kernels.conv.pixel_shuffle import pixel_shuffle, pixel_shuffle_ref
from vidaccel.kernels.conv.upsample_clip import upsample_clip, upsample_clip_padding, upsample_clip_ref
from vidaccel.kernels.norm.padded_group_norm import padded_group_norm, padded_group_norm_ref
from vidaccel.kernels.norm.rms_norm_silu import rms_norm_silu, rms_norm_silu_ref
from vidaccel.kernels.op import runs_triton
from vidaccel.sites.block import FusedBlock, call_site, cut_corner, fuses
from vidaccel.sites.plain import plain_reason

__all__ = ["FusedHunyuanVideoDecoder3D", "FusedHunyuanVideoEncoder3D", "decode_bytes", "encode_bytes"]

CAUSAL = Padding(before=2, border=1, frame_mode="replicate", pixel_mode="replicate")
CORNER_FRAMES = 3  # of latents
CORNER_PIXELS = 2
_MARGIN = 1.1  # the allocator's rounding, the borders, the convolutions' workspaces, all that is small


@fuses(
    HunyuanVideoDecoder3D,
    {
        "whole_clip": "math-exact",
        "group_norm_silu": "math-exact",
        "conv_epilogue": "math-exact",
        "upsample_clip": "math-exact",
        "rms_norm_silu": "math-exact",
        "pixel_shuffle": "math-exact",
        "pixel_conv": "math-exact",
        "spatial_attention": "math-exact",
    },
)
class FusedHunyuanVideoDecoder3D(TileDecoder, HunyuanVideoDecoder3D):
    """The decoder of HunyuanVideo, of a clip or of a tile."""

    conv_in: Any
    mid_block: Any
    up_blocks: Any
    conv_norm_out: Any
    conv_out: Any

    @classmethod
    def left_alone_reason(cls, module: Any) -> str | None:
        return structure_reason(module, _reasons)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return HunyuanVideoDecoder3D.forward(self, hidden_states)
        out: Tensor = call_site(FusedHunyuanVideoDecoder3D, self, hidden_states)
        return out

    def call_reason(self, hidden_states: Tensor) -> str | None:
        return whole_clip_reason(self, hidden_states, self.conv_in.conv.weight)

    def bytes_at_once(self, latents: Tensor) -> int:
        return decode_bytes(self, latents)

    def corner(self, args: Any, kwargs: Any) -> Any:
        return cut_corner((args[0][:1, :, :CORNER_FRAMES],), {}, most_whole=0)

    def fused_forward(self, hidden_states: Tensor) -> Tensor:
        return _Decode(self).run(hidden_states)


@fuses(
    HunyuanVideoEncoder3D,
    {
        "whole_clip": "math-exact",
        "group_norm_silu": "math-exact",
        "conv_epilogue": "math-exact",
        "rms_norm_silu": "math-exact",
        "spatial_attention": "math-exact",
    },
)
class FusedHunyuanVideoEncoder3D(FusedBlock, HunyuanVideoEncoder3D):
    """The encoder of HunyuanVideo, of a clip or of a tile."""

    conv_in: Any
    mid_block: Any
    down_blocks: Any
    conv_norm_out: Any
    conv_out: Any

    @classmethod
    def left_alone_reason(cls, module: Any) -> str | None:
        return structure_reason(module, _encoder_reasons)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return HunyuanVideoEncoder3D.forward(self, hidden_states)
        out: Tensor = call_site(FusedHunyuanVideoEncoder3D, self, hidden_states)
        return out

    def call_reason(self, hidden_states: Tensor) -> str | None:
        return whole_clip_reason(self, hidden_states, self.conv_in.conv.weight, "pixels")

    def corner(self, args: Any, kwargs: Any) -> Any:
        rate, *scales = (math.prod(along) for along in zip(*_strides(self), strict=True))
        height, width = (CORNER_PIXELS * scale for scale in scales)
        return (args[0][:1, :, : 1 + rate * (CORNER_FRAMES - 1), :height, :width].contiguous(),), {}

    def fused_forward(self, hidden_states: Tensor) -> Tensor:
        return _Encode(self).run(hidden_states)


class _Rows:
    """What a decode has in common with an encode."""

    def __init__(self, coder: Any) -> None:
        self._coder = coder
        self._norm_op = padded_group_norm if coder.runs("group_norm_silu") else padded_group_norm_ref

    def _first(self, clip: Tensor) -> Chunk:
        """``clip`` ``[B, C, F, H, W]`` behind the first convolution."""
        buffer = pad_clip(clip.permute(0, 2, 3, 4, 1), None, CAUSAL)
        conv = self._coder.conv_in.conv
        return Chunk(Sum(conv_rows(buffer, conv, padding=UNPADDED), conv.bias), {}, False)

    def _mid(self, chunk: Chunk) -> None:
        mid = self._coder.mid_block
        self._resnet(chunk, mid.resnets[0])
        for attention, resnet in zip(mid.attentions, mid.resnets[1:], strict=True):
            if attention is not None:
                self._attention(chunk, attention)
            self._resnet(chunk, resnet)

    def _last(self, chunk: Chunk) -> Tensor:
        """What the last convolution reads."""
        self._add_up(chunk)
        buffer = self._norm(chunk, self._coder.conv_norm_out)
        del chunk.flow
        return buffer

    def _add_up(self, chunk: Chunk) -> None:
        """Let what flows be the sum, with the statistics of its frames if the kernel of a norm wants them."""
        coder, x = self._coder, chunk.flow.x
        wanted = coder.runs("group_norm_silu") and runs_triton("padded_group_norm", x)
        chunk.flow = added_up(chunk.flow, fused=coder.runs("conv_epilogue"), statistics=wanted)

    def _norm(self, chunk: Chunk, norm: Any, padding: Padding = CAUSAL, *, silu: bool = True) -> Tensor:
        """What a convolution reads: what flows, through a norm and SiLU, with all that lies around it."""
        flow = chunk.flow
        return self._norm_op(
            flow.x, norm.weight, norm.bias, norm.num_groups, norm.eps, addend=flow.bias, padding=padding, silu=silu,
            statistics=flow.statistics,
        )  # fmt: skip

    def _summed(self, chunk: Chunk, padding: Padding) -> Tensor:
        """What a convolution behind no norm reads: what flows, added, with all that lies around it."""
        flow = chunk.flow
        run = rms_norm_silu if self._coder.runs("rms_norm_silu") else rms_norm_silu_ref
        _, buffer = run(
            flow.x, bias=flow.bias, residual=flow.residual, residual_bias=flow.residual_bias, padding=padding,
            kind="none", silu=False, keep=False,
        )  # fmt: skip
        del chunk.flow
        return buffer

    def _resnet(self, chunk: Chunk, resnet: Any) -> None:
        self._add_up(chunk)
        buffer = self._norm(chunk, resnet.norm1)
        residual, residual_bias, shortcut = chunk.flow.x, None, resnet.conv_shortcut
        if shortcut is not None:
            residual, residual_bias = conv_rows(residual, shortcut.conv), shortcut.conv.bias
        del chunk.flow
        chunk.flow = Sum(conv_rows(buffer, resnet.conv1.conv, padding=UNPADDED), resnet.conv1.conv.bias)
        del buffer
        buffer = self._norm(chunk, resnet.norm2)
        del chunk.flow
        made = conv_rows(buffer, resnet.conv2.conv, padding=UNPADDED)
        chunk.flow = Sum(made, resnet.conv2.conv.bias, residual, residual_bias)

    def _attention(self, chunk: Chunk, attention: Any) -> None:
        """Each frame attends to itself and to those before it."""
        self._add_up(chunk)
        normed = self._norm(chunk, attention.group_norm, NO_PADDING, silu=False)
        residual = chunk.flow.x
        samples, frames, height, width, channels = normed.shape
        rows, pixels = normed.view(samples, -1, channels), height * width
        q, k, v = (
            F.linear(rows, layer.weight, layer.bias) for layer in (attention.to_q, attention.to_k, attention.to_v)
        )
        run = spatial_attention if self._coder.runs("spatial_attention") else spatial_attention_ref
        attended = torch.empty_like(q)
        for frame in range(frames):
            start, end = frame * pixels, (frame + 1) * pixels
            attended[:, start:end] = run(q[:, start:end], k[:, :end], v[:, :end], attention.heads)
        out = attention.to_out[0]
        chunk.flow = Sum(F.linear(attended, out.weight).view(residual.shape), out.bias, residual)


class _Decode(_Rows):
    """One decode of latents by the modules of a decoder."""

    def run(self, latents: Tensor) -> Tensor:
        decoder = self._coder
        samples, _, frames, height, width = latents.shape
        factors = [upsampler.upsample_factor for upsampler in upsamplers_of(decoder)]
        rate, scale = 2 ** sum(factor[0] == 2 for factor in factors), 2 ** len(factors)
        height, width = height * scale, width * scale
        shape = samples, len(decoder.conv_out.conv.weight), 1 + rate * (frames - 1), height, width
        pixels = latents.new_empty(shape)

        def needs(whole: int) -> int:
            return decode_bytes(decoder, latents)

        # the norms need all frames: they are the only chunk
        explain = partial(out_of_memory, samples, height, width, frames=frames)
        decode_in_chunks(1, latents.device, needs, lambda start, end: self._decode(latents, pixels), explain)
        tell_chunk(decoder, frames, frames)
        return pixels

    def _decode(self, latents: Tensor, out: Tensor) -> None:
        decoder = self._coder
        chunk = self._first(latents)
        self._mid(chunk)
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                self._resnet(chunk, resnet)
            for upsampler in block.upsamplers or ():
                self._upsample(chunk, upsampler)
        run = pixel_conv if decoder.runs("pixel_conv") else pixel_conv_ref
        conv = decoder.conv_out.conv
        out.copy_(run(self._last(chunk), conv.weight, conv.bias, bordered=True))

    def _upsample(self, chunk: Chunk, upsampler: Any) -> None:
        factor_t, conv = int(upsampler.upsample_factor[0]), upsampler.conv.conv
        if not self._coder.runs("upsample_clip"):
            self._add_up(chunk)
            chunk.flow = Sum(upsample_clip_ref(chunk.flow.x, conv.weight, conv.bias, factor_t=factor_t))
            return
        buffer = self._summed(chunk, upsample_clip_padding(factor_t))
        shuffle = pixel_shuffle if self._coder.runs("pixel_shuffle") else pixel_shuffle_ref
        chunk.flow = Sum(upsample_clip(buffer, conv.weight, conv.bias, factor_t=factor_t, shuffle=shuffle))


class _Encode(_Rows):
    """One encode of pixels by the modules of an encoder."""

    def run(self, pixels: Tensor) -> Tensor:
        encoder, made = self._coder, []
        samples, _, frames, height, width = pixels.shape

        def needs(whole: int) -> int:
            return encode_bytes(encoder, pixels)

        explain = partial(out_of_memory, samples, height, width, verb="encode")
        decode_in_chunks(1, pixels.device, needs, lambda start, end: made.append(self._encode(pixels)), explain)
        tell_chunk(encoder, frames, frames)
        return made[0]

    def _encode(self, pixels: Tensor) -> Tensor:
        encoder = self._coder
        chunk = self._first(pixels)
        for block in encoder.down_blocks:
            for resnet in block.resnets:
                self._resnet(chunk, resnet)
            for downsampler in block.downsamplers or ():
                self._downsample(chunk, downsampler)
        self._mid(chunk)
        conv = encoder.conv_out.conv
        return clip_of(conv_rows(self._last(chunk), conv, padding=UNPADDED) + conv.bias).contiguous()

    def _downsample(self, chunk: Chunk, downsampler: Any) -> None:
        conv, buffer = downsampler.conv.conv, self._summed(chunk, CAUSAL)
        weight = channels_last_weight(conv.weight, buffer.dtype)
        made = F.conv3d(clip_of(buffer), weight, None, conv.stride)
        chunk.flow = Sum(made.permute(0, 2, 3, 4, 1).contiguous(), conv.bias)


def decode_bytes(decoder: Any, latents: Tensor) -> int:
    """Most memory that the layers hold at once."""
    pixels = latents.numel() // latents.shape[1]
    return int(max(_channels_held(decoder)) * pixels * latents.element_size() * _MARGIN)


def _channels_held(decoder: Any) -> Iterator[int]:
    """For every layer: how many channels' worth of tensors it holds at its worst, in units of a latent pixel."""
    pixels = 1
    for block in (decoder.mid_block, *decoder.up_blocks):
        for resnet in block.resnets:
            yield pixels * _resnet_channels(resnet)
        for attention in getattr(block, "attentions", None) or ():
            yield 0 if attention is None else pixels * 6 * attention.to_q.in_features
        for upsampler in getattr(block, "upsamplers", None) or ():
            conv = upsampler.conv.conv
            pixels *= 8 if upsampler.upsample_factor[0] == 2 else 4
            yield pixels * 2 * conv.out_channels  # before and after the pixels are in place
    yield pixels * 3 * decoder.conv_out.conv.in_channels


def _resnet_channels(resnet: Any) -> int:
    """How many channels' worth of tensors it holds at its worst."""
    into, out = resnet.conv1.conv.in_channels, resnet.conv1.conv.out_channels
    # two addends; the sum, the norm of it and a shortcut; a residual, a convolution's input and output
    return int(max(2 * into + (out if into != out else 0), out + max(into, out) + out))


def _strides(encoder: Any) -> Iterator[tuple[int, int, int]]:
    """What each downsampler makes one of, in time, height and width."""
    for block in encoder.down_blocks:
        for downsampler in block.downsamplers or ():
            yield downsampler.conv.conv.stride


def encode_bytes(encoder: Any, pixels: Tensor) -> int:
    """Most memory that the layers of an encode hold at once."""
    samples, _, frames, height, width = pixels.shape
    size, most = float(samples * (frames + CAUSAL.before) * height * width), 0.0
    for block in (*encoder.down_blocks, encoder.mid_block):
        for resnet in block.resnets:
            most = max(most, size * _resnet_channels(resnet))
        for attention in getattr(block, "attentions", None) or ():
            most = max(most, 0 if attention is None else size * 6 * attention.to_q.in_features)
        for downsampler in getattr(block, "downsamplers", None) or ():
            conv = downsampler.conv.conv
            smaller = math.prod(conv.stride)
            # two addends and their sum; behind them, what the convolution makes
            most = max(most, size * (conv.in_channels * 3), size * (conv.in_channels + conv.out_channels / smaller))
            size /= smaller
    return int(most * pixels.element_size() * _MARGIN)


def _reasons(decoder: Any) -> Iterator[str | None]:
    yield from _common_reasons(decoder, decoder.up_blocks)
    for block in decoder.up_blocks:
        yield plain_reason(block, HunyuanVideoUpBlock3D)
        for upsampler in block.upsamplers or ():
            yield plain_reason(upsampler, HunyuanVideoUpsampleCausal3D)
            yield _causal_reason(upsampler.conv, 3)
            if tuple(upsampler.upsample_factor) not in ((1, 2, 2), (2, 2, 2)):
                yield f"it upsamples by {tuple(upsampler.upsample_factor)}"


def _encoder_reasons(encoder: Any) -> Iterator[str | None]:
    yield from _common_reasons(encoder, encoder.down_blocks)
    for block in encoder.down_blocks:
        yield plain_reason(block, HunyuanVideoDownBlock3D)
        for downsampler in block.downsamplers or ():
            yield plain_reason(downsampler, HunyuanVideoDownsampleCausal3D)
            yield plain_reason(downsampler.conv, HunyuanVideoCausalConv3d)
            yield _causal_reason(downsampler.conv, 3, downsampler.conv.conv.stride)


def _common_reasons(coder: Any, blocks: Any) -> Iterator[str | None]:
    yield plain_reason(coder.conv_act, nn.SiLU)
    yield _causal_reason(coder.conv_in, 3)
    yield plain_reason(coder.mid_block, HunyuanVideoMidBlock3D)
    for attention in coder.mid_block.attentions:
        if attention is not None:
            yield from _attention_reasons(attention)
    for block in (coder.mid_block, *blocks):
        for resnet in block.resnets:
            yield from _resnet_reasons(resnet)
    yield plain_reason(coder.conv_norm_out, nn.GroupNorm)
    yield _causal_reason(coder.conv_out, 3)


def _attention_reasons(attention: Any) -> Iterator[str | None]:
    yield plain_reason(attention, Attention)
    yield attention_reason(attention)
    yield plain_reason(attention.group_norm, nn.GroupNorm)
    for layer in (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]):
        yield plain_reason(layer, nn.Linear)
    if attention.to_out[0].bias is None:
        yield "a projection has no bias"
    yield dropout_reason(attention.to_out[1])
    others = attention.spatial_norm, attention.norm_q, attention.norm_k, attention.norm_cross
    if not attention.residual_connection or any(part is not None for part in others):
        yield "an attention has other norms, or no residual"
    if attention.rescale_output_factor != 1 or attention.scale != attention.to_q.out_features**-0.5:
        yield "an attention scales by another factor"
    if attention.heads != 1:
        yield "an attention has several heads"


def _resnet_reasons(resnet: Any) -> Iterator[str | None]:
    yield plain_reason(resnet, HunyuanVideoResnetBlockCausal3D)
    yield plain_reason(resnet.nonlinearity, nn.SiLU)
    yield dropout_reason(resnet.dropout)
    for norm, conv in ((resnet.norm1, resnet.conv1), (resnet.norm2, resnet.conv2)):
        yield plain_reason(norm, nn.GroupNorm)
        yield _causal_reason(conv, 3)
    if resnet.conv_shortcut is not None:
        yield _causal_reason(resnet.conv_shortcut, 1)


def _causal_reason(conv: Any, side: int, stride: tuple[int, ...] = (1, 1, 1)) -> str | None:
    if reason := plain_reason(conv, HunyuanVideoCausalConv3d):
        return reason
    if conv.pad_mode != "replicate" or tuple(conv.time_causal_padding) != (*(side // 2,) * 4, side - 1, 0):
        return "a convolution is not padded by what it repeats"
    return conv_reason(conv.conv, nn.Conv3d, (side,) * 3, (0,) * 3, stride)
