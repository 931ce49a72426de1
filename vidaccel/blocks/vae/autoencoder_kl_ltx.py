"""diffusers' ``autoencoders/autoencoder_kl_ltx.py``: decoder and encoder as rows, little between their convolutions.

Stock repeats the first and the last frame of every convolution's input with ``cat``, normalises it in six passes or
more, and permutes it after every upsampler. Here a clip is rows ``[B, F, H, W, C]`` from the first convolution to the
last. ``rms_norm_silu`` writes a convolution's input with the frames and pixels around it, and adds the bias and the
residual that the convolution before has left out. The weights of an upsampler's convolution are reordered, so that the
channels of one pixel lie together, and ``pixel_shuffle`` puts the pixels in their place.

LTX-2's are made of the same parts (``autoencoder_kl_ltx2.py``): :class:`RowsDecoder` and :class:`RowsEncoder` serve
both.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_ltx import (
    LTXVideo095DownBlock3D,
    LTXVideoCausalConv3d,
    LTXVideoDecoder3d,
    LTXVideoDownBlock3D,
    LTXVideoDownsampler3d,
    LTXVideoEncoder3d,
    LTXVideoMidBlock3d,
    LTXVideoResnetBlock3d,
    LTXVideoUpBlock3d,
    LTXVideoUpsampler3d,
)
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from vidaccel.blocks.vae.causal_clip import Sum, clip_of, conv_rows, dropout_reason, free_bytes, structure_reason
from vidaccel.blocks.vae.tile_batches import TileDecoder
from vidaccel.environment import memory_ran_out
from vidaccel.kernels.conv.padded_clip import Padding, pad_clip
from vidaccel.kernels.conv.pixel_shuffle import pixel_shuffle, pixel_shuffle_ref
from vidaccel.kernels.norm.rms_norm_silu import rms_norm_silu, rms_norm_silu_ref
from vidaccel.kernels.op import DTYPES, note
from vidaccel.kernels.settings import Fidelity
from vidaccel.sites.block import FusedBlock, call_site, cut_corner, fuses
from vidaccel.sites.plain import plain_reason, stock_class

__all__ = [
    "DECODER_OPS",
    "ENCODER_OPS",
    "Family",
    "FusedLTXVideoDecoder3d",
    "FusedLTXVideoEncoder3d",
    "RowsDecoder",
    "RowsEncoder",
    "decode_bytes",
]

ENCODER_OPS: dict[str, Fidelity] = {"channels_last": "math-exact", "rms_norm_silu": "math-exact"}
DECODER_OPS = ENCODER_OPS | {"pixel_shuffle": "math-exact"}
CORNER_FRAMES = 3
PIXEL_MODES = ("zeros", "replicate", "reflect")  # that rms_norm_silu writes
_MARGIN = 1.1  # the allocator's rounding, the convolutions' workspaces, all that is small


class Family(NamedTuple):
    """The classes that decoder and encoder are made of."""

    conv: type[nn.Module]
    shortcut: type[nn.Module]
    norm: type[nn.Module]
    resnet: type[nn.Module]
    mid_block: type[nn.Module]
    up_block: type[nn.Module]
    upsampler: type[nn.Module]
    down_blocks: tuple[type[nn.Module], ...]
    downsampler: type[nn.Module]


class _RowsCoder(FusedBlock):
    """What decoder and encoder share."""

    conv_in: Any
    mid_block: Any
    norm_out: Any
    conv_out: Any
    patch_size: int
    patch_size_t: int
    family: Family

    @classmethod
    def left_alone_reason(cls, module: Any) -> str | None:
        return structure_reason(module, _reasons, cls.family)

    def input_reason(self, x: Tensor) -> str | None:
        if not self.runs("channels_last"):
            return "channels_last is off, or failed"
        if torch.is_autocast_enabled(x.device.type):
            return "autocast is on"
        weight = self.conv_in.conv.weight
        if x.dtype not in DTYPES:  # there stock's RMSNorm still sums in float32
            return f"the input is {x.dtype}, not float16, bfloat16 or float32"
        if x.dtype != weight.dtype or x.device != weight.device:
            return f"the input is {x.dtype} on {x.device}, the weights {weight.dtype} on {weight.device}"
        return None if x.numel() else "the input is empty"

    def explained(self, run: Callable[..., Tensor], what: str, needed: int, x: Tensor, *args: Any) -> Tensor:
        """``run(x, *args)``, its running out of memory explained."""
        note("channels_last", "torch")
        try:
            return run(x, *args)
        except RuntimeError as error:
            if not memory_ran_out(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold every tensor of the attempt
            raise torch.OutOfMemoryError(_out_of_memory(what, needed, x)) from error


class RowsDecoder(TileDecoder, _RowsCoder):
    """What the decoders of LTX-Video and LTX-2 share."""

    up_blocks: Any
    timestep_scale_multiplier: Any

    def call_reason(self, latents: Tensor, temb: Tensor | None, causal: bool | None = None) -> str | None:
        if reason := self.input_reason(latents):
            return reason
        channels = self.conv_in.conv.in_channels
        if latents.ndim != 5 or latents.shape[1] != channels:
            return f"the latents are not [B, {channels}, F, H, W]"
        if self.conv_in.conv.padding_mode == "reflect" and min(latents.shape[3:]) < 2:
            return "pictures of one row or column cannot be padded by reflection"
        if self.timestep_scale_multiplier is not None and (temb is None or temb.numel() != len(latents)):
            return "there is not one timestep for each clip"
        return None

    def bytes_at_once(self, latents: Tensor) -> int:
        return decode_bytes(self, latents)

    def can_run_again(self, args: Any, kwargs: Any) -> bool:
        return super().can_run_again(args, kwargs) and not self._takes_random_numbers()

    def _takes_random_numbers(self) -> bool:
        return any(_injects_noise(part) for part in self.modules())

    def corner(self, args: Any, kwargs: Any) -> Any:
        if self._takes_random_numbers():
            return None  # they are the clip's
        latents, *others = args
        return cut_corner((latents[:, :, :CORNER_FRAMES], *others), kwargs, most_whole=0)

    def fused_forward(self, latents: Tensor, temb: Tensor | None, causal: bool | None = None) -> Tensor:
        """Decode; ``causal`` None: each convolution says itself whether it is."""
        run = _Rows(self, causal).decode
        return self.explained(run, "decoding {} latent frames", decode_bytes(self, latents), latents, temb)


class RowsEncoder(_RowsCoder):
    """What the encoders of LTX-Video and LTX-2 share."""

    down_blocks: Any

    def call_reason(self, pixels: Tensor, causal: bool | None = None) -> str | None:
        if reason := self.input_reason(pixels):
            return reason
        sizes, channels = self._patch(), self.conv_in.conv.in_channels
        if pixels.ndim != 5 or pixels.shape[1] * math.prod(sizes) != channels:
            return f"the clip is not [B, {channels // math.prod(sizes)}, F, H, W]"
        if any(size % patch for size, patch in zip(pixels.shape[2:], sizes, strict=True)):
            return f"the clip does not divide into patches of {sizes}"
        return None

    def corner(self, args: Any, kwargs: Any) -> Any:
        pixels, *others = args
        frames, height, width = (math.prod(along) for along in zip(self._patch(), *_strides(self), strict=True))
        return (pixels[:, :, : 1 + frames, : 2 * height, : 2 * width].contiguous(), *others), kwargs

    def fused_forward(self, pixels: Tensor, causal: bool | None = None) -> Tensor:
        """Encode; ``causal`` None: each convolution says itself whether it is."""
        run = _Rows(self, causal).encode
        return self.explained(run, "encoding {} frames", _encode_bytes(self, pixels), pixels)

    def _patch(self) -> tuple[int, int, int]:
        return self.patch_size_t, self.patch_size, self.patch_size


LTX = Family(
    conv=LTXVideoCausalConv3d,
    shortcut=LTXVideoCausalConv3d,
    norm=RMSNorm,
    resnet=LTXVideoResnetBlock3d,
    mid_block=LTXVideoMidBlock3d,
    up_block=LTXVideoUpBlock3d,
    upsampler=LTXVideoUpsampler3d,
    down_blocks=(LTXVideoDownBlock3D, LTXVideo095DownBlock3D),
    downsampler=LTXVideoDownsampler3d,
)


@fuses(LTXVideoDecoder3d, DECODER_OPS)
class FusedLTXVideoDecoder3d(RowsDecoder, LTXVideoDecoder3d):
    """The decoder of LTX-Video, 0.9.0 to 0.9.8."""

    family = LTX

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        if torch.compiler.is_compiling():
            return LTXVideoDecoder3d.forward(self, hidden_states, temb)
        return call_site(FusedLTXVideoDecoder3d, self, hidden_states, temb)


@fuses(LTXVideoEncoder3d, ENCODER_OPS)
class FusedLTXVideoEncoder3d(RowsEncoder, LTXVideoEncoder3d):
    """The encoder of LTX-Video, 0.9.0 to 0.9.8."""

    family = LTX

    def forward(self, hidden_states: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return LTXVideoEncoder3d.forward(self, hidden_states)
        return call_site(FusedLTXVideoEncoder3d, self, hidden_states)


class _Reordered(NamedTuple):
    """A convolution with its output channels in another order."""

    weight: Tensor
    bias: Tensor


class _Rows:
    """One call of a decoder or an encoder.

    Where the clip is, ``flow`` alone knows: no variable of a caller keeps a tensor longer than it is needed.
    """

    flow: Sum

    def __init__(self, coder: Any, causal: bool | None) -> None:
        self._coder = coder
        self._causal = causal

    def encode(self, pixels: Tensor) -> Tensor:
        """The mean of the latents and, repeated, the logarithm of their variance: ``[B, 2 * C, F, H, W]``."""
        encoder, patch = self._coder, self._coder.patch_size
        cells = pixels.unflatten(4, (-1, patch)).unflatten(3, (-1, patch)).unflatten(2, (-1, encoder.patch_size_t))
        self._begin(cells.permute(0, 2, 4, 6, 1, 3, 7, 5).flatten(4))  # channels (C, frame, column, row)
        del cells
        for block in encoder.down_blocks:
            for resnet in block.resnets:
                self._resnet(resnet, None)
            for downsampler in block.downsamplers or ():
                self._downsample(downsampler)
            if (conv_out := getattr(block, "conv_out", None)) is not None:
                self._resnet(conv_out, None)
        for resnet in encoder.mid_block.resnets:
            self._resnet(resnet, None)
        buffer = self._norm(encoder.norm_out, encoder.conv_out, keep=False)
        del self.flow
        made = clip_of(self._convolved(buffer, encoder.conv_out) + encoder.conv_out.conv.bias)
        channels = made.shape[1] - 1
        return torch.cat([made, made[:, -1:].expand(-1, channels - 1, -1, -1, -1)], dim=1).contiguous()

    def decode(self, latents: Tensor, temb: Tensor | None) -> Tensor:
        """The pixels ``[B, C, F, H, W]``."""
        decoder = self._coder
        self._begin(latents.permute(0, 2, 3, 4, 1))
        if decoder.timestep_scale_multiplier is not None:
            temb = temb * decoder.timestep_scale_multiplier
        for block in (decoder.mid_block, *decoder.up_blocks):
            self._block(block, temb)
        modulation = self._modulations(decoder.scale_shift_table, self._embedded(decoder, temb))
        buffer = self._norm(decoder.norm_out, decoder.conv_out, *modulation, keep=False)
        del self.flow
        return self._pixels(buffer)

    def _begin(self, rows: Tensor) -> None:
        conv = self._coder.conv_in
        self.flow = Sum(self._convolved(pad_clip(rows, None, self._padding(conv)), conv), conv.conv.bias)

    def _block(self, block: Any, temb: Tensor | None) -> None:
        if (conv_in := getattr(block, "conv_in", None)) is not None:
            self._resnet(conv_in, None)
        temb = self._embedded(block, temb)
        for upsampler in getattr(block, "upsamplers", None) or ():
            self._upsample(upsampler)
        for resnet in block.resnets:
            self._resnet(resnet, temb)

    def _embedded(self, owner: Any, temb: Tensor | None) -> Tensor | None:
        """``temb`` as the resnets of ``owner`` take it; None if they take none."""
        if owner.time_embedder is None:
            return None
        rows = self.flow.x
        assert temb is not None
        return owner.time_embedder(
            timestep=temb.flatten(),
            resolution=None,
            aspect_ratio=None,
            batch_size=len(rows),
            hidden_dtype=rows.dtype,
        ).view(len(rows), -1)

    def _modulations(self, table: Tensor | None, temb: Tensor | None) -> tuple[Tensor, ...]:
        """Shift and scale ``[B, C]``, once or twice; none without a table."""
        if table is None or temb is None:
            return ()
        return (temb.unflatten(1, table.shape) + table).unbind(1)

    def _resnet(self, resnet: Any, temb: Tensor | None) -> None:
        modulation = self._modulations(resnet.scale_shift_table, temb)
        buffer = self._norm(resnet.norm1, resnet.conv1, *modulation[:2], keep=True)
        residual, residual_bias = self.flow.x, None
        self.flow = Sum(self._convolved(buffer, resnet.conv1), resnet.conv1.conv.bias)
        del buffer
        self._add_noise(resnet.per_channel_scale1)
        buffer = self._norm(resnet.norm2, resnet.conv2, *modulation[2:], keep=False)
        del self.flow
        self.flow = Sum(self._convolved(buffer, resnet.conv2), resnet.conv2.conv.bias)
        del buffer
        self._add_noise(resnet.per_channel_scale2)
        if (norm := resnet.norm3) is not None:
            residual = F.layer_norm(residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        if resnet.conv_shortcut is not None:
            shortcut = getattr(resnet.conv_shortcut, "conv", resnet.conv_shortcut)
            residual, residual_bias = conv_rows(residual, shortcut), shortcut.bias
        self.flow.residual, self.flow.residual_bias = residual, residual_bias

    def _add_noise(self, gain: Tensor | None) -> None:
        """The random numbers that stock takes: one for each pixel of a frame, the same for all frames."""
        if gain is not None:
            rows = self.flow.x
            noise = torch.randn(rows.shape[2:4], device=rows.device, dtype=rows.dtype)
            rows += noise[..., None] * gain.flatten()

    def _norm(
        self, norm: Any, conv: Any, shift: Tensor | None = None, scale: Tensor | None = None, *, keep: bool
    ) -> Tensor:  # fmt: skip
        """What ``conv`` reads: what flows, normed, with all that lies around it."""
        return self._written(self._padding(conv), kind="mean", eps=norm.eps, scale=scale, shift=shift, keep=keep)

    def _written(self, padding: Padding, *, keep: bool = False, **options: Any) -> Tensor:
        """What flows, all of it added, normed and padded; with ``keep``, the sum is what flows on."""
        run = rms_norm_silu if self._coder.runs("rms_norm_silu") else rms_norm_silu_ref
        flow = self.flow
        flow.x, y = run(
            flow.x, bias=flow.bias, residual=flow.residual, residual_bias=flow.residual_bias, padding=padding,
            keep=keep, inplace=True, **options,
        )  # fmt: skip
        flow.bias = flow.residual = flow.residual_bias = None
        return y

    def _upsample(self, upsampler: Any) -> None:
        padding = self._padding(upsampler.conv)
        buffer = self._written(padding, kind="none", silu=False)
        del self.flow
        cell = math.prod(upsampler.stride)
        # channels (C, cell) become (cell, C)
        conv = _reordered(upsampler.conv.conv, (-1, cell), (1, 0))
        made = self._convolved(buffer, upsampler.conv, conv)  # [B, F, H, W, (cell, C)]
        source = padding.inner(buffer) if upsampler.residual else None
        del buffer
        run = pixel_shuffle if self._coder.runs("pixel_shuffle") else pixel_shuffle_ref
        stride = tuple(upsampler.stride)
        self.flow = Sum(run(made, conv.bias, source, cell=stride, drop=stride[0] - 1))

    def _downsample(self, downsampler: Any) -> None:
        if isinstance(downsampler, self._coder.family.conv):
            buffer = self._written(self._padding(downsampler), kind="none", silu=False)
            del self.flow
            conv = downsampler.conv
            self.flow = Sum(self._convolved(buffer, downsampler), conv.bias)
            return
        conv, stride = downsampler.conv.conv, downsampler.stride
        padding = self._padding(downsampler.conv)
        again = stride[0] - 1  # frames that stock puts before the clip, for time to divide
        buffer = self._written(padding._replace(before=padding.before + again), kind="none", silu=False)
        del self.flow
        source = _in_cells(padding.inner(buffer), stride).unflatten(-1, (-1, downsampler.group_size)).mean(-1)
        made = self._convolved(buffer, downsampler.conv)
        del buffer
        self.flow = Sum(_in_cells(made, stride), conv.bias.repeat_interleave(math.prod(stride)), source)

    def _pixels(self, buffer: Tensor) -> Tensor:
        """The last convolution, and its channels ``(C, frame, column, row)`` of a patch in their place."""
        decoder = self._coder
        patch, frames = decoder.patch_size, decoder.patch_size_t
        conv = _reordered(decoder.conv_out.conv, (-1, patch, patch), (0, 2, 1))  # rows before columns
        rows = self._convolved(buffer, decoder.conv_out, conv)
        samples, count, height, width, channels = rows.shape
        cell = channels // (frames * patch * patch), frames, patch, patch
        pixels = rows.new_empty(samples, cell[0], count * frames, height * patch, width * patch)
        target = pixels.unflatten(4, (width, patch)).unflatten(3, (height, patch)).unflatten(2, (count, frames))
        bias = conv.bias.view(cell[0], 1, frames, 1, patch, 1, patch)
        torch.add(rows.unflatten(-1, cell).permute(0, 4, 1, 5, 2, 6, 3, 7), bias, out=target)
        return pixels

    def _padding(self, conv: Any) -> Padding:
        """What ``conv`` reads around its input, but for zeros around its pictures, which cuDNN adds for nothing."""
        causal = conv.is_causal if self._causal is None else self._causal
        before, after = (2, 0) if causal else (1, 1)
        mode = conv.conv.padding_mode
        return Padding(before, after, int(mode != "zeros"), "replicate", mode)

    def _convolved(self, buffer: Tensor, conv: Any, reordered: _Reordered | None = None) -> Tensor:
        """The convolution of what :meth:`_padding` has been put around, without its bias."""
        padding = None if conv.conv.padding_mode == "zeros" else (0, 0, 0)
        if conv.conv.stride == (1, 1, 1):
            return conv_rows(buffer, reordered or conv.conv, padding=padding)
        weight = conv.conv.weight.contiguous(memory_format=torch.channels_last_3d)
        out = F.conv3d(clip_of(buffer), weight, None, conv.conv.stride, padding or (0, 1, 1))
        return out.permute(0, 2, 3, 4, 1).contiguous()


def _reordered(conv: Any, shape: tuple[int, ...], order: tuple[int, ...]) -> _Reordered:
    """``conv`` with its output channels, seen as ``shape``, permuted to ``order``; its weight is channels-last."""
    rows = conv.weight.permute(0, 2, 3, 4, 1).unflatten(0, shape)
    weight = rows.permute(*order, *range(len(shape), rows.ndim)).flatten(0, len(shape) - 1)
    bias = conv.bias.unflatten(0, shape).permute(order).flatten()
    return _Reordered(weight.permute(0, 4, 1, 2, 3), bias)


def _in_cells(rows: Tensor, stride: tuple[int, ...]) -> Tensor:
    """``[B, F, H, W, C]`` as ``[B, F / t, H / y, W / x, (C, t, y, x)]``."""
    t, y, x = stride
    cells = rows.unflatten(3, (-1, x)).unflatten(2, (-1, y)).unflatten(1, (-1, t))
    return cells.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(4)


def decode_bytes(decoder: Any, latents: Tensor) -> int:
    """Most memory that the layers hold at once while these latents are decoded."""
    pixels = latents[:, 0].numel()
    return int(max(_channels_held(decoder)) * pixels * latents.element_size() * _MARGIN)


def _channels_held(decoder: Any) -> Iterator[int]:
    """For every layer: how many channels' worth of tensors it holds at its worst, in units of a latent pixel."""
    pixels = 1
    for block in (decoder.mid_block, *decoder.up_blocks):
        for upsampler in getattr(block, "upsamplers", None) or ():
            conv = upsampler.conv.conv
            yield pixels * (conv.in_channels + 2 * conv.out_channels)  # its input, what it makes, and that in place
            pixels *= math.prod(upsampler.stride)
        for resnet in block.resnets:
            yield pixels * 4 * resnet.conv2.out_channels  # a convolution's output, a residual, their sum, its norm
    conv = decoder.conv_out.conv
    yield pixels * (conv.in_channels + 2 * conv.out_channels)  # and the same as pixels


def _encode_bytes(encoder: Any, pixels: Tensor) -> int:
    """Most memory that the layers hold at once while this clip is encoded."""
    patches = pixels[:, 0].numel() / (encoder.patch_size**2 * encoder.patch_size_t)
    return int(max(_channels_held_encoding(encoder)) * patches * pixels.element_size() * _MARGIN)


def _channels_held_encoding(encoder: Any) -> Iterator[float]:
    """As :func:`_channels_held`, in units of a patch."""
    patches = 1.0
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            yield patches * 4 * resnet.conv2.out_channels
        for downsampler in block.downsamplers or ():
            yield patches * 5 * downsampler.conv.in_channels  # its input, that padded, what it makes, both in cells
            patches /= math.prod(_stride_of(downsampler))


def _strides(encoder: Any) -> Iterator[tuple[int, int, int]]:
    for block in encoder.down_blocks:
        for downsampler in block.downsamplers or ():
            yield _stride_of(downsampler)


def _stride_of(downsampler: Any) -> tuple[int, int, int]:
    """Of a downsampler, or of a convolution in its place."""
    stride: tuple[int, int, int] = getattr(downsampler, "stride", None) or downsampler.conv.stride
    return stride


def _out_of_memory(what: str, needed: int, x: Tensor) -> str:
    """What the stock error leaves out; ``what`` names the frames of ``x``."""
    samples, _, frames, height, width = x.shape
    free = max(free_bytes(x.device), 0)
    slicing = "vae.enable_slicing() takes one clip at a time, " if samples > 1 else ""
    return (
        f"out of memory while {what.format(frames)} of {samples} clips of {width} x {height}: "
        f"it takes about {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free; "
        f"{slicing}vae.use_framewise_decoding = True takes some frames at a time (here and in an encode), "
        "vae.enable_tiling() smaller pictures; the arguments of the latter set how large both are"
    )


def _reasons(coder: Any, family: Family) -> Iterator[str | None]:
    yield _conv_reason(coder.conv_in, family)
    yield plain_reason(coder.mid_block, family.mid_block)
    for resnet in coder.mid_block.resnets:
        yield from _resnet_reasons(resnet, family)
    for block in getattr(coder, "up_blocks", ()):
        yield from _up_block_reasons(block, family)
    for block in getattr(coder, "down_blocks", ()):
        yield from _down_block_reasons(block, family)
    yield _norm_reason(coder.norm_out, family)
    yield plain_reason(coder.conv_act, nn.SiLU)
    yield _conv_reason(coder.conv_out, family)


def _up_block_reasons(block: Any, family: Family) -> Iterator[str | None]:
    yield plain_reason(block, family.up_block)
    for resnet in (*filter(None, [block.conv_in]), *block.resnets):
        yield from _resnet_reasons(resnet, family)
    if block.conv_in is not None and block.conv_in.scale_shift_table is not None:
        yield "a resnet that changes the width takes a timestep, which stock gives it in no form that fits"
    for upsampler in block.upsamplers or ():
        yield plain_reason(upsampler, family.upsampler)
        yield _conv_reason(upsampler.conv, family)


def _down_block_reasons(block: Any, family: Family) -> Iterator[str | None]:
    kind = stock_class(block)
    yield plain_reason(block, kind if kind in family.down_blocks else family.down_blocks[0])
    for resnet in (*block.resnets, *filter(None, [getattr(block, "conv_out", None)])):
        yield from _resnet_reasons(resnet, family)
    for downsampler in block.downsamplers or ():
        if stock_class(downsampler) is family.conv:
            yield _conv_reason(downsampler, family, (2, 2, 2))
            continue
        yield plain_reason(downsampler, family.downsampler)
        yield _conv_reason(downsampler.conv, family)
        if downsampler.stride[0] > 2:
            yield f"a downsampler makes one frame of {downsampler.stride[0]}"


def _resnet_reasons(resnet: Any, family: Family) -> Iterator[str | None]:
    yield plain_reason(resnet, family.resnet)
    yield plain_reason(resnet.nonlinearity, nn.SiLU)
    yield dropout_reason(resnet.dropout)
    for norm, conv in ((resnet.norm1, resnet.conv1), (resnet.norm2, resnet.conv2)):
        yield _norm_reason(norm, family)
        yield _conv_reason(conv, family)
    if resnet.norm3 is not None:
        yield plain_reason(resnet.norm3, nn.LayerNorm)
    if (shortcut := resnet.conv_shortcut) is not None:
        yield plain_reason(shortcut, family.shortcut)
        yield _geometry_reason(getattr(shortcut, "conv", shortcut), 1, "zeros")


def _conv_reason(conv: Any, family: Family, stride: tuple[int, int, int] = (1, 1, 1)) -> str | None:
    if reason := plain_reason(conv, family.conv):
        return reason
    if conv.kernel_size != (3, 3, 3):
        return f"a convolution sees {conv.kernel_size} pixels, not 3 x 3 x 3"
    return _geometry_reason(conv.conv, 3, *PIXEL_MODES, stride=stride)


def _geometry_reason(
    conv: Any, taps: int, *modes: str, stride: tuple[int, int, int] = (1, 1, 1)
) -> str | None:  # fmt: skip
    if reason := plain_reason(conv, nn.Conv3d):
        return reason
    geometry = (taps,) * 3, stride, (0, taps // 2, taps // 2), (1, 1, 1), 1
    found = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
    if found != geometry or conv.padding_mode not in modes or conv.bias is None:
        return "a convolution has another stride, dilation or padding, groups, or no bias"
    return None


def _norm_reason(norm: Any, family: Family) -> str | None:
    if reason := plain_reason(norm, family.norm):
        return reason
    if getattr(norm, "weight", None) is not None or getattr(norm, "bias", None) is not None:
        return "a norm has a weight"
    return None if getattr(norm, "channel_dim", 1) == 1 else "a norm is not over the channels"


def _injects_noise(part: Any) -> bool:
    return getattr(part, "per_channel_scale1", None) is not None
