"""Kandinsky 5: text and image to video.

What the family offers: all between two products is one pass, most of which stock code does in float32
(``gated_residual_norm``, ``qk_norm_rope``). Sparse (NABLA) attention stays as it is.
"""

from __future__ import annotations

from vidaccel.blocks.dit.transformer_kandinsky import (
    FusedKandinsky5TransformerDecoderBlock,
    FusedKandinsky5TransformerEncoderBlock,
)
from vidaccel.sites.rules import Swap

__all__ = ["RULES"]

RULES = {
    "Kandinsky5Transformer3DModel": (
        Swap(FusedKandinsky5TransformerDecoderBlock),
        Swap(FusedKandinsky5TransformerEncoderBlock),
    ),
}
