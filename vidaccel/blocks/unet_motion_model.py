"""diffusers' ``models/unets/unet_motion_model.py``: AnimateDiff's motion modules, kept channels-last."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import Tensor

from vidaccel.blocks.projections import QKV_PROJECTION, RESIDUAL_PROJECTION
from vidaccel.blocks.site import fuses
from vidaccel.blocks.transformer_temporal import FrameTransformer

__all__ = ["FusedAnimateDiffTransformer3D"]


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
