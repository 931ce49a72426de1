"""diffusers' ``autoencoders/autoencoder_kl_wan.py``: decoder and encoder, a whole clip at once instead of a few frames.

Stock calls the decoder once for each latent frame. Its causal convolutions keep the two frames before in a cache that
the caller passes along, so 33 convolutions are made of clones, cats and pads of small pieces. The decoder is causal, so
all frames at once give the same numbers; where memory does not hold them, as many as it does, the last two frames of
each convolution's input carried on to the next. Clips are rows ``[B, F, H, W, C]`` from the first convolution to the
last. ``rms_norm_silu`` writes a convolution's input behind the frames that it looks back at, and adds the bias and
the residual that the convolution before has left out, and behind an upsampler puts the pixels in place.

In the last up-blocks, which leave the number of frames as it is, tensors may be too large for cuDNN's faster
convolutions. Then these blocks and the last convolution work on some frames at a time (a piece), and the last two
frames of each convolution's input are carried on to the next piece.

The caller is left as it is: it asks for frame after frame. What it passes first is a view of frame 0 of latents whose
storage holds the clip and nothing else, so that is decoded, and the frames are handed out call by call. What has been
done is kept in the caller's own cache, in place of stock's tensors (:class:`_Progress`): it lives as long as that, and
there is one for each decode. Latents that come one frame at a time are decoded so, and the convolutions' last frames
carried on. If a call is not the one that was foreseen, what was decoded ahead is forgotten.

Of a tile, the caller cuts out one frame, and has the 1 x 1 x 1 convolution before the decoder make a new tensor of it.
:class:`FusedWanPostQuantConv` makes all frames of the tile then, and returns a view of one.

The encoder is asked for the first frame, and then for four at a time, each call with a view of the clip that somebody
gave to ``encode``. Nothing tells how many frames will be asked for: that clip may be the beginning of a longer one. So
a call that finds nothing ready encodes 32 frames, or four times as many as have been asked for so far, of those that
begin with its own: a clip of 81 in three steps.
A downsampler's convolution over time leaves the first frame of a clip as it is; of the others, it makes one of two.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AvgDown3D,
    DupUp3D,
    WanAttentionBlock,
    WanCausalConv3d,
    WanDecoder3d,
    WanEncoder3d,
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
from torch.utils.weak import TensorWeakRef

from vidaccel.blocks.pixel_rows import convolve_rows, upsampled_by_rows, upsampled_cells_by_rows
from vidaccel.blocks.vae.causal_clip import (
    Chunk,
    Halos,
    Sum,
    clip_of,
    conv_rows,
    decode_in_chunks,
    dropout_reason,
    images_of,
    out_of_memory,
    structure_reason,
    tell_chunk,
)
from vidaccel.blocks.vae.half_operands import float16_convolutions, scale_to_fit, takes_tf32
from vidaccel.kernels.attention.spatial_attention import spatial_attention, spatial_attention_ref
from vidaccel.kernels.conv.channels_last_weight import channels_last_weight
from vidaccel.kernels.conv.conv_epilogue import conv_epilogue, conv_epilogue_ref
from vidaccel.kernels.conv.padded_clip import NO_PADDING, Padding
from vidaccel.kernels.conv.pixel_conv import pixel_conv, pixel_conv_ref
from vidaccel.kernels.conv.pixel_shuffle import pixel_shuffle, pixel_shuffle_ref
from vidaccel.kernels.conv.upsample_conv import upsample_cells, upsample_conv_ref
from vidaccel.kernels.norm.rms_norm_silu import compile_ahead, rms_norm_silu, rms_norm_silu_ref
from vidaccel.kernels.op import note, runs_triton
from vidaccel.parallel.layout import PixelRows, pixel_rows
from vidaccel.parallel.ranks import Agreement, Ranks
from vidaccel.sites.block import CORNER, GRADIENTS, SITES, FusedBlock, call_site, cut_corner, fuses
from vidaccel.sites.memo import once_per_call
from vidaccel.sites.plain import plain_reason
from vidaccel.sites.site import SiteGroup

__all__ = ["FusedWanDecoder3d", "FusedWanEncoder3d", "FusedWanPostQuantConv", "decode_bytes", "encode_bytes"]

BEFORE = 2  # frames that a causal convolution looks back at
CAUSAL = Padding(before=BEFORE)
# A downsampler's convolution begins at the first pixel and goes by two: two zeros in front, of which its first output
# is made, are as good as none. That is cut off.
AROUND = Padding(border=2)
STOCK_FRAMES = 4  # that stock encodes at a time
# How many frames are encoded at once before they are asked for: times as many as have been so far, and at least.
AHEAD, LEAST_AHEAD = 4, 32
CORNER_FRAMES = 3
# Few of cuDNN's kernels take a tensor of more numbers. On an H200 the one that takes those of Wan 2.2 does 630 TFLOP/s,
# others 760 (decoder-profiles-h200.txt). They work on tiles of 128 channels; of 96, it is the fastest.
MOST_NUMBERS, TILE_CHANNELS = 2**31 - 1, 128
_MARGIN = 1.1  # the allocator's rounding, the convolutions' workspaces, all that is small


@dataclass(eq=False)
class _Progress:
    """What has been decoded of a clip; stands first in the caller's cache of features.

    Attributes:
        made: Takes a number of latent frames; how many frames the first so many become.
        latents: ``[B, C, F, H, W]``, all that have been decoded: a copy of our own.
        halos: What the convolutions need to go on behind the last of them; None: not kept, or stock has gone on.
        cache: The same as stock keeps it; None where stock has decoded nothing.
        asked: The latents that the caller is to ask for, frame by frame; None where nothing was decoded ahead.
        ahead: ``[B, C, F, H, W]``, their pixels.
        frames: How many latent frames have been handed out.
        start: How many frames had been handed out when ``ahead`` was made.
        version: Of ``asked``; None in inference mode, where tensors have none.
    """

    made: Callable[[int], int]
    latents: Tensor | None = None
    halos: Halos | None = None
    cache: list[Any] | None = None
    asked: Tensor | None = None
    ahead: Tensor | None = None
    frames: int = 0
    start: int = 0
    version: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A deep copy has the latents, of which the rest can be made: it would copy the modules with their halos."""
        twin = replace(self)
        twin.forget_ahead()
        return {**vars(twin), "halos": None, "cache": None}

    def _is_not_stocks(self, *_: Any) -> Any:
        """What stock code does with a tensor of its cache, which this is not.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            "a cache that a patched decoder or encoder has begun cannot go on where it is not patched (any more): "
            "begin the clip anew, with an empty cache"
        )

    __getitem__ = to = _is_not_stocks

    def apart(self) -> _Progress:
        """The same for one more call; this one stays as it is, for a caller may go on from a copy of his cache, too."""
        halos, cache = self.halos, self.cache
        return replace(
            self, halos=None if halos is None else dict(halos), cache=None if cache is None else list(cache)
        )  # fmt: skip

    def expects(self, x: Tensor) -> bool:
        """Whether ``x`` is the next of the latents that were decoded ahead, unchanged since."""
        if self.ahead is None or self.latents is None or not self.lies_next(x):
            return False
        if self.version is not None and x._version != self.version:
            return False
        # No version tells of what NumPy writes, or somebody through .data. On a GPU, to compare is to wait for it.
        known = self.version is not None and x.is_cuda
        return known or torch.equal(x, self.latents[:, :, self.frames : self.frames + x.shape[2]])

    def lies_next(self, x: Tensor) -> bool:
        """Whether ``x`` is where the next of the latents that the caller is to ask for are."""
        if self.asked is None or x.ndim != 5:
            return False
        following = self.asked[:, :, self.frames : self.frames + x.shape[2]]
        return (
            x.shape == following.shape
            and x.stride() == following.stride()
            and x.data_ptr() == following.data_ptr()
            and x.dtype == following.dtype
            and x.device == following.device
        )

    def decoded(self, clip: Tensor) -> None:
        """``clip`` has been decoded, behind what was before."""
        before = [] if self.latents is None else [self.latents]
        self.latents = torch.cat([*before, clip.detach()], dim=2)

    def look_ahead(self, clip: Tensor, pixels: Tensor) -> None:
        """``pixels`` were made of those of ``clip`` that the caller has not asked for yet, or of the first of them."""
        self.asked, self.ahead, self.start = clip, pixels, self.made(self.frames)
        self.version = None if clip.is_inference() else clip._version

    def take(self, frames: int) -> Tensor:
        """The pixels of the next latent frames."""
        assert self.ahead is not None and self.asked is not None
        begin, end = (self.made(count) - self.start for count in (self.frames, self.frames + frames))
        self.frames += frames
        pixels = self.ahead[:, :, begin:end].contiguous()
        if end == self.ahead.shape[2]:
            self.ahead = None
        if self.frames == self.asked.shape[2]:
            self.asked = None
        return pixels

    def forget_ahead(self) -> None:
        """What was decoded ahead will not be asked for."""
        if self.ahead is not None:
            assert self.latents is not None
            self.latents = self.latents[:, :, : self.frames]
            self.halos = self.cache = None
        self.asked = self.ahead = None


def _frames_of(latent_frames: int, rate: int) -> int:
    """How many frames the first ``latent_frames`` become."""
    return 0 if latent_frames == 0 else 1 + rate * (latent_frames - 1)


@fuses(
    WanDecoder3d,
    {
        "whole_clip": "math-exact",
        "half_operands": "math-exact",
        "rms_norm_silu": "math-exact",
        "conv_epilogue": "math-exact",
        "clip_conv": "math-exact",
        "pixel_shuffle": "math-exact",
        "upsample_conv": "math-exact",
        "pixel_conv": "math-exact",
        "spatial_attention": "math-exact",
    },
)
class FusedWanDecoder3d(FusedBlock, WanDecoder3d):
    """The decoder of Wan 2.1 and 2.2: one call decodes all latents, those behind it hand out what it made."""

    conv_in: Any
    mid_block: Any
    up_blocks: Any
    norm_out: Any
    conv_out: Any

    @classmethod
    def left_alone_reason(cls, module: Any) -> str | None:
        return structure_reason(module, _reasons)

    def compile_ahead(self) -> None:
        for before, block in itertools.pairwise(self.up_blocks):
            gamma, shortcut = block.resnets[0].norm1.gamma.detach().flatten(), getattr(before, "avg_shortcut", None)
            half = _half_dtype(self, gamma)
            compile_ahead(
                gamma,
                residual=shortcut is not None,
                x_scale=half is not None,
                cells=True,
                factor_t=0 if shortcut is None else shortcut.factor_t,
                step=1 if shortcut is None else shortcut.in_channels // shortcut.out_channels,
                keep=True,
                out_dtype=half,
            )
        _compile_ahead(self, [resnet for block in self.up_blocks for resnet in block.resnets])

    def forward(
        self, x: Tensor, feat_cache: Any = None, feat_idx: Any = [0], first_chunk: bool = False  # noqa: B006
    ) -> Tensor:  # fmt: skip
        if torch.compiler.is_compiling():
            return WanDecoder3d.forward(self, x, feat_cache, feat_idx, first_chunk)
        progress = _progress_in(feat_cache)
        if progress is None:
            sites = _sites_of(self)
            if sites is None:  # restored, and somebody has kept this forward
                return WanDecoder3d.forward(self, x, feat_cache, feat_idx, first_chunk)
            if reason := self._beginning_reason(x, feat_cache, first_chunk):
                sites.count(reason)
                return WanDecoder3d.forward(self, x, feat_cache, feat_idx, first_chunk)
            progress, clip = _Progress(partial(_frames_of, rate=_temporal_rate(self))), _clip_behind(x)
        else:
            progress, clip = progress.apart(), x
            feat_cache[0] = progress
            if progress.expects(x):
                return progress.take(x.shape[2])
            progress.forget_ahead()
        pixels = call_site(FusedWanDecoder3d, self, clip, progress)
        progress.decoded(clip)
        feat_cache[0] = progress
        if clip is x:
            progress.frames += x.shape[2]
            return pixels
        progress.look_ahead(clip, pixels)
        return progress.take(x.shape[2])

    def _beginning_reason(self, x: Tensor, feat_cache: Any, first_chunk: bool) -> str | None:
        """Why a first call is stock's, with all that follow it, or None."""
        return _first_call_reason(self, x, feat_cache, first_chunk) or self.call_reason(x, None)

    def layout_for(
        self, ranks: Ranks, agreement: Agreement, frames: int, x: Tensor, feat_cache: Any = None, feat_idx: Any = None,
        first_chunk: bool = False,
    ) -> PixelRows | str:  # fmt: skip
        """How ``frames`` latent frames, of which ``x`` is the first, are decoded on several ranks, or why they are not.

        The other arguments are those of the first call.
        """
        if reason := self._beginning_reason(x, feat_cache, first_chunk):
            return reason
        if _clip_behind(x).shape[2] != frames:
            return "its latent frames come one by one"
        return PixelRows.reason(ranks, x.shape[3]) or PixelRows(ranks, x.shape[3], agreement)

    def call_reason(self, clip: Tensor, progress: _Progress | None) -> str | None:
        return _clip_reason(self, clip)

    def corner(self, args: Any, kwargs: Any) -> Any:
        clip, progress = args
        if progress.latents is not None:
            return None
        return cut_corner((clip[:, :, :CORNER_FRAMES], _Progress(progress.made)), {}, most_whole=0)

    @classmethod
    def original_forward(cls, host: Any, clip: Tensor, progress: _Progress) -> Tensor:
        """Frame by frame, as stock's caller does, unless that has begun to ask for more at once."""
        cache = _empty_cache(host)
        if progress.latents is None:
            pixels = _original_frames(host, clip, cache)
        else:
            if progress.cache is None:
                _original_frames(host, progress.latents, cache)
                progress.cache = cache
            pixels = WanDecoder3d.forward(host, clip, progress.cache, [0], False)
        if progress.latents is None:
            progress.cache = cache
        progress.halos = None
        return pixels

    def fused_forward(self, clip: Tensor, progress: _Progress) -> Tensor:
        halos = progress.halos
        if progress.latents is not None and halos is None:
            _, halos = _Decode(self, clip).run(progress.latents, {}, keep=True)
        # frames that come one at a time may be followed by others, which a whole clip is not
        pixels, progress.halos = _Decode(self, clip).run(clip, halos or {}, keep=clip.shape[2] == 1 or bool(halos))
        progress.cache = None
        return pixels


def _latents_of(frames: int, rate: int) -> int:
    """How many latent frames the first ``frames`` become."""
    return 0 if frames == 0 else 1 + (frames - 1) // rate


@fuses(
    WanEncoder3d,
    {
        "whole_clip": "math-exact",
        "half_operands": "math-exact",
        "rms_norm_silu": "math-exact",
        "conv_epilogue": "math-exact",
        "clip_conv": "math-exact",
        "spatial_attention": "math-exact",
    },
)
class FusedWanEncoder3d(FusedBlock, WanEncoder3d):
    """The encoder of Wan 2.1 and 2.2: a call encodes frames ahead, and the next ones hand them out."""

    conv_in: Any
    mid_block: Any
    down_blocks: Any
    norm_out: Any
    conv_out: Any

    @classmethod
    def left_alone_reason(cls, module: Any) -> str | None:
        return structure_reason(module, _encoder_reasons)

    def compile_ahead(self) -> None:
        _compile_ahead(self, [layer for layer in _down_layers(self) if not isinstance(layer, WanResample)])

    def forward(self, x: Tensor, feat_cache: Any = None, feat_idx: Any = [0]) -> Tensor:  # noqa: B006
        if torch.compiler.is_compiling():
            return WanEncoder3d.forward(self, x, feat_cache, feat_idx)
        progress, clip = _progress_in(feat_cache), x
        if progress is None:
            sites = _sites_of(self)
            if sites is None:  # restored, and somebody has kept this forward
                return WanEncoder3d.forward(self, x, feat_cache, feat_idx)
            if reason := _first_call_reason(self, x, feat_cache) or self.call_reason(x, None):
                sites.count(reason)
                return WanEncoder3d.forward(self, x, feat_cache, feat_idx)
            progress = _Progress(partial(_latents_of, rate=_frames_of_a_latent(self)))
            progress.asked = _frames_behind(x)
        else:
            progress = progress.apart()
            feat_cache[0] = progress
            if progress.expects(x):
                return progress.take(x.shape[2])
            if progress.ahead is None and progress.lies_next(x):
                assert progress.asked is not None
                behind = progress.asked[:, :, progress.frames :]
                most = min(max(LEAST_AHEAD, AHEAD * progress.frames), behind.shape[2])
                clip = behind[:, :, : most // x.shape[2] * x.shape[2]]
            else:
                progress.forget_ahead()
        latents = call_site(FusedWanEncoder3d, self, clip, progress)
        progress.decoded(clip)
        feat_cache[0] = progress
        if clip is x:
            progress.frames += x.shape[2]
            return latents
        assert progress.asked is not None
        progress.look_ahead(progress.asked, latents)
        return progress.take(x.shape[2])

    def call_reason(self, clip: Tensor, progress: _Progress | None) -> str | None:
        if reason := _clip_reason(self, clip):
            return reason
        sides, times = clip.shape[3:], len(_downsamplers(self))
        if any(side >> times == 0 for side in sides):
            return f"the pictures are too small to be halved {times} times"
        if any(side % 2**times for side in sides) and isinstance(self.down_blocks[0], WanResidualDownBlock):
            return f"a shortcut does not divide pictures of {sides[1]} x {sides[0]}"
        begins = progress is None or progress.latents is None
        if (clip.shape[2] - begins) % _frames_of_a_latent(self):
            return "its frames do not make whole latent frames"
        return None

    def corner(self, args: Any, kwargs: Any) -> Any:
        clip, progress = args
        if progress.latents is not None:
            if progress.latents.shape[2] > 1:
                return None
            clip = torch.cat([progress.latents, clip[:, :, : _frames_of_a_latent(self)]], dim=2)
        side = CORNER << len(_downsamplers(self))
        return (clip[..., :side, :side].contiguous(), _Progress(progress.made)), {}

    @classmethod
    def original_forward(cls, host: Any, clip: Tensor, progress: _Progress) -> Tensor:
        """A few frames at a time, as stock's caller does."""
        if progress.latents is None or progress.cache is None:
            progress.cache = _empty_cache(host)
            if progress.latents is not None:
                _originally_encoded(host, progress.latents, progress.cache)
        progress.halos = None
        return _originally_encoded(host, clip, progress.cache)

    def fused_forward(self, clip: Tensor, progress: _Progress) -> Tensor:
        halos: Halos = {}
        if progress.latents is not None:
            halos = progress.halos or _Encode(self, clip).run(progress.latents, {})[1]
        progress.halos = progress.cache = None
        latents, progress.halos = _Encode(self, clip).run(clip, halos)
        return latents


def _originally_encoded(host: Any, clip: Tensor, cache: list[Any]) -> Tensor:
    first = int(cache[0] is None)
    parts = [clip[:, :, :1]] * first + [part for part in clip[:, :, first:].split(STOCK_FRAMES, dim=2) if part.numel()]
    return torch.cat([WanEncoder3d.forward(host, part, cache, [0]) for part in parts], dim=2)


def _frames_behind(x: Tensor) -> Tensor:
    """``x``, a frame, and those behind it in memory, as far as its strides tell."""
    strides, step, offset = x.stride(), x.stride(2), int(x.storage_offset())
    extents = {dim: (x.shape[dim] - 1) * strides[dim] for dim in (0, 1, 3, 4)}
    in_frame = sum(extent for dim, extent in extents.items() if dim > 1 or strides[dim] < step)
    around = [strides[dim] for dim in (0, 1) if strides[dim] > step]
    if step <= in_frame or any(stride % step for stride in around):
        return x
    elements = x.untyped_storage().nbytes() // x.element_size()
    there = (elements - offset - sum(extents.values()) - 1) // step + 1
    if around:
        every = min(around) // step
        there = min(there, every - offset // step % every)
    return x if there < 2 else x.as_strided((*x.shape[:2], there, *x.shape[3:]), strides, offset)


class _Tile(NamedTuple):
    """What the convolution before the decoder has made of all frames of a tile that were still to come.

    Attributes:
        clip: What the tile was cut from.
        version: Of the clip.
        start: Where the first of the frames lies in it, in memory.
        frames: ``[B, C, F, H, W]``, what was made; alive as long as somebody has a view of it.
    """

    clip: Callable[[], Tensor | None]
    version: int
    start: int
    frames: Callable[[], Tensor | None]

    def made_of(self, x: Tensor) -> Tensor | None:
        """What was made of ``x``, a frame of a tile, or None."""
        frames, clip = self.frames(), self.clip()
        if frames is None or clip is None or x._base is not clip or clip._version != self.version:
            return None
        if x.ndim != 5 or x.shape[2] != 1 or x.stride() != clip.stride():
            return None
        at, rest = divmod(int(x.storage_offset()) - self.start, x.stride(2))
        if rest or not 0 <= at < frames.shape[2] or frames.shape[3:] != x.shape[3:] or len(frames) != len(x):
            return None
        return frames[:, :, at : at + 1]


_tiles: WeakKeyDictionary[nn.Module, _Tile] = WeakKeyDictionary()


@fuses(WanCausalConv3d, {"whole_tiles": "math-exact"})
class FusedWanPostQuantConv(FusedBlock, WanCausalConv3d):
    """The 1 x 1 x 1 convolution before the decoder: of a tile that is given to it frame by frame, all at once."""

    @classmethod
    def left_alone_reason(cls, module: Any) -> str | None:
        return _conv_reason(module, 1)

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        sites = None if torch.compiler.is_compiling() else _sites_of(self)  # None if only kept by a hook
        if sites is None or cache_x is not None or not self._may_look_ahead(x, sites):
            return WanCausalConv3d.forward(self, x, cache_x)
        tile = _tiles.get(self)
        made = None if tile is None else tile.made_of(x)
        if made is not None:
            return made
        frames = _frames_to_come(x)
        if frames is None:
            return WanCausalConv3d.forward(self, x)
        whole = WanCausalConv3d.forward(self, frames)
        clip: Any = x._base
        _tiles[self] = _Tile(TensorWeakRef(clip), clip._version, int(x.storage_offset()), TensorWeakRef(whole))
        return whole[:, :, :1]

    def _may_look_ahead(self, x: Tensor, sites: SiteGroup) -> bool:
        if not sites.runs("whole_tiles") or plain_reason(self, WanCausalConv3d):
            return False
        sites.sites["whole_tiles"].implementations.add("torch")
        recorded = torch.is_grad_enabled() and (x.requires_grad or any(w.requires_grad for w in self.parameters()))
        return not recorded and self.left_alone_reason(self) is None


def _frames_to_come(x: Tensor) -> Tensor | None:
    """``x``, a tile of a frame, and those behind it; None if there are none, or it is no such thing.

    Only tiles: of a call for a whole frame nobody knows whether the others will be asked for.
    """
    clip = x._base
    if x.ndim != 5 or x.shape[2] != 1 or clip is None or clip.ndim != 5 or not clip.is_contiguous():
        return None
    if x.stride() != clip.stride() or x.shape[3:] == clip.shape[3:] or not x.numel():
        return None
    at = int(x.storage_offset() - clip.storage_offset()) // clip.stride(2) % clip.shape[2]
    if clip.shape[2] - at < 2:
        return None
    samples, channels, _, height, width = x.shape
    return x.as_strided((samples, channels, clip.shape[2] - at, height, width), x.stride(), x.storage_offset())


def _original_frames(host: Any, clip: Tensor, cache: list[Any]) -> Tensor:
    frames = [WanDecoder3d.forward(host, clip[:, :, at : at + 1], cache, [0], at == 0) for at in range(clip.shape[2])]
    return frames[0] if len(frames) == 1 else torch.cat(frames, dim=2)


def _empty_cache(coder: nn.Module) -> list[Any]:
    """As stock's caller makes it."""
    return [None] * sum(isinstance(part, WanCausalConv3d) for part in coder.modules())


def _first_call_reason(coder: FusedBlock, x: Tensor, feat_cache: Any, first_chunk: bool = True) -> str | None:
    """Why a first call of ``coder`` is stock's, with all that follow it, or None."""
    if not isinstance(feat_cache, list) or not feat_cache:
        return "no cache of features was passed, without which stock changes no clip's length"
    if not first_chunk or any(entry is not None for entry in feat_cache):
        return "it goes on where stock has begun"
    if x.ndim != 5 or x.shape[2] != 1:
        return "the first call for a clip is not for one frame"
    if torch.is_grad_enabled() and (x.requires_grad or any(weight.requires_grad for weight in coder.parameters())):
        return GRADIENTS
    return coder.left_alone_reason(coder)


def _clip_reason(coder: Any, clip: Tensor) -> str | None:
    """Why a clip goes to the original forward of ``coder``, or None."""
    if not coder.runs("whole_clip"):
        return "whole_clip is off, or failed"
    if torch.is_autocast_enabled(clip.device.type):
        return "autocast is on"
    weight = coder.conv_in.weight
    if clip.ndim != 5 or clip.shape[1] != weight.shape[1] or not clip.numel():
        return f"the clip is not [B, {weight.shape[1]}, F, H, W]"
    if clip.dtype != weight.dtype or clip.device != weight.device:
        return f"the clip is {clip.dtype} on {clip.device}, the weights {weight.dtype} on {weight.device}"
    return None


def _sites_of(coder: nn.Module) -> SiteGroup | None:
    return getattr(coder, SITES, None)


def _progress_in(feat_cache: Any) -> _Progress | None:
    if isinstance(feat_cache, list) and feat_cache and isinstance(feat_cache[0], _Progress):
        return feat_cache[0]
    return None


def _clip_behind(x: Tensor) -> Tensor:
    """The clip that ``x`` is frame 0 of, if the storage of ``x`` is that of one; else ``x`` itself."""
    samples, channels, _, height, width = x.shape
    elements = x.untyped_storage().nbytes() // x.element_size()
    frames, rest = divmod(elements, max(samples * channels * height * width, 1))
    if rest or frames < 2 or x.storage_offset():
        return x
    clip = x.as_strided((samples, channels, frames, height, width), x.stride())
    dense = clip.is_contiguous() or clip.is_contiguous(memory_format=torch.channels_last_3d)
    return clip if dense else x


def _half_dtype(coder: Any, x: Tensor) -> torch.dtype | None:
    """What the convolutions behind a norm are to read; None: the dtype of ``x``."""
    return torch.float16 if takes_tf32(x) and coder.runs("half_operands") else None


def _compile_ahead(coder: Any, resnets: list[Any]) -> None:
    """Begin to compile what the middle, the end and these ResNet blocks will need."""
    for resnet in (*coder.mid_block.resnets, *resnets):
        gamma, next_gamma = (norm.gamma.detach().flatten() for norm in (resnet.norm1, resnet.norm2))
        half = _half_dtype(coder, gamma)
        compile_ahead(gamma, residual=True, keep=True, out_dtype=half)
        compile_ahead(next_gamma, out_dtype=half)
        if isinstance(resnet.conv_shortcut, WanCausalConv3d):
            compile_ahead(next_gamma, residual=True, residual_bias=True, keep=True, out_dtype=half)
    gamma = coder.norm_out.gamma.detach().flatten()
    compile_ahead(gamma, residual=True, out_dtype=_half_dtype(coder, gamma))


def _normed_convolutions(coder: Any, resnets: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """The norms of a decoder or encoder that has these ResNet blocks, and the convolutions that read them."""
    for resnet in (*coder.mid_block.resnets, *resnets):
        yield resnet.norm1, resnet.conv1
        yield resnet.norm2, resnet.conv2
    for attention in coder.mid_block.attentions:
        yield attention.norm, attention.to_qkv
    yield coder.norm_out, coder.conv_out


def _normed_in(block: Any) -> Iterator[tuple[Any, Any]]:
    for resnet in block.resnets:
        yield resnet.norm1, resnet.conv1
        yield resnet.norm2, resnet.conv2


def _convolutions_of(resample: Any) -> list[Any]:
    """Those of an upsampler, in the order in which they run."""
    over_time = [resample.time_conv] if _lengthens(resample) else []
    return [*over_time, resample.resample[1]]


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
        half = _half_dtype(coder, clip)
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
        chunk.flow = Sum(conv_rows(buffer, resnet.conv1, fused=fused), resnet.conv1.bias)
        del buffer
        buffer = self._norm(chunk, resnet.norm2, resnet.conv2, keep=False)
        del chunk.flow
        made = conv_rows(buffer, resnet.conv2, fused=fused)
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


class _Decode(_Layers):
    """One decode of latents by the modules of a decoder."""

    def __init__(self, decoder: FusedWanDecoder3d, latents: Tensor) -> None:
        scaled = [conv for resample in _upsamplers(decoder) for conv in _convolutions_of(resample)]
        resnets = (resnet for block in decoder.up_blocks for resnet in block.resnets)
        super().__init__(decoder, latents, list(_normed_convolutions(decoder, resnets)), scaled)
        self._decoder = decoder
        self._rate = _temporal_rate(decoder)
        self._most = latents  # or the rows of them that the rank with most has, by which all ranks reckon

    def run(self, latents: Tensor, halos: Halos, keep: bool) -> tuple[Tensor, Halos | None]:
        """The pixels, and what the next frames need if that is to be kept."""
        decoder, rate, begins = self._decoder, self._rate, not halos
        samples, _, frames, height, width = latents.shape
        over, own = pixel_rows(), latents
        if over is not None:
            own, self._most = over.part(latents, 3), over.largest_part(latents, 3)
        scale = 2 ** sum(True for _ in _upsamplers(decoder))
        height, width = height * scale, width * scale

        def pixel_frames(latent_frames: int) -> int:
            return _frames_of(latent_frames, rate) if begins else rate * latent_frames

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
        piece = _frames_of_a_piece(decoder, self._most, made)
        then = "" if piece == made else f", {piece} of {made} in the last up-blocks"
        tell_chunk(decoder, "whole_clip", step, frames, then)
        return pixels, halos if keep else None

    def _chunk(self, latents: Tensor, halos: Halos, out: Tensor, keep: bool) -> Halos:
        decoder = self._decoder
        chunk = Chunk(Sum(latents), halos, keep)
        self._enter(chunk, latents)
        self._middle(chunk)
        first = _even_from(decoder)
        for block in decoder.up_blocks[:first]:
            self._up_block(chunk, block)
        frames = out.shape[2]
        step = _frames_of_a_piece(decoder, self._most, frames)
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
        for upsampler in _upsamplers_of(block):
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
        if not (chunk.keep or chunk.halos) or not _lengthens(resample):
            scale = self._scale(chunk, _convolutions_of(resample), before)
        if scale is None:
            self._summed(chunk)
        else:
            self._scaled_sum(chunk, scale)
        if _lengthens(resample):
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


class _Encode(_Layers):
    """One encode of a clip by the modules of an encoder."""

    def __init__(self, encoder: FusedWanEncoder3d, clip: Tensor) -> None:
        resnets = (layer for layer in _down_layers(encoder) if not isinstance(layer, WanResample))
        scaled = [resample.resample[1] for resample in _downsamplers(encoder)]
        super().__init__(encoder, clip, list(_normed_convolutions(encoder, resnets)), scaled)
        self._encoder = encoder

    def run(self, clip: Tensor, halos: Halos) -> tuple[Tensor, Halos]:
        """The latents, and what the next frames need, which ``halos`` become.

        Without halos, nothing is before the first frame.
        """
        samples, _, frames, height, width = clip.shape
        times, rate, first = len(_downsamplers(self._encoder)), _frames_of_a_latent(self._encoder), int(not halos)
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
        tell_chunk(self._encoder, "whole_clip", rate * step, rate * out.shape[2], then)

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
        if _shortens(resample):
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


def _down_layers(encoder: Any) -> Iterator[Any]:
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
def _downsamplers(encoder: Any) -> list[Any]:
    return [layer for layer in _down_layers(encoder) if isinstance(layer, WanResample)]


@once_per_call
def _frames_of_a_latent(encoder: Any) -> int:
    """That a latent frame is made of, but for the first of a clip."""
    return int(2 ** sum(map(_shortens, _downsamplers(encoder))))


def _shortens(downsampler: Any) -> bool:
    """Whether it makes one frame of two."""
    return bool(downsampler.mode == "downsample3d")


def encode_bytes(encoder: Any, clip: Tensor, frames: int) -> int:
    """Most memory that the layers hold when so many ``frames`` of the clip, not its first one, are encoded at once."""
    size, half = clip.element_size(), _half_dtype(encoder, clip)
    held = _Held(frames, False, size, size if half is None else half.itemsize, None)
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
                if _shortens(layer):
                    # the sum; it behind the frame before; what is made of these
                    most = max(most, kept + (5 * numbers // 2 + layer.dim) * pixels * size)
                    halos += pixels * layer.dim * size
                    frames //= 2
                continue
            in_dim, out_dim = layer.in_dim, layer.out_dim
            first = isinstance(block, WanResidualDownBlock) and layer is block.resnets[0]
            kept = frames * pixels * in_dim * size if first and in_dim != out_dim else kept
            most = max(most, kept + pixels * held.in_resnet(frames, in_dim, out_dim))
            halos += BEFORE * pixels * (in_dim + out_dim) * held.half
            if first:
                shortcut = block.avg_shortcut
                factor = shortcut.factor_t * shortcut.factor_s**2
                kept = frames * pixels * out_dim * size // factor
    middle = 2 * len(encoder.mid_block.resnets) + 1  # convolutions
    halos += middle * BEFORE * pixels * encoder.conv_out.weight.shape[1] * held.half
    return int((most + 2 * halos) * _MARGIN)


def _behind(halo: Tensor | None, latents: Tensor) -> Tensor:
    """Latents ``[B, C, F, H, W]`` as rows, behind the frames before them."""
    samples, channels, frames, height, width = latents.shape
    buffer = latents.new_zeros(samples, BEFORE + frames, height, width, channels)
    buffer[:, BEFORE:] = latents.permute(0, 2, 3, 4, 1)
    if halo is not None:
        buffer[:, :BEFORE] = halo
    return buffer


@once_per_call
def _temporal_rate(decoder: Any) -> int:
    """Frames that a latent frame becomes, but for the first of a clip."""
    return int(2 ** sum(map(_lengthens, _upsamplers(decoder))))


@once_per_call
def _even_from(decoder: Any) -> int:
    """Position of the first up-block from which on a clip has the frames of its pixels."""
    found = [at for at, block in enumerate(decoder.up_blocks) if any(map(_lengthens, _upsamplers_of(block)))]
    return found[-1] + 1 if found else 0


def _lengthens(upsampler: Any) -> bool:
    """Whether it makes two frames of one."""
    return bool(upsampler.mode == "upsample3d")


def _frames_of_a_piece(decoder: Any, latents: Tensor, frames: int) -> int:
    """How many of the frames go through the last up-blocks at once, one after the other as far as the pixels.

    The halos are passed from piece to piece, so that a piece costs nothing but these.
    """
    first, pixels = _even_from(decoder), latents.shape[0] * latents.shape[3] * latents.shape[4]
    numbers = 0
    for at, block in enumerate(decoder.up_blocks):
        widths = {width for resnet in block.resnets for width in (resnet.in_dim, resnet.out_dim)}
        if at >= first:
            if any(width % TILE_CHANNELS for width in widths):
                return frames
            numbers = max(numbers, pixels * max(widths))
        pixels *= 4 ** len(_upsamplers_of(block))
    most = max(MOST_NUMBERS // max(numbers, 1) - BEFORE, 1)
    return ceil(frames / ceil(frames / most))


def _upsamplers(decoder: Any) -> Iterator[Any]:
    for block in decoder.up_blocks:
        yield from _upsamplers_of(block)


def _upsamplers_of(block: Any) -> list[Any]:
    found = [block.upsampler] if isinstance(block, WanResidualUpBlock) else block.upsamplers or ()
    return [upsampler for upsampler in found if upsampler is not None]


def decode_bytes(decoder: Any, latents: Tensor, frames: int | None = None) -> int:
    """Most memory that the layers hold when so many ``frames`` of the latents are decoded at once; None: all of them.

    The pixels of the whole clip are not counted.
    """
    whole = frames is None or frames >= latents.shape[2]
    size, half = latents.element_size(), _half_dtype(decoder, latents)
    frames = latents.shape[2] if frames is None else frames
    rate = _temporal_rate(decoder)
    made = _frames_of(frames, rate) if whole else rate * frames
    piece = _frames_of_a_piece(decoder, latents, made)
    held = _Held(frames, whole, size, size if half is None else half.itemsize, piece if piece < made else None)
    pixels = latents.shape[0] * latents.shape[3] * latents.shape[4]
    return int((max(held.in_layers(decoder)) + held.in_halos(decoder)) * pixels * _MARGIN)


@dataclass(frozen=True)
class _Held:
    """How many bytes a decode holds, for each latent pixel.

    Attributes:
        frames: Latent frames that are decoded at once.
        whole: Whether these are all; else halos come from the chunk before, and are kept for the next.
        size: Bytes of a number.
        half: Of one that a convolution of a ResNet block reads or writes.
        piece: Frames that go through the last up-blocks at once; None: all.
    """

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
            if self.piece is not None and at >= _even_from(decoder):
                kept_for_pieces = kept_for_pieces or made
                frames = self.piece
            kept = kept_for_pieces
            # what the upsampler before has made, and its shortcut; the pixels in place, and the norm of them
            yield made + pixels * block.resnets[0].in_dim * (frames * self.size + (frames + BEFORE) * self.half)
            if getattr(block, "avg_shortcut", None) is not None:
                kept += pixels * frames * block.in_dim * self.size
            for resnet in block.resnets:
                yield kept + pixels * self.in_resnet(frames, resnet.in_dim, resnet.out_dim)
            for upsampler in _upsamplers_of(block):
                channels, out_channels = upsampler.dim, upsampler.resample[1].out_channels
                # bytes of a number that a convolution reads or writes
                read = self.half if self.whole or not _lengthens(upsampler) else self.size
                if _lengthens(upsampler):
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
        first = _even_from(decoder) if self.whole else 0
        pixels, numbers = 1, sum(BEFORE * conv.weight.shape[1] for _, conv in _normed_in(decoder.mid_block))
        for at, block in enumerate(decoder.up_blocks):
            if at >= first:
                numbers += pixels * sum(BEFORE * conv.weight.shape[1] for _, conv in _normed_in(block))
            pixels *= 4 ** len(_upsamplers_of(block))
        return 2 * self.half * (numbers + pixels * BEFORE * decoder.conv_out.weight.shape[1])

    def _frames(self, rate: int) -> int:
        return _frames_of(self.frames, rate) if self.whole else rate * self.frames

    def in_resnet(self, frames: int, width_in: int, width_out: int) -> int:
        """The residual, and what a convolution reads and writes; the norm behind it writes over what it reads."""
        clip, padded = frames * (self.size + self.half), (frames + BEFORE) * self.half
        if width_in == width_out:
            return width_out * (clip + padded)
        first = width_in * (frames * self.size + padded) + width_out * clip  # beside the convolution of the residual
        return max(first, width_out * (clip + padded))


def _reasons(decoder: Any) -> Iterator[str | None]:
    yield from _end_reasons(decoder)
    for block in decoder.up_blocks:
        residual = isinstance(block, WanResidualUpBlock)
        yield plain_reason(block, WanResidualUpBlock if residual else WanUpBlock)
        if residual and block.avg_shortcut is not None:
            yield plain_reason(block.avg_shortcut, DupUp3D)
        for resnet in block.resnets:
            yield from _resnet_reasons(resnet)
        for resample in _upsamplers_of(block):
            yield plain_reason(resample, WanResample)
            yield plain_reason(resample.resample, nn.Sequential)
            yield from _resample_reasons(resample)


def _encoder_reasons(encoder: Any) -> Iterator[str | None]:
    yield from _end_reasons(encoder)
    for block in encoder.down_blocks:
        if isinstance(block, WanResidualDownBlock):
            yield plain_reason(block, WanResidualDownBlock)
            yield plain_reason(block.avg_shortcut, AvgDown3D)
    for layer in _down_layers(encoder):
        if isinstance(layer, WanResample):
            yield plain_reason(layer, WanResample)
            yield plain_reason(layer.resample, nn.Sequential)
            yield from _downsample_reasons(layer)
        else:
            yield from _resnet_reasons(layer)
    if STOCK_FRAMES % _frames_of_a_latent(encoder):
        yield f"{_frames_of_a_latent(encoder)} frames make a latent one"


def _end_reasons(coder: Any) -> Iterator[str | None]:
    """Those of what a decoder and an encoder both have."""
    yield plain_reason(coder.nonlinearity, nn.SiLU)
    yield _conv_reason(coder.conv_in, 3)
    mid = coder.mid_block
    yield plain_reason(mid, WanMidBlock)
    for attention in mid.attentions:
        yield plain_reason(attention, WanAttentionBlock)
        yield _norm_reason(attention.norm)
        for conv in (attention.to_qkv, attention.proj):
            yield _conv2d_reason(conv, 1)
    for resnet in mid.resnets:
        yield from _resnet_reasons(resnet)
    yield _norm_reason(coder.norm_out)
    yield _conv_reason(coder.conv_out, 3)


def _resnet_reasons(resnet: Any) -> Iterator[str | None]:
    yield plain_reason(resnet, WanResidualBlock)
    yield plain_reason(resnet.nonlinearity, nn.SiLU)
    yield dropout_reason(resnet.dropout)
    for norm, conv in ((resnet.norm1, resnet.conv1), (resnet.norm2, resnet.conv2)):
        yield _norm_reason(norm)
        yield _conv_reason(conv, 3)
    if resnet.in_dim == resnet.out_dim:
        yield plain_reason(resnet.conv_shortcut, nn.Identity)
    else:
        yield _conv_reason(resnet.conv_shortcut, 1)


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
        yield _conv_reason(resample.time_conv, 3, 1)


def _downsample_reasons(resample: Any) -> Iterator[str | None]:
    if resample.mode not in ("downsample2d", "downsample3d"):
        yield f"it has a resampler of mode {resample.mode}"
        return
    pad, conv = resample.resample
    yield plain_reason(pad, nn.ZeroPad2d)
    if tuple(pad.padding) != (0, 1, 0, 1):
        yield "it does not pad by a pixel at the right and below"
    yield _conv2d_reason(conv, 3, stride=2)
    if _shortens(resample):
        yield _conv_reason(resample.time_conv, 3, 1, stride=2)


def _conv_reason(conv: Any, frames: int, side: int | None = None, stride: int = 1) -> str | None:
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


def _norm_reason(norm: Any) -> str | None:
    if reason := plain_reason(norm, WanRMS_norm):
        return reason
    if not norm.channel_first or isinstance(norm.bias, Tensor) or norm.bias != 0.0:
        return "a norm has a bias, or its channels come last"
    return "a norm scales by another factor" if norm.scale != norm.gamma.numel() ** 0.5 else None
