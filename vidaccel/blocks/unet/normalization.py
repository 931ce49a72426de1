"""GroupNorm and LayerNorm modules on the fused ops: the adds before a norm and the SiLU after it in one pass."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vidaccel.kernels.norm.add_layer_norm import RowTo, add_layer_norm
from vidaccel.kernels.norm.group_norm_silu import compile_ahead, group_norm_silu
from vidaccel.sites.parameters import has_hook, why_unreadable
from vidaccel.sites.site import FusedBlock, fuses

__all__ = [
    "FusedGroupNorm",
    "FusedGroupNormSiLU",
    "PassThroughSiLU",
    "add_layer_norm_module",
    "as_clip",
    "as_frames",
    "compile_group_norm_ahead",
    "group_norm_module",
    "why_layer_norms_unreadable",
]


def as_clip(frames: Tensor, num_frames: int) -> Tensor:
    """``[B*F, C, H, W]`` seen as ``[B, C, F, H, W]``."""
    return frames.unflatten(0, (-1, num_frames)).transpose(1, 2)


def as_frames(clip: Tensor) -> Tensor:
    """``[B, C, F, H, W]`` in channels-last memory seen as ``[B*F, C, H, W]``."""
    return clip.transpose(1, 2).flatten(0, 1)


def group_norm_module(
    norm: nn.GroupNorm, x: Tensor, *, silu: bool, shift: Tensor | None = None, tail: Tensor | None = None
) -> Tensor:
    """The fused op with a GroupNorm module's parameters; `x` is ``[N, C, *spatial]``, `shift` ``[N, T, C]``.

    `tail` has further channels, which lie elsewhere.
    """
    return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu=silu, shift=shift, tail=tail)


def compile_group_norm_ahead(norm: Any, *, silu: bool = True, shift: bool = False, and_sum: bool = False) -> None:
    """Begin to compile what a GroupNorm module's parameters, if it has plain ones, will be given to."""
    if isinstance(norm, nn.GroupNorm) and type(norm.weight) is nn.Parameter:
        compile_ahead(norm.weight, norm.num_groups, silu=silu, shift=shift, and_sum=and_sum)


def add_layer_norm_module(
    norm: nn.LayerNorm,
    x: Tensor,
    residual: Tensor | None = None,
    row: Tensor | None = None,
    position: Tensor | None = None,
    row_to: RowTo = "sum",
) -> tuple[Tensor, Tensor]:
    """``z = row + (x + residual)`` and ``norm(z) + position``, or what `row_to` makes of it.

    `x` is ``[B, S, C]``, `row` ``[B, 1, C]``, `position` ``[T, C]`` with T a divisor of B.
    """
    weights = (norm.weight, norm.bias, norm.eps)
    return add_layer_norm(x, *weights, residual=residual, row=row, position=position, row_to=row_to)


def why_layer_norms_unreadable(norms: tuple[nn.Module, ...], x: Tensor) -> str | None:
    """The first reason why one of ``norms`` is not a plain affine LayerNorm beside ``x``, or None."""
    return next(filter(None, (why_unreadable(norm, nn.LayerNorm, x) for norm in norms)), None)


@fuses(nn.GroupNorm, {"group_norm_silu": "math-exact"})
class FusedGroupNorm(FusedBlock, nn.GroupNorm):
    """A GroupNorm that no SiLU follows: the one before a transformer or an attention."""

    @classmethod
    def why_left_alone(cls, module: nn.Module) -> str | None:
        return None if getattr(module, "affine", False) else "it has no weight and bias"

    def forward(self, input: Tensor) -> Tensor:
        return self.guarded(input)

    def why_unserved(self, input: Tensor) -> str | None:
        return why_unreadable(self, nn.GroupNorm, input)

    def compile_ahead(self) -> None:
        for and_sum in (False, True):  # the second is norm_and_residual's
            compile_group_norm_ahead(self, silu=False, and_sum=and_sum)

    def fused_forward(self, input: Tensor) -> Tensor:
        return group_norm_module(self, input, silu=False)


@fuses(nn.GroupNorm, {"group_norm_silu": "math-exact"})
class FusedGroupNormSiLU(FusedGroupNorm):
    """A model's last GroupNorm (``conv_norm_out``), which takes over the SiLU of the ``conv_act`` beside it.

    The two are one site: while this class is in place ``conv_act`` is a :class:`PassThroughSiLU`, so the original
    forward must apply the SiLU too.
    """

    def original_forward(self, input: Tensor) -> Tensor:
        return F.silu(nn.GroupNorm.forward(self, input))

    def compile_ahead(self) -> None:
        compile_group_norm_ahead(self)

    def fused_forward(self, input: Tensor) -> Tensor:
        return group_norm_module(self, input, silu=True)


class PassThroughSiLU(nn.SiLU):
    """A SiLU that the norm before it has already applied."""

    def forward(self, input: Tensor) -> Tensor:
        return input

    @classmethod
    def why_left_alone(cls, module: nn.Module) -> str | None:
        if type(module) is not nn.SiLU:
            return f"its activation is {type(module).__name__}, not SiLU"
        return "a hook replaced its activation's forward" if has_hook(module) else None
