"""Kandinsky 6: text and image to video and sound.

What the family offers: all between two products is one pass, most of which stock code does in several, in float32
(``gated_residual_norm``, ``qk_norm_rope``). Its VAE is HunyuanVideo's. Its super-resolution, whose attention is sparse
and needs torch.compile, stays as it is.
"""

from __future__ import annotations

from vidaccel.blocks.dit.transformer_kandinsky6 import (
    FusedKandinsky6FusedTransformerDecoderBlock,
    FusedKandinsky6TransformerEncoderBlock,
)
from vidaccel.sites.rules import Swap

__all__ = ["RULES"]

RULES = {
    "Kandinsky6Transformer3DModel": (
        Swap(FusedKandinsky6FusedTransformerDecoderBlock),
        Swap(FusedKandinsky6TransformerEncoderBlock),
    ),
}
