"""diffusers' ``models/unets/unet_3d_blocks.py``: the up-blocks of SVD, ModelScope and I2VGenXL.

Stock code concatenates the activations with a skip connection before each ResNet block, which reads and writes both
once more. Here a fused ResNet block gets the two as :class:`Joined`, and normalises and projects them where they lie.
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
from vidaccel.kernels.conv.joined_projection import joining_pays
from vidaccel.kernels.op import note, runs_triton
from vidaccel.sites.block import FusedBlock, call_site, fuses
from vidaccel.sites.plain import plain_reason
from vidaccel.sites.site import Fidelity

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


class UpBlock(FusedBlock):
    """What all up-blocks share: how a skip connection joins, and what keeps one from joining."""

    resnets: nn.ModuleList
    upsamplers: Any

    def call_reason(self, hidden_states: Tensor, skips: tuple[Tensor, ...], *args: Any, **kwargs: Any) -> str | None:
        if len(skips) < len(self.resnets):
            return "there are fewer skip connections than ResNet blocks"
        if all(getattr(self, factor, None) for factor in ("s1", "s2", "b1", "b2")):
            return "FreeU is on, which changes what is concatenated"
        if torch.is_autocast_enabled(hidden_states.device.type):
            return "autocast chooses the dtypes of matrix products"
        return None

    def joined(self, resnet: nn.Module, x: Tensor, skip: Tensor) -> Tensor | Joined:
        """The two channel by channel, for ``resnet``; not made where it takes them apart."""
        gains = runs_triton(SKIP_CONCAT, x) and joining_pays(x)
        if torch.compiler.is_compiling() or not gains:
            return torch.cat([x, skip], dim=1)
        reason = _joining_reason(resnet, skip)
        note(SKIP_CONCAT, "torch" if reason else "in place", reason or "")
        return torch.cat([x, skip], dim=1) if reason else Joined(x, skip)

    def upsampled(self, hidden_states: Tensor, size: Any) -> Tensor:
        for upsampler in self.upsamplers or ():
            hidden_states = upsampler(hidden_states, size)
        return hidden_states


def _joining_reason(resnet: Any, skip: Tensor) -> str | None:
    """Why ``resnet`` has to get ``skip`` concatenated with its input, or None if :class:`Joined` will do."""
    if isinstance(resnet, SpatioTemporalResBlock):  # fused or not, it only hands its input on
        if reason := plain_reason(resnet, SpatioTemporalResBlock):
            return reason
        if type(resnet) is SpatioTemporalResBlock:
            return "its ResNet block is not fused"
        resnet = resnet.spatial_res_block
    return resnet.joining_reason(skip) if isinstance(resnet, FusedResnetBlock2D) else "its ResNet block is not fused"


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
        return call_site(
            FusedUpBlockSpatioTemporal,
            self, hidden_states, res_hidden_states_tuple, temb, image_only_indicator, upsample_size,
        )  # fmt: skip

    def fused_forward(
        self, x: Tensor, skips: tuple[Tensor, ...], temb: Tensor, image_only_indicator: Tensor, upsample_size: Any
    ) -> Tensor:
        for resnet, skip in zip(self.resnets, reversed(skips), strict=False):
            x = resnet(self.joined(resnet, x, skip), temb, image_only_indicator=image_only_indicator)
        return self.upsampled(x, upsample_size)


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
        return call_site(
            FusedCrossAttnUpBlockSpatioTemporal,
            self, hidden_states, res_hidden_states_tuple, temb, encoder_hidden_states, image_only_indicator,
            upsample_size,
        )  # fmt: skip

    def fused_forward(
        self,
        x: Tensor,
        skips: tuple[Tensor, ...],
        temb: Tensor,
        context: Tensor,
        image_only_indicator: Tensor,
        upsample_size: Any,
    ) -> Tensor:
        for resnet, attn, skip in zip(self.resnets, self.attentions, reversed(skips), strict=False):
            x = resnet(self.joined(resnet, x, skip), temb, image_only_indicator=image_only_indicator)
            x = attn(
                x, encoder_hidden_states=context, image_only_indicator=image_only_indicator, return_dict=False
            )[0]  # fmt: skip
        return self.upsampled(x, upsample_size)


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
        return call_site(
            FusedUpBlock3D, self, hidden_states, res_hidden_states_tuple, temb, upsample_size, num_frames
        )  # fmt: skip

    def fused_forward(
        self, x: Tensor, skips: tuple[Tensor, ...], temb: Tensor, upsample_size: Any, num_frames: int
    ) -> Tensor:
        for resnet, temp_conv, skip in zip(self.resnets, self.temp_convs, reversed(skips), strict=False):
            x = temp_conv(resnet(self.joined(resnet, x, skip), temb), num_frames=num_frames)
        return self.upsampled(x, upsample_size)


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
        return call_site(
            FusedCrossAttnUpBlock3D,
            self, hidden_states, res_hidden_states_tuple, temb, encoder_hidden_states, upsample_size, attention_mask,
            num_frames, cross_attention_kwargs,
        )  # fmt: skip

    def fused_forward(
        self,
        x: Tensor,
        skips: tuple[Tensor, ...],
        temb: Tensor,
        context: Tensor,
        upsample_size: Any,
        attention_mask: Tensor | None,  # which stock code does not use either
        num_frames: int,
        attention_kwargs: dict[str, Any] | None,
    ) -> Tensor:
        layers = zip(
            self.resnets, self.temp_convs, self.attentions, self.temp_attentions, reversed(skips), strict=False
        )
        for resnet, temp_conv, attn, temp_attn, skip in layers:
            x = temp_conv(resnet(self.joined(resnet, x, skip), temb), num_frames=num_frames)
            x = attn(
                x, encoder_hidden_states=context, cross_attention_kwargs=attention_kwargs, return_dict=False
            )[0]  # fmt: skip
            x = temp_attn(
                x, num_frames=num_frames, cross_attention_kwargs=attention_kwargs, return_dict=False
            )[0]  # fmt: skip
        return self.upsampled(x, upsample_size)
