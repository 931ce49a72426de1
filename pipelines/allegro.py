"""Allegro: text to video.

What the family offers: norms, modulations, gates and residuals are one pass each (``gated_residual_norm``), and the
fastest attention runs (``spatial_attention``).
"""

from __future__ import annotations

from vidaccel.blocks.dit.sequence import Sequence
from vidaccel.blocks.dit.transformer_allegro import FusedAllegroTransformerBlock
from vidaccel.sites.rules import Swap

__all__ = ["RULES", "SPREAD"]

RULES = {"AllegroTransformer3DModel": (Swap(FusedAllegroTransformerBlock),)}
SPREAD = {"AllegroTransformer3DModel": Sequence("transformer_blocks")}
