"""diffusers' ``transformers/consisid_transformer_3d.py``: ConsisID's block is CogVideoX's.

Behind every other block a face is attended to, which makes a new tensor of the video: the next block joins text and
video once.
"""

from __future__ import annotations

from diffusers.models.transformers.consisid_transformer_3d import ConsisIDBlock
from torch import Tensor

from vidaccel.blocks.dit.cogvideox_transformer_3d import COGVIDEOX_OPS, JointBlock
from vidaccel.sites.block import call_site, fuses

__all__ = ["FusedConsisIDBlock"]


@fuses(ConsisIDBlock, COGVIDEOX_OPS)
class FusedConsisIDBlock(JointBlock, ConsisIDBlock):
    """Attention and feed-forward over text and video, each stream modulated by its own part of the timestep."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        return call_site(FusedConsisIDBlock, self, hidden_states, encoder_hidden_states, temb, image_rotary_emb)
