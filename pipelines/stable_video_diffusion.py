"""Stable Video Diffusion (image to video): the spatio-temporal UNet and the temporal VAE decoder.

What the family offers (measured and derived in the project's notes, repeated here as reasons):

* context is one CLIP image token, so cross-attention is a row per frame (``one_token_attention``);
* spatial and temporal ResNet blocks share one channels-last tensor (``channels_last``);
* GroupNorm over all frames runs on 64 thread blocks in stock PyTorch (``group_norm_silu``);
* temporal attention is 14 or 25 frames for each of thousands of pixels (``temporal_attention``).

The VAE's encoder sees a single image per clip; its ResNet blocks are the same classes and are patched with the rest.
"""

from __future__ import annotations

from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import (
    AutoencoderKLTemporalDecoder,
)
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel

from vidaccel.blocks.unet.activations import FusedGEGLU
from vidaccel.blocks.unet.attention import FusedBasicTransformerBlock, FusedTemporalBasicTransformerBlock
from vidaccel.blocks.unet.attention_processor import Processor
from vidaccel.blocks.unet.convolution import FusedFewChannelConv2d
from vidaccel.blocks.unet.frames import Frames
from vidaccel.blocks.unet.normalization import FusedGroupNorm
from vidaccel.blocks.unet.resnet import (
    FusedAlphaBlender,
    FusedResnetBlock2D,
    FusedSpatioTemporalResBlock,
    FusedTemporalResnetBlock,
)
from vidaccel.blocks.unet.transformer_temporal import FusedTransformerSpatioTemporalModel
from vidaccel.blocks.unet.unet_3d_blocks import FusedCrossAttnUpBlockSpatioTemporal, FusedUpBlockSpatioTemporal
from vidaccel.blocks.unet.upsampling import FusedUpsample2D
from vidaccel.blocks.vae.vae import FusedTemporalDecoder
from vidaccel.sites.rules import ChannelsLastWeights, Swap

__all__ = ["RULES", "SPREAD"]

SPREAD = {"UNetSpatioTemporalConditionModel": Frames(dim=1, where={"sample": 1})}

_RESNET_RULES = (
    Swap(FusedSpatioTemporalResBlock),
    Swap(FusedResnetBlock2D),
    Swap(FusedTemporalResnetBlock),
    Swap(FusedAlphaBlender),
    Swap(FusedUpsample2D),
    Swap(FusedGroupNorm, names=("norm", "group_norm", "conv_norm_out")),
    Processor(),
)

RULES = {
    "UNetSpatioTemporalConditionModel": (
        ChannelsLastWeights(UNetSpatioTemporalConditionModel),
        Swap(FusedUpBlockSpatioTemporal),
        Swap(FusedCrossAttnUpBlockSpatioTemporal),
        Swap(FusedTransformerSpatioTemporalModel),
        Swap(FusedBasicTransformerBlock),
        Swap(FusedTemporalBasicTransformerBlock),
        Swap(FusedGEGLU),
        *_RESNET_RULES,
    ),
    "AutoencoderKLTemporalDecoder": (
        ChannelsLastWeights(AutoencoderKLTemporalDecoder),
        Swap(FusedTemporalDecoder),
        Swap(FusedFewChannelConv2d, names=("conv_in",)),
        *_RESNET_RULES,
    ),
}
