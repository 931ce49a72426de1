"""Motif-Video: text and image to video.

What the family offers: attention without a mask, on text without its padding (``padded_text``); norms, modulations,
gates and rotary embeddings in one pass each (``gated_residual_norm``, ``qk_norm_rope``, ``linear_gelu``); blocks of one
stream that never join attention and feed-forward (``residual_projection``). Its VAE is Wan's.
"""

from __future__ import annotations

from vidaccel.blocks.dit.transformer_motif_video import (
    FusedMotifVideoSingleTransformerBlock,
    FusedMotifVideoTransformerBlock,
)
from vidaccel.sites.rules import Swap

__all__ = ["RULES"]

RULES = {
    "MotifVideoTransformer3DModel": (
        Swap(FusedMotifVideoTransformerBlock),
        Swap(FusedMotifVideoSingleTransformerBlock),
    ),
}
