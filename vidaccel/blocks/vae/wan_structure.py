"""What a decoder and an encoder of Wan consist of: which layers, what memory these take, and why some are not served.

Read off the modules, so that Wan 2.1 and 2.2, which lay their blocks out in other ways, are one to ``wan_layers.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AvgDown3D,
    DupUp3D,
    WanAttentionBlock,
    WanCausalConv3d,
    WanMidBlock,
    WanResample,
    WanResidualBlock,
    WanResidualDownBlock,
    WanResidualUpBlock,
    WanRMS_norm,
    WanUpBlock,
    WanUpsample,
)
from torch import Tensor, nn

from vidaccel.blocks.vae.causal_clip import dropout_reason, rms_norm_reason
from vidaccel.blocks.vae.half_operands import takes_tf32
from vidaccel.kernels.conv.clip_conv import workspace_bytes
from vidaccel.kernels.conv.padded_clip import Padding
from vidaccel.sites.memo import once_per_call
from vidaccel.sites.plain import plain_reason, replaced_attention_reason

__all__ = [
    "AROUND",
    "BEFORE",
    "STOCK_FRAMES",
    "conv_reason",
    "decode_bytes",
    "decoder_reasons",
    "down_layers",
    "downsamplers",
    "encode_bytes",
    "encoder_reasons",
    "even_from",
    "frames_of",
    "frames_of_a_latent",
    "frames_of_a_piece",
    "half_dtype",
    "lengthens",
    "shortens",
    "temporal_rate",
    "upsamplers",
    "upsamplers_of",
]

BEFORE = 2  # frames that a causal convolution looks back at
# A downsampler's convolution begins at the first pixel and goes by two: two zeros in front, of which its first output
# is made, are as good as none. That is cut off.
AROUND = Padding(border=2)
STOCK_FRAMES = 4  # that stock encodes at a time
# Few of cuDNN's kernels take a tensor of more numbers. On an H200 the one that takes those of Wan 2.2 does 630 TFLOP/s,
# others 760 (decoder-profiles-h200.txt). They work on tiles of 128 channels; of 96, it is the fastest.
MOST_NUMBERS, TILE_CHANNELS = 2**31 - 1, 128
_MARGIN = 1.1  # the allocator's rounding, the convolutions' workspaces, all that is small


def half_dtype(coder: Any, x: Tensor) -> torch.dtype | None:
    """What the convolutions behind a norm are to read; None: the dtype of ``x``."""
    return torch.float16 if takes_tf32(x) and coder.runs("half_operands") else None


def frames_of(latent_frames: int, rate: int) -> int:
    """How many frames the first ``latent_frames`` become."""
    return 0 if latent_frames == 0 else 1 + rate * (latent_frames - 1)


@once_per_call
def temporal_rate(decoder: Any) -> int:
    """Frames that a latent frame becomes, but for the first of a clip."""
    return int(2 ** sum(map(lengthens, upsamplers(decoder))))


@once_per_call
def even_from(decoder: Any) -> int:
    """Position of the first up-block from which on a clip has the frames of its pixels."""
    found = [at for at, block in enumerate(decoder.up_blocks) if any(map(lengthens, upsamplers_of(block)))]
    return found[-1] + 1 if found else 0


def lengthens(upsampler: Any) -> bool:
    """Whether it makes two frames of one."""
    return bool(upsampler.mode == "upsample3d")


def upsamplers(decoder: Any) -> Iterator[Any]:
    for block in decoder.up_blocks:
        yield from upsamplers_of(block)


def upsamplers_of(block: Any) -> list[Any]:
    found = [block.upsampler] if isinstance(block, WanResidualUpBlock) else block.upsamplers or ()
    return [upsampler for upsampler in found if upsampler is not None]


def frames_of_a_piece(decoder: Any, latents: Tensor, frames: int) -> int:
    """How many of the frames go through the last up-blocks at once, one after the other as far as the pixels.

    The halos are passed from piece to piece, so that a piece costs nothing but these.
    """
    first, pixels = even_from(decoder), latents.shape[0] * latents.shape[3] * latents.shape[4]
    numbers = 0
    for at, block in enumerate(decoder.up_blocks):
        widths = {width for resnet in block.resnets for width in (resnet.in_dim, resnet.out_dim)}
        if at >= first:
            if any(width % TILE_CHANNELS for width in widths):
                return frames
            numbers = max(numbers, pixels * max(widths))
        pixels *= 4 ** len(upsamplers_of(block))
    most = max(MOST_NUMBERS // max(numbers, 1) - BEFORE, 1)
    return ceil(frames / ceil(frames / most))


def decode_bytes(decoder: Any, latents: Tensor, frames: int | None = None) -> int:
    """Most memory that the layers hold when so many ``frames`` of the latents are decoded at once; None: all of them.

    The pixels of the whole clip are not counted.
    """
    whole = frames is None or frames >= latents.shape[2]
    size, half = latents.element_size(), half_dtype(decoder, latents)
    frames = latents.shape[2] if frames is None else frames
    rate = temporal_rate(decoder)
    made = frames_of(frames, rate) if whole else rate * frames
    piece = frames_of_a_piece(decoder, latents, made)
    half_size = size if half is None else half.itemsize
    held = _Held(latents, frames, whole, size, half_size, piece if piece < made else None)
    pixels = latents.shape[0] * latents.shape[3] * latents.shape[4]
    return int((max(held.in_layers(decoder)) + held.in_halos(decoder)) * pixels * _MARGIN)


@dataclass(frozen=True)
class _Held:
    """How many bytes a decode holds, for each latent pixel.

    Attributes:
        x: What is decoded, or encoded.
        frames: Latent frames that are decoded at once.
        whole: Whether these are all; else halos come from the chunk before, and are kept for the next.
        size: Bytes of a number.
        half: Of one that a convolution of a ResNet block reads or writes.
        piece: Frames that go through the last up-blocks at once; None: all.
    """

    x: Tensor
    frames: int
    whole: bool
    size: int
    half: int
    piece: int | None

    def in_layers(self, decoder: Any) -> Iterator[int]:
        """For every layer, at its worst."""
        pixels, rate, made, kept_for_pieces = 1, 1, 0, 0
        for at, block in enumerate(decoder.up_blocks):
            frames = self._frames(rate)
            if self.piece is not None and at >= even_from(decoder):
                kept_for_pieces = kept_for_pieces or made
                frames = self.piece
            kept = kept_for_pieces
            # what the upsampler before has made, and its shortcut; the pixels in place, and the norm of them
            yield made + pixels * block.resnets[0].in_dim * (frames * self.size + (frames + BEFORE) * self.half)
            if getattr(block, "avg_shortcut", None) is not None:
                kept += pixels * frames * block.in_dim * self.size
            for resnet in block.resnets:
                of_a_picture = pixels * self.x.shape[3] * self.x.shape[4]
                yield kept + pixels * self.in_resnet(frames, of_a_picture, resnet.in_dim, resnet.out_dim)
            for upsampler in upsamplers_of(block):
                channels, out_channels = upsampler.dim, upsampler.resample[1].out_channels
                # bytes of a number that a convolution reads or writes
                read = self.half if self.whole or not lengthens(upsampler) else self.size
                if lengthens(upsampler):
                    # the frames, behind those before; those of the convolution over time, and these in their order
                    yield kept + pixels * frames * channels * read * (5 if self.whole else 6)
                    rate *= 2
                    frames = self._frames(rate)
                made = kept + 4 * pixels * frames * out_channels * read
                yield made + pixels * frames * channels * read
                pixels *= 4

    def in_halos(self, decoder: Any) -> int:
        """All of them, those of the chunk before and the next ones."""
        if self.whole and self.piece is None:
            return 0
        first = even_from(decoder) if self.whole else 0
        pixels, numbers = 1, sum(BEFORE * conv.weight.shape[1] for _, conv in _normed_in(decoder.mid_block))
        for at, block in enumerate(decoder.up_blocks):
            if at >= first:
                numbers += pixels * sum(BEFORE * conv.weight.shape[1] for _, conv in _normed_in(block))
            pixels *= 4 ** len(upsamplers_of(block))
        return 2 * self.half * (numbers + pixels * BEFORE * decoder.conv_out.weight.shape[1])

    def _frames(self, rate: int) -> int:
        return frames_of(self.frames, rate) if self.whole else rate * self.frames

    def in_resnet(self, frames: int, pixels: int, width_in: int, width_out: int) -> int:
        """The residual, and what a convolution reads and writes; the norm behind it writes over what it reads.

        For each of its pixels, of which a picture has so many.
        """
        clip, padded = frames * (self.size + self.half), (frames + BEFORE) * self.half
        widths = {(width_in, width_out), (width_out, width_out)}
        workspace = max(workspace_bytes(self.x, frames, pixels, *pair) for pair in widths) // (
            len(self.x) * pixels or 1
        )
        if width_in == width_out:
            return width_out * (clip + padded) + workspace
        first = width_in * (frames * self.size + padded) + width_out * clip  # beside the convolution of the residual
        return max(first, width_out * (clip + padded)) + workspace


def down_layers(encoder: Any) -> Iterator[Any]:
    """The ResNet blocks and the downsamplers before the middle."""
    for block in encoder.down_blocks:
        yield from _layers_of(block)


def _layers_of(block: Any) -> Iterator[Any]:
    if not isinstance(block, WanResidualDownBlock):
        yield block
        return
    yield from block.resnets
    if block.downsampler is not None:
        yield block.downsampler


@once_per_call
def downsamplers(encoder: Any) -> list[Any]:
    return [layer for layer in down_layers(encoder) if isinstance(layer, WanResample)]


@once_per_call
def frames_of_a_latent(encoder: Any) -> int:
    """That a latent frame is made of, but for the first of a clip."""
    return int(2 ** sum(map(shortens, downsamplers(encoder))))


def shortens(downsampler: Any) -> bool:
    """Whether it makes one frame of two."""
    return bool(downsampler.mode == "downsample3d")


def encode_bytes(encoder: Any, clip: Tensor, frames: int) -> int:
    """Most memory that the layers hold when so many ``frames`` of the clip, not its first one, are encoded at once."""
    size, half = clip.element_size(), half_dtype(encoder, clip)
    held = _Held(clip, frames, False, size, size if half is None else half.itemsize, None)
    samples, channels, _, height, width = clip.shape
    pixels, width_in = samples * height * width, encoder.conv_in.weight.shape[0]
    most = pixels * size * ((frames + BEFORE) * channels + frames * width_in)
    halos = BEFORE * pixels * size * channels
    for block in encoder.down_blocks:
        kept = 0
        for layer in _layers_of(block):
            if isinstance(layer, WanResample):
                padded = samples * (height + 2 * AROUND.border) * (width + 2 * AROUND.border)
                numbers = frames * layer.dim
                most = max(most, kept + numbers * (pixels * (held.half + size) + padded * held.half))
                height, width = height // 2, width // 2
                pixels = samples * height * width
                if shortens(layer):
                    # the sum; it behind the frame before; what is made of these
                    most = max(most, kept + (5 * numbers // 2 + layer.dim) * pixels * size)
                    halos += pixels * layer.dim * size
                    frames //= 2
                continue
            in_dim, out_dim = layer.in_dim, layer.out_dim
            first = isinstance(block, WanResidualDownBlock) and layer is block.resnets[0]
            kept = frames * pixels * in_dim * size if first and in_dim != out_dim else kept
            most = max(most, kept + pixels * held.in_resnet(frames, height * width, in_dim, out_dim))
            halos += BEFORE * pixels * (in_dim + out_dim) * held.half
            if first:
                shortcut = block.avg_shortcut
                factor = shortcut.factor_t * shortcut.factor_s**2
                kept = frames * pixels * out_dim * size // factor
    middle = 2 * len(encoder.mid_block.resnets) + 1  # convolutions
    halos += middle * BEFORE * pixels * encoder.conv_out.weight.shape[1] * held.half
    return int((most + 2 * halos) * _MARGIN)


def _normed_in(block: Any) -> Iterator[tuple[Any, Any]]:
    for resnet in block.resnets:
        yield resnet.norm1, resnet.conv1
        yield resnet.norm2, resnet.conv2


def decoder_reasons(decoder: Any) -> Iterator[str | None]:
    yield from _end_reasons(decoder)
    for block in decoder.up_blocks:
        residual = isinstance(block, WanResidualUpBlock)
        yield plain_reason(block, WanResidualUpBlock if residual else WanUpBlock)
        if residual and block.avg_shortcut is not None:
            yield plain_reason(block.avg_shortcut, DupUp3D)
        for resnet in block.resnets:
            yield from _resnet_reasons(resnet)
        for resample in upsamplers_of(block):
            yield plain_reason(resample, WanResample)
            yield plain_reason(resample.resample, nn.Sequential)
            yield from _resample_reasons(resample)


def encoder_reasons(encoder: Any) -> Iterator[str | None]:
    yield from _end_reasons(encoder)
    for block in encoder.down_blocks:
        if isinstance(block, WanResidualDownBlock):
            yield plain_reason(block, WanResidualDownBlock)
            yield plain_reason(block.avg_shortcut, AvgDown3D)
    for layer in down_layers(encoder):
        if isinstance(layer, WanResample):
            yield plain_reason(layer, WanResample)
            yield plain_reason(layer.resample, nn.Sequential)
            yield from _downsample_reasons(layer)
        else:
            yield from _resnet_reasons(layer)
    if STOCK_FRAMES % frames_of_a_latent(encoder):
        yield f"{frames_of_a_latent(encoder)} frames make a latent one"


def _end_reasons(coder: Any) -> Iterator[str | None]:
    """Those of what a decoder and an encoder both have."""
    yield plain_reason(coder.nonlinearity, nn.SiLU)
    yield conv_reason(coder.conv_in, 3)
    mid = coder.mid_block
    yield plain_reason(mid, WanMidBlock)
    for attention in mid.attentions:
        yield plain_reason(attention, WanAttentionBlock) or replaced_attention_reason()
        yield rms_norm_reason(attention.norm, WanRMS_norm)
        for conv in (attention.to_qkv, attention.proj):
            yield _conv2d_reason(conv, 1)
    for resnet in mid.resnets:
        yield from _resnet_reasons(resnet)
    yield rms_norm_reason(coder.norm_out, WanRMS_norm)
    yield conv_reason(coder.conv_out, 3)


def _resnet_reasons(resnet: Any) -> Iterator[str | None]:
    yield plain_reason(resnet, WanResidualBlock)
    yield plain_reason(resnet.nonlinearity, nn.SiLU)
    yield dropout_reason(resnet.dropout)
    for norm, conv in ((resnet.norm1, resnet.conv1), (resnet.norm2, resnet.conv2)):
        yield rms_norm_reason(norm, WanRMS_norm)
        yield conv_reason(conv, 3)
    if resnet.in_dim == resnet.out_dim:
        yield plain_reason(resnet.conv_shortcut, nn.Identity)
    else:
        yield conv_reason(resnet.conv_shortcut, 1)


def _resample_reasons(resample: Any) -> Iterator[str | None]:
    if resample.mode not in ("upsample2d", "upsample3d"):
        yield f"it has a resampler of mode {resample.mode}"
        return
    upsample, conv = resample.resample
    yield plain_reason(upsample, WanUpsample)
    if (upsample.size, upsample.scale_factor, upsample.mode) != (None, (2.0, 2.0), "nearest-exact"):
        yield "it does not upsample by 2 to the nearest pixel"
    yield _conv2d_reason(conv, 3)
    if resample.mode == "upsample3d":
        yield conv_reason(resample.time_conv, 3, 1)


def _downsample_reasons(resample: Any) -> Iterator[str | None]:
    if resample.mode not in ("downsample2d", "downsample3d"):
        yield f"it has a resampler of mode {resample.mode}"
        return
    pad, conv = resample.resample
    yield plain_reason(pad, nn.ZeroPad2d)
    if tuple(pad.padding) != (0, 1, 0, 1) or pad.value != 0:
        yield "it does not pad by a pixel of zeros at the right and below"
    yield _conv2d_reason(conv, 3, stride=2)
    if shortens(resample):
        yield conv_reason(resample.time_conv, 3, 1, stride=2)


def conv_reason(conv: Any, frames: int, side: int | None = None, stride: int = 1) -> str | None:
    """Of a causal convolution that sees so many frames, and as many pixels along each side if not told otherwise.

    One that goes by several frames pads none.
    """
    if reason := plain_reason(conv, WanCausalConv3d):
        return reason
    side = frames if side is None else side
    geometry = (frames, side, side), (stride, 1, 1), (0, 0, 0), (1, 1, 1), 1, "zeros"
    edges = (side // 2,) * 4 + (frames - 1 if stride == 1 else 0, 0)
    c = conv
    found = c.kernel_size, c.stride, c.padding, c.dilation, c.groups, c.padding_mode
    if found != geometry or tuple(c._padding) != edges or c.bias is None:
        return "a convolution is not a plain causal one"
    return None


def _conv2d_reason(conv: Any, side: int, stride: int = 1) -> str | None:
    if reason := plain_reason(conv, nn.Conv2d):
        return reason
    edge = (side // 2 if stride == 1 else 0,) * 2
    geometry = (side, side), (stride, stride), edge, (1, 1), 1, "zeros"
    found = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
    return "a convolution of images is not a plain one" if found != geometry or conv.bias is None else None
