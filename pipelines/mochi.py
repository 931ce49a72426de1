"""Mochi: text to video.

What the family offers: each sample attends to a view of its valid tokens instead of a copy, and the GPU is asked once
per call how many these are (``padded_text``); norms of branches, gates, residuals and the norms behind them are one
pass each (``gated_residual_norm``, ``qk_norm_rope``). The VAE's decoder never pads, copies or permutes a clip
(``padded_group_norm``, ``pixel_shuffle``).
"""

from __future__ import annotations

from vidaccel.blocks.dit.sequence import Sequence
from vidaccel.blocks.dit.transformer_mochi import FusedMochiTransformerBlock
from vidaccel.blocks.vae.autoencoder_kl_mochi import FusedMochiDecoder3D
from vidaccel.blocks.vae.tile_batches import TileBatches
from vidaccel.blocks.vae.tile_blends import TileBlends
from vidaccel.sites.rules import Swap

__all__ = ["RULES", "SPREAD"]

RULES = {
    "AutoencoderKLMochi": (Swap(FusedMochiDecoder3D), TileBatches(), TileBlends()),
    "MochiTransformer3DModel": (Swap(FusedMochiTransformerBlock),),
}
SPREAD = {"MochiTransformer3DModel": Sequence("transformer_blocks")}
