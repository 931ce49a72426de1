"""Mochi: text to video.

What the family offers: each sample attends to a view of its valid tokens instead of a copy, and the GPU is asked once
per call how many these are (``padded_text``); norms of branches, gates, residuals and the norms behind them are one
pass each (``gated_residual_norm``, ``qk_norm_rope``).
"""

from __future__ import annotations

from vidaccel.blocks.dit.transformer_mochi import FusedMochiTransformerBlock
from vidaccel.sites.rules import Swap

__all__ = ["RULES"]

RULES = {"MochiTransformer3DModel": (Swap(FusedMochiTransformerBlock),)}
