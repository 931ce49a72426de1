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

from vidaccel.blocks.unet.projections import QKV_PROJECTION, RESIDUAL_PROJECTION
from vidaccel.blocks.unet.transformer_temporal import FrameTransformer
from vidaccel.blocks.unet.unet_3d_blocks import UP_BLOCK_OPS, UpBlock
from vidaccel.sites.site import fuses

__all__ = ["FusedAnimateDiffTransformer3D", "FusedCrossAttnUpBlockMotion", "FusedUpBlockMotion"]


@fuses(
    AnimateDiffTransformer3D,
    {
        "temporal_attention": "math-exact",
        "add_layer_norm": "math-exact",
        "channels_last": "math-exact",
        QKV_PROJECTION: "math-exact",
        RESIDUAL_PROJECTION: "math-exact",
    },
)
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
        return self.guarded(
            hidden_states, encoder_hidden_states, timestep, class_labels, num_frames, cross_attention_kwargs
        )


@fuses(UpBlockMotion, UP_BLOCK_OPS)
class FusedUpBlockMotion(UpBlock, UpBlockMotion):
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
        skips = self.skips_for(hidden_states, res_hidden_states_tuple)
        return self.original_forward(hidden_states, skips, temb, upsample_size, num_frames, *args, **kwargs)


@fuses(CrossAttnUpBlockMotion, UP_BLOCK_OPS)
class FusedCrossAttnUpBlockMotion(UpBlock, CrossAttnUpBlockMotion):
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
        skips = self.skips_for(hidden_states, res_hidden_states_tuple)
        return self.original_forward(
            hidden_states,
            skips,
            temb,
            encoder_hidden_states,
            cross_attention_kwargs,
            upsample_size,
            attention_mask,
            encoder_attention_mask,
            num_frames,
        )
