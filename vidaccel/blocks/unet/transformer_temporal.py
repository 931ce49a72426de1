"""diffusers' ``models/transformers/transformer_temporal.py``: transformers over frames, kept channels-last.

``TransformerSpatioTemporalModel`` is SVD's, ``TransformerTemporalModel`` that of ModelScope and I2VGenXL.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import TemporalBasicTransformerBlock
from diffusers.models.transformers.transformer_temporal import (
    TransformerSpatioTemporalModel,
    TransformerTemporalModel,
    TransformerTemporalModelOutput,
)
from torch import Tensor

from vidaccel.blocks.unet.attention import (
    FusedBasicTransformerBlock,
    FusedTemporalBasicTransformerBlock,
    TemporalSelfAttention,
)
from vidaccel.blocks.unet.frames import by_pixels, whole_clip
from vidaccel.blocks.unet.normalization import FusedGroupNorm, as_clip, norm_and_residual
from vidaccel.blocks.unet.resnet import FusedAlphaBlender
from vidaccel.blocks.unet.transformer_2d import adds_in_product
from vidaccel.kernels.conv.alpha_blend import compile_ahead as compile_blend_ahead
from vidaccel.kernels.ffn.residual_projection import residual_projection
from vidaccel.parallel.layout import frames
from vidaccel.sites.block import FusedBlock, call_site, fuses, run_part
from vidaccel.sites.plain import plain_reason
from vidaccel.sites.site import Fidelity

__all__ = [
    "FRAME_TRANSFORMER_OPS",
    "FrameTransformer",
    "FusedTransformerSpatioTemporalModel",
    "FusedTransformerTemporalModel",
]


FRAME_TRANSFORMER_OPS: dict[str, Fidelity] = {
    "temporal_attention": "math-exact",
    "add_layer_norm": "math-exact",
    "channels_last": "math-exact",
    "qkv_projection": "math-exact",
    "residual_projection": "math-exact",
}


@fuses(
    TransformerSpatioTemporalModel,
    {"channels_last": "math-exact", "residual_projection": "math-exact"},
)
class FusedTransformerSpatioTemporalModel(FusedBlock, TransformerSpatioTemporalModel):
    """Image to rows and back as views, the context once per clip instead of once per pixel, one row per frame index.

    Stock code copies the activations into NCHW at the end and broadcasts the context to ``[B*HW, L, D]``. Where both
    blocks of a pair are fused, what one ends and the other begins with is a single pass: the spatial block's last sum,
    the frame embedding and the temporal block's first norm; likewise the temporal block's last sum and the blend.
    """

    def compile_ahead(self) -> None:
        mixer = self.time_mixer
        if isinstance(mixer, FusedAlphaBlender):
            images, second = mixer.merge_strategy == "learned_with_images", mixer.switch_spatial_to_temporal_mix
            compile_blend_ahead(mixer.mix_factor, image_only=images, residual=True, spatial_is_second=second)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        image_only_indicator: Tensor | None = None,
        return_dict: bool = True,
    ) -> TransformerTemporalModelOutput | tuple[Tensor]:
        sample = call_site(
            FusedTransformerSpatioTemporalModel, self, hidden_states, encoder_hidden_states, image_only_indicator
        )
        return TransformerTemporalModelOutput(sample=sample) if return_dict else (sample,)

    @classmethod
    def original_forward(
        cls, host: Any, hidden_states: Tensor, context: Tensor, image_only_indicator: Tensor
    ) -> Tensor:
        (sample,) = whole_clip(
            TransformerSpatioTemporalModel, host, hidden_states, context, image_only_indicator, return_dict=False
        )
        return sample

    def call_reason(self, hidden_states: Tensor, context: Tensor | None, *args: Any) -> str | None:
        if context is None:
            return "no context was passed"
        return "the contexts are not as many as the images" if context.shape[0] != hidden_states.shape[0] else None

    def fused_forward(self, hidden_states: Tensor, context: Tensor, image_only_indicator: Tensor) -> Tensor:
        num_frames = image_only_indicator.shape[-1]
        height = hidden_states.shape[2]
        residual = hidden_states
        both = None
        if self.runs("residual_projection") and adds_in_product(self.proj_out, hidden_states):
            both = norm_and_residual(self.norm, hidden_states, self.proj_out.bias)
        normed, with_bias = both or (self.norm(hidden_states), None)
        hidden_states = self.proj_in(normed.permute(0, 2, 3, 1).flatten(1, 2))  # [B*F, HW, C]
        frame_embedding = self._frame_embedding(num_frames, hidden_states)
        first_frame_context = context.unflatten(0, (-1, num_frames))[:, 0]  # [B, L, D]
        for block, temporal_block in zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True):
            blocks: tuple[Any, ...] = (block, temporal_block, hidden_states, context, first_frame_context, num_frames)
            run: Any = self._run_as_one if self._are_served(*blocks) else self._run_in_turn
            spatial, temporal, addend = run(*blocks, frame_embedding)
            hidden_states = self._mix(spatial, temporal, addend, image_only_indicator)
        if with_bias is not None:
            addend = with_bias.permute(0, 2, 3, 1).flatten(1, 2)
            hidden_states = residual_projection(hidden_states, self.proj_out.weight, addend)
            return hidden_states.unflatten(1, (height, -1)).permute(0, 3, 1, 2)
        hidden_states = self.proj_out(hidden_states).unflatten(1, (height, -1))
        return hidden_states.permute(0, 3, 1, 2) + residual

    def _are_served(
        self, block: Any, temporal_block: Any, hidden_states: Tensor, context: Tensor, time_context: Tensor, frames: int
    ) -> bool:
        """Whether both blocks are fused, and serve this call."""
        return (
            isinstance(block, FusedBasicTransformerBlock)
            and isinstance(temporal_block, FusedTemporalBasicTransformerBlock)
            and block.serves_parent(*_block_arguments(hidden_states, context))
            and temporal_block.serves_parent(hidden_states, frames, time_context)
        )

    def _run_as_one(
        self,
        block: FusedBasicTransformerBlock,
        temporal_block: FusedTemporalBasicTransformerBlock,
        hidden_states: Tensor,
        context: Tensor,
        time_context: Tensor,
        num_frames: int,
        frame_embedding: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The spatial block's result, and the two addends of the temporal block's."""
        addends = run_part(block, block.last_addends, *_block_arguments(hidden_states, context))
        return run_part(temporal_block, temporal_block.last_addends, addends, frame_embedding, num_frames, time_context)

    def _run_in_turn(
        self,
        block: Any,
        temporal_block: Any,
        hidden_states: Tensor,
        context: Tensor,
        time_context: Tensor,
        num_frames: int,
        frame_embedding: Tensor,
    ) -> tuple[Tensor, Tensor, None]:
        """The spatial block's result and the temporal block's."""
        hidden_states = block(hidden_states, encoder_hidden_states=context)
        fused = isinstance(temporal_block, FusedTemporalBasicTransformerBlock)
        if not fused or plain_reason(temporal_block, TemporalBasicTransformerBlock):
            time_context = time_context.repeat_interleave(hidden_states.shape[1], dim=0)
        mixed = temporal_block(
            hidden_states + frame_embedding, num_frames=num_frames, encoder_hidden_states=time_context
        )
        return hidden_states, mixed, None

    def _mix(self, spatial: Tensor, temporal: Tensor, addend: Tensor | None, image_only_indicator: Tensor) -> Tensor:
        """The blend of ``spatial`` with ``temporal + addend``."""
        mixer = self.time_mixer
        if isinstance(mixer, FusedAlphaBlender) and mixer.serves_parent(spatial, temporal, image_only_indicator):
            return run_part(mixer, mixer.fused_forward, spatial, temporal, image_only_indicator, addend)
        temporal = temporal if addend is None else temporal + addend
        return mixer(x_spatial=spatial, x_temporal=temporal, image_only_indicator=image_only_indicator)

    def _frame_embedding(self, num_frames: int, like: Tensor) -> Tensor:
        """``[B*F, 1, C]``: the embedding of each frame's index."""
        over = frames()
        first = 0 if over is None else over.own.start
        indices = torch.arange(first, first + num_frames, device=like.device).repeat(like.shape[0] // num_frames)
        return self.time_pos_embed(self.time_proj(indices).to(like.dtype))[:, None]


def _block_arguments(hidden_states: Tensor, context: Tensor) -> tuple[Any, ...]:
    """All of BasicTransformerBlock's, in order."""
    return hidden_states, None, context, None, None, None, None, None


class FrameTransformer(TemporalSelfAttention):
    """What ModelScope's and AnimateDiff's transformers over frames share: GroupNorm over a clip, blocks, residual.

    Stock code copies the image into ``[B*HW, F, C]`` for its blocks, and back.
    """

    norm: Any
    proj_in: Any
    proj_out: Any

    def call_reason(self, hidden_states: Tensor, *args: Any) -> str | None:
        if frames() is not None and not isinstance(self.norm, FusedGroupNorm):
            return "its norm is not fused, and takes all frames of the clip"
        return super().call_reason(hidden_states, *args)

    def fused_forward(
        self,
        hidden_states: Tensor,
        context: None,
        timestep: Tensor | None,
        class_labels: Tensor | None,
        num_frames: int,
        attention_kwargs: dict[str, Any] | None,
    ) -> Tensor:
        height = hidden_states.shape[2]
        clip = as_clip(hidden_states, num_frames)
        both = None
        if self.runs("residual_projection") and adds_in_product(self.proj_out, clip):
            both = norm_and_residual(self.norm, clip, self.proj_out.bias)
        normed, with_bias = both or (self.norm(clip), None)
        rows = by_pixels(self.run_blocks, self.proj_in(_frame_rows(normed)), num_frames)
        if with_bias is not None:
            rows = residual_projection(rows, self.proj_out.weight.flatten(1), _frame_rows(with_bias))
            return rows.unflatten(1, (height, -1)).permute(0, 3, 1, 2)
        return self.proj_out(rows).unflatten(1, (height, -1)).permute(0, 3, 1, 2) + hidden_states


def _frame_rows(clip: Tensor) -> Tensor:
    """``[B, C, F, H, W]`` as ``[B*F, HW, C]``: a view of a channels-last clip."""
    return clip.permute(0, 2, 3, 4, 1).flatten(2, 3).flatten(0, 1)


# its bases in diffusers disagree about the type of config_name, which mypy minds
@fuses(TransformerTemporalModel, FRAME_TRANSFORMER_OPS)
class FusedTransformerTemporalModel(FrameTransformer, TransformerTemporalModel):  # type: ignore[misc]
    """The temporal transformer of ModelScope and I2VGenXL, and the one after their first convolution."""

    def forward(  # type: ignore[override]  # stock code returns tuples too, whatever it is annotated with
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: torch.LongTensor | None = None,
        class_labels: torch.LongTensor | None = None,
        num_frames: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> TransformerTemporalModelOutput | tuple[Tensor]:
        sample = call_site(
            FusedTransformerTemporalModel,
            self,
            hidden_states,
            encoder_hidden_states,
            timestep,
            class_labels,
            num_frames,
            cross_attention_kwargs,
        )
        return TransformerTemporalModelOutput(sample=sample) if return_dict else (sample,)

    @classmethod
    def original_forward(cls, host: Any, *args: Any) -> Tensor:
        (sample,) = whole_clip(TransformerTemporalModel, host, *args, return_dict=False)
        return sample
