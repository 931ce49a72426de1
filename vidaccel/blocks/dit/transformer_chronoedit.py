"""diffusers' ``transformers/transformer_chronoedit.py``: the block of ChronoEdit, a copy of Wan's."""

from __future__ import annotations

from diffusers.models.transformers.transformer_chronoedit import WanAttention, WanAttnProcessor, WanTransformerBlock
from torch import Tensor

from vidaccel.blocks.dit.step_caches import known_to_step_caches
from vidaccel.blocks.dit.transformer_wan import WAN_OPS, Parts, WanBlock
from vidaccel.sites.block import call_site, fuses

__all__ = ["FusedChronoEditTransformerBlock"]


@known_to_step_caches
@fuses(WanTransformerBlock, WAN_OPS)
class FusedChronoEditTransformerBlock(WanBlock, WanTransformerBlock):
    """Wan's block."""

    parts = Parts(WanAttention, WanAttnProcessor, WanAttnProcessor)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Tensor) -> Tensor:
        return call_site(
            FusedChronoEditTransformerBlock, self, hidden_states, encoder_hidden_states, temb, rotary_emb
        )  # fmt: skip
