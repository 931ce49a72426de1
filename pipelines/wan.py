"""Wan 2.1 and 2.2: text, image and video to video, VACE and Animate; the experts of 2.2-A14B are two models of a class.

What the family offers: 133 passes over the tokens of a block, most of them in float32, become 18
(``gated_residual_norm``, ``qk_norm_rope``, ``linear_gelu``); TI2V's modulation is made once for each different timestep
instead of once for each token (``modulation_rows``).
"""

from __future__ import annotations

from vidaccel.blocks.dit.sequence import Sequence
from vidaccel.blocks.dit.transformer_wan import FusedWanTimeTextImageEmbedding, FusedWanTransformerBlock
from vidaccel.blocks.dit.transformer_wan_animate import FusedWanAnimateTransformerBlock
from vidaccel.blocks.dit.transformer_wan_vace import FusedWanVACETransformerBlock
from vidaccel.sites.rules import Swap

__all__ = ["RULES", "SPREAD"]

RULES = {
    "WanTransformer3DModel": (Swap(FusedWanTransformerBlock), Swap(FusedWanTimeTextImageEmbedding)),
    "WanVACETransformer3DModel": (Swap(FusedWanTransformerBlock), Swap(FusedWanVACETransformerBlock)),
    "WanAnimateTransformer3DModel": (Swap(FusedWanAnimateTransformerBlock),),
}
SPREAD = {"WanTransformer3DModel": Sequence("blocks")}
