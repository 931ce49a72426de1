"""diffusers' ``models/unets/unet_3d_blocks.py``: the up-blocks of SVD, ModelScope and I2VGenXL.

Stock code concatenates the activations with a skip connection before each ResNet block, which reads and writes both
once more. Here the stock forward runs with skip connections that put it off: ``torch.cat`` of one makes a
:class:`Joined`, which a fused ResNet block normalises and projects where its two tensors lie. That block checks itself;
the loop around it is the original one. Fidelity: math-exact (see ``resnet.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.resnet import SpatioTemporalResBlock
from diffusers.models.unets.unet_3d_blocks import (
    CrossAttnUpBlock3D,
    CrossAttnUpBlockSpatioTemporal,
    UpBlock3D,
    UpBlockSpatioTemporal,
)
from torch import Tensor, nn

from vidaccel.blocks.unet.resnet import FusedResnetBlock2D, Joined
from vidaccel.kernels.dispatch import Choice, runs_triton, tensors_problem
from vidaccel.sites.parameters import why_not_bypassed
from vidaccel.sites.site import Fidelity, FusedBlock, fuses

__all__ = [
    "UP_BLOCK_OPS",
    "FusedCrossAttnUpBlock3D",
    "FusedCrossAttnUpBlockSpatioTemporal",
    "FusedUpBlock3D",
    "FusedUpBlockSpatioTemporal",
    "UpBlock",
]

SKIP_CONCAT = "skip_concat"
UP_BLOCK_OPS: dict[str, Fidelity] = {SKIP_CONCAT: "math-exact"}


class _Skip(Tensor):
    """A skip connection that is not copied to be concatenated; to everything else it is the tensor that it was."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.cat and kwargs == {"dim": 1} and [type(part) for part in args[0]] == [Tensor, _Skip]:
                x, skip = args[0]
                return Joined(x, skip.as_subclass(Tensor))
            return func(*args, **kwargs or {})


class UpBlock(FusedBlock):
    """What all up-blocks share: their forward is the original one, called with what :meth:`skips_for` returns."""

    resnets: Any
    gradient_checkpointing: bool

    def skips_for(self, hidden_states: Tensor, skips: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """``skips``, of which those are a :class:`_Skip` now that their ResNet block takes as they are."""
        if torch.compiler.is_compiling():  # it has its own ways to fuse
            return skips
        if not _gains(hidden_states):
            self._vidaccel.note_choices([])
            return skips
        if reason := self._records_gradients((hidden_states, *skips)) or self.why_unserved(hidden_states):
            self._vidaccel.note_fallback(reason)
            return skips
        last_first = [self._skip_for(resnet, skip) for resnet, skip in zip(self.resnets, reversed(skips), strict=False)]
        return tuple(reversed(last_first))

    def why_unserved(self, hidden_states: Tensor) -> str | None:
        if all(getattr(self, factor, None) for factor in ("s1", "s2", "b1", "b2")):
            return "FreeU is on, which changes what is concatenated"
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return "gradient checkpointing is on"
        if torch.is_autocast_enabled(hidden_states.device.type):
            return "autocast chooses the dtypes of matrix products"
        return tensors_problem(hidden_states)

    def _skip_for(self, resnet: nn.Module, skip: Tensor) -> Tensor:
        if reason := _why_concatenated(resnet, skip):
            self._vidaccel.note_fallback(reason)
            return skip
        self._vidaccel.note_choices([Choice(SKIP_CONCAT, "in place")])
        return skip.as_subclass(_Skip)


def _gains(x: Tensor) -> bool:
    """Whether there are kernels for it, and a matrix product is as fast as a convolution: with TF32 in both or none."""
    tf32_in_convolutions_only = torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    slower = x.is_cuda and x.dtype == torch.float32 and tf32_in_convolutions_only
    return runs_triton(SKIP_CONCAT, x) and not slower


def _why_concatenated(resnet: nn.Module, skip: Tensor) -> str | None:
    """Why ``resnet`` has to get ``skip`` concatenated with its input, or None if :class:`Joined` will do."""
    if isinstance(resnet, SpatioTemporalResBlock):  # fused or not, it only hands its input on
        if reason := why_not_bypassed(resnet, SpatioTemporalResBlock):
            return reason
        resnet = resnet.spatial_res_block
    return resnet.why_concatenated(skip) if isinstance(resnet, FusedResnetBlock2D) else "its ResNet block is not fused"


@fuses(UpBlockSpatioTemporal, UP_BLOCK_OPS)
class FusedUpBlockSpatioTemporal(UpBlock, UpBlockSpatioTemporal):
    """SVD's lowest level."""

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor | None = None,
        image_only_indicator: Tensor | None = None,
        upsample_size: int | None = None,
    ) -> Tensor:
        skips = self.skips_for(hidden_states, res_hidden_states_tuple)
        return self.original_forward(hidden_states, skips, temb, image_only_indicator, upsample_size)


@fuses(CrossAttnUpBlockSpatioTemporal, UP_BLOCK_OPS)
class FusedCrossAttnUpBlockSpatioTemporal(UpBlock, CrossAttnUpBlockSpatioTemporal):
    """SVD's other levels."""

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        image_only_indicator: Tensor | None = None,
        upsample_size: int | None = None,
    ) -> Tensor:
        skips = self.skips_for(hidden_states, res_hidden_states_tuple)
        return self.original_forward(
            hidden_states, skips, temb, encoder_hidden_states, image_only_indicator, upsample_size
        )


@fuses(UpBlock3D, UP_BLOCK_OPS)
class FusedUpBlock3D(UpBlock, UpBlock3D):
    """ModelScope's and I2VGenXL's lowest level."""

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor | None = None,
        upsample_size: int | None = None,
        num_frames: int = 1,
    ) -> Tensor:
        skips = self.skips_for(hidden_states, res_hidden_states_tuple)
        return self.original_forward(hidden_states, skips, temb, upsample_size, num_frames)


@fuses(CrossAttnUpBlock3D, UP_BLOCK_OPS)
class FusedCrossAttnUpBlock3D(UpBlock, CrossAttnUpBlock3D):
    """ModelScope's and I2VGenXL's other levels."""

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        upsample_size: int | None = None,
        attention_mask: Tensor | None = None,
        num_frames: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        skips = self.skips_for(hidden_states, res_hidden_states_tuple)
        return self.original_forward(
            hidden_states,
            skips,
            temb,
            encoder_hidden_states,
            upsample_size,
            attention_mask,
            num_frames,
            cross_attention_kwargs,
        )
