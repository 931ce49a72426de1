"""I2VGenXL (image and text to video): ModelScope's blocks around another entry.

The UNet itself prepares what it knows of the image: a few convolutions and a transformer over frames of four channels,
the same at every step. They belong to the top-level model, which no rule touches.
"""

from __future__ import annotations

from diffusers.models.unets.unet_i2vgen_xl import I2VGenXLUNet

from vidaccel.blocks.unet.frames import Frames
from vidaccel.blocks.unet.text_context import TextSource
from vidaccel.pipelines.unet_3d_blocks import BLOCK_RULES
from vidaccel.sites.rules import ChannelsLastWeights

__all__ = ["RULES", "SPREAD"]

SPREAD = {
    "I2VGenXLUNet": Frames(
        dim=2, where={"sample": 2, "image_latents": 2}, first=("image_latents_context_embedding",)
    )
}  # fmt: skip

RULES = {
    "I2VGenXLUNet": (
        TextSource(I2VGenXLUNet, repeats_text=True),
        ChannelsLastWeights(I2VGenXLUNet),
        *BLOCK_RULES,
    )
}
