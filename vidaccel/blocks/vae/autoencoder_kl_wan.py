"""diffusers' ``autoencoders/autoencoder_kl_wan.py``: decoder and encoder, a whole clip at once instead of a few frames.

Stock calls the decoder once for each latent frame. Its causal convolutions keep the two frames before in a cache that
the caller passes along, so 33 convolutions are made of clones, cats and pads of small pieces. The decoder is causal, so
all frames at once give the same numbers; where memory does not hold them, as many as it does, the last two frames of
each convolution's input carried on to the next. ``wan_layers.py`` does that.

The caller is left as it is: it asks for frame after frame. What it passes first is a view of frame 0 of latents whose
storage holds the clip and nothing else, so that is decoded, and the frames are handed out call by call. What has been
done is kept in the caller's own cache, in place of stock's tensors (:class:`_Progress`): it lives as long as that, and
there is one for each decode. Latents that come one frame at a time are decoded so, and the convolutions' last frames
carried on. If a call is not the one that was foreseen, what was decoded ahead is forgotten.

Of a tile, the caller cuts out one frame, and has the convolution before the decoder make a new tensor of it. So tiles
are whole clips only where their calls are heard beforehand (``tile_batches.py``).

The encoder is asked for the first frame, and then for four at a time, each call with a view of the clip that somebody
gave to ``encode``. Nothing tells how many frames will be asked for: that clip may be the beginning of a longer one. So
a call that finds nothing ready encodes 32 frames, or four times as many as have been asked for so far, of those that
begin with its own: a clip of 81 in three steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanDecoder3d,
    WanEncoder3d,
    WanResample,
    WanResidualDownBlock,
)
from torch import Tensor, nn

from vidaccel.blocks.vae.causal_clip import Halos, same_bits, structure_reason, whole_clip_reason
from vidaccel.blocks.vae.tile_batches import TileDecoder
from vidaccel.blocks.vae.wan_layers import Decode, Encode
from vidaccel.blocks.vae.wan_structure import (
    STOCK_FRAMES,
    decode_bytes,
    decoder_reasons,
    down_layers,
    downsamplers,
    encoder_reasons,
    frames_of,
    frames_of_a_latent,
    half_dtype,
    temporal_rate,
)
from vidaccel.kernels.norm.rms_norm_silu import compile_ahead
from vidaccel.parallel.layout import PixelRows
from vidaccel.parallel.ranks import Agreement, Ranks
from vidaccel.sites.block import (
    CORNER,
    SITES,
    FusedBlock,
    call_site,
    cut_corner,
    fuses,
    looking_reason,
    unserved_reason,
)
from vidaccel.sites.site import SiteGroup

__all__ = ["FusedWanDecoder3d", "FusedWanEncoder3d"]

# How many frames are encoded at once before they are asked for: times as many as have been so far, and at least.
AHEAD, LEAST_AHEAD = 4, 32
CORNER_FRAMES = 4  # what the last one looks back at is handed on (decode_in_chunks)


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
        return known or same_bits(x, self.latents[:, :, self.frames : self.frames + x.shape[2]])

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
class FusedWanDecoder3d(TileDecoder, WanDecoder3d):
    """The decoder of Wan 2.1 and 2.2: one call decodes all latents, those behind it hand out what it made."""

    conv_in: Any
    mid_block: Any
    up_blocks: Any
    norm_out: Any
    conv_out: Any

    @classmethod
    def left_alone_reason(cls, module: Any) -> str | None:
        return structure_reason(module, decoder_reasons)

    def compile_ahead(self) -> None:
        _compile_ahead(self, [resnet for block in self.up_blocks for resnet in block.resnets])
        for halo, (before, block) in itertools.product((False, True), itertools.pairwise(self.up_blocks)):
            gamma, shortcut = block.resnets[0].norm1.gamma.detach().flatten(), getattr(before, "avg_shortcut", None)
            half = half_dtype(self, gamma)
            compile_ahead(
                gamma,
                residual=shortcut is not None,
                x_scale=half is not None,
                cells=True,
                factor_t=0 if shortcut is None else shortcut.factor_t,
                step=1 if shortcut is None else shortcut.in_channels // shortcut.out_channels,
                keep=True,
                halo=halo,
                out_dtype=half,
            )

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
            progress, clip = _Progress(partial(frames_of, rate=temporal_rate(self))), _clip_behind(x)
        else:
            progress, clip = progress.apart(), x
            feat_cache[0] = progress
            if progress.expects(x) and not _going_on_reason(self, x):
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

    def tile_reason(
        self, x: Tensor, feat_cache: Any = None, feat_idx: Any = None, first_chunk: bool = False
    ) -> str | None:  # fmt: skip
        return self._beginning_reason(x, feat_cache, first_chunk) or unserved_reason(
            self, getattr(self, SITES), (x, None), {}
        )  # fmt: skip

    def bytes_at_once(self, latents: Tensor) -> int:
        return decode_bytes(self, latents)

    def call_reason(self, clip: Tensor, progress: _Progress | None) -> str | None:
        return whole_clip_reason(self, clip, self.conv_in.weight, "frames")

    def path_in_data(self, args: Any, kwargs: Any) -> Any:
        return args[1].latents is None

    def corner(self, args: Any, kwargs: Any) -> Any:
        clip, progress = args
        if progress.latents is not None:
            clip = torch.cat([progress.latents[:, :, 1 - CORNER_FRAMES :], clip], dim=2)
        return cut_corner((clip[:, :, :CORNER_FRAMES], _Progress(progress.made)), {}, most_whole=0)

    @classmethod
    def original_forward(cls, host: Any, clip: Tensor, progress: _Progress) -> Tensor:
        """Frame by frame, as stock's caller does, unless that has begun to ask for more at once."""
        cache = _empty_cache(host)
        if progress.latents is None:
            pixels = _original_frames(host, clip, cache)
        else:
            if progress.cache is None:
                with torch.no_grad():  # as they were decoded
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
            _, halos = Decode(self, clip).run(progress.latents, {}, keep=True)
        # frames that come one at a time may be followed by others, which a whole clip is not
        pixels, progress.halos = Decode(self, clip).run(clip, halos or {}, keep=clip.shape[2] == 1 or bool(halos))
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
        return structure_reason(module, encoder_reasons)

    def compile_ahead(self) -> None:
        _compile_ahead(self, [layer for layer in down_layers(self) if not isinstance(layer, WanResample)])

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
            progress = _Progress(partial(_latents_of, rate=frames_of_a_latent(self)))
            progress.asked = _frames_behind(x)
        else:
            progress = progress.apart()
            if x.ndim == 5 and progress.made(1 + x.shape[2]) == progress.made(x.shape[2]):
                # what becomes of a part of a latent frame, and of all behind it, goes by how the frames come
                return self._left_to_stock(x, progress, feat_cache, feat_idx)
            feat_cache[0] = progress
            served = not _going_on_reason(self, x)
            if served and progress.expects(x):
                return progress.take(x.shape[2])
            if served and progress.ahead is None and progress.lies_next(x):
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

    def _left_to_stock(self, x: Tensor, progress: _Progress, feat_cache: list[Any], feat_idx: Any) -> Tensor:
        """This call and all behind it are stock's."""
        if (sites := _sites_of(self)) is not None:
            sites.count("its frames do not make whole latent frames")
        progress.forget_ahead()
        cache = _cache_behind(self, progress)
        feat_cache[: len(cache)] = cache
        return WanEncoder3d.forward(self, x, feat_cache, feat_idx)

    def call_reason(self, clip: Tensor, progress: _Progress | None) -> str | None:
        if reason := whole_clip_reason(self, clip, self.conv_in.weight, "frames"):
            return reason
        sides, times = clip.shape[3:], len(downsamplers(self))
        if any(side >> times == 0 for side in sides):
            return f"the pictures are too small to be halved {times} times"
        if any(side % 2**times for side in sides) and isinstance(self.down_blocks[0], WanResidualDownBlock):
            return f"a shortcut does not divide pictures of {sides[1]} x {sides[0]}"
        return None

    def corner(self, args: Any, kwargs: Any) -> Any:
        clip, progress = args
        if progress.latents is not None:
            clip = torch.cat([progress.latents[:, :, :1], clip[:, :, : frames_of_a_latent(self)]], dim=2)
        side = CORNER << len(downsamplers(self))
        return (clip[..., :side, :side].contiguous(), _Progress(progress.made)), {}

    @classmethod
    def original_forward(cls, host: Any, clip: Tensor, progress: _Progress) -> Tensor:
        """A few frames at a time, as stock's caller does."""
        progress.cache, progress.halos = _cache_behind(host, progress), None
        return _originally_encoded(host, clip, progress.cache)

    def fused_forward(self, clip: Tensor, progress: _Progress) -> Tensor:
        halos: Halos = {}
        if progress.latents is not None:
            halos = progress.halos or Encode(self, clip).run(progress.latents, {})[1]
        progress.halos = progress.cache = None
        latents, progress.halos = Encode(self, clip).run(clip, halos)
        return latents


def _cache_behind(host: Any, progress: _Progress) -> list[Any]:
    """Stock's, behind the frames that have been encoded so far; an empty one if there are none, as in each check."""
    if progress.cache is not None and progress.latents is not None:
        return progress.cache
    cache = _empty_cache(host)
    if progress.latents is not None:
        with torch.no_grad():  # as they were encoded
            _originally_encoded(host, progress.latents, cache)
    return cache


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
    return looking_reason(coder, x) or coder.left_alone_reason(coder)


def _going_on_reason(coder: FusedWanDecoder3d | FusedWanEncoder3d, x: Tensor) -> str | None:
    """Why a later call of ``coder`` is not to have what was made ahead of it, or None."""
    if reason := looking_reason(coder, x) or coder.left_alone_reason(coder):
        return reason
    return whole_clip_reason(coder, x, coder.conv_in.weight, "frames")


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


def _compile_ahead(coder: Any, resnets: list[Any]) -> None:
    """Begin to compile what the middle, the end and these ResNet blocks will need, then what later pieces will."""
    for halo in (False, True):
        begin = partial(compile_ahead, halo=halo)
        for resnet in (*coder.mid_block.resnets, *resnets):
            gamma, next_gamma = (norm.gamma.detach().flatten() for norm in (resnet.norm1, resnet.norm2))
            half = half_dtype(coder, gamma)
            begin(gamma, residual=True, keep=True, out_dtype=half)
            begin(next_gamma, out_dtype=half)
            if isinstance(resnet.conv_shortcut, WanCausalConv3d):
                begin(next_gamma, residual=True, residual_bias=True, keep=True, out_dtype=half)
        gamma = coder.norm_out.gamma.detach().flatten()
        begin(gamma, residual=True, out_dtype=half_dtype(coder, gamma))
