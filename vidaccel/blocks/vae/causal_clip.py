"""What the coders of causal 3-D VAEs share: clips as rows, chunks of frames, and the loop that fits them to memory.

A clip is rows ``[B, F, H, W, C]`` from the first convolution to the last, and the additions that a convolution leaves
out (its bias, the residual) are done by whatever reads it next (:class:`Sum`). A chunk of latent frames goes through
the decoder at once (:class:`Chunk`). A causal convolution looks at frames before its own: the last frames of its input,
its halo, are kept for the next chunk. :func:`decode_in_chunks` decodes chunks as long as memory allows.

Over several ranks, each has some rows of every picture (Wan; ``pixel_rows.py``), or a stretch of every chunk's frames
(CogVideoX, whose norms take the statistics of a few frames). Then all go from convolution to convolution together, and
each gets its halo from the rank before.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidaccel.blocks.pixel_rows import convolve_rows
from vidaccel.blocks.vae.half_operands import largest_pixel
from vidaccel.environment import memory_ran_out, usable_bytes
from vidaccel.errors import first_line
from vidaccel.kernels.conv.channels_last_weight import channels_last_weight
from vidaccel.kernels.conv.clip_conv import clip_conv
from vidaccel.kernels.conv.conv_epilogue import (
    STATISTICS_STEP,
    conv_epilogue,
    conv_epilogue_and_statistics,
    conv_epilogue_ref,
)
from vidaccel.kernels.conv.enlarged_clip import small_frames
from vidaccel.kernels.norm.channel_statistics import ChannelStatistics
from vidaccel.kernels.op import note, overheard
from vidaccel.parallel.layout import LatentFrames, PixelRows
from vidaccel.parallel.ranks import Ranks
from vidaccel.sites.block import SITES, FusedBlock
from vidaccel.sites.memo import held, once_per_call
from vidaccel.sites.plain import plain_reason
from vidaccel.sites.site import SiteGroup

__all__ = [
    "UNPADDED",
    "Chunk",
    "Halos",
    "Sum",
    "added_up",
    "clip_of",
    "conv_reason",
    "conv_rows",
    "decode_in_chunks",
    "decode_stretch",
    "dropout_reason",
    "free_bytes",
    "images_of",
    "latents_reason",
    "out_of_memory",
    "rms_norm_reason",
    "same_bits",
    "structure_reason",
    "tell_chunk",
    "upsamplers_of",
    "whole_clip_reason",
]

UNPADDED = 0, 0, 0  # what a convolution adds to input that is padded already

Halos = dict[nn.Module, Tensor]  # the last frames of the input of each convolution, [B, F, H, W, C]


@dataclass(eq=False)
class Sum:
    """A clip of rows whose last additions are still to be done: ``x + bias + (residual + residual_bias)``.

    With the statistics of every frame, where nothing is left to add and they are known. Behind an upsampler, x may be
    cells, ``x_scale`` times what they stand for, and the residual small, to be enlarged by ``factor_t`` but for the
    first ``skip`` frames: as ``rms_norm_silu`` takes them.
    """

    x: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None
    residual_bias: Tensor | None = None
    statistics: ChannelStatistics | None = None
    x_scale: Tensor | None = None
    factor_t: int = 0
    skip: int = 0

    def some(self, frames: slice) -> Sum:
        """Some of the frames, without their statistics."""
        residual, skip = self.residual, 0
        if residual is not None and self.factor_t:
            residual, skip = small_frames(residual, frames, self.factor_t, self.skip)
        elif residual is not None:
            residual = residual[:, frames]
        return replace(self, x=self.x[:, frames], residual=residual, statistics=None, skip=skip)


@dataclass(eq=False)
class Chunk:
    """The latent frames that go through the decoder together.

    Attributes:
        flow: Where they are. Held here alone, so that no caller's variable keeps a tensor longer than it is needed.
        halos: Of the chunk before; empty: this one is the first of its clip.
        keep: Whether a chunk follows.
        ranks: That each have a stretch of it, or None.
        following: The halos that this one leaves, if a chunk follows.
        kept: A clip of rows that is needed again behind several layers, so that none of them may write over it.
    """

    flow: Sum
    halos: Halos
    keep: bool
    ranks: Ranks | None = None
    following: Halos = field(default_factory=dict)
    kept: Tensor | None = None

    @property
    def begins(self) -> bool:
        """Whether the first frame of the clip is here."""
        return not self.halos and (self.ranks is None or self.ranks.rank == 0)

    def keep_of(self, conv: nn.Module, frames: Tensor, before: int = 2) -> None:
        """Keep the last ``before`` of the frames ``[B, F, H, W, C]`` that ``conv`` reads, its halo included.

        Over ranks, the halo of all but the first rank is written only now: the rank before has it.
        """
        if self.ranks is None:
            if self.keep:
                self.following[conv] = frames[:, -before:].clone()
            return
        halo = self.ranks.shift(frames[:, -before:], ring=self.keep)  # the first rank's is for the next chunk
        if halo is None:
            return
        if self.keep:
            self.following[conv] = halo
        if self.ranks.rank:
            frames[:, :before] = halo


def images_of(rows: Tensor) -> Tensor:
    """Rows ``[B, F, H, W, C]`` seen as images ``[B * F, C, H, W]``."""
    return rows.flatten(0, 1).permute(0, 3, 1, 2)


def clip_of(rows: Tensor) -> Tensor:
    """Rows ``[B, F, H, W, C]`` seen as a clip ``[B, C, F, H, W]``."""
    return rows.permute(0, 4, 1, 2, 3)


def conv_rows(
    rows: Tensor,
    conv: Any,
    *,
    fused: bool = False,
    padding: tuple[int, int, int] | None = None,
    gamma: Tensor | None = None,
) -> Tensor:
    """The convolution of rows ``[B, F, H, W, C]`` by the weight of ``conv``, ``[C', C, T, Y, X]``, without its bias.

    In the dtype of the rows.

    Args:
        rows: They begin with the frames that the convolution looks back at.
        conv: Has a ``weight``; its stride and dilation are 1.
        fused: Whether ``clip_conv`` may do it, which adds no zeros in time.
        padding: Zeros at either end of time, height and width. None: none in time, what keeps the size in space.
        gamma: Of the RMS norm (and SiLU) that the rows come from, if they do.

    Returns:
        ``[B, F', H', W', C']``, contiguous.
    """

    def convolve(clip: Tensor) -> Tensor:
        if fused and not any(padding or ()):
            largest = None if gamma is None or clip.dtype != torch.bfloat16 else largest_pixel(gamma)
            return clip_of(clip_conv(clip.permute(0, 2, 3, 4, 1), conv.weight, largest, bordered=padding is not None))
        height, width = conv.weight.shape[3:]
        weight = channels_last_weight(conv.weight, clip.dtype)
        return F.conv3d(clip, weight, None, padding=padding or (0, height // 2, width // 2))

    return convolve_rows(conv, convolve, clip_of(rows)).permute(0, 2, 3, 4, 1).contiguous()


def added_up(flow: Sum, *, fused: bool, statistics: bool) -> Sum:
    """What flows, all of it added, in place of ``flow.x``.

    Args:
        flow: What is to be added.
        fused: Whether the kernels may do it.
        statistics: Whether the kernel of a norm wants those of the frames.
    """
    if flow.bias is None:
        return flow
    images, residual = clip_of(flow.x), None if flow.residual is None else clip_of(flow.residual)
    known = None
    if not fused:
        images = conv_epilogue_ref(images, flow.bias, residual, flow.residual_bias)
    elif statistics and images.shape[1] % STATISTICS_STEP == 0:
        images, known = conv_epilogue_and_statistics(
            images, flow.bias, residual, residual_bias=flow.residual_bias, inplace=True
        )
    else:
        images = conv_epilogue(images, flow.bias, residual, residual_bias=flow.residual_bias, inplace=True)
    return Sum(images.permute(0, 2, 3, 4, 1), statistics=known)


def decode_in_chunks(
    frames: int,
    device: torch.device,
    needs: Callable[[int], int],
    decode: Callable[[int, int], None],
    explain: Callable[[int, int], str] | None = None,
    over: LatentFrames | PixelRows | None = None,
) -> int:
    """Decode, or encode, latent frames in chunks as long as memory allows; where it runs out, in halves of those.

    Args:
        frames: How many there are.
        device: Where.
        needs: Takes a number of frames; the bytes that decoding them at once takes.
        decode: Takes where a chunk begins and ends. It keeps nothing of a chunk whose decoding failed.
        explain: Takes the bytes that one frame takes and those that are free; what to say where that is too much.
            None: ``decode`` has said so.
        over: The ranks that decode each chunk together: all choose the same, and none goes on in halves alone.

    Returns:
        How many frames the longest of the last chunks had.

    Raises:
        torch.OutOfMemoryError: One frame is too much; as ``explain`` says.
    """
    free = free_bytes(device)
    step, at = _frames_that_fit(frames, needs, free if over is None else over.least(max(free, 0))), 0
    if (listener := overheard()) is not None and listener.only_references:  # what chunks hand on is checked, too
        step = max(frames - 1, 1)
    while at < frames:
        end = min(at + step, frames)
        try:
            decode(at, end)
        except RuntimeError as error:
            if not memory_ran_out(error) or (explain is None and end - at == 1):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold every tensor of the attempt
            if explain is not None and (end - at == 1 or over is not None):
                raise torch.OutOfMemoryError(explain(needs(1), max(free_bytes(device), 0))) from error
            step = (end - at + 1) // 2
            continue
        at = end
    return min(step, frames)


def decode_stretch(
    start: int,
    end: int,
    out: Tensor,
    pixel_frames: Callable[[int], int],
    decode: Callable[[int, int, Tensor, Ranks | None], None],
    over: LatentFrames | None,
) -> None:
    """Decode a chunk of latent frames, or this rank's stretch of it; the pixels of all ranks are in ``out``.

    Args:
        start: Where the chunk begins.
        end: Where it ends.
        out: ``[B, C, F, H, W]``, its pixels.
        pixel_frames: Takes a number of latent frames; how many frames so many from the first on become.
        decode: Takes where a stretch begins and ends, its pixels, and the ranks that decode the other ones, if any.
        over: The ranks, or None.
    """
    if over is None:
        decode(start, end, out, None)
        return
    stretches = over.stretches(start, end)
    lengths = [pixel_frames(end) - pixel_frames(start) for start, end in stretches]
    own, (start, end) = out.split(lengths, dim=2)[over.ranks.rank], stretches[over.ranks.rank]
    if start < end:
        decode(start, end, own, over.ranks if lengths[-1] else None)
        over.ranks.settle()
    out.copy_(over.ranks.gather(own, 2, out.shape[2], lengths))


def _frames_that_fit(frames: int, needs: Callable[[int], int], free: int) -> int:
    """How many frames are decoded at once: all, if they fit into what is free, else as equal parts as may be."""
    steps = (math.ceil(frames / chunks) for chunks in range(1, frames + 1))
    return next((step for step in steps if needs(step) <= free), 1)


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Whether tensors of one shape and dtype hold the same bits: what is no number is the same as itself."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return torch.equal(*(t.resolve_neg().view(bits) for t in (x, y)))


def free_bytes(device: torch.device) -> int:
    """What this process may still allocate on ``device``."""
    return usable_bytes(device) - (torch.cuda.memory_allocated(device) if device.type == "cuda" else 0)


def out_of_memory(
    samples: int, height: int, width: int, needed: int, free: int, frames: int = 1, verb: str = "decode"
) -> str:
    """What the stock error leaves out, of ``samples`` clips of this size, of which ``frames`` at least go at once."""
    least = "one latent frame" if frames == 1 else f"{frames} latent frames"
    slicing = f"vae.enable_slicing() {verb}s one clip at a time, " if samples > 1 else ""
    return (
        f"out of memory while {verb[:-1]}ing {least} of {samples} clips of {width} x {height} pixels: "
        f"it takes about {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free; "
        f"{slicing}vae.enable_tiling() {verb}s smaller pictures"
    )


def tell_chunk(decoder: nn.Module, step: int, frames: int, then: str = "") -> None:
    """Tell the report, at the site of ``whole_clip``, that ``step`` of ``frames`` latent frames went through at once.

    And what happened ``then``.
    """
    if (memo := held()) is not None and memo.way:
        return  # it is a check
    ran = f"{step} of {frames} frames{then}"
    note("whole_clip", ran)
    sites: SiteGroup | None = getattr(decoder, SITES, None)
    if sites is not None and (site := sites.sites.get("whole_clip")):
        site.implementations.add(ran)  # also where nobody listens: memory may be another from clip to clip


def whole_clip_reason(coder: FusedBlock, clip: Tensor, weight: Tensor, what: str = "latents") -> str | None:
    """Why a call of ``coder`` does not take a whole clip, or None; arguments as of :func:`latents_reason`."""
    return latents_reason(clip, weight, what) if coder.runs("whole_clip") else "whole_clip is off, or failed"


def latents_reason(latents: Tensor, weight: Tensor, what: str = "latents") -> str | None:
    """Why latents, or ``what`` they are, are not what a coder whose first convolution has this ``weight`` takes."""
    if torch.is_autocast_enabled(latents.device.type):
        return "autocast is on"
    if latents.ndim != 5 or latents.shape[1] != weight.shape[1] or not latents.numel():
        return f"the {what} are not [B, {weight.shape[1]}, F, H, W]"
    found, expected = ((x.dtype, x.device) for x in (latents, weight))
    return None if found == expected else f"the {what} are {found}, the weights {expected}"


@once_per_call
def structure_reason(coder: nn.Module, reasons: Callable[..., Iterable[str | None]], *of: Any) -> str | None:
    """Why ``coder`` is not made of what is done here in one go, or None.

    Args:
        coder: A decoder or encoder.
        reasons: Takes it and ``of``; those of its parts, one by one. To read them may fail where a part is not there,
            or there are more: that is a reason, too.
    """
    try:
        reason = next(filter(None, reasons(coder, *of)), None)
    except (AttributeError, TypeError, ValueError, LookupError) as error:
        return f"it is not built as expected: {first_line(error)}"
    if reason:
        return reason
    weights = list(coder.parameters())
    if any(type(weight) is not nn.Parameter or not weight.is_floating_point() for weight in weights):
        return "a weight is no plain parameter"
    if len({(weight.dtype, weight.device) for weight in weights}) > 1:
        return "its weights differ in dtype or device"
    return None


def conv_reason(
    conv: Any,
    kind: type[nn.Module],
    taps: tuple[int, ...],
    padding: tuple[int, ...],
    stride: tuple[int, ...] | None = None,
) -> str | None:
    """Why ``conv`` is no ``kind`` of so many taps and zeros around, of this stride (1) and with a bias, or None."""
    if reason := plain_reason(conv, kind):
        return reason
    ones = (1,) * len(taps)
    found = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
    plain = found == (taps, stride or ones, padding, ones, 1, "zeros") and conv.bias is not None
    return None if plain else "a convolution is not a plain one"


def upsamplers_of(decoder: Any) -> Iterator[Any]:
    """Those of all its blocks."""
    for block in decoder.up_blocks:
        yield from block.upsamplers or ()


def rms_norm_reason(norm: Any, kind: type[nn.Module]) -> str | None:
    """Why ``norm`` is no ``kind`` of RMS norm over channels with nothing but its gamma, or None."""
    if reason := plain_reason(norm, kind):
        return reason
    if not norm.channel_first or isinstance(norm.bias, Tensor) or norm.bias != 0.0:
        return "a norm has a bias, or its channels come last"
    return "a norm scales by another factor" if norm.scale != norm.gamma.numel() ** 0.5 else None


def dropout_reason(dropout: Any) -> str | None:
    """Why ``dropout`` may not be left out, or None."""
    return plain_reason(dropout, nn.Dropout) or ("dropout is on" if dropout.training and dropout.p else None)
