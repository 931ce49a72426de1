"""EasyAnimate: text to video; stock code of its other pipelines does not run.

What the family offers: all between two products is one pass (``gated_residual_norm``, ``qk_norm_rope``,
``linear_gelu``), and text and video are joined by the one that writes queries and keys.
"""

from __future__ import annotations

from vidaccel.blocks.dit.sequence import Sequence
from vidaccel.blocks.dit.transformer_easyanimate import FusedEasyAnimateTransformerBlock
from vidaccel.sites.rules import Swap

__all__ = ["RULES", "SPREAD"]

RULES = {"EasyAnimateTransformer3DModel": (Swap(FusedEasyAnimateTransformerBlock),)}
SPREAD = {"EasyAnimateTransformer3DModel": Sequence("transformer_blocks")}
