"""``AutoencoderKLCogVideoX``, the video VAE of CogVideoX 1.0 and 1.5, and of ConsisID.

No pipeline of its own: whatever pipeline holds one has it patched by these rules, beside its denoiser. What the family
offers: a third of a decode goes into the moments of GroupNorms, and another into enlarging and convolving the latents
at the size of the clip for each of 37 norms; what is left are the convolutions and a pass or two around each.
"""

from __future__ import annotations

from vidaccel.blocks.vae.autoencoder_kl_cogvideox import FusedCogVideoXDecoder3D
from vidaccel.blocks.vae.autoencoder_kl_cogvideox_encoder import FusedCogVideoXEncoder3D
from vidaccel.blocks.vae.tile_batches import TileBatches
from vidaccel.blocks.vae.tile_blends import TileBlends
from vidaccel.sites.rules import Swap

__all__ = ["RULES"]

RULES = {
    "AutoencoderKLCogVideoX": (
        Swap(FusedCogVideoXEncoder3D),
        Swap(FusedCogVideoXDecoder3D),
        TileBatches(),
        TileBlends(),
    ),
}
