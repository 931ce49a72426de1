"""The blocks that ModelScope's UNet and I2VGenXL's are both made of."""

from __future__ import annotations

from vidaccel.blocks.unet.activations import FusedGEGLU
from vidaccel.blocks.unet.attention import FusedTextTransformerBlock
from vidaccel.blocks.unet.attention_processor import Processor
from vidaccel.blocks.unet.convolution import FusedFewChannelConv2d
from vidaccel.blocks.unet.normalization import FusedGroupNorm
from vidaccel.blocks.unet.resnet import FusedResnetBlock2D, FusedTemporalConvLayer
from vidaccel.blocks.unet.transformer_2d import FusedTransformer2DModel
from vidaccel.blocks.unet.transformer_temporal import FusedTransformerTemporalModel
from vidaccel.blocks.unet.unet_3d_blocks import FusedCrossAttnUpBlock3D, FusedUpBlock3D
from vidaccel.blocks.unet.upsampling import FusedUpsample2D
from vidaccel.sites.rules import Swap

__all__ = ["BLOCK_RULES"]

BLOCK_RULES = (
    Swap(FusedUpBlock3D),
    Swap(FusedCrossAttnUpBlock3D),
    Swap(FusedTransformer2DModel),
    Swap(FusedTextTransformerBlock),
    Swap(FusedTransformerTemporalModel),
    Swap(FusedTemporalConvLayer),
    Swap(FusedResnetBlock2D),
    Swap(FusedUpsample2D),
    Swap(FusedFewChannelConv2d, names=("conv_in",)),
    Swap(FusedGEGLU),
    Swap(FusedGroupNorm, names=("norm", "conv_norm_out")),
    Processor(),
)
