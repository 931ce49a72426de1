"""GroupNorm and LayerNorm modules on the fused ops: the adds before a norm and the SiLU after it in one pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vidaccel.blocks.pixel_rows import statistics_of_pictures, whole_pictures
from vidaccel.blocks.unet.frames import statistics_of_clip, whole_clip
from vidaccel.kernels.norm.channel_statistics import ChannelStatistics
from vidaccel.kernels.norm.group_norm_silu import compile_ahead, group_norm_and_sum, group_norm_silu
from vidaccel.sites.block import CORNER_ROWS, FusedBlock, call_site, cut_corner, fuses, run_part
from vidaccel.sites.plain import readable_reason

__all__ = [
    "FusedGroupNorm",
    "as_clip",
    "as_frames",
    "compile_group_norm_ahead",
    "group_norm_module",
    "norm_and_residual",
    "norms_reason",
]


def as_clip(frames: Tensor, num_frames: int) -> Tensor:
    """``[B*F, C, H, W]`` seen as ``[B, C, F, H, W]``: the same memory, if that is channels-last."""
    return frames.unflatten(0, (-1, num_frames)).transpose(1, 2)


def as_frames(clip: Tensor) -> Tensor:
    """``[B, C, F, H, W]`` in channels-last memory seen as ``[B*F, C, H, W]``."""
    return clip.transpose(1, 2).flatten(0, 1)


def group_norm_module(
    norm: nn.GroupNorm,
    x: Tensor,
    *,
    silu: bool,
    shift: Tensor | None = None,
    tail: Tensor | None = None,
    statistics: ChannelStatistics | None = None,
) -> Tensor:
    """The fused op with a GroupNorm module's parameters; `x` is ``[N, C, *spatial]``, `shift` ``[N, T, C]``.

    `tail` has further channels, which lie elsewhere; `statistics` are those of `x`, if somebody has computed them. Of a
    clip whose frames, or rows of pixels, are spread over ranks, they are made those of the whole clip.
    """
    statistics = statistics_of_pictures(x, shift, statistics or statistics_of_clip(x, shift))
    return group_norm_silu(
        x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu=silu, shift=shift, tail=tail, statistics=statistics
    )  # fmt: skip


def compile_group_norm_ahead(norm: Any, *, silu: bool = True, shift: bool = False, and_sum: bool = False) -> None:
    """Begin to compile what a GroupNorm module's parameters, if it has plain ones, will be given to."""
    if isinstance(norm, nn.GroupNorm) and type(norm.weight) is nn.Parameter:
        compile_ahead(norm.weight, norm.num_groups, silu=silu, shift=shift, and_sum=and_sum)


def norms_reason(kind: type[nn.Module], x: Tensor, *norms: nn.Module) -> str | None:
    """The first reason why one of ``norms`` is not a plain affine ``kind`` beside ``x``, or None."""
    for norm in norms:
        if reason := readable_reason(norm, kind, x):
            return reason
    return None


@fuses(nn.GroupNorm, {"group_norm_silu": "math-exact"})
class FusedGroupNorm(FusedBlock, nn.GroupNorm):
    """A GroupNorm that no SiLU of ours follows: before a transformer or an attention, or at the end of a model."""

    @classmethod
    def left_alone_reason(cls, module: Any) -> str | None:
        return None if getattr(module, "affine", False) else "it has no weight and bias"

    def forward(self, input: Tensor) -> Tensor:
        return call_site(FusedGroupNorm, self, input)

    @classmethod
    def original_forward(cls, host: Any, input: Tensor) -> Tensor:
        if input.ndim == 5:
            return whole_clip(nn.GroupNorm, host, input)
        return whole_pictures(nn.GroupNorm.forward, host, input)

    def call_reason(self, input: Tensor) -> str | None:
        return readable_reason(self, nn.GroupNorm, input)

    def compile_ahead(self) -> None:
        for and_sum in (False, True):  # the second is norm_and_residual's
            compile_group_norm_ahead(self, silu=False, and_sum=and_sum)

    def fused_forward(self, input: Tensor) -> Tensor:
        return group_norm_module(self, input, silu=False)

    def corner(self, args: Any, kwargs: Any) -> Any:
        (x,) = args
        return ((x[..., :CORNER_ROWS],), {}) if x.ndim == 3 else cut_corner(args, kwargs)  # [N, C, S]


def norm_and_residual(norm: Any, image: Tensor, bias: Tensor) -> tuple[Tensor, Tensor] | None:
    """``norm(image)`` and ``image + bias``, for a projection to its width; None if ``norm`` has to be called."""
    if not isinstance(norm, FusedGroupNorm) or not norm.serves_parent(image):
        return None
    arguments = norm.weight, norm.bias, norm.num_groups, norm.eps, bias
    return run_part(norm, group_norm_and_sum, image, *arguments, statistics=statistics_of_clip(image))
