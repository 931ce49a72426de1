"""The layers of Wan's decoder and encoder, that whole clips, or long chunks of them, go through as rows.

Clips are rows ``[B, F, H, W, C]`` from the first convolution to the last. ``rms_norm_silu`` writes a convolution's
input behind the frames that it looks back at, adds the bias and the residual that the convolution before has left out,
and behind an upsampler puts the pixels in place. Where memory does not hold a clip, the last two frames of each
convolution's input are carried on to the next chunk.

In the last up-blocks, which leave the number of frames as it is, tensors may be too large for cuDNN's faster
convolutions. Then these blocks and the last convolution work on some frames at a time (a piece), and the last two
frames of each convolution's input are carried on to the next piece.

A downsampler's convolution over time leaves the first frame of a clip as it is; of the others, it makes one of two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample, WanResidualDownBlock
from torch import Tensor, nn

from vidaccel.blocks.pixel_rows import convolve_rows, upsampled_by_rows, upsampled_cells_by_rows
from vidaccel.blocks.vae.causal_clip import (
    Chunk,
    Halos,
    Sum,
    clip_of,
    conv_rows,
    decode_in_chunks,
    images_of,
    out_of_memory,
    tell_chunk,
)
from vidaccel.blocks.vae.half_operands import float16_convolutions, scale_to_fit
from vidaccel.blocks.vae.wan_structure import (
    AROUND,
    BEFORE,
    decode_bytes,
    down_layers,
    downsamplers,
    encode_bytes,
    even_from,
    frames_of,
    frames_of_a_latent,
    frames_of_a_piece,
    half_dtype,
    lengthens,
    shortens,
    temporal_rate,
    upsamplers,
    upsamplers_of,
)
from vidaccel.kernels.attention.spatial_attention import spatial_attention, spatial_attention_ref
from vidaccel.kernels.conv.channels_last_weight import channels_last_weight
from vidaccel.kernels.conv.conv_epilogue import conv_epilogue, conv_epilogue_ref
from vidaccel.kernels.conv.padded_clip import NO_PADDING, Padding
from vidaccel.kernels.conv.pixel_conv import pixel_conv, pixel_conv_ref
from vidaccel.kernels.conv.pixel_shuffle import pixel_shuffle, pixel_shuffle_ref
from vidaccel.kernels.conv.upsample_conv import upsample_cells, upsample_conv_ref
from vidaccel.kernels.norm.rms_norm_silu import rms_norm_silu, rms_norm_silu_ref
from vidaccel.kernels.op import note, runs_triton
from vidaccel.parallel.layout import pixel_rows

__all__ = ["Decode", "Encode"]

CAUSAL = Padding(before=BEFORE)


class _Layers:
    """The layers of a decoder or encoder, that a chunk of its clip goes through."""

    def __init__(self, coder: Any, clip: Tensor, normed: list[tuple[Any, Any]], scaled: list[Any]) -> None:
        """
        Args:
            coder: Whose layers.
            clip: What it reads.
            normed: The norms, and the convolutions that read them.
            scaled: The convolutions that read a sum, scaled to fit where they read float16.
        """
        self._coder = coder
        self._half: dict[nn.Module, torch.dtype] | None = None  # what convolutions read; None: the clip's dtype
        self._largest: dict[nn.Module, Tensor] = {}  # number of their outputs, of those that read float16
        half = half_dtype(coder, clip)
        if half is not None:
            one = clip.new_ones(1)
            reads = [(norm.gamma, conv) for norm, conv in normed] + [(one, conv) for conv in scaled]
            fit = float16_convolutions(reads)
            self._half = {conv: half if at in fit else clip.dtype for at, (_, conv) in enumerate(reads)}
            self._largest = {reads[at][1]: largest for at, largest in fit.items()}
        self._tell_operands(clip)

    def _tell_operands(self, clip: Tensor) -> None:
        kinds = Counter([clip.dtype] if self._half is None else self._half.values())
        too_large = 0 if self._half is None else kinds[clip.dtype]
        reason = f"{too_large} convolutions whose numbers float16 may not hold read float32" if too_large else ""
        for dtype in kinds:
            note("half_operands", str(dtype).removeprefix("torch."), reason)

    def _enter(self, chunk: Chunk, clip: Tensor) -> None:
        """The first convolution, of ``[B, C, F, H, W]``."""
        conv = self._coder.conv_in
        buffer = _behind(chunk.halos.get(conv), clip)
        chunk.keep_of(conv, buffer)
        chunk.flow = Sum(conv_rows(buffer, conv), conv.bias)

    def _middle(self, chunk: Chunk) -> None:
        mid = self._coder.mid_block
        self._resnet(chunk, mid.resnets[0])
        for attention, resnet in zip(mid.attentions, mid.resnets[1:], strict=True):
            self._attention(chunk, attention)
            self._resnet(chunk, resnet)

    def _norm(self, chunk: Chunk, norm: Any, conv: nn.Module, *, keep: bool, silu: bool = True) -> Tensor:
        """What ``conv`` gets: its input, and the frames before if it looks back; with ``keep``, the sum flows on."""
        causal = isinstance(conv, WanCausalConv3d)
        run = rms_norm_silu if self._coder.runs("rms_norm_silu") else rms_norm_silu_ref
        flow = chunk.flow
        z, y = run(
            flow.x,
            norm.gamma.flatten(),
            bias=flow.bias,
            residual=flow.residual,
            residual_bias=flow.residual_bias,
            halo=chunk.halos.get(conv),
            x_scale=flow.x_scale,
            factor_t=flow.factor_t,
            skip=flow.skip,
            padding=CAUSAL if causal else NO_PADDING,
            silu=silu,
            keep=keep,
            inplace=flow.residual is None or flow.residual is not chunk.kept,
            out_dtype=None if self._half is None else self._half[conv],
        )
        chunk.flow = Sum(z)
        if causal:
            chunk.keep_of(conv, y)
        return y

    def _summed(self, chunk: Chunk) -> Tensor:
        """What flows, all of it added."""
        flow = chunk.flow
        if flow.bias is not None:
            images = clip_of(flow.x)
            residual = None if flow.residual is None else clip_of(flow.residual)
            if self._coder.runs("conv_epilogue"):
                inplace = flow.residual is None or flow.residual is not chunk.kept
                images = conv_epilogue(images, flow.bias, residual, residual_bias=flow.residual_bias, inplace=inplace)
            else:
                images = conv_epilogue_ref(images, flow.bias, residual, flow.residual_bias)
            chunk.flow = Sum(images.permute(0, 2, 3, 4, 1))
        return chunk.flow.x

    def _resnet(self, chunk: Chunk, resnet: Any, keep: bool = False) -> None:
        """With ``keep``, what it reads is kept, all of it added."""
        buffer = self._norm(chunk, resnet.norm1, resnet.conv1, keep=True)
        residual, residual_bias, shortcut = chunk.flow.x, None, resnet.conv_shortcut
        if keep:
            chunk.kept = residual
        if isinstance(shortcut, WanCausalConv3d):
            residual, residual_bias = conv_rows(residual, shortcut), shortcut.bias
        fused = self._coder.runs("clip_conv")
        made = conv_rows(buffer, resnet.conv1, fused=fused, gamma=resnet.norm1.gamma)
        chunk.flow = Sum(made, resnet.conv1.bias)
        del buffer, made
        buffer = self._norm(chunk, resnet.norm2, resnet.conv2, keep=False)
        del chunk.flow
        made = conv_rows(buffer, resnet.conv2, fused=fused, gamma=resnet.norm2.gamma)
        chunk.flow = Sum(made, resnet.conv2.bias, residual, residual_bias)

    def _attention(self, chunk: Chunk, block: Any) -> None:
        normed, proj = self._norm(chunk, block.norm, block.to_qkv, keep=True, silu=False), block.proj
        residual = chunk.flow.x
        weight, bias = (parameter.to(normed.dtype) for parameter in (block.to_qkv.weight, block.to_qkv.bias))
        rows = F.linear(normed.flatten(0, 1).flatten(1, 2), weight.flatten(1), bias)  # [B * F, H * W, 3 * C]
        run = spatial_attention if self._coder.runs("spatial_attention") else spatial_attention_ref
        q, others = rows[..., : len(proj.bias)], rows[..., len(proj.bias) :]
        if (over := pixel_rows()) is not None:
            others = over.gather(others, 1)
        k, v = others.chunk(2, dim=-1)
        attended = run(q, k, v, 1).view(normed.shape).to(residual.dtype)
        out = F.conv2d(images_of(attended), proj.weight, None).permute(0, 2, 3, 1).contiguous()
        chunk.flow = Sum(out.view(residual.shape), proj.bias, residual)

    def _scale(self, chunk: Chunk, convolutions: list[Any], before: Any) -> Tensor | None:
        """What flows is to be multiplied by that, and the ``convolutions`` to read float16; None: neither."""
        flow = chunk.flow
        if self._half is None or flow.residual is None or flow.residual_bias is not None:
            return None
        added = self._largest.get(before.conv2)
        if added is None or not all(conv in self._largest for conv in convolutions):
            return None
        scale = scale_to_fit(flow.residual, added, convolutions)
        over = pixel_rows()
        return scale if over is None else over.ranks.least(scale)


class Decode(_Layers):
    """One decode of latents by the modules of a decoder."""

    def __init__(self, decoder: Any, latents: Tensor) -> None:
        scaled = [conv for resample in upsamplers(decoder) for conv in _convolutions_of(resample)]
        resnets = (resnet for block in decoder.up_blocks for resnet in block.resnets)
        super().__init__(decoder, latents, list(_normed_convolutions(decoder, resnets)), scaled)
        self._decoder = decoder
        self._rate = temporal_rate(decoder)
        self._most = latents  # or the rows of them that the rank with most has, by which all ranks reckon

    def run(self, latents: Tensor, halos: Halos, keep: bool) -> tuple[Tensor, Halos | None]:
        """The pixels, and what the next frames need if that is to be kept."""
        decoder, rate, begins = self._decoder, self._rate, not halos
        samples, _, frames, height, width = latents.shape
        over, own = pixel_rows(), latents
        if over is not None:
            own, self._most = over.part(latents, 3), over.largest_part(latents, 3)
        scale = 2 ** sum(True for _ in upsamplers(decoder))
        height, width = height * scale, width * scale

        def pixel_frames(latent_frames: int) -> int:
            return frames_of(latent_frames, rate) if begins else rate * latent_frames

        pixels = latents.new_empty(samples, len(decoder.conv_out.weight), pixel_frames(frames), height, width)

        def decode(start: int, end: int) -> None:
            nonlocal halos
            out = whole = pixels[:, :, pixel_frames(start) : pixel_frames(end)]
            if over is not None:
                out = over.part(whole, 3)
            halos = self._chunk(own[:, :, start:end], halos, out, keep or end < frames)
            if over is not None:
                whole.copy_(over.gather(out, 3))

        needs = partial(decode_bytes, decoder, self._most)
        explain = partial(out_of_memory, samples, height, width)
        step = decode_in_chunks(frames, latents.device, needs, decode, explain, over)
        made = pixel_frames(step)
        piece = frames_of_a_piece(decoder, self._most, made)
        then = "" if piece == made else f", {piece} of {made} in the last up-blocks"
        tell_chunk(decoder, step, frames, then)
        return pixels, halos if keep else None

    def _chunk(self, latents: Tensor, halos: Halos, out: Tensor, keep: bool) -> Halos:
        decoder = self._decoder
        chunk = Chunk(Sum(latents), halos, keep)
        self._enter(chunk, latents)
        self._middle(chunk)
        first = even_from(decoder)
        for block in decoder.up_blocks[:first]:
            self._up_block(chunk, block)
        frames = out.shape[2]
        step = frames_of_a_piece(decoder, self._most, frames)
        if step == frames:
            self._to_pixels(chunk, first, out)
            return chunk.following
        flow = chunk.flow
        del chunk.flow
        for start in range(0, frames, step):
            some = slice(start, min(start + step, frames))
            piece = Chunk(flow.some(some), {**chunk.halos, **chunk.following}, keep or some.stop < frames)
            self._to_pixels(piece, first, out[:, :, some])
            chunk.following |= piece.following
        return chunk.following

    def _to_pixels(self, chunk: Chunk, first: int, out: Tensor) -> None:
        """What is left to do of a chunk, from the up-block at position ``first`` on."""
        decoder = self._decoder
        for block in decoder.up_blocks[first:]:
            self._up_block(chunk, block)
        buffer = self._norm(chunk, decoder.norm_out, decoder.conv_out, keep=False)
        del chunk.flow
        conv, run = decoder.conv_out, pixel_conv if decoder.runs("pixel_conv") else pixel_conv_ref
        out.copy_(convolve_rows(conv, lambda _: run(buffer, conv.weight, conv.bias), clip_of(buffer)))

    def _up_block(self, chunk: Chunk, block: Any) -> None:
        shortcut = getattr(block, "avg_shortcut", None)
        for at, resnet in enumerate(block.resnets):
            self._resnet(chunk, resnet, keep=at == 0 and shortcut is not None)
        for upsampler in upsamplers_of(block):
            self._upsample(chunk, upsampler, block.resnets[-1])
        if shortcut is not None:
            # of the first frame of a clip, time has made one frame: the last of its cell
            skip = shortcut.factor_t - 1 if chunk.begins else 0
            chunk.flow = replace(chunk.flow, residual=chunk.kept, factor_t=shortcut.factor_t, skip=skip)
            chunk.kept = None

    def _upsample(self, chunk: Chunk, resample: Any, before: Any) -> None:
        """``before`` is the ResNet block whose output it gets."""
        conv, scale = resample.resample[1], None
        # A convolution over time gets the clip at once: each chunk would have its own scale, and another one's halo.
        if not (chunk.keep or chunk.halos) or not lengthens(resample):
            scale = self._scale(chunk, _convolutions_of(resample), before)
        if scale is None:
            self._summed(chunk)
        else:
            self._scaled_sum(chunk, scale)
        if lengthens(resample):
            self._double(chunk, resample.time_conv, scale)
        samples, images = len(chunk.flow.x), images_of(chunk.flow.x)
        del chunk.flow
        if self._decoder.runs("upsample_conv") and runs_triton("upsample_conv", images):
            made = upsampled_cells_by_rows(conv.weight, lambda x: upsample_cells(x, conv.weight), images)
        else:
            made = upsampled_by_rows(conv.weight, lambda x: upsample_conv_ref(x, conv.weight, None), images)
            made = made.permute(0, 2, 3, 1)
        chunk.flow = Sum(made.unflatten(0, (samples, -1)), conv.bias, x_scale=scale)

    def _scaled_sum(self, chunk: Chunk, scale: Tensor) -> None:
        """What flows, all of it added, times ``scale``, in float16."""
        flow = chunk.flow
        run = rms_norm_silu if self._decoder.runs("rms_norm_silu") else rms_norm_silu_ref
        _, scaled = run(
            flow.x,
            scale.expand(flow.x.shape[-1]),
            bias=flow.bias,
            residual=flow.residual,
            kind="none",
            silu=False,
            keep=False,
            out_dtype=torch.float16,
        )
        chunk.flow = Sum(scaled)

    def _double(self, chunk: Chunk, conv: Any, scale: Tensor | None) -> None:
        """Every frame becomes two, but for the first of a clip, which the convolution over time never sees."""
        x = chunk.flow.x
        halo, first = chunk.halos.get(conv), chunk.begins
        frames = buffer = x[:, first:]
        before = x.new_zeros(len(x), BEFORE + first, *x.shape[2:]) if halo is None else halo
        if halo is not None:
            buffer = torch.cat([before, frames], dim=1)
            chunk.keep_of(conv, buffer)
        elif chunk.keep:
            chunk.keep_of(conv, torch.cat([before, frames[:, -BEFORE:]], dim=1))
        count = frames.shape[1]
        if count == 0:
            return
        # Zeros are before the first clip's. One more of them keeps a place for its first frame; those behind are cut.
        looks_back = halo is not None
        made = conv_rows(buffer, conv) if looks_back else conv_rows(frames, conv, padding=(BEFORE + first, 0, 0))
        bias = conv.bias if scale is None else conv.bias * scale
        run = pixel_shuffle if self._decoder.runs("pixel_shuffle") else pixel_shuffle_ref
        doubled = run(made[:, : first + count], bias, cell=(2, 1, 1), drop=int(first))
        doubled[:, :first] = x[:, :first]
        chunk.flow = Sum(doubled)


class Encode(_Layers):
    """One encode of a clip by the modules of an encoder."""

    def __init__(self, encoder: Any, clip: Tensor) -> None:
        resnets = (layer for layer in down_layers(encoder) if not isinstance(layer, WanResample))
        scaled = [resample.resample[1] for resample in downsamplers(encoder)]
        super().__init__(encoder, clip, list(_normed_convolutions(encoder, resnets)), scaled)
        self._encoder = encoder

    def run(self, clip: Tensor, halos: Halos) -> tuple[Tensor, Halos]:
        """The latents, and what the next frames need, which ``halos`` become.

        Without halos, nothing is before the first frame.
        """
        samples, _, frames, height, width = clip.shape
        times, rate, first = len(downsamplers(self._encoder)), frames_of_a_latent(self._encoder), int(not halos)
        made = first + (frames - first) // rate
        latents = clip.new_empty(samples, len(self._encoder.conv_out.weight), made, height >> times, width >> times)
        if first:
            self._in_chunks(clip[:, :, :1], halos, latents[:, :, :1], 1, "")
        if made > first:
            self._in_chunks(clip[:, :, first:], halos, latents[:, :, first:], rate, " behind the first")
        return latents, halos

    def _in_chunks(self, clip: Tensor, halos: Halos, out: Tensor, rate: int, then: str) -> None:
        def encode(start: int, end: int) -> None:
            # the same dictionary, for else who has called keeps those before
            halos.update(self._chunk(clip[:, :, rate * start : rate * end], halos, out[:, :, start:end]))

        def needs(latent_frames: int) -> int:
            return encode_bytes(self._encoder, clip, rate * latent_frames)

        explain = partial(out_of_memory, len(clip), clip.shape[3], clip.shape[4], verb="encode")
        step = decode_in_chunks(out.shape[2], clip.device, needs, encode, explain)
        tell_chunk(self._encoder, rate * step, rate * out.shape[2], then)

    def _chunk(self, clip: Tensor, halos: Halos, out: Tensor) -> Halos:
        encoder, before = self._encoder, None
        chunk = Chunk(Sum(clip), halos, keep=True)
        self._enter(chunk, clip)
        for block in encoder.down_blocks:
            if isinstance(block, WanResidualDownBlock):
                self._down_block(chunk, block)
            elif isinstance(block, WanResample):
                self._downsample(chunk, block, before)
            else:
                self._resnet(chunk, block)
            before = block
        self._middle(chunk)
        buffer = self._norm(chunk, encoder.norm_out, encoder.conv_out, keep=False)
        del chunk.flow
        out.copy_(clip_of(conv_rows(buffer, encoder.conv_out) + encoder.conv_out.bias))
        return chunk.following

    def _down_block(self, chunk: Chunk, block: Any) -> None:
        for at, resnet in enumerate(block.resnets):
            self._resnet(chunk, resnet, keep=at == 0)
            if at == 0 and chunk.kept is not None:
                chunk.kept = _averaged(chunk.kept, block.avg_shortcut)
        if block.downsampler is not None:
            self._downsample(chunk, block.downsampler, block.resnets[-1])
        else:
            self._summed(chunk)
        chunk.flow = replace(chunk.flow, residual=chunk.kept)
        chunk.kept = None

    def _downsample(self, chunk: Chunk, resample: Any, before: Any) -> None:
        """``before`` is the ResNet block whose output it gets."""
        conv = resample.resample[1]
        scale, wide = self._scale(chunk, [conv], before), None if self._half is None else torch.float32
        flow, run = chunk.flow, rms_norm_silu if self._coder.runs("rms_norm_silu") else rms_norm_silu_ref
        samples, _, height, width, channels = flow.x.shape
        _, padded = run(
            flow.x,
            None if scale is None else scale.expand(channels),
            bias=flow.bias,
            residual=flow.residual,
            residual_bias=flow.residual_bias,
            padding=AROUND,
            kind="none",
            silu=False,
            keep=False,
            out_dtype=wide if scale is None else torch.float16,
        )
        del chunk.flow, flow
        weight = channels_last_weight(conv.weight.unsqueeze(2), padded.dtype).squeeze(2)
        made = F.conv2d(images_of(padded), weight, None, stride=2)
        del padded
        made = made[:, :, 1 : 1 + height // 2, 1 : 1 + width // 2].permute(0, 2, 3, 1)
        chunk.flow = Sum(made.contiguous().unflatten(0, (samples, -1)), conv.bias, x_scale=scale)
        if shortens(resample):
            self._halve(chunk, resample.time_conv)

    def _halve(self, chunk: Chunk, conv: Any) -> None:
        """Of two frames one, but for the first of a clip, which stays as it is."""
        halo, scale, bias = chunk.halos.get(conv), chunk.flow.x_scale, chunk.flow.bias
        if scale is None or bias is None:
            self._summed(chunk)
        else:
            chunk.flow = Sum(torch.addcmul(bias, chunk.flow.x, 1 / scale))
        x = chunk.flow.x
        chunk.keep_of(conv, x, before=1)
        if halo is not None:
            clip = clip_of(torch.cat([halo, x], dim=1))
            made = F.conv3d(clip, channels_last_weight(conv.weight, clip.dtype), None, stride=(2, 1, 1))
            chunk.flow = Sum(made.permute(0, 2, 3, 4, 1).contiguous(), conv.bias)


def _normed_convolutions(coder: Any, resnets: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """The norms of a decoder or encoder that has these ResNet blocks, and the convolutions that read them."""
    for resnet in (*coder.mid_block.resnets, *resnets):
        yield resnet.norm1, resnet.conv1
        yield resnet.norm2, resnet.conv2
    for attention in coder.mid_block.attentions:
        yield attention.norm, attention.to_qkv
    yield coder.norm_out, coder.conv_out


def _convolutions_of(resample: Any) -> list[Any]:
    """Those of an upsampler, in the order in which they run."""
    over_time = [resample.time_conv] if lengthens(resample) else []
    return [*over_time, resample.resample[1]]


def _averaged(rows: Tensor, shortcut: Any) -> Tensor:
    """``AvgDown3D`` of rows."""
    frames, side, group = shortcut.factor_t, shortcut.factor_s, shortcut.group_size
    if frames == side == group == 1:
        return rows
    if missing := -rows.shape[1] % frames:
        rows = torch.cat([torch.zeros_like(rows[:, :1])] * missing + [rows], dim=1)
    cells = rows.unflatten(3, (-1, side)).unflatten(2, (-1, side)).unflatten(1, (-1, frames))
    cells = cells.permute(0, 1, 3, 5, 7, 2, 4, 6)  # [B, F', H', W', C, frames, side, side]
    if group % side**2 == 0:
        cells, group = cells.mean((-2, -1)), group // side**2
    return cells.flatten(4).unflatten(4, (-1, group)).mean(-1).contiguous()


def _behind(halo: Tensor | None, latents: Tensor) -> Tensor:
    """Latents ``[B, C, F, H, W]`` as rows, behind the frames before them."""
    samples, channels, frames, height, width = latents.shape
    buffer = latents.new_zeros(samples, BEFORE + frames, height, width, channels)
    buffer[:, BEFORE:] = latents.permute(0, 2, 3, 4, 1)
    if halo is not None:
        buffer[:, :BEFORE] = halo
    return buffer
