"""diffusers' ``models/unets/unet_motion_model.py``: AnimateDiff's up-blocks, and motion modules, kept channels-last."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.unets.unet_motion_model import (
    AnimateDiffTransformer3D,
    CrossAttnUpBlockMotion,
    UpBlockMotion,
)
from torch import Tensor

from vidaccel.blocks.unet.frames import whole_clip
from vidaccel.blocks.unet.transformer_temporal import FRAME_TRANSFORMER_OPS, FrameTransformer
from vidaccel.blocks.unet.unet_3d_blocks import UP_BLOCK_OPS, UpBlock
from vidaccel.sites.block import call_site, fuses

__all__ = ["FusedAnimateDiffTransformer3D", "FusedCrossAttnUpBlockMotion", "FusedUpBlockMotion"]


@fuses(AnimateDiffTransformer3D, FRAME_TRANSFORMER_OPS)
class FusedAnimateDiffTransformer3D(FrameTransformer, AnimateDiffTransformer3D):
    """A motion module: the temporal transformer whose attentions see the frame's position, added after each norm."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: torch.LongTensor | None = None,
        class_labels: torch.LongTensor | None = None,
        num_frames: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        return call_site(
            FusedAnimateDiffTransformer3D,
            self, hidden_states, encoder_hidden_states, timestep, class_labels, num_frames, cross_attention_kwargs,
        )  # fmt: skip

    @classmethod
    def original_forward(cls, host: Any, *args: Any) -> Tensor:
        out: Tensor = whole_clip(AnimateDiffTransformer3D, host, *args)
        return out


class _UpBlockMotion(UpBlock):
    def upsampled(self, hidden_states: Tensor, size: Any) -> Tensor:
        for upsampler in self.upsamplers or ():
            hidden_states = upsampler(hidden_states=hidden_states, output_size=size)
        return hidden_states


@fuses(UpBlockMotion, UP_BLOCK_OPS)
class FusedUpBlockMotion(_UpBlockMotion, UpBlockMotion):
    """A level of AnimateDiff's without attention; SDXL's highest, SD 1.5's lowest."""

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor | None = None,
        upsample_size: Any = None,
        num_frames: int = 1,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        return call_site(
            FusedUpBlockMotion,
            self, hidden_states, res_hidden_states_tuple, temb, upsample_size, num_frames, *args, **kwargs,
        )  # fmt: skip

    def call_reason(self, hidden_states: Tensor, skips: tuple[Tensor, ...], *args: Any, **kwargs: Any) -> str | None:
        if len(args) > 3 or kwargs:
            return "deprecated arguments were passed"
        return super().call_reason(hidden_states, skips)

    def fused_forward(
        self, x: Tensor, skips: tuple[Tensor, ...], temb: Tensor, upsample_size: Any, num_frames: int
    ) -> Tensor:
        for resnet, motion_module, skip in zip(self.resnets, self.motion_modules, reversed(skips), strict=False):
            x = resnet(input_tensor=self.joined(resnet, x, skip), temb=temb)
            x = motion_module(x, num_frames=num_frames)
        return self.upsampled(x, upsample_size)


@fuses(CrossAttnUpBlockMotion, UP_BLOCK_OPS)
class FusedCrossAttnUpBlockMotion(_UpBlockMotion, CrossAttnUpBlockMotion):
    """AnimateDiff's other levels."""

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        upsample_size: int | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        num_frames: int = 1,
    ) -> Tensor:
        return call_site(
            FusedCrossAttnUpBlockMotion,
            self, hidden_states, res_hidden_states_tuple, temb, encoder_hidden_states, cross_attention_kwargs,
            upsample_size, attention_mask, encoder_attention_mask, num_frames,
        )  # fmt: skip

    def fused_forward(
        self,
        x: Tensor,
        skips: tuple[Tensor, ...],
        temb: Tensor,
        context: Any,
        attention_kwargs: dict[str, Any] | None,
        upsample_size: Any,
        attention_mask: Tensor | None,
        context_mask: Tensor | None,
        num_frames: int,
    ) -> Tensor:
        layers = zip(self.resnets, self.attentions, self.motion_modules, reversed(skips), strict=False)
        for resnet, attn, motion_module, skip in layers:
            x = resnet(input_tensor=self.joined(resnet, x, skip), temb=temb)
            x = attn(
                hidden_states=x,
                encoder_hidden_states=context,
                cross_attention_kwargs=attention_kwargs,
                attention_mask=attention_mask,
                encoder_attention_mask=context_mask,
                return_dict=False,
            )[0]
            x = motion_module(x, num_frames=num_frames)
        return self.upsampled(x, upsample_size)
