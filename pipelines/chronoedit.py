"""ChronoEdit: edits a picture by making the clip that leads there; blocks are copies of Wan's."""

from __future__ import annotations

from vidaccel.blocks.dit.sequence import Sequence
from vidaccel.blocks.dit.transformer_chronoedit import FusedChronoEditTransformerBlock
from vidaccel.sites.rules import Swap

__all__ = ["RULES", "SPREAD"]

RULES = {"ChronoEditTransformer3DModel": (Swap(FusedChronoEditTransformerBlock),)}
SPREAD = {"ChronoEditTransformer3DModel": Sequence("blocks")}
