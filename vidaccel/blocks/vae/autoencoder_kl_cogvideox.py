"""diffusers' ``autoencoders/autoencoder_kl_cogvideox.py``: the decoder, a whole clip at a time.

Stock's caller cuts latents, or a tile of them, into batches of two or three frames and calls the decoder for each; a
cache of the last two frames of every convolution's input goes from call to call. Each of 37 norms enlarges the latents
to the size of the clip and convolves them there twice. Here clips are rows ``[B, F, H, W, C]`` from the first
convolution to the last (``causal_clip``). ``spatial_norm_silu`` reads the nearest pixel of convolved latents, and
writes the input of a convolution behind the two frames that it looks back at. What a convolution leaves out, its bias
and the residual, is added by the pass that sums the statistics of the next norm. An upsampler convolves each frame
once, before time makes two of it.

The decoder is causal but for its GroupNorms, whose statistics are those of one of stock's batches. So all batches at
once give the same numbers, if the statistics stay apart; where memory does not hold all, as many as it does. The caller
is left as it is. What it passes first is a view of the first frames of the latents; what follows can be seen from that,
is decoded too, and is handed out call by call. What has been decoded ahead stands in place of the cache
(:class:`_Ahead`). If a call is not the one that was foreseen, stock's cache is made, and the call is decoded alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import (
    CogVideoXCausalConv3d,
    CogVideoXDecoder3D,
    CogVideoXMidBlock3D,
    CogVideoXResnetBlock3D,
    CogVideoXSafeConv3d,
    CogVideoXSpatialNorm3D,
    CogVideoXUpBlock3D,
)
from diffusers.models.upsampling import CogVideoXUpsample3D
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from vidaccel.blocks.vae.causal_clip import (
    Chunk,
    Halos,
    Sum,
    added_up,
    clip_of,
    conv_reason,
    conv_rows,
    decode_in_chunks,
    decode_stretch,
    dropout_reason,
    images_of,
    latents_reason,
    out_of_memory,
    same_bits,
    structure_reason,
    tell_chunk,
    upsamplers_of,
)
from vidaccel.blocks.vae.tile_batches import TileDecoder
from vidaccel.kernels.conv.conv_epilogue import STATISTICS_STEP
from vidaccel.kernels.conv.padded_clip import Padding, pad_clip
from vidaccel.kernels.conv.pixel_conv import pixel_conv, pixel_conv_ref
from vidaccel.kernels.conv.upsample_conv import upsample_conv, upsample_conv_and_statistics, upsample_conv_ref
from vidaccel.kernels.norm.spatial_norm_silu import spatial_norm_silu, spatial_norm_silu_ref
from vidaccel.kernels.op import runs_triton
from vidaccel.parallel.layout import LatentFrames, latent_frames
from vidaccel.parallel.ranks import Agreement, Ranks
from vidaccel.sites.block import SITES, call_site, cut_corner, fuses, looking_reason, unserved_reason
from vidaccel.sites.plain import plain_reason

__all__ = [
    "CAUSAL",
    "Cache",
    "FusedCogVideoXDecoder3D",
    "ResnetRows",
    "cache_of",
    "causal_reason",
    "decode_bytes",
    "halos_of",
    "resnet_reasons",
]

CAUSAL = Padding(before=2, frame_mode="replicate")
_MARGIN = 1.1  # the allocator's rounding, the convolutions' workspaces, all that is small

Cache = dict[str, Any]  # as stock keeps it: the last frames of each convolution's input, by the names of its modules


@dataclass(eq=False)
class _Carried:
    """Stock's cache: the one that a call of the decoder begins with, and the one that it leaves."""

    before: Cache | None = None
    after: Cache | None = None


@dataclass(frozen=True, eq=False)
class _Ahead(Mapping[str, Any]):
    """What was decoded of a clip before it was asked for; goes from call to call in place of stock's cache.

    Whoever looks into it, stock too if it goes on where this has begun, finds stock's cache, which is made then.

    Attributes:
        decoder: What decoded it.
        asked: ``[B, C, F, H, W]``, the latents that the caller is to ask for.
        version: Of these.
        latents: A copy of them.
        pixels: ``[B, C, F', H', W']``.
        ends: Where each batch of latent frames ends.
        done: How many batches have been handed out.
    """

    decoder: nn.Module
    asked: Tensor
    version: int
    latents: Tensor
    pixels: Tensor
    ends: tuple[int, ...]
    done: int = 0

    def expects(self, sample: Tensor) -> bool:
        """Whether ``sample`` is the next batch of the latents that were decoded ahead, unchanged since."""
        if self.done == len(self.ends):
            return False
        some = slice(self._start, self.ends[self.done])
        following = self.asked[:, :, some]
        lies_next = (
            sample.shape == following.shape
            and sample.stride() == following.stride()
            and sample.data_ptr() == following.data_ptr()
            and sample.dtype == following.dtype
            and sample.device == following.device
            and self.asked._version == self.version
        )
        # No version tells of what NumPy writes, or somebody through .data. On a GPU, to compare is to wait for it.
        return lies_next and (sample.is_cuda or same_bits(sample, self.latents[:, :, some]))

    def take(self) -> tuple[Tensor, _Ahead]:
        """The pixels of the next batch, and what the call for the one behind it is to be given."""
        apart = self.ends[0] % 2
        rate = (self.pixels.shape[2] - apart) // (self.ends[-1] - apart)
        start, end = (_frames_of(at, self.ends[0], rate) for at in (self._start, self.ends[self.done]))
        return self.pixels[:, :, start:end].contiguous(), replace(self, done=self.done + 1)

    @cached_property
    def cache(self) -> Cache:
        """The cache as stock has it at this place, which decodes the batches that have been handed out once more."""
        carried = _Carried()
        ends = self.ends[: self.done]
        with torch.no_grad():  # as they were decoded
            FusedCogVideoXDecoder3D.original_forward(self.decoder, self.latents[:, :, : ends[-1]], ends, carried)
        assert carried.after is not None
        return carried.after

    def to(self, device: Any, non_blocking: bool = False) -> _Ahead | Cache:
        """What hooks of accelerate do with all that goes through them: stock's cache, unless it is there already."""
        if torch.device(device) == self.latents.device:
            return self
        moved: Cache = tree_map_only(Tensor, lambda x: x.to(device, non_blocking=non_blocking), dict(self))
        return moved

    def __getitem__(self, name: str) -> Any:
        return self.cache[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache)

    def __len__(self) -> int:
        return len(self.cache)

    @property
    def _start(self) -> int:
        return self.ends[self.done - 1] if self.done else 0


def _frames_of(latent_frames: int, first: int, rate: int) -> int:
    """How many frames the first ``latent_frames`` become: of an odd ``first`` batch, one frame stays one."""
    return rate * latent_frames - (rate - 1) * (first % 2) if latent_frames else 0


@fuses(
    CogVideoXDecoder3D,
    {
        "whole_clip": "math-exact",
        "spatial_norm_silu": "math-exact",
        "conv_epilogue": "math-exact",
        "upsample_conv": "math-exact",
        "pixel_conv": "math-exact",
    },
)
class FusedCogVideoXDecoder3D(TileDecoder, CogVideoXDecoder3D):
    """The decoder of CogVideoX: the first call of a clip decodes all of it, those behind it hand out what it made."""

    conv_in: Any
    mid_block: Any
    up_blocks: Any
    norm_out: Any
    conv_out: Any

    @classmethod
    def left_alone_reason(cls, module: Any) -> str | None:
        return structure_reason(module, _reasons)

    def forward(
        self, sample: Tensor, temb: Tensor | None = None, conv_cache: dict[str, Tensor] | None = None
    ) -> Tensor:  # fmt: skip
        cache: Any = conv_cache
        restored = not hasattr(self, SITES)  # and somebody has kept this forward
        if torch.compiler.is_compiling() or restored or temb is not None or sample.ndim != 5:
            return CogVideoXDecoder3D.forward(self, sample, temb, cache)
        if isinstance(cache, _Ahead):
            if cache.expects(sample) and self._may_look_ahead(sample):
                return cache.take()  # type: ignore[return-value]  # stock's annotation forgets its cache
            cache = cache.cache
        clip: Tensor = sample
        ends: tuple[int, ...] = (sample.shape[2],)
        if not cache and self._may_look_ahead(sample):
            clip, ends = _foreseen(sample)
        carried = _Carried(cache)
        pixels: Tensor = call_site(FusedCogVideoXDecoder3D, self, clip, ends, carried)
        if len(ends) == 1:
            return pixels, carried.after  # type: ignore[return-value]
        ahead = _Ahead(self, clip, clip._version, clip.detach().clone(), pixels, ends)
        return ahead.take()  # type: ignore[return-value]

    def _may_look_ahead(self, sample: Tensor) -> bool:
        return (
            self.runs("whole_clip")
            and not looking_reason(self, sample)
            and not self.left_alone_reason(self)
            and not self.call_reason(sample, (), None)
        )

    def layout_for(
        self, ranks: Ranks, agreement: Agreement, frames: int, sample: Tensor, temb: Any = None, conv_cache: Any = None
    ) -> LatentFrames | str:
        """How ``frames`` latent frames are decoded on several ranks, or why they are not.

        ``sample`` is their first batch; the other arguments are those of that call.
        """
        if not self._may_look_ahead(sample):
            return self.left_alone_reason(self) or self.call_reason(sample, (), None) or "whole_clip is off, or failed"
        _, ends = _foreseen(sample)
        if temb is not None or ends[-1] != frames:
            return "its batches of latent frames come one by one"
        return LatentFrames.reason(ranks, len(ends)) or LatentFrames(ranks, len(ends), agreement)

    def tile_reason(self, sample: Tensor, temb: Any = None, conv_cache: Any = None) -> str | None:
        if temb is not None:
            return "an embedding of the timestep was passed"
        return unserved_reason(self, getattr(self, SITES), (sample, (), None), {})

    def bytes_at_once(self, latents: Tensor) -> int:
        return decode_bytes(self, latents, latents.shape[2])

    def call_reason(self, clip: Tensor, ends: tuple[int, ...], carried: _Carried | None) -> str | None:
        return latents_reason(clip, self.conv_in.conv.weight)

    def corner(self, args: Any, kwargs: Any) -> Any:
        clip, ends, _ = args
        first = min(ends[0], 2 + ends[0] % 2)  # a batch as stock's caller has it, however long this one is
        ends = (first, first + 2, first + 4)[: max(len(ends), 2)]  # other calls come before a single one, or behind it
        frames = [at % clip.shape[2] for at in range(ends[-1])]
        return cut_corner((clip[:1, :, frames], ends, _Carried()), {}, most_whole=0)

    @classmethod
    def original_forward(cls, host: Any, clip: Tensor, ends: tuple[int, ...], carried: _Carried) -> Tensor:
        """Batch by batch, as stock's caller does."""
        cache, batches = carried.before, []
        for start, end in zip((0, *ends), ends, strict=False):
            pixels, cache = CogVideoXDecoder3D.forward(host, clip[:, :, start:end], None, cache)
            batches.append(pixels)
        carried.after = cache
        return batches[0] if len(batches) == 1 else torch.cat(batches, dim=2)

    def fused_forward(self, clip: Tensor, ends: tuple[int, ...], carried: _Carried) -> Tensor:
        keep = len(ends) == 1  # others may follow, which a whole clip is not
        pixels, halos = _Decode(self, clip, ends).run(halos_of(self, carried.before or {}), keep)
        if keep:
            carried.after = cache_of(self, halos)
        return pixels


def _foreseen(sample: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The clip that ``sample`` is the first batch of, and where its batches end; ``sample`` itself if it is no such.

    Stock's first batch has the frames that are left over when the clip is cut into even batches. Of several sizes of
    batches that explain it, the smallest is assumed: the released one is 2.
    """
    first = sample.shape[2]
    clip = _clip_behind(sample)
    frames = clip.shape[2]
    for size in range(2, first + 1, 2):
        if size + frames % size == first < frames:
            return clip, (first, *range(first + size, frames + 1, size))
    return sample, (first,)


def _clip_behind(sample: Tensor) -> Tensor:
    """All frames of the tensor that ``sample`` was cut from, if it is the first of them; else ``sample`` itself."""
    base = sample._base
    if base is None or base.ndim != 5 or base.stride() != sample.stride() or not sample.numel():
        return sample
    rest, index = int(sample.storage_offset() - base.storage_offset()), [0] * 5
    for dim in sorted(range(5), key=base.stride, reverse=True):
        if base.shape[dim] > 1:
            index[dim], rest = divmod(rest, base.stride(dim))
    ends = [at + size for at, size in zip(index, sample.shape, strict=True)]
    if rest or index[2] or ends[1] != base.shape[1] or any(map(int.__gt__, ends, base.shape)):
        return sample
    samples, height, width = (slice(index[dim], ends[dim]) for dim in (0, 3, 4))
    clip = base[samples, :, :, height, width]
    return clip if clip.data_ptr() == sample.data_ptr() else sample


class ResnetRows:
    """A residual block of rows, by the norm and the additions of the decode or encode that it is in."""

    def _norm(self, chunk: Chunk, norm: Any, conv: nn.Module) -> Tensor:
        """What ``conv`` reads: what flows, through the norm and SiLU, behind the frames before."""
        raise NotImplementedError

    def _add_up(self, chunk: Chunk) -> None:
        """Let what flows be the sum, with the statistics of its frames if the kernel of a norm wants them."""
        raise NotImplementedError

    def _resnet(self, chunk: Chunk, resnet: Any) -> None:
        self._add_up(chunk)
        buffer = self._norm(chunk, resnet.norm1, resnet.conv1)
        residual, residual_bias = chunk.flow.x, None
        if resnet.in_channels != resnet.out_channels:
            shortcut = resnet.conv_shortcut
            residual, residual_bias = conv_rows(residual, shortcut), shortcut.bias
        chunk.flow = Sum(conv_rows(buffer, resnet.conv1.conv), resnet.conv1.conv.bias)
        del buffer
        buffer = self._norm(chunk, resnet.norm2, resnet.conv2)
        del chunk.flow
        chunk.flow = Sum(conv_rows(buffer, resnet.conv2.conv), resnet.conv2.conv.bias, residual, residual_bias)


class _Decode(ResnetRows):
    """One decode of latents ``[B, C, F, H, W]``, whose batches are to end at ``ends``, by the modules of a decoder."""

    def __init__(self, decoder: FusedCogVideoXDecoder3D, latents: Tensor, ends: tuple[int, ...]) -> None:
        self._decoder = decoder
        self._latents, self._ends = latents, ends
        self._norm_op = spatial_norm_silu if decoder.runs("spatial_norm_silu") else spatial_norm_silu_ref
        self._runs_kernels = runs_triton("spatial_norm_silu", latents) and decoder.runs("spatial_norm_silu")
        # of the chunk that is under way:
        self._rows = latents  # its latents, [B, F, H, W, C]
        self._batches = 0, 0  # latent frames in its first batch, and in each behind that
        self._rate = 1  # frames that time has made of one so far

    def run(self, halos: Halos, keep: bool) -> tuple[Tensor, Halos]:
        """The pixels, and with ``keep`` what the frames behind them need."""
        decoder, latents, ends = self._decoder, self._latents, self._ends
        over = None if halos or keep else latent_frames()
        samples, _, _, height, width = latents.shape
        upsamplers = list(upsamplers_of(decoder))
        rate = 2 ** sum(upsampler.compress_time for upsampler in upsamplers)
        height, width = height * 2 ** len(upsamplers), width * 2 ** len(upsamplers)
        shape = samples, len(decoder.conv_out.conv.weight), _frames_of(ends[-1], ends[0], rate), height, width
        pixels = latents.new_empty(shape)

        def pixel_frames(batches: int) -> int:
            return _frames_of(ends[batches - 1] if batches else 0, ends[0], rate)

        def decode(start: int, end: int) -> None:
            follows = keep or end < len(ends)

            def stretch(start: int, end: int, out: Tensor, ranks: Ranks | None) -> None:
                nonlocal halos
                first, last = ends[start - 1] if start else 0, ends[end - 1]
                self._rows = latents[:, :, first:last].permute(0, 2, 3, 4, 1).contiguous()
                self._batches = ends[start] - first, ends[end - 1] - ends[end - 2] if end > 1 else last
                self._rate = 1
                halos = self._chunk(Chunk(Sum(self._rows), halos, follows, ranks), out)

            out = pixels[:, :, pixel_frames(start) : pixel_frames(end)]
            decode_stretch(start, end, out, pixel_frames, stretch, over)

        def needs(batches: int) -> int:
            own = batches if over is None else over.stretches(0, batches)[0][1]
            return decode_bytes(decoder, latents, ends[own - 1])

        explain = partial(out_of_memory, samples, height, width, frames=ends[0])
        step = decode_in_chunks(len(ends), latents.device, needs, decode, explain, over)
        tell_chunk(decoder, ends[step - 1], ends[-1])
        return pixels, halos

    def _chunk(self, chunk: Chunk, out: Tensor) -> Halos:
        decoder = self._decoder
        buffer = pad_clip(self._rows, chunk.halos.get(decoder.conv_in), CAUSAL)
        chunk.keep_of(decoder.conv_in, buffer)
        chunk.flow = Sum(conv_rows(buffer, decoder.conv_in.conv), decoder.conv_in.conv.bias)
        for block in (decoder.mid_block, *decoder.up_blocks):
            for resnet in block.resnets:
                self._resnet(chunk, resnet)
            for upsampler in getattr(block, "upsamplers", None) or ():
                self._upsample(chunk, upsampler)
        buffer = self._norm(chunk, decoder.norm_out, decoder.conv_out)
        del chunk.flow
        run = pixel_conv if decoder.runs("pixel_conv") else pixel_conv_ref
        out.copy_(run(buffer, decoder.conv_out.conv.weight, decoder.conv_out.conv.bias))
        return chunk.following

    def _norm(self, chunk: Chunk, norm: Any, conv: nn.Module) -> Tensor:
        if chunk.flow.residual is not None:
            self._add_up(chunk)
        flow, (first, rest), rate = chunk.flow, self._batches, self._rate
        gain, shift = (
            F.linear(self._rows, part.conv.weight.flatten(1), part.conv.bias) for part in (norm.conv_y, norm.conv_b)
        )
        group_norm = norm.norm_layer
        buffer = self._norm_op(
            flow.x, group_norm.weight, group_norm.bias, group_norm.num_groups, group_norm.eps, gain, shift,
            addend=flow.bias, halo=chunk.halos.get(conv), before=CAUSAL.before,
            first_span=_frames_of(first, first, rate), span=rate * rest,
            statistics=flow.statistics,
        )  # fmt: skip
        chunk.keep_of(conv, buffer)
        return buffer

    def _add_up(self, chunk: Chunk) -> None:
        chunk.flow = added_up(
            chunk.flow, fused=self._decoder.runs("conv_epilogue"), statistics=self._runs_kernels
        )  # fmt: skip

    def _wants_statistics(self, channels: int) -> bool:
        return self._runs_kernels and channels % STATISTICS_STEP == 0

    def _upsample(self, chunk: Chunk, upsampler: Any) -> None:
        if chunk.flow.residual is not None:
            self._add_up(chunk)
        conv, samples = upsampler.conv, len(chunk.flow.x)
        images, statistics = images_of(chunk.flow.x), None
        del chunk.flow
        if not self._decoder.runs("upsample_conv") or not runs_triton("upsample_conv", images):
            images = upsample_conv_ref(images, conv.weight, conv.bias)
        elif self._wants_statistics(conv.out_channels):
            images, statistics = upsample_conv_and_statistics(images, conv.weight, conv.bias)
        else:
            images = upsample_conv(images, conv.weight, conv.bias)
        rows = images.permute(0, 2, 3, 1).unflatten(0, (samples, -1))
        del images
        if upsampler.compress_time and rows.shape[1] > 1:
            self._rate *= 2
            rows = _doubled(rows)
            if statistics is not None:
                parts = _doubled(statistics.parts.unflatten(0, (samples, -1))).flatten(0, 1)
                statistics = statistics._replace(parts=parts)
        chunk.flow = Sum(rows, statistics=statistics)


def _doubled(frames: Tensor) -> Tensor:
    """Every frame of ``[B, F, ...]`` twice, but for the first of an odd number."""
    apart, count = frames.shape[1] % 2, frames.shape[1]
    out = frames.new_empty(len(frames), 2 * count - apart, *frames.shape[2:])
    out[:, :apart] = frames[:, :apart]
    out[:, apart:].unflatten(1, (-1, 2)).copy_(frames[:, apart:, None])
    return out


def _cached_convs(coder: Any) -> Iterator[tuple[tuple[str, ...], nn.Module]]:
    """The convolutions that look back, in their order, and where stock's cache has what they look at."""
    yield ("conv_in",), coder.conv_in
    down, up = (
        {f"{way}_block_{at}": block for at, block in enumerate(getattr(coder, f"{way}_blocks", ()))}
        for way in ("down", "up")
    )
    blocks = {**down, "mid_block": coder.mid_block, **up}
    for name, block in blocks.items():
        for at, resnet in enumerate(block.resnets):
            yield (name, f"resnet_{at}", "conv1"), resnet.conv1
            yield (name, f"resnet_{at}", "conv2"), resnet.conv2
    yield ("conv_out",), coder.conv_out


def halos_of(coder: Any, cache: Cache) -> Halos:
    """What stock's cache has, as rows."""
    halos: Halos = {}
    if cache:
        for path, conv in _cached_convs(coder):
            found: Any = cache
            for name in path:
                found = found[name]
            halos[conv] = found.permute(0, 2, 3, 4, 1)
    return halos


def cache_of(coder: Any, halos: Halos) -> Cache:
    """What stock's cache would have, but for what it never reads."""
    cache: Cache = {}
    for (*outer, name), conv in _cached_convs(coder):
        inner = cache
        for step in outer:
            inner = inner.setdefault(step, {})
        inner[name] = clip_of(halos[conv])
    return cache


def decode_bytes(decoder: Any, latents: Tensor, frames: int) -> int:
    """Most memory that the layers hold at once, for so many latent frames of a clip."""
    pixels = latents.shape[0] * latents.shape[3] * latents.shape[4]
    channels = frames * max(_channels_held(decoder)) + 2 * _halo_channels(decoder)
    return int(channels * pixels * latents.element_size() * _MARGIN)


def _halo_channels(decoder: Any) -> int:
    """How many channels' worth the frames are that convolutions look back at, in units of a latent pixel."""
    total, pixels = decoder.conv_in.conv.in_channels, 1
    for block in (decoder.mid_block, *decoder.up_blocks):
        total += pixels * sum(resnet.in_channels + resnet.out_channels for resnet in block.resnets)
        pixels *= 4 ** len(getattr(block, "upsamplers", None) or ())
    return CAUSAL.before * (total + pixels * decoder.conv_out.conv.in_channels)


def _channels_held(decoder: Any) -> Iterator[int]:
    """For every layer: how many channels' worth of tensors it holds at its worst, in units of a latent pixel."""
    pixels = 1
    for block in (decoder.mid_block, *decoder.up_blocks):
        for resnet in block.resnets:
            into, out = resnet.in_channels, resnet.out_channels
            # the residual, or its source too; a convolution's input and output
            yield pixels * (max(2 * into, 2 * out) + out + (into if into != out else 0))
        for upsampler in getattr(block, "upsamplers", None) or ():
            channels = upsampler.conv.out_channels
            yield pixels * (upsampler.conv.in_channels + 8 * channels)  # before and after the pixels are in place
            pixels *= 4
            if upsampler.compress_time:
                yield pixels * 3 * channels  # the frames, and each twice
                pixels *= 2
    yield pixels * 3 * decoder.conv_out.conv.in_channels


def _reasons(decoder: Any) -> Iterator[str | None]:
    yield plain_reason(decoder.conv_act, nn.SiLU)
    yield causal_reason(decoder.conv_in, 3)
    yield plain_reason(decoder.mid_block, CogVideoXMidBlock3D)
    for resnet in decoder.mid_block.resnets:
        yield from resnet_reasons(resnet, _norm_reasons)
    for block in decoder.up_blocks:
        yield plain_reason(block, CogVideoXUpBlock3D)
        for resnet in block.resnets:
            yield from resnet_reasons(resnet, _norm_reasons)
        for upsampler in block.upsamplers or ():
            yield plain_reason(upsampler, CogVideoXUpsample3D)
            yield conv_reason(upsampler.conv, nn.Conv2d, (3, 3), (1, 1))
    yield from _norm_reasons(decoder.norm_out)
    yield causal_reason(decoder.conv_out, 3)


def resnet_reasons(resnet: Any, norm_reasons: Callable[[Any], Iterator[str | None]]) -> Iterator[str | None]:
    yield plain_reason(resnet, CogVideoXResnetBlock3D)
    yield plain_reason(resnet.nonlinearity, nn.SiLU)
    yield dropout_reason(resnet.dropout)
    for norm, conv in ((resnet.norm1, resnet.conv1), (resnet.norm2, resnet.conv2)):
        yield from norm_reasons(norm)
        yield causal_reason(conv, 3)
    if resnet.in_channels != resnet.out_channels:
        yield conv_reason(resnet.conv_shortcut, CogVideoXSafeConv3d, (1, 1, 1), (0, 0, 0))


def _norm_reasons(norm: Any) -> Iterator[str | None]:
    yield plain_reason(norm, CogVideoXSpatialNorm3D)
    yield plain_reason(norm.norm_layer, nn.GroupNorm)
    yield causal_reason(norm.conv_y, 1)
    yield causal_reason(norm.conv_b, 1)


def causal_reason(conv: Any, side: int) -> str | None:
    if reason := plain_reason(conv, CogVideoXCausalConv3d):
        return reason
    if conv.pad_mode == "replicate" or conv.time_kernel_size != side:
        return "a convolution does not look back at two frames, the first of which is repeated"
    return conv_reason(conv.conv, CogVideoXSafeConv3d, (side,) * 3, (0, side // 2, side // 2))
