"""HunyuanVideo 1.5: text and image to video.

What the family offers: attention without a mask, on text without its padding (``padded_text``): stock code spends two
thirds of its time on a mask that hides nothing else; norms, modulations, gates and rotary embeddings in one pass each
(``gated_residual_norm``, ``qk_norm_rope``, ``linear_gelu``).
"""

from __future__ import annotations

from vidaccel.blocks.dit.sequence import Sequence
from vidaccel.blocks.dit.transformer_hunyuan_video15 import FusedHunyuanVideo15TransformerBlock
from vidaccel.sites.rules import Swap

__all__ = ["RULES", "SPREAD"]

RULES = {"HunyuanVideo15Transformer3DModel": (Swap(FusedHunyuanVideo15TransformerBlock),)}
SPREAD = {"HunyuanVideo15Transformer3DModel": Sequence("transformer_blocks")}
