"""CogVideoX 1.0 and 1.5: text, image, video and control video to video.

What the family offers: 95 passes over the tokens of a block become 16, for text and video stay in one buffer from block
to block, and all between two products is one pass (``gated_residual_norm``, ``qk_norm_rope``, ``linear_gelu``).
"""

from __future__ import annotations

from vidaccel.blocks.dit.cogvideox_transformer_3d import FusedCogVideoXBlock
from vidaccel.blocks.dit.sequence import Sequence
from vidaccel.sites.rules import Swap

__all__ = ["RULES", "SPREAD"]

RULES = {"CogVideoXTransformer3DModel": (Swap(FusedCogVideoXBlock),)}
SPREAD = {"CogVideoXTransformer3DModel": Sequence("transformer_blocks")}
