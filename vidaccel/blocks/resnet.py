"""diffusers' ``models/resnet.py``: the spatial and temporal ResNet blocks and the blend between them.

Activations stay channels-last: a ``[B*F, C, H, W]`` tensor with channels_last strides and the ``[B, C, F, H, W]``
tensor with channels_last_3d strides are the same memory, so the permutes of the stock code become views.

PyTorch adds a cuDNN convolution's bias in a kernel of its own. Here the first convolution's bias joins the time
embedding, which the second norm adds as it reads; the second convolution's, and that of the convolution on the
residual, join the sum (``conv_epilogue``).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from diffusers.models.resnet import AlphaBlender, ResnetBlock2D, SpatioTemporalResBlock, TemporalResnetBlock
from torch import Tensor, nn

from vidaccel.blocks.normalization import group_norm_module
from vidaccel.blocks.parameters import why_unreadable
from vidaccel.blocks.site import FusedBlock, fuses
from vidaccel.kernels.alpha_blend import alpha_blend
from vidaccel.kernels.conv_epilogue import conv_epilogue
from vidaccel.kernels.dispatch import runs_triton

__all__ = ["FusedAlphaBlender", "FusedResnetBlock2D", "FusedSpatioTemporalResBlock", "FusedTemporalResnetBlock"]

Convolution = nn.Conv2d | nn.Conv3d


class _ResnetBlock(FusedBlock):
    """What the two kinds of ResNet block share; ``time_embedding`` is ``[N, T, C]``, a row for each of T frames."""

    norm1: Any
    norm2: Any
    conv1: Any
    conv2: Any
    dropout: Any
    conv_shortcut: Any

    def why_unserved(self, input_tensor: Tensor, temb: Tensor | None) -> str | None:
        if not self._vidaccel.enabled("group_norm_silu"):
            return None
        return why_unreadable(self.norm1, nn.GroupNorm, input_tensor) or why_unreadable(
            self.norm2, nn.GroupNorm, input_tensor
        )

    def residual_branch(self, x: Tensor, time_embedding: Tensor | None, **epilogue: Any) -> Tensor:
        """The whole block, up to and with the sum; ``epilogue`` is what ``conv_epilogue`` takes for a blend."""
        hidden_states = self._norm_silu(self.norm1, x)
        if self._splits_bias(self.conv1, hidden_states) and self._vidaccel.enabled("group_norm_silu"):
            bias = self.conv1.bias.to(x.dtype)
            hidden_states = _without_bias(self.conv1, hidden_states)
            shift = bias.expand(x.shape[0], 1, -1) if time_embedding is None else time_embedding + bias
        else:
            hidden_states, shift = self.conv1(hidden_states), time_embedding
        hidden_states = self.dropout(self._norm_silu(self.norm2, hidden_states, shift))
        if not self._splits_bias(self.conv2, hidden_states):
            return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + self.conv2(hidden_states)
        if self.conv_shortcut is not None and self._splits_bias(self.conv_shortcut, x):
            epilogue["residual_bias"] = self.conv_shortcut.bias
            x = _without_bias(self.conv_shortcut, x)
        elif self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        hidden_states = _without_bias(self.conv2, hidden_states)
        return conv_epilogue(hidden_states, self.conv2.bias, x, inplace=True, **epilogue)

    def _norm_silu(self, norm: nn.GroupNorm, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """``silu(norm(x + shift))``."""
        if self._vidaccel.enabled("group_norm_silu"):
            return group_norm_module(norm, x, silu=True, shift=shift)
        if shift is not None:
            x = x + shift.mT.unflatten(2, (-1, *(1 for _ in x.shape[3:])))  # [N, C, T, 1, ...]
        return F.silu(norm(x))

    def _splits_bias(self, conv: Convolution, x: Tensor) -> bool:
        """Whether to run ``conv`` without its bias: only where a kernel then adds it on its way."""
        if not self._vidaccel.enabled("conv_epilogue") or not runs_triton("conv_epilogue", x):
            return False
        return why_unreadable(conv, nn.Conv2d if x.ndim == 4 else nn.Conv3d, x) is None


def _without_bias(conv: Convolution, x: Tensor) -> Tensor:
    return conv._conv_forward(x, conv.weight, None)


@fuses(ResnetBlock2D, {"group_norm_silu": "math-exact", "conv_epilogue": "math-exact", "unit_division": "bit-exact"})
class FusedResnetBlock2D(_ResnetBlock, ResnetBlock2D):
    """Norm, SiLU and the adds before them in one kernel, bias and residual in another, no division by 1.0."""

    @classmethod
    def why_left_alone(cls, module: nn.Module) -> str | None:
        assert isinstance(module, ResnetBlock2D)
        if module.upsample is not None or module.downsample is not None:
            return "it resamples inside the block"
        if module.time_embedding_norm not in ("default", "group"):  # "group": the image VAE's decoder, which has none
            return f"its time embedding is of the kind {module.time_embedding_norm!r}"
        return None if isinstance(module.nonlinearity, nn.SiLU) else "its activation is not SiLU"

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.guarded(input_tensor, temb, *args, **kwargs)

    def why_unserved(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> str | None:
        if args or kwargs:
            return "deprecated arguments beyond the time embedding were passed"
        return super().why_unserved(input_tensor, temb)

    def fused_forward(self, input_tensor: Tensor, temb: Tensor | None) -> Tensor:
        time_embedding = None
        if temb is not None and self.time_emb_proj is not None:
            temb = temb if self.skip_time_act else self.nonlinearity(temb)
            time_embedding = self.time_emb_proj(temb)[:, None, :]
        hidden_states = self.residual_branch(input_tensor, time_embedding)
        if self.output_scale_factor == 1.0 and self._vidaccel.enabled("unit_division"):
            return hidden_states
        return hidden_states / self.output_scale_factor


@fuses(TemporalResnetBlock, {"group_norm_silu": "math-exact", "conv_epilogue": "math-exact"})
class FusedTemporalResnetBlock(_ResnetBlock, TemporalResnetBlock):
    """The same over ``[B, C, F, H, W]``: statistics run over all frames, the time embedding has a row for each."""

    def forward(self, input_tensor: Tensor, temb: Tensor) -> Tensor:
        return self.guarded(input_tensor, temb)

    def fused_forward(self, input_tensor: Tensor, temb: Tensor | None, **epilogue: Any) -> Tensor:
        time_embedding = None if self.time_emb_proj is None else self.time_emb_proj(self.nonlinearity(temb))
        return self.residual_branch(input_tensor, time_embedding, **epilogue)

    def takes_blend(self, x: Tensor) -> bool:
        """Whether the last kernel of this block can take a blend with its input on its way."""
        state = self._vidaccel
        return not state.broken and self._splits_bias(self.conv2, x) and self.why_unserved(x, None) is None


@fuses(SpatioTemporalResBlock, {"conv_epilogue": "math-exact"})
class FusedSpatioTemporalResBlock(FusedBlock, SpatioTemporalResBlock):
    """The temporal block's last kernel (bias, residual) also blends its result with the spatial block's."""

    @classmethod
    def why_left_alone(cls, module: nn.Module) -> str | None:
        assert isinstance(module, SpatioTemporalResBlock)
        if module.time_mixer.merge_strategy == "fixed":
            return "its blend factor is fixed"
        return None if module.temporal_res_block.conv_shortcut is None else "its temporal block changes the width"

    def forward(
        self, hidden_states: Tensor, temb: Tensor | None = None, image_only_indicator: Tensor | None = None
    ) -> Tensor:
        return self.guarded(hidden_states, temb, image_only_indicator)

    def why_unserved(
        self, hidden_states: Tensor, temb: Tensor | None, image_only_indicator: Tensor | None
    ) -> str | None:
        return "no image_only_indicator was passed" if image_only_indicator is None else None

    def fused_forward(self, hidden_states: Tensor, temb: Tensor | None, image_only_indicator: Tensor) -> Tensor:
        hidden_states = self.spatial_res_block(hidden_states, temb)
        clip_shape = (-1, image_only_indicator.shape[-1])
        spatial = hidden_states.unflatten(0, clip_shape).transpose(1, 2)  # [B, C, F, H, W]
        temb = None if temb is None else temb.unflatten(0, clip_shape)
        blended = self._temporal_blend(spatial, temb, image_only_indicator)
        return blended.transpose(1, 2).flatten(0, 1)

    def _temporal_blend(self, spatial: Tensor, temb: Tensor | None, image_only_indicator: Tensor) -> Tensor:
        temporal, mixer = self.temporal_res_block, self.time_mixer
        if not (isinstance(temporal, FusedTemporalResnetBlock) and temporal.takes_blend(spatial)):
            return mixer(spatial, temporal(spatial, temb), image_only_indicator)
        indicator = image_only_indicator if mixer.merge_strategy == "learned_with_images" else None
        return temporal.fused_forward(
            spatial,
            temb,
            mix_factor=mixer.mix_factor,
            image_only=indicator,
            spatial_is_second=mixer.switch_spatial_to_temporal_mix,
        )


@fuses(AlphaBlender, {"alpha_blend": "math-exact"})
class FusedAlphaBlender(FusedBlock, AlphaBlender):
    """``alpha * spatial + (1 - alpha) * temporal`` in one pass, alpha worked out inside it from its parameter."""

    mix_factor: Tensor

    @classmethod
    def why_left_alone(cls, module: nn.Module) -> str | None:
        assert isinstance(module, AlphaBlender)
        return "its blend factor is fixed" if module.merge_strategy == "fixed" else None

    def forward(self, x_spatial: Tensor, x_temporal: Tensor, image_only_indicator: Tensor | None = None) -> Tensor:
        return self.guarded(x_spatial, x_temporal, image_only_indicator)

    def why_unserved(self, x_spatial: Tensor, x_temporal: Tensor, image_only_indicator: Tensor | None) -> str | None:
        if self.mix_factor.device != x_spatial.device:
            return f"mix_factor is on {self.mix_factor.device}, its input on {x_spatial.device}"
        return None

    def fused_forward(self, x_spatial: Tensor, x_temporal: Tensor, image_only_indicator: Tensor | None) -> Tensor:
        indicator = image_only_indicator if self.merge_strategy == "learned_with_images" else None
        return alpha_blend(
            x_spatial, x_temporal, self.mix_factor, indicator, spatial_is_second=self.switch_spatial_to_temporal_mix
        )
