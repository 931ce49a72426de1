"""ModelScope text to video and its descendants (Zeroscope): an image UNet with temporal layers between its blocks.

What the family offers:

* after every ResNet block four convolutions over frames, after every spatial transformer one over frames, and one more
  after the first convolution: stock code permutes the activations for each and back (``channels_last``);
* GroupNorm over all frames runs on 64 thread blocks in stock PyTorch (``group_norm_silu``);
* temporal attention, twice in a block, is 16 or 24 frames for each of thousands of pixels (``temporal_attention``);
* each of the four convolutions over frames has a bias that PyTorch adds in a pass of its own (``conv_epilogue``).
"""

from __future__ import annotations

from diffusers.models.unets.unet_3d_condition import UNet3DConditionModel

from vidaccel.blocks.unet.activations import FusedGEGLU
from vidaccel.blocks.unet.attention import FusedTextTransformerBlock
from vidaccel.blocks.unet.attention_processor import Processor
from vidaccel.blocks.unet.convolution import FusedFewChannelConv2d
from vidaccel.blocks.unet.normalization import FusedGroupNorm
from vidaccel.blocks.unet.resnet import FusedResnetBlock2D, FusedTemporalConvLayer
from vidaccel.blocks.unet.text_context import TextSource
from vidaccel.blocks.unet.transformer_2d import FusedTransformer2DModel
from vidaccel.blocks.unet.transformer_temporal import FusedTransformerTemporalModel
from vidaccel.blocks.unet.unet_3d_blocks import FusedCrossAttnUpBlock3D, FusedUpBlock3D
from vidaccel.blocks.unet.upsampling import FusedUpsample2D
from vidaccel.sites.rules import ChannelsLastWeights, Swap

__all__ = ["BLOCK_RULES", "RULES"]

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

RULES = {
    "UNet3DConditionModel": (
        TextSource(UNet3DConditionModel, repeats_text=True),
        ChannelsLastWeights(UNet3DConditionModel),
        *BLOCK_RULES,
    ),
}
