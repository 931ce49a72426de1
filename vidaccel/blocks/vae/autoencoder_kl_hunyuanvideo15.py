"""diffusers' ``autoencoders/autoencoder_kl_hunyuanvideo15.py``: decoder and encoder, without pads, cats and a mask.

Stock pads the input of every convolution by a pass of its own, takes a dozen passes for a norm, and fills an attention
mask row by row. Here clips are rows ``[B, F, H, W, C]`` from the first convolution to the last (``causal_clip``).
``rms_norm_silu`` writes a convolution's input with the frames and pixels that it repeats around it, and adds the bias
and the residual that the convolution before has left out. ``depth_to_space`` puts the channels of an upsampler's
convolution in place and adds the shortcut. A frame's attention sees the frames up to it, by ``block_causal_attention``,
without a mask.

The first convolution and the middle, small at the size of the latents, see the whole clip; from there on, as many
frames as memory allows go at once, each convolution's last two frames carried on to the next chunk. An encode goes the
other way: what comes before the middle takes as many frames at once as memory allows, and the middle the whole clip.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import (
    HunyuanVideo15AttnBlock,
    HunyuanVideo15CausalConv3d,
    HunyuanVideo15Decoder3D,
    HunyuanVideo15DownBlock3D,
    HunyuanVideo15Downsample,
    HunyuanVideo15Encoder3D,
    HunyuanVideo15MidBlock,
    HunyuanVideo15ResnetBlock,
    HunyuanVideo15RMS_norm,
    HunyuanVideo15UpBlock3D,
    HunyuanVideo15Upsample,
)
from torch import Tensor, nn

from vidaccel.blocks.vae.causal_clip import (
    UNPADDED,
    Chunk,
    Halos,
    Sum,
    clip_of,
    conv_reason,
    conv_rows,
    decode_in_chunks,
    out_of_memory,
    rms_norm_reason,
    structure_reason,
    tell_chunk,
    upsamplers_of,
    whole_clip_reason,
)
from vidaccel.blocks.vae.tile_batches import TileDecoder
from vidaccel.kernels.attention.block_causal_attention import block_causal_attention, block_causal_attention_ref
from vidaccel.kernels.conv.clip_conv import workspace_bytes
from vidaccel.kernels.conv.depth_to_space import depth_to_space, depth_to_space_ref
from vidaccel.kernels.conv.padded_clip import NO_PADDING, Padding, pad_clip
from vidaccel.kernels.conv.pixel_conv import pixel_conv, pixel_conv_ref
from vidaccel.kernels.norm.rms_norm_silu import compile_ahead, rms_norm_silu, rms_norm_silu_ref
from vidaccel.sites.block import FusedBlock, call_site, cut_corner, fuses
from vidaccel.sites.plain import plain_reason, replaced_attention_reason

__all__ = ["FusedHunyuanVideo15Decoder3D", "FusedHunyuanVideo15Encoder3D", "decode_bytes", "encode_bytes"]

CAUSAL = Padding(before=2, border=1, frame_mode="replicate", pixel_mode="replicate")
CORNER_FRAMES = 4  # of latents; what the last one looks back at is handed on (decode_in_chunks)
CORNER_PIXELS = 2
_MARGIN = 1.1  # the allocator's rounding, the borders, the convolutions' workspaces, all that is small


@fuses(
    HunyuanVideo15Decoder3D,
    {
        "whole_clip": "math-exact",
        "rms_norm_silu": "math-exact",
        "clip_conv": "math-exact",
        "depth_to_space": "bit-exact",
        "pixel_conv": "math-exact",
        "spatial_attention": "math-exact",
    },
)
class FusedHunyuanVideo15Decoder3D(TileDecoder, HunyuanVideo15Decoder3D):
    """The decoder of HunyuanVideo 1.5, of a clip or of a tile."""

    conv_in: Any
    mid_block: Any
    up_blocks: Any
    norm_out: Any
    conv_out: Any
    repeat: int

    @classmethod
    def left_alone_reason(cls, module: Any) -> str | None:
        return structure_reason(module, _reasons)

    def compile_ahead(self) -> None:
        begin = partial(compile_ahead, padding=CAUSAL)
        for resnet in (*self.mid_block.resnets, *(resnet for block in self.up_blocks for resnet in block.resnets)):
            gamma, next_gamma = (norm.gamma.detach().flatten() for norm in (resnet.norm1, resnet.norm2))
            begin(gamma, bias=False)  # behind an upsampler
            begin(gamma, residual=True, keep=True)
            begin(next_gamma)
        begin(self.norm_out.gamma.detach().flatten(), residual=True)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return HunyuanVideo15Decoder3D.forward(self, hidden_states)
        out: Tensor = call_site(FusedHunyuanVideo15Decoder3D, self, hidden_states)
        return out

    def call_reason(self, hidden_states: Tensor) -> str | None:
        return whole_clip_reason(self, hidden_states, self.conv_in.conv.weight)

    def bytes_at_once(self, latents: Tensor) -> int:
        return decode_bytes(self, latents, latents.shape[2])

    def corner(self, args: Any, kwargs: Any) -> Any:
        return cut_corner((args[0][:1, :, :CORNER_FRAMES],), {}, most_whole=0)

    @classmethod
    def original_forward(cls, host: Any, hidden_states: Tensor) -> Tensor:
        """Sample by sample, as these may be tiles: the mask of stock's attention fits a single one."""
        samples = hidden_states.split(1) if hidden_states.ndim == 5 else [hidden_states]
        return torch.cat([HunyuanVideo15Decoder3D.forward(host, sample) for sample in samples])

    def fused_forward(self, hidden_states: Tensor) -> Tensor:
        return _Decode(self).run(hidden_states)


@fuses(
    HunyuanVideo15Encoder3D,
    {
        "whole_clip": "math-exact",
        "rms_norm_silu": "math-exact",
        "clip_conv": "math-exact",
        "spatial_attention": "math-exact",
    },
)
class FusedHunyuanVideo15Encoder3D(FusedBlock, HunyuanVideo15Encoder3D):
    """The encoder of HunyuanVideo 1.5, of a clip or of a tile."""

    conv_in: Any
    mid_block: Any
    down_blocks: Any
    norm_out: Any
    conv_out: Any
    group_size: int

    @classmethod
    def left_alone_reason(cls, module: Any) -> str | None:
        return structure_reason(module, _encoder_reasons)

    def compile_ahead(self) -> None:
        begin = partial(compile_ahead, padding=CAUSAL)
        resnets = [resnet for block in (*self.down_blocks, self.mid_block) for resnet in block.resnets]
        begin(resnets[0].norm1.gamma.detach().flatten(), keep=True)  # behind the first convolution
        for resnet in resnets:
            gamma, next_gamma = (norm.gamma.detach().flatten() for norm in (resnet.norm1, resnet.norm2))
            begin(gamma, residual=True, keep=True)
            begin(next_gamma)
        begin(self.mid_block.resnets[0].norm1.gamma.detach().flatten(), bias=False)
        begin(self.norm_out.gamma.detach().flatten(), residual=True, keep=True)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return HunyuanVideo15Encoder3D.forward(self, hidden_states)
        out: Tensor = call_site(FusedHunyuanVideo15Encoder3D, self, hidden_states)
        return out

    def call_reason(self, hidden_states: Tensor) -> str | None:
        if reason := whole_clip_reason(self, hidden_states, self.conv_in.conv.weight, "pixels"):
            return reason
        (frames, *sides), (rate, scale) = hidden_states.shape[2:], _compression(self)
        if (frames - 1) % rate or any(side % scale for side in sides):
            return f"the clip is not 1 + {rate} n frames whose sides are multiples of {scale}"
        return None

    def corner(self, args: Any, kwargs: Any) -> Any:
        rate, scale = _compression(self)
        frames, side = 1 + rate * (CORNER_FRAMES - 1), scale * CORNER_PIXELS
        return (args[0][:1, :, :frames, :side, :side].contiguous(),), {}

    def fused_forward(self, hidden_states: Tensor) -> Tensor:
        return _Encode(self).run(hidden_states)


class _Rows:
    """What a decode has in common with an encode."""

    def __init__(self, coder: Any) -> None:
        self._coder = coder
        self._norm_op = rms_norm_silu if coder.runs("rms_norm_silu") else rms_norm_silu_ref

    def _mid(self, chunk: Chunk) -> None:
        """The blocks in the middle, which see the whole clip."""
        mid = self._coder.mid_block
        self._resnet(chunk, mid.resnets[0])
        for attention, resnet in zip(mid.attentions, mid.resnets[1:], strict=True):
            if attention is not None:
                self._attention(chunk, attention)
            self._resnet(chunk, resnet)

    def _written(self, chunk: Chunk, padding: Padding, gamma: Tensor | None = None, **options: Any) -> Tensor:
        """What flows, added, normed and padded; with ``keep``, the sum is what flows on."""
        flow = chunk.flow
        z, y = self._norm_op(
            flow.x, gamma, bias=flow.bias, residual=flow.residual, residual_bias=flow.residual_bias, padding=padding,
            **{"keep": False, "inplace": True, **options},
        )  # fmt: skip
        flow.x, flow.bias, flow.residual, flow.residual_bias = z, None, None, None
        return y

    def _input_of(self, chunk: Chunk, conv: Any, norm: Any = None, *, keep: bool = False) -> Tensor:
        """What ``conv`` reads: what flows, through ``norm`` and SiLU if there is one, with all that lies around it."""
        options = {"kind": "none", "silu": False} if norm is None else {"gamma": norm.gamma.flatten()}
        buffer = self._written(chunk, CAUSAL, halo=chunk.halos.get(conv), keep=keep, **options)
        chunk.keep_of(conv, buffer[:, :, 1:-1, 1:-1], CAUSAL.before)
        return buffer

    def _resnet(self, chunk: Chunk, resnet: Any) -> None:
        buffer = self._input_of(chunk, resnet.conv1, resnet.norm1, keep=True)
        residual, residual_bias, shortcut = chunk.flow.x, None, resnet.conv_shortcut
        if shortcut is not None:
            residual, residual_bias = conv_rows(residual, shortcut), shortcut.bias
        chunk.flow = Sum(self._convolved(buffer, resnet.conv1, resnet.norm1), resnet.conv1.conv.bias)
        del buffer
        buffer = self._input_of(chunk, resnet.conv2, resnet.norm2)
        del chunk.flow
        made = self._convolved(buffer, resnet.conv2, resnet.norm2)
        chunk.flow = Sum(made, resnet.conv2.conv.bias, residual, residual_bias)

    def _convolved(self, buffer: Tensor, conv: Any, norm: Any) -> Tensor:
        """By ``conv``, behind ``norm`` and SiLU."""
        fused = self._coder.runs("clip_conv")
        return conv_rows(buffer, conv.conv, fused=fused, padding=UNPADDED, gamma=norm.gamma)

    def _attention(self, chunk: Chunk, block: Any) -> None:
        """Each frame attends to itself and to those before it."""
        normed = self._written(chunk, NO_PADDING, block.norm.gamma.flatten(), silu=False, keep=True)
        residual = chunk.flow.x
        samples, _, height, width, channels = normed.shape
        rows, pixels = normed.view(samples, -1, channels), height * width
        q, k, v = (F.linear(rows, conv.weight.flatten(1), conv.bias) for conv in (block.to_q, block.to_k, block.to_v))
        fused = self._coder.runs("spatial_attention")
        attended = (block_causal_attention if fused else block_causal_attention_ref)(q, k, v, pixels)
        out = F.linear(attended, block.proj_out.weight.flatten(1))
        chunk.flow = Sum(out.view(residual.shape), block.proj_out.bias, residual)


class _Decode(_Rows):
    """One decode of latents by the modules of a decoder."""

    def run(self, latents: Tensor) -> Tensor:
        decoder = self._coder
        samples, _, frames, height, width = latents.shape
        upsamplers = list(upsamplers_of(decoder))
        rate = 2 ** sum(upsampler.add_temporal_upsample for upsampler in upsamplers)
        height, width = height * 2 ** len(upsamplers), width * 2 ** len(upsamplers)

        def pixel_frames(latent_frames: int) -> int:
            return 1 + rate * (latent_frames - 1) if latent_frames else 0

        channels = len(decoder.conv_out.conv.weight)
        pixels = latents.new_empty(samples, channels, pixel_frames(frames), height, width)
        halos: Halos = {}
        middle: Tensor | None = None

        def decode(start: int, end: int) -> None:
            nonlocal halos, middle
            if middle is None:
                middle = self._middle(latents)
            chunk = Chunk(Sum(middle[:, start:end]), halos, end < frames)
            halos = self._up(chunk, pixels[:, :, pixel_frames(start) : pixel_frames(end)])

        needs = partial(decode_bytes, decoder, latents)
        explain = partial(out_of_memory, samples, height, width)
        step = decode_in_chunks(frames, latents.device, needs, decode, explain)
        tell_chunk(decoder, step, frames)
        return pixels

    def _middle(self, latents: Tensor) -> Tensor:
        """What the up-blocks get of the whole clip."""
        decoder = self._coder
        rows = latents.permute(0, 2, 3, 4, 1)
        conv = decoder.conv_in.conv
        summed = conv_rows(pad_clip(rows, None, CAUSAL), conv, padding=UNPADDED)
        chunk = Chunk(Sum(summed, conv.bias, rows.repeat_interleave(decoder.repeat, -1)), {}, False)
        del summed
        self._mid(chunk)
        return self._written(chunk, NO_PADDING, kind="none", silu=False)

    def _up(self, chunk: Chunk, out: Tensor) -> Halos:
        decoder = self._coder
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                self._resnet(chunk, resnet)
            for upsampler in block.upsamplers or ():
                self._upsample(chunk, upsampler)
        buffer = self._input_of(chunk, decoder.conv_out, decoder.norm_out)
        del chunk.flow
        run = pixel_conv if decoder.runs("pixel_conv") else pixel_conv_ref
        conv = decoder.conv_out.conv
        out.copy_(run(buffer, conv.weight, conv.bias, bordered=True))
        return chunk.following

    def _upsample(self, chunk: Chunk, upsample: Any) -> None:
        buffer = self._input_of(chunk, upsample.conv)
        del chunk.flow
        conv = upsample.conv.conv
        made = conv_rows(buffer, conv, padding=UNPADDED)
        run = depth_to_space if self._coder.runs("depth_to_space") else depth_to_space_ref
        factor_t = 2 if upsample.add_temporal_upsample else 1
        source = CAUSAL.inner(buffer)
        chunk.flow = Sum(run(made, conv.bias, source, factor_t=factor_t, first=chunk.begins))


class _Encode(_Rows):
    """One encode of pixels by the modules of an encoder."""

    def run(self, pixels: Tensor) -> Tensor:
        encoder = self._coder
        samples, _, _, height, width = pixels.shape
        rate, scale = _compression(encoder)
        frames = _latent_frames(encoder, pixels)
        halos: Halos = {}
        middle = pixels.new_empty(samples, frames, height // scale, width // scale, encoder.norm_out.gamma.numel())

        def encode(start: int, end: int) -> None:
            nonlocal halos
            first = 1 + rate * (start - 1) if start else 0
            rows = pixels[:, :, first : 1 + rate * (end - 1)].permute(0, 2, 3, 4, 1)
            chunk = Chunk(Sum(rows), halos, end < frames)
            self._down(chunk)
            middle[:, start:end] = self._written(chunk, NO_PADDING, kind="none", silu=False)
            halos = chunk.following

        needs = partial(encode_bytes, encoder, pixels)
        explain = partial(out_of_memory, samples, height, width, verb="encode")
        step = decode_in_chunks(frames, pixels.device, needs, encode, explain)
        tell_chunk(encoder, step, frames)
        return self._latents(Chunk(Sum(middle), {}, False))

    def _down(self, chunk: Chunk) -> None:
        encoder = self._coder
        conv = encoder.conv_in.conv
        chunk.flow = Sum(conv_rows(self._input_of(chunk, encoder.conv_in), conv, padding=UNPADDED), conv.bias)
        for block in encoder.down_blocks:
            for resnet in block.resnets:
                self._resnet(chunk, resnet)
            for downsampler in block.downsamplers or ():
                self._downsample(chunk, downsampler)

    def _downsample(self, chunk: Chunk, downsample: Any) -> None:
        buffer = self._input_of(chunk, downsample.conv)
        del chunk.flow
        factor_t, conv = 2 if downsample.add_temporal_downsample else 1, downsample.conv.conv
        alone = factor_t == 2 and chunk.begins  # the first frame stays one where time is halved
        residual = _in_cells(CAUSAL.inner(buffer), factor_t, alone, downsample.group_size)
        made = conv_rows(buffer, conv, padding=UNPADDED)
        del buffer
        chunk.flow = Sum(_in_cells(made, factor_t, alone), conv.bias.repeat(4 * factor_t), residual)

    def _latents(self, chunk: Chunk) -> Tensor:
        """The mean of the latents and the logarithm of their variance, of what the down-blocks have made."""
        encoder = self._coder
        self._mid(chunk)
        buffer = self._input_of(chunk, encoder.conv_out, encoder.norm_out, keep=True)
        shortcut = chunk.flow.x.unflatten(-1, (-1, encoder.group_size)).mean(-1)
        conv = encoder.conv_out.conv
        return clip_of(conv_rows(buffer, conv, padding=UNPADDED) + conv.bias + shortcut).contiguous()


def _in_cells(rows: Tensor, factor_t: int, alone: bool, group: int = 0) -> Tensor:
    """``[B, t * F, 2 * H, 2 * W, C]`` as ``[B, F, H, W, t * 2 * 2 * C]``, or as the means of every ``group`` of these.

    Frame 0 may be ``alone``: it has half as many channels, so each of them counts twice, and a group is half as large.
    """
    if alone:
        first, others = rows[:, :1], rows[:, 1:]
        one = _in_cells(first, 1, False, group // 2) if group else _in_cells(first, 1, False).repeat(1, 1, 1, 1, 2)
        return torch.cat([one, _in_cells(others, factor_t, False, group)], dim=1)
    if group:  # all of one pixel
        rows = rows.unflatten(-1, (-1, group)).mean(-1)
    cells = rows.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).unflatten(1, (-1, factor_t))
    return cells.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)


def _downsamplers(encoder: Any) -> Iterator[Any]:
    for block in encoder.down_blocks:
        yield from block.downsamplers or ()


def _compression(encoder: Any) -> tuple[int, int]:
    """Frames for each frame of latents but the first, and pixels for each pixel of a row or column of them."""
    temporal = [downsampler.add_temporal_downsample for downsampler in _downsamplers(encoder)]
    return 2 ** sum(temporal), 2 ** len(temporal)


def _latent_frames(encoder: Any, pixels: Tensor) -> int:
    return 1 + (pixels.shape[2] - 1) // _compression(encoder)[0]


def decode_bytes(decoder: Any, latents: Tensor, frames: int) -> int:
    """Most memory that the layers behind the middle hold at once, for so many latent frames of a clip."""
    pixels = latents.shape[0] * latents.shape[3] * latents.shape[4]
    channels = frames * max(_channels_held(decoder))
    if frames < latents.shape[2]:
        channels += 2 * _halo_channels(decoder)  # those of the chunk before, and those for the next
    return int(channels * pixels * latents.element_size() * _MARGIN) + _workspace_bytes(decoder, latents, frames)


def _workspace_bytes(decoder: Any, latents: Tensor, frames: int) -> int:
    """What the convolutions of residual blocks take beside their input and output, at most."""
    (height, width), most = latents.shape[3:], 0
    for block in decoder.up_blocks:
        pixels = (height + 2 * CAUSAL.border) * (width + 2 * CAUSAL.border)
        for resnet in block.resnets:
            conv = resnet.conv1.conv
            most = max(most, workspace_bytes(latents, frames, pixels, conv.in_channels, conv.out_channels))
        for upsampler in block.upsamplers or ():
            height, width = 2 * height, 2 * width
            frames = 2 * frames if upsampler.add_temporal_upsample else frames
    return most


def _halo_channels(decoder: Any) -> int:
    """How many channels' worth the frames are that a chunk leaves to the next, in units of a latent pixel."""
    total, pixels = 0, 1
    for block in decoder.up_blocks:
        convs = [conv for resnet in block.resnets for conv in (resnet.conv1, resnet.conv2)]
        upsamplers = block.upsamplers or ()
        convs += [upsampler.conv for upsampler in upsamplers]
        total += pixels * sum(conv.conv.in_channels for conv in convs)
        pixels *= 4 ** len(upsamplers)
    return CAUSAL.before * (total + pixels * decoder.conv_out.conv.in_channels)


def _channels_held(decoder: Any) -> Iterator[int]:
    """For every layer: how many channels' worth of tensors it holds at its worst, in units of a latent pixel."""
    pixels = 1
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            into, out = resnet.conv1.conv.in_channels, resnet.conv1.conv.out_channels
            yield pixels * _resnet_channels(into, out)
        for upsampler in block.upsamplers or ():
            conv = upsampler.conv.conv
            # its input, what it makes, and that in place
            yield pixels * (conv.in_channels + 2 * conv.out_channels)
            pixels *= 8 if upsampler.add_temporal_upsample else 4
    yield pixels * 3 * decoder.conv_out.conv.in_channels


def encode_bytes(encoder: Any, pixels: Tensor, frames: int) -> int:
    """Most memory that the layers before the middle hold at once, for so many latent frames of a clip."""
    samples, channels, of_clip, height, width = pixels.shape
    chunked = frames < _latent_frames(encoder, pixels)
    count = frames * _compression(encoder)[0] if chunked else of_clip
    pixel, halos, most, workspace = samples * height * width, samples * height * width * channels, 0, 0
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            into, out = resnet.conv1.conv.in_channels, resnet.conv1.conv.out_channels
            workspace = max(workspace, workspace_bytes(pixels, count, pixel // (samples or 1), out, out))
            most = max(most, pixel * (count * _resnet_channels(into, out) + CAUSAL.before * max(into, out)))
            halos += pixel * (into + out)
        for downsampler in block.downsamplers or ():
            into, out = downsampler.conv.conv.in_channels, downsampler.conv.conv.out_channels
            # two addends and their sum; behind them, the shortcut, what the convolution makes, and either in place
            most = max(most, pixel * (count * max(3 * into, into + 3 * out) + CAUSAL.before * into))
            halos += pixel * into
            pixel //= 4
            count = (count + 1) // 2 if downsampler.add_temporal_downsample else count
    if chunked:
        most += 2 * CAUSAL.before * halos  # those of the chunk before, and those for the next
    return int(most * pixels.element_size() * _MARGIN) + workspace


def _resnet_channels(into: int, out: int) -> int:
    """How many channels' worth of tensors a residual block holds at its worst."""
    # two addends, their sum and the norm of it; behind them, a residual, a convolution's input and output
    return max(4 * into, 3 * out + (into if into != out else 0))


def _reasons(decoder: Any) -> Iterator[str | None]:
    yield from _reasons_of_both(decoder)
    for block in decoder.up_blocks:
        yield plain_reason(block, HunyuanVideo15UpBlock3D)
        for resnet in block.resnets:
            yield from _resnet_reasons(resnet)
        for upsampler in block.upsamplers or ():
            yield plain_reason(upsampler, HunyuanVideo15Upsample)
            yield _causal_reason(upsampler.conv)
            conv = upsampler.conv.conv
            if conv.out_channels % conv.in_channels or (upsampler.add_temporal_upsample and upsampler.repeats % 2):
                yield "the channels of a shortcut do not fit those of its upsampler"


def _encoder_reasons(encoder: Any) -> Iterator[str | None]:
    yield from _reasons_of_both(encoder)
    for block in encoder.down_blocks:
        yield plain_reason(block, HunyuanVideo15DownBlock3D)
        for resnet in block.resnets:
            yield from _resnet_reasons(resnet)
        for downsampler in block.downsamplers or ():
            yield plain_reason(downsampler, HunyuanVideo15Downsample)
            yield _causal_reason(downsampler.conv)
            conv, group = downsampler.conv.conv, downsampler.group_size
            if conv.out_channels * group != conv.in_channels or (downsampler.add_temporal_downsample and group % 2):
                yield "the channels of a shortcut do not fit those of its downsampler"
    if encoder.conv_out.conv.out_channels * encoder.group_size != encoder.norm_out.gamma.numel():
        yield "the channels of the shortcut do not fit those of the latents"


def _reasons_of_both(coder: Any) -> Iterator[str | None]:
    """Those of what a decoder has in common with an encoder."""
    yield plain_reason(coder.conv_act, nn.SiLU)
    yield _causal_reason(coder.conv_in)
    mid = coder.mid_block
    yield plain_reason(mid, HunyuanVideo15MidBlock)
    for attention in mid.attentions:
        if attention is not None:
            yield plain_reason(attention, HunyuanVideo15AttnBlock) or replaced_attention_reason()
            yield rms_norm_reason(attention.norm, HunyuanVideo15RMS_norm)
            for conv in (attention.to_q, attention.to_k, attention.to_v, attention.proj_out):
                yield conv_reason(conv, nn.Conv3d, (1,) * 3, (0,) * 3)
    for resnet in mid.resnets:
        yield from _resnet_reasons(resnet)
    yield rms_norm_reason(coder.norm_out, HunyuanVideo15RMS_norm)
    yield _causal_reason(coder.conv_out)


def _resnet_reasons(resnet: Any) -> Iterator[str | None]:
    yield plain_reason(resnet, HunyuanVideo15ResnetBlock)
    yield plain_reason(resnet.nonlinearity, nn.SiLU)
    for norm, conv in ((resnet.norm1, resnet.conv1), (resnet.norm2, resnet.conv2)):
        yield rms_norm_reason(norm, HunyuanVideo15RMS_norm)
        yield _causal_reason(conv)
    if resnet.conv_shortcut is not None:
        yield conv_reason(resnet.conv_shortcut, nn.Conv3d, (1,) * 3, (0,) * 3)


def _causal_reason(conv: Any) -> str | None:
    if reason := plain_reason(conv, HunyuanVideo15CausalConv3d):
        return reason
    if conv.pad_mode != "replicate" or tuple(conv.time_causal_padding) != (1, 1, 1, 1, 2, 0):
        return "a convolution is not padded by what it repeats"
    return conv_reason(conv.conv, nn.Conv3d, (3,) * 3, (0,) * 3)
