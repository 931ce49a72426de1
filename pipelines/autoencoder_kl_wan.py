"""``AutoencoderKLWan``, the video VAE of Wan 2.1 and of all that decode with it (SkyReels, VACE, ChronoEdit, Helios).

No pipeline of its own: whatever pipeline holds one has it patched by these rules, beside its denoiser. What the family
offers: 14,338 launches, most of them for pads, cats and clones of single frames, become some hundred; the convolutions
see whole clips. To encode 81 frames, stock runs 5,900 operations and the encoder here some 280.
"""

from __future__ import annotations

from vidaccel.blocks.vae.autoencoder_kl_wan import FusedWanDecoder3d, FusedWanEncoder3d
from vidaccel.blocks.vae.tile_batches import TileBatches
from vidaccel.blocks.vae.tile_blends import TileBlends
from vidaccel.sites.rules import Swap

__all__ = ["RULES"]

RULES = {
    "AutoencoderKLWan": (
        Swap(FusedWanEncoder3d),
        Swap(FusedWanDecoder3d),
        TileBatches(),
        TileBlends(),
    ),
}
