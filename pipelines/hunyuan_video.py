"""HunyuanVideo: text and image to video, SkyReels-V1, FramePack; and its VAE, which Kandinsky 5 decodes with too.

What the family offers: attention without a mask, on text without its padding (``padded_text``); norms, modulations,
gates and rotary embeddings in one pass each (``gated_residual_norm``, ``qk_norm_rope``, ``linear_gelu``); blocks of one
stream that never join attention and feed-forward (``residual_projection``). The VAE never pads, copies or upsamples a
clip, and its attention needs no mask of all pairs of tokens (``padded_group_norm``, ``upsample_clip``).
"""

from __future__ import annotations

from vidaccel.blocks.dit.sequence import Sequence
from vidaccel.blocks.dit.transformer_hunyuan_video import (
    FusedHunyuanVideoSingleTransformerBlock,
    FusedHunyuanVideoTokenReplaceSingleTransformerBlock,
    FusedHunyuanVideoTokenReplaceTransformerBlock,
    FusedHunyuanVideoTransformerBlock,
)
from vidaccel.blocks.vae.autoencoder_kl_hunyuan_video import FusedHunyuanVideoDecoder3D, FusedHunyuanVideoEncoder3D
from vidaccel.blocks.vae.tile_batches import TileBatches
from vidaccel.blocks.vae.tile_blends import TileBlends
from vidaccel.sites.rules import Swap

__all__ = ["RULES", "SPREAD"]

_BLOCKS = (Swap(FusedHunyuanVideoTransformerBlock), Swap(FusedHunyuanVideoSingleTransformerBlock))

RULES = {
    "AutoencoderKLHunyuanVideo": (
        Swap(FusedHunyuanVideoEncoder3D),
        Swap(FusedHunyuanVideoDecoder3D),
        TileBatches(),
        TileBlends(),
    ),
    "HunyuanVideoTransformer3DModel": (
        *_BLOCKS,
        Swap(FusedHunyuanVideoTokenReplaceTransformerBlock),
        Swap(FusedHunyuanVideoTokenReplaceSingleTransformerBlock),
    ),
    "HunyuanVideoFramepackTransformer3DModel": _BLOCKS,
}
_TOKENS = Sequence("transformer_blocks", "single_transformer_blocks")
SPREAD = {"HunyuanVideoTransformer3DModel": _TOKENS, "HunyuanVideoFramepackTransformer3DModel": _TOKENS}
