"""diffusers' ``transformers/transformer_wan_animate.py``: the block of Wan Animate, a copy of Wan's.

The attention to a face's motion behind every fifth block stays diffusers'.
"""

from __future__ import annotations

from diffusers.models.transformers.transformer_wan_animate import WanAttention, WanAttnProcessor, WanTransformerBlock
from torch import Tensor

from vidaccel.blocks.dit.step_caches import known_to_step_caches
from vidaccel.blocks.dit.transformer_wan import WAN_OPS, Parts, WanBlock
from vidaccel.sites.block import call_site, fuses

__all__ = ["FusedWanAnimateTransformerBlock"]


@known_to_step_caches
@fuses(WanTransformerBlock, WAN_OPS)
class FusedWanAnimateTransformerBlock(WanBlock, WanTransformerBlock):
    """Wan's block."""

    parts = Parts(WanAttention, WanAttnProcessor, WanAttnProcessor)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Tensor) -> Tensor:
        return call_site(
            FusedWanAnimateTransformerBlock, self, hidden_states, encoder_hidden_states, temb, rotary_emb
        )  # fmt: skip
