"""Sana-Video: text and image to video.

What the family offers: norms, modulations, gates and residuals are one pass each (``gated_residual_norm``); where a
frame is given, the modulation is made once for each different timestep instead of once for each token
(``modulation_rows``).
"""

from __future__ import annotations

from vidaccel.blocks.dit.normalization import FusedAdaLayerNormSingle
from vidaccel.blocks.dit.transformer_sana_video import FusedSanaVideoTransformerBlock
from vidaccel.sites.rules import Swap

__all__ = ["RULES"]

RULES = {"SanaVideoTransformer3DModel": (Swap(FusedSanaVideoTransformerBlock), Swap(FusedAdaLayerNormSingle))}
