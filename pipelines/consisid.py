"""ConsisID: a person's image to video, with CogVideoX's blocks.

What the family offers is what CogVideoX does; the attention to the face between its blocks stays as it is.
"""

from __future__ import annotations

from vidaccel.blocks.dit.consisid_transformer_3d import FusedConsisIDBlock
from vidaccel.blocks.dit.sequence import Sequence
from vidaccel.sites.rules import Swap

__all__ = ["RULES", "SPREAD"]

RULES = {"ConsisIDTransformer3DModel": (Swap(FusedConsisIDBlock),)}
SPREAD = {"ConsisIDTransformer3DModel": Sequence("transformer_blocks")}
