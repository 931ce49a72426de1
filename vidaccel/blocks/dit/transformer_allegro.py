"""diffusers' ``transformers/transformer_allegro.py``: the block of Allegro.

Norms, modulations, gates and residuals are one pass each between two products. The rotary embedding turns thirds of a
head by time, height and width, which stays in PyTorch; what it turns goes to the fastest attention.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from diffusers.models.attention_processor import AllegroAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb_allegro
from diffusers.models.transformers.transformer_allegro import AllegroTransformerBlock
from torch import Tensor

from vidaccel.blocks.dit.ada_norm_single import AdaNormSingleBlock, plain_attention_reason
from vidaccel.blocks.dit.attention import feed_forward, over_heads, project
from vidaccel.kernels.attention.spatial_attention import spatial_attention
from vidaccel.kernels.op import REFERENCE, note
from vidaccel.parallel.layout import own_tokens
from vidaccel.sites.block import CORNER_ROWS, MOST_WHOLE, call_site, fuses
from vidaccel.sites.site import Fidelity

__all__ = ["ALLEGRO_OPS", "FusedAllegroTransformerBlock"]

ALLEGRO_OPS: dict[str, Fidelity] = {
    "gated_residual_norm": "math-exact",
    "spatial_attention": "math-exact",
    "linear_gelu": "math-exact",
}

Rotary = tuple[tuple[Any, ...], tuple[Tensor, ...]]  # tables of time, height and width; places [B, S] in each


@fuses(AllegroTransformerBlock, ALLEGRO_OPS)
class FusedAllegroTransformerBlock(AdaNormSingleBlock, AllegroTransformerBlock):
    """Self-attention, cross-attention to text and feed-forward, on ``[B, S, C]``."""

    attn1: Any
    attn2: Any
    ff: Any

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        temb: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        return call_site(
            FusedAllegroTransformerBlock,
            self, hidden_states, encoder_hidden_states, temb, attention_mask, encoder_attention_mask, image_rotary_emb,
        )  # fmt: skip

    def call_reason(self, x: Tensor, text: Any, temb: Tensor, mask: Any, *args: Any) -> str | None:
        if x.ndim != 3 or x.shape[1] == 1:  # stock code takes one token for none
            return "its tokens are not [B, S, C] with S > 1"
        return self.norms_reason(x, temb)

    def spread_reason(self, x: Tensor, text: Any, temb: Tensor, mask: Tensor | None, *args: Any) -> str | None:
        return self._self_attention_reason(mask)

    def corner(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, text, temb, mask, text_mask, rotary = args
        if x.numel() <= MOST_WHOLE:
            return args, kwargs
        if mask is not None:
            return None
        if rotary is not None:
            tables, places = rotary
            rotary = tables, tuple(place[..., :CORNER_ROWS] for place in places)
        return (x[:, :CORNER_ROWS], text, temb, None, text_mask, rotary), kwargs

    def fused_forward(
        self, x: Tensor, text: Tensor, temb: Tensor, mask: Tensor | None, text_mask: Tensor | None, rotary: Any
    ) -> Tensor:
        attend = partial(self._self_attention, mask=mask, rotary=rotary)
        to_text = None
        if self.attn2 is not None:
            to_text = partial(
                self.attn2, encoder_hidden_states=text, attention_mask=text_mask, image_rotary_emb=None
            )  # fmt: skip
        feed = partial(feed_forward, self.ff, fused=self.runs("linear_gelu"))
        return self.run_block(x, self.modulations(temb), None, attend, to_text, feed)

    def _self_attention(self, x: Tensor, mask: Tensor | None, rotary: Rotary | None) -> Tensor:
        attn = self.attn1
        if reason := self._self_attention_reason(mask):
            note("spatial_attention", REFERENCE, reason)
            out: Tensor = attn(x, encoder_hidden_states=None, attention_mask=mask, image_rotary_emb=rotary)
            return out
        query, key = (_turned(project_in(x), attn.heads, rotary) for project_in in (attn.to_q, attn.to_k))
        return project(attn, over_heads(spatial_attention, query, key, attn.to_v(x), attn.heads))

    def _self_attention_reason(self, mask: Tensor | None) -> str | None:
        """Why self-attention has to be called, or None."""
        if not self.runs("spatial_attention"):
            return "it is off, or failed"
        if mask is not None:
            return "its attention is masked"
        return plain_attention_reason(self.attn1, AllegroAttnProcessor2_0)


def _turned(x: Tensor, num_heads: int, rotary: Rotary | None) -> Tensor:
    """Rows ``[B, S, H*D]``."""
    if rotary is None:
        return x
    tables, places = rotary
    heads = x.unflatten(2, (num_heads, -1)).transpose(1, 2)
    own_places = [own_tokens(place, 1) for place in places]
    return apply_rotary_emb_allegro(heads, tables, own_places).transpose(1, 2).flatten(2)
