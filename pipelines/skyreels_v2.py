"""SkyReels-V2: text and image to video, and diffusion forcing for clips of any length; blocks are copies of Wan's.

What the family offers: Wan's passes; in diffusion forcing a modulation for each frame instead of each token.
"""

from __future__ import annotations

from vidaccel.blocks.dit.sequence import Sequence
from vidaccel.blocks.dit.transformer_skyreels_v2 import FusedSkyReelsV2TransformerBlock
from vidaccel.sites.rules import Swap

__all__ = ["RULES", "SPREAD"]

RULES = {"SkyReelsV2Transformer3DModel": (Swap(FusedSkyReelsV2TransformerBlock),)}
SPREAD = {"SkyReelsV2Transformer3DModel": Sequence("blocks")}
