"""AnimateDiff, on SD 1.5 and SDXL: an image UNet with motion modules between its blocks, per-frame VAE.

What the family offers:

* the pipeline repeats the text for every frame (``text_rows``);
* the spatial transformers leave channels-last and copy back (``channels_last``);
* GEGLU, norms and residuals are a quarter of the time of an eager step.

Its ControlNets are the same blocks. PIA's UNet only has more input channels.
"""

from __future__ import annotations

from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.controlnets.controlnet_sparsectrl import SparseControlNetModel
from diffusers.models.unets.unet_motion_model import UNetMotionModel

from vidaccel.blocks.unet.activations import FusedGEGLU
from vidaccel.blocks.unet.attention import FusedTextTransformerBlock
from vidaccel.blocks.unet.attention_processor import Processor
from vidaccel.blocks.unet.convolution import FusedFewChannelConv2d
from vidaccel.blocks.unet.frames import RESIDUALS, ROWS, Frames
from vidaccel.blocks.unet.normalization import FusedGroupNorm
from vidaccel.blocks.unet.resnet import FusedResnetBlock2D
from vidaccel.blocks.unet.text_context import TextSource
from vidaccel.blocks.unet.transformer_2d import FusedTransformer2DModel
from vidaccel.blocks.unet.unet_motion_model import (
    FusedAnimateDiffTransformer3D,
    FusedCrossAttnUpBlockMotion,
    FusedUpBlockMotion,
)
from vidaccel.blocks.unet.upsampling import FusedUpsample2D
from vidaccel.sites.rules import ChannelsLastWeights, Swap

__all__ = ["RULES", "SPREAD"]

_OF_PICTURES = (
    "sample", "timestep", "encoder_hidden_states", "controlnet_cond", "class_labels", "timestep_cond",
    "attention_mask", "added_cond_kwargs",
)  # fmt: skip
_PICTURES = Frames(dim=ROWS, where=dict.fromkeys(_OF_PICTURES, ROWS))

SPREAD = {
    "UNetMotionModel": Frames(dim=2, where={"sample": 2, "encoder_hidden_states": ROWS, **RESIDUALS}),
    "ControlNetModel": _PICTURES,
    "MultiControlNetModel": _PICTURES,
    "SparseControlNetModel": Frames(
        dim=ROWS,
        where={"sample": 2, "encoder_hidden_states": ROWS, "controlnet_cond": 2, "conditioning_mask": 2},
    ),
}

_BLOCK_RULES = (
    Swap(FusedTransformer2DModel),
    Swap(FusedTextTransformerBlock),
    Swap(FusedAnimateDiffTransformer3D),
    Swap(FusedGEGLU),
    Swap(FusedResnetBlock2D),
    Swap(FusedUpsample2D),
    Swap(FusedFewChannelConv2d, names=("conv_in",)),
    Swap(FusedGroupNorm, names=("norm", "conv_norm_out")),
    Processor(),
)
_CONTROLNET_RULES = (ChannelsLastWeights(ControlNetModel), *_BLOCK_RULES)

RULES = {
    "UNetMotionModel": (
        TextSource(UNetMotionModel),
        ChannelsLastWeights(UNetMotionModel),
        Swap(FusedUpBlockMotion),
        Swap(FusedCrossAttnUpBlockMotion),
        *_BLOCK_RULES,
    ),
    "ControlNetModel": _CONTROLNET_RULES,
    "MultiControlNetModel": _CONTROLNET_RULES,
    "SparseControlNetModel": (
        TextSource(SparseControlNetModel),
        ChannelsLastWeights(SparseControlNetModel),
        *_BLOCK_RULES,
    ),
}
