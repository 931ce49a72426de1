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

from vidaccel.blocks.unet.frames import RESIDUALS, Frames
from vidaccel.blocks.unet.text_context import TextSource
from vidaccel.pipelines.unet_3d_blocks import BLOCK_RULES
from vidaccel.sites.rules import ChannelsLastWeights

__all__ = ["RULES", "SPREAD"]

SPREAD = {"UNet3DConditionModel": Frames(dim=2, where={"sample": 2, **RESIDUALS})}

RULES = {
    "UNet3DConditionModel": (
        TextSource(UNet3DConditionModel, repeats_text=True),
        ChannelsLastWeights(UNet3DConditionModel),
        *BLOCK_RULES,
    ),
}
