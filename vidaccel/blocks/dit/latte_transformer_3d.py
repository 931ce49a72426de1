"""diffusers' ``transformers/latte_transformer_3d.py``: Latte's ``BasicTransformerBlock``, of space and of time.

Blocks of the same class serve the UNets, where nothing is modulated (``blocks/unet/attention.py``).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

from vidaccel.blocks.dit.ada_norm_single import AdaNormSingleBlock, plain_attention_reason
from vidaccel.blocks.dit.attention import feed_forward, project
from vidaccel.blocks.dit.step_caches import known_to_step_caches
from vidaccel.kernels.attention.spatial_attention import spatial_attention
from vidaccel.kernels.op import REFERENCE, note
from vidaccel.sites.block import CORNER, MOST_WHOLE, call_site, fuses
from vidaccel.sites.site import Fidelity

__all__ = ["LATTE_OPS", "FusedLatteTransformerBlock"]

LATTE_OPS: dict[str, Fidelity] = {
    "gated_residual_norm": "math-exact",
    "spatial_attention": "math-exact",
    "linear_gelu": "math-exact",
}


@known_to_step_caches
@fuses(BasicTransformerBlock, LATTE_OPS)
class FusedLatteTransformerBlock(AdaNormSingleBlock, BasicTransformerBlock):
    """Self-attention, cross-attention to text in a block of space, and feed-forward, on ``[B, S, C]``."""

    attn1: Any
    attn2: Any
    ff: Any

    @classmethod
    def stands_for(cls, module: Any) -> bool:
        return bool(module.norm_type == "ada_norm_single")

    @classmethod
    def left_alone_reason(cls, module: Any) -> str | None:
        if module.pos_embed is not None or module.only_cross_attention:
            return "it has a positional embedding, or attends to a text only"
        return None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        return call_site(
            FusedLatteTransformerBlock,
            self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
            cross_attention_kwargs, class_labels, added_cond_kwargs,
        )  # fmt: skip

    def call_reason(self, x: Tensor, mask: Any, text: Any, text_mask: Any, temb: Tensor, *options: Any) -> str | None:
        if x.ndim != 3:
            return "its tokens are not [B, S, C]"
        if options[0]:
            return f"its attention takes {', '.join(options[0])}"
        return "its feed-forward works in chunks" if self._chunk_size is not None else self.norms_reason(x, temb)

    def corner(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A few samples: each is one frame, or one place in all frames."""
        if args[0].numel() <= MOST_WHOLE:
            return args, kwargs
        return tuple(arg[:CORNER] if isinstance(arg, Tensor) else arg for arg in args), kwargs

    def fused_forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        text: Tensor | None,
        text_mask: Tensor | None,
        temb: Tensor,
        *options: Any,
    ) -> Tensor:
        to_text = None
        if self.attn2 is not None:
            to_text = partial(self.attn2, encoder_hidden_states=text, attention_mask=text_mask)
        feed = partial(feed_forward, self.ff, fused=self.runs("linear_gelu"))
        return self.run_block(
            x, self.modulations(temb), None, partial(self._self_attention, mask=mask), to_text, feed
        )  # fmt: skip

    def _self_attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        attn: Any = self.attn1
        reason = None if self.runs("spatial_attention") else "it is off, or failed"
        reason = reason or ("its attention is masked" if mask is not None else None)
        if reason := reason or plain_attention_reason(attn, AttnProcessor2_0):
            note("spatial_attention", REFERENCE, reason)
            out: Tensor = attn(x, encoder_hidden_states=None, attention_mask=mask)
            return out
        return project(attn, spatial_attention(attn.to_q(x), attn.to_k(x), attn.to_v(x), attn.heads))
