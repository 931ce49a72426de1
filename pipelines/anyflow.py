"""AnyFlow: clips in any number of steps, at once or chunk by chunk (FAR); blocks are Wan's with other attentions.

What the family offers: Wan's passes, queries and keys turned in float32 instead of as complex numbers of float64, and a
modulation for each different timestep instead of each token's.
"""

from __future__ import annotations

from vidaccel.blocks.dit.sequence import Sequence
from vidaccel.blocks.dit.transformer_anyflow import FusedAnyFlowTransformerBlock
from vidaccel.blocks.dit.transformer_anyflow_far import FusedAnyFlowFARTransformerBlock
from vidaccel.sites.rules import Swap

__all__ = ["RULES", "SPREAD"]

RULES = {
    "AnyFlowTransformer3DModel": (Swap(FusedAnyFlowTransformerBlock),),
    "AnyFlowFARTransformer3DModel": (Swap(FusedAnyFlowFARTransformerBlock),),
}
SPREAD = {"AnyFlowTransformer3DModel": Sequence("blocks")}
