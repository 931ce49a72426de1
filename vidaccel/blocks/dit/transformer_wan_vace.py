"""diffusers' ``transformers/transformer_wan_vace.py``: the block of Wan VACE's control branch.

It works on the control's tokens as Wan's block does on the video's. The first one adds the video's to them, in one pass
with its first norm; what a layer of the video takes from the control is projected at the end.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_wan_vace import WanVACETransformerBlock
from torch import Tensor

from vidaccel.blocks.dit.step_caches import known_to_step_caches
from vidaccel.blocks.dit.transformer_wan import WAN_OPS, WanBlock
from vidaccel.sites.block import CORNER_ROWS, call_site, fuses

__all__ = ["FusedWanVACETransformerBlock"]


@known_to_step_caches
@fuses(WanVACETransformerBlock, WAN_OPS)
class FusedWanVACETransformerBlock(WanBlock, WanVACETransformerBlock):
    """Wan's block on ``control_hidden_states`` ``[B, S, C]``; the answer is a projection of the result, and this."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        control_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Tensor,
    ) -> Any:
        return call_site(
            FusedWanVACETransformerBlock,
            self, hidden_states, encoder_hidden_states, control_hidden_states, temb, rotary_emb,
        )  # fmt: skip

    def call_reason(self, hidden_states: Tensor, context: Tensor, control: Tensor, *args: Any) -> str | None:
        return super().call_reason(control, context, *args)

    def cut(self, x: Tensor, context: Tensor, control: Tensor, *args: Any) -> tuple[Any, ...]:
        control, _, *rest = super().cut(control, context, *args)
        return x[:, :CORNER_ROWS], context, control, *rest

    def fused_forward(  # type: ignore[override]
        self, hidden_states: Tensor, context: Tensor, control: Tensor, temb: Tensor, rotary_emb: Any
    ) -> tuple[Tensor | None, Tensor]:
        modulation = self.modulation(temb)
        if self.proj_in is None:
            normed = self.modulate(control, modulation)
        else:
            shift, scale, *_, rows = modulation
            control, normed = self.add_norm(self.proj_in(control), hidden_states, None, rows, self.norm1, scale, shift)
        control = self.rest(control, self.self_attention(normed, rotary_emb), context, modulation)
        return None if self.proj_out is None else self.proj_out(control), control
