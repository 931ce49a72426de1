"""diffusers' ``models/transformers/transformer_2d.py``: the spatial transformer of the text-conditioned UNets.

Activations stay channels-last: image to rows and back are views, where stock code copies the activations into NCHW at
the end. A 1x1 convolution of such an image is a matrix product of its rows, bias included; cuDNN would add the bias in
a pass of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from vidaccel.blocks.unet.convolution import geometry_of
from vidaccel.blocks.unet.normalization import norm_and_residual
from vidaccel.kernels.ffn.residual_projection import residual_projection
from vidaccel.kernels.op import runs_triton
from vidaccel.sites.block import FusedBlock, call_site, fuses
from vidaccel.sites.plain import readable_reason

__all__ = ["FusedTransformer2DModel", "adds_in_product"]

_POINTWISE = (1, 1), (0, 0), (1, 1), 1, "zeros"  # of a 1x1 convolution: all that geometry_of tells but its size


@fuses(Transformer2DModel, {"channels_last": "math-exact", "residual_projection": "math-exact"})
class FusedTransformer2DModel(FusedBlock, Transformer2DModel):  # type: ignore[misc]
    """Norm, projection, blocks, projection and residual on ``[N, HW, C]``, whatever kind the two projections are."""

    @classmethod
    def left_alone_reason(cls, module: Any) -> str | None:
        return None if module.is_input_continuous else "its input is not an image of features"

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: torch.LongTensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        class_labels: torch.LongTensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        sample = call_site(
            FusedTransformer2DModel,
            self,
            hidden_states,
            encoder_hidden_states,
            timestep,
            added_cond_kwargs,
            class_labels,
            cross_attention_kwargs,
            attention_mask,
            encoder_attention_mask,
        )
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    @classmethod
    def original_forward(cls, host: Any, *args: Any) -> Tensor:
        (sample,) = Transformer2DModel.forward(host, *args, return_dict=False)
        return sample

    def call_reason(self, hidden_states: Tensor, *args: Any) -> str | None:
        *_, attention_mask, context_mask = args
        return None if attention_mask is None and context_mask is None else "an attention mask was passed"

    def fused_forward(
        self,
        hidden_states: Tensor,
        context: Any,
        timestep: torch.LongTensor | None,
        added_cond_kwargs: dict[str, Tensor] | None,
        class_labels: torch.LongTensor | None,
        cross_attention_kwargs: dict[str, Any] | None,
        *masks: None,
    ) -> Tensor:
        height = hidden_states.shape[2]
        both = None
        if self.runs("residual_projection") and adds_in_product(self.proj_out, hidden_states):
            both = norm_and_residual(self.norm, hidden_states, self.proj_out.bias)
        normed, with_bias = both or (self.norm(hidden_states), None)
        rows = self._project(self.proj_in, _rows(normed), height)
        for block in self.transformer_blocks:
            rows = block(
                rows,
                attention_mask=None,
                encoder_hidden_states=context,
                encoder_attention_mask=None,
                timestep=timestep,
                cross_attention_kwargs=cross_attention_kwargs,
                class_labels=class_labels,
            )
        if with_bias is not None:
            weight = self.proj_out.weight.flatten(1)
            return _image(residual_projection(rows, weight, _rows(with_bias)), height)
        return _image(self._project(self.proj_out, rows, height), height) + hidden_states

    def _project(self, projection: Any, rows: Tensor, height: int) -> Tensor:
        """``proj_in`` or ``proj_out`` of ``[N, HW, C]``, a Linear or a 1x1 convolution."""
        if self.use_linear_projection:
            return projection(rows)
        # LoRA, quantised, offloaded
        if readable_reason(projection, nn.Conv2d, rows) or geometry_of(projection)[1:] != _POINTWISE:
            return _rows(projection(_image(rows, height)))
        return F.linear(rows, projection.weight.flatten(1), projection.bias)


def adds_in_product(projection: Any, x: Tensor) -> bool:
    """Whether a product of ours with an addend may stand for the last ``projection`` of a transformer on ``x``."""
    if torch.compiler.is_compiling() or not runs_triton("residual_projection", x):
        return False
    kind = nn.Conv2d if isinstance(projection, nn.Conv2d) else nn.Linear
    if readable_reason(projection, kind, x) or projection.weight.dtype != x.dtype:
        return False
    return kind is nn.Linear or geometry_of(projection)[1:] == _POINTWISE


def _rows(image: Tensor) -> Tensor:
    """``[N, C, H, W]`` as ``[N, HW, C]``: a view of a channels-last image."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def _image(rows: Tensor, height: int) -> Tensor:
    """``[N, HW, C]`` as ``[N, C, H, W]`` with channels-last strides: a view."""
    return rows.unflatten(1, (height, -1)).permute(0, 3, 1, 2)
