"""Helios: long clips in sections, each of which attends to a history of the ones before; blocks are copies of Wan's.

What the family offers: Wan's passes, and a modulation for the history and one for the clip instead of each token's.
"""

from __future__ import annotations

from vidaccel.blocks.dit.sequence import Sequence
from vidaccel.blocks.dit.transformer_helios import FusedHeliosTransformerBlock
from vidaccel.sites.rules import Swap

__all__ = ["RULES", "SPREAD"]

RULES = {"HeliosTransformer3DModel": (Swap(FusedHeliosTransformerBlock),)}
SPREAD = {"HeliosTransformer3DModel": Sequence("blocks")}
