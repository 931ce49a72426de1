"""diffusers' ``transformers/transformer_hunyuan_video15.py``: the block of HunyuanVideo 1.5, of two streams.

It is that of HunyuanVideo but for its mask: ``[B, T]``, of the text alone. Stock code makes S + T by S + T booleans of
it in every layer (51,000 x 51,000 at 480p), which hide the padding of the text and nothing else, and attention runs at
a third of its speed. Here the padding is cut off; where it cannot be, the mask is one of keys, ``[B, 1, 1, S + T]``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from diffusers.models.transformers.transformer_hunyuan_video15 import (
    HunyuanVideo15AttnProcessor2_0,
    HunyuanVideo15TransformerBlock,
)
from torch import Tensor

from vidaccel.blocks.dit.padded_text import layers_are_hooked
from vidaccel.blocks.dit.step_caches import known_to_step_caches
from vidaccel.blocks.dit.transformer_hunyuan_video import TWO_STREAM_OPS, TwoStreamBlock
from vidaccel.sites.block import call_site, fuses

__all__ = ["FusedHunyuanVideo15TransformerBlock"]


@known_to_step_caches
@fuses(HunyuanVideo15TransformerBlock, TWO_STREAM_OPS)
class FusedHunyuanVideo15TransformerBlock(TwoStreamBlock, HunyuanVideo15TransformerBlock):
    """Two streams, video and text (an image, glyphs and a prompt), valid tokens of the text first."""

    attention_processor: ClassVar[type] = HunyuanVideo15AttnProcessor2_0

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        freqs_cis: tuple[Tensor, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        return call_site(
            FusedHunyuanVideo15TransformerBlock,
            self, hidden_states, encoder_hidden_states, temb, attention_mask, freqs_cis,
        )  # fmt: skip

    def mask_reason(self, x: Tensor, text: Tensor, mask: Tensor | None) -> str | None:
        if mask is None or mask.shape != text.shape[:2]:
            return "its attention mask is not [B, T]"
        return None

    def tokens_before_text(self, x: Tensor) -> int:
        return 0

    def key_mask(self, x: Tensor, mask: Tensor) -> Tensor:
        keys = F.pad(mask.bool(), (x.shape[1], 0), value=True)[:, None, None]
        return keys & keys.mT if layers_are_hooked() else keys  # padding attends to nothing in stock code

    def mask_of_ones(self, text: Tensor) -> Tensor:
        return text.new_ones(text.shape[:2]).bool()
