"""Latte: text to video, by blocks of space and of time in turn.

What the family offers: norms, modulations, gates and residuals are one pass each (``gated_residual_norm``).
"""

from __future__ import annotations

from vidaccel.blocks.dit.latte_transformer_3d import FusedLatteTransformerBlock
from vidaccel.sites.rules import Swap

__all__ = ["RULES"]

RULES = {"LatteTransformer3DModel": (Swap(FusedLatteTransformerBlock),)}
