"""diffusers' ``transformers/transformer_sana_video.py``: the block of Sana-Video.

Norms, modulations, gates and residuals are one pass each; linear attention, cross-attention and the convolutions of the
feed-forward are called as they are. Where frames are given, tokens of one timestep share a modulation
(``modulation_rows.py``).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from diffusers.models.transformers.transformer_sana_video import SanaVideoTransformerBlock
from torch import Tensor

from vidaccel.blocks.dit.ada_norm_single import AdaNormSingleBlock
from vidaccel.blocks.dit.modulation_rows import distinct_rows
from vidaccel.sites.block import call_site, fuses

__all__ = ["FusedSanaVideoTransformerBlock"]


@fuses(SanaVideoTransformerBlock, {"gated_residual_norm": "math-exact"})
class FusedSanaVideoTransformerBlock(AdaNormSingleBlock, SanaVideoTransformerBlock):
    """Linear self-attention, cross-attention to text and a feed-forward of convolutions, on ``[B, S, C]``."""

    attn1: Any
    attn2: Any
    ff: Any

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        return call_site(
            FusedSanaVideoTransformerBlock,
            self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
            frames, height, width, rotary_emb,
        )  # fmt: skip

    def call_reason(self, x: Tensor, mask: Any, text: Any, text_mask: Any, temb: Tensor, *args: Any) -> str | None:
        if temb.ndim != 3 or temb.shape[1] not in (1, x.shape[1]):
            return "its timestep embedding is not [B, 1 or S, 6*C]"
        return self.norms_reason(x, temb)

    def path_in_data(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        temb = args[4]
        return distinct_rows(_parts(temb))[0].shape[1] if temb.ndim == 3 else None

    def corner(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Whole frames, of which a few rows of each would be another picture: the first two."""
        x, mask, text, text_mask, temb, frames, height, width, rotary = args
        kept = min(frames, 2)
        x = x[:, : kept * height * width]
        temb = temb if temb.shape[1] == 1 else temb[:, : x.shape[1]]
        rotary = None if rotary is None else tuple(table[:, : x.shape[1]] for table in rotary)
        return (x, mask, text, text_mask, temb, kept, height, width, rotary), kwargs

    def fused_forward(
        self, x: Tensor, mask: Any, text: Tensor, text_mask: Any, temb: Tensor, *sizes: Any
    ) -> Tensor:  # fmt: skip
        *grid, rotary = sizes
        distinct, rows = distinct_rows(_parts(temb))  # [B, R, 6, C]
        modulations = (self.scale_shift_table + distinct).unbind(2)
        to_text = None
        if self.attn2 is not None:
            to_text = partial(self.attn2, encoder_hidden_states=text, attention_mask=text_mask)
        return self.run_block(
            x, modulations, rows, partial(self.attn1, rotary_emb=rotary), to_text, partial(self._feed, grid=grid)
        )  # fmt: skip

    def _feed(self, x: Tensor, grid: list[int]) -> Tensor:
        out: Tensor = self.ff(x.unflatten(1, grid))
        return out.flatten(1, 3)


def _parts(temb: Tensor) -> Tensor:
    """``[B, S, 6*C]`` as ``[B, S, 6, C]``."""
    return temb.unflatten(2, (6, -1))
