"""Blocks modulated by a table of their own, added to one embedding of the timestep ("AdaLN-single", PixArt's).

Self-attention, cross-attention to a text if there is one, feed-forward; the cross-attention has no norm before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from vidaccel.blocks.dit.attention import attention_reason
from vidaccel.blocks.dit.gated_residual import GatedResidualBlock
from vidaccel.sites.memo import once_per_call
from vidaccel.sites.plain import parameters_reason

__all__ = ["AdaNormSingleBlock", "plain_attention_reason"]

Branch = Callable[[Tensor], Tensor]


class AdaNormSingleBlock(GatedResidualBlock):
    """What such blocks do alike, on ``[B, S, C]``."""

    norm1: Any
    norm2: Any
    scale_shift_table: Any

    def norms_reason(self, x: Tensor, temb: Tensor) -> str | None:
        """Why a call goes to the original forward, or None."""
        if torch.is_autocast_enabled(x.device.type):
            return "autocast is on"
        if not x.dtype == temb.dtype == self.scale_shift_table.dtype:
            return "tokens and timestep embedding differ in dtype"
        if len(temb) != len(x):
            return "tokens and timestep embedding differ in batch size"
        for norm in (self.norm1, self.norm2):
            if reason := parameters_reason(norm, nn.LayerNorm, x.device):
                return reason
        return None

    def modulations(self, temb: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of attention and of the feed-forward, ``[B, 1, C]``, of ``temb`` ``[B, 6 C]``."""
        table = self.scale_shift_table[None]
        return (table + temb.reshape(len(temb), 6, -1)).chunk(6, dim=1)

    def run_block(
        self,
        x: Tensor,
        modulations: Sequence[Tensor],
        rows: Tensor | None,
        attend: Branch,
        attend_to_text: Branch | None,
        feed: Branch,
    ) -> Tensor:
        """The block, its branches given.

        Args:
            x: ``[B, S, C]``.
            modulations: Shift, scale and gate of attention and of the feed-forward, ``[B, R, C]``.
            rows: ``[S]``, the row of each token, or None.
            attend: Takes normed tokens.
            attend_to_text: Takes tokens as they are; None: there is no text.
            feed: Takes normed tokens.
        """
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulations
        branch = attend(self.modulate(self.norm1, x, scale, shift, rows))
        gate_of_branch: Tensor | None = gate
        if attend_to_text is not None:
            x = self.add(x, branch, gate, rows)
            branch, gate_of_branch = attend_to_text(x), None
        x, normed = self.add_norm(x, branch, gate_of_branch, self.norm2, ff_scale, ff_shift, rows)
        return self.add(x, feed(normed), ff_gate, rows)


@once_per_call
def plain_attention_reason(attn: Any, processor: type) -> str | None:
    """Why an ``Attention`` does more than project, attend and project, or has to be called; or None."""
    if reason := attention_reason(attn, Attention, processor):
        return reason
    norms = attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k
    if any(norm is not None for norm in norms) or attn.residual_connection or attn.rescale_output_factor != 1:
        return "its attention has norms, a residual or a factor of its own"
    return None
