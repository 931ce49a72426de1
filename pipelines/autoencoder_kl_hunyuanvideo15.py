"""``AutoencoderKLHunyuanVideo15``, the video VAE of HunyuanVideo 1.5.

No pipeline of its own: whatever pipeline holds one has it patched by these rules, beside its denoiser. What the family
offers: of 97,275 launches of a tiled decode, most are for pads, norms and a mask that is filled row by row; what is
left are the convolutions and a pass or two around each.
"""

from __future__ import annotations

from vidaccel.blocks.vae.autoencoder_kl_hunyuanvideo15 import (
    FusedHunyuanVideo15Decoder3D,
    FusedHunyuanVideo15Encoder3D,
)
from vidaccel.blocks.vae.tile_batches import TileBatches
from vidaccel.blocks.vae.tile_blends import TileBlends
from vidaccel.sites.rules import Swap

__all__ = ["RULES"]

RULES = {
    "AutoencoderKLHunyuanVideo15": (
        Swap(FusedHunyuanVideo15Encoder3D),
        Swap(FusedHunyuanVideo15Decoder3D),
        TileBatches(),
        TileBlends(),
    ),
}
