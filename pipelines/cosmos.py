"""Cosmos 1.0, Predict2, Predict2.5 and Transfer2.5: text, image and video to world, with or without a ControlNet.

What the family offers: all between two products is one pass (``gated_residual_norm``, ``qk_norm_rope``); where frames
are given, the modulation is made once for each different timestep instead of once for each token
(``modulation_rows``).
"""

from __future__ import annotations

from vidaccel.blocks.dit.sequence import Sequence
from vidaccel.blocks.dit.transformer_cosmos import FusedCosmosTransformerBlock
from vidaccel.sites.rules import Swap

__all__ = ["RULES", "SPREAD"]

_BLOCKS = (Swap(FusedCosmosTransformerBlock),)

RULES = {"CosmosTransformer3DModel": _BLOCKS, "CosmosControlNetModel": _BLOCKS}
SPREAD = {"CosmosTransformer3DModel": Sequence("transformer_blocks")}
