"""LTX-Video: text and image to video, video conditions, long clips of several prompts.

What the family offers: some 70 passes over the tokens of a block become 17 (``gated_residual_norm``, ``qk_norm_rope``,
``linear_gelu``); the text without its padding, and attention to it without a mask (``padded_text``); one rotary table
for all samples (``rotary_table``); where tokens have timesteps of their own, one modulation for each different one
(``modulation_rows``).
"""

from __future__ import annotations

from vidaccel.blocks.dit.normalization import FusedAdaLayerNormSingle
from vidaccel.blocks.dit.sequence import Sequence
from vidaccel.blocks.dit.transformer_ltx import FusedLTXVideoRotaryPosEmbed, FusedLTXVideoTransformerBlock
from vidaccel.blocks.vae.autoencoder_kl_ltx import FusedLTXVideoDecoder3d, FusedLTXVideoEncoder3d
from vidaccel.blocks.vae.tile_batches import TileBatches
from vidaccel.blocks.vae.tile_blends import TileBlends
from vidaccel.sites.rules import Swap

__all__ = ["RULES", "SPREAD"]

RULES = {
    "AutoencoderKLLTXVideo": (Swap(FusedLTXVideoDecoder3d), Swap(FusedLTXVideoEncoder3d), TileBatches(), TileBlends()),
    "LTXVideoTransformer3DModel": (
        Swap(FusedLTXVideoTransformerBlock),
        Swap(FusedLTXVideoRotaryPosEmbed),
        Swap(FusedAdaLayerNormSingle),
    ),
}
SPREAD = {"LTXVideoTransformer3DModel": Sequence("transformer_blocks")}
