"""diffusers' ``models/resnet.py``: the spatial and temporal ResNet blocks, the blend between them, temporal layers.

Activations stay channels-last: a ``[B*F, C, H, W]`` tensor with channels_last strides and the ``[B, C, F, H, W]``
tensor with channels_last_3d strides are the same memory, so the permutes of the stock code become views.

PyTorch adds a cuDNN convolution's bias in a kernel of its own. Here the bias of a convolution with a norm behind it
joins the time embedding, which the norm adds as it reads; that of the last, and that of the convolution on the
residual, join the sum (``conv_epilogue``), or are added by the convolution's own kernel where that is faster
(``temporal_conv``).

Where a skip connection joins, a fused up-block hands over the two tensors instead of their concatenation, as
:class:`Joined`. The norm reads both, and so does the 1x1 convolution on the residual, as two matrix products. Fidelity:
math-exact, for the first product is rounded before the second is added.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.resnet import (
    AlphaBlender,
    ResnetBlock2D,
    SpatioTemporalResBlock,
    TemporalConvLayer,
    TemporalResnetBlock,
)
from torch import Tensor, nn

from vidaccel.blocks.unet.normalization import as_clip, as_frames, compile_group_norm_ahead, group_norm_module
from vidaccel.kernels.conv.alpha_blend import alpha_blend
from vidaccel.kernels.conv.conv_epilogue import compile_ahead, conv_epilogue
from vidaccel.kernels.conv.temporal_conv import temporal_conv
from vidaccel.kernels.dispatch import runs_triton
from vidaccel.sites.parameters import why_not_bypassed, why_unreadable
from vidaccel.sites.site import FusedBlock, fuses

__all__ = [
    "FusedAlphaBlender",
    "FusedResnetBlock2D",
    "FusedSpatioTemporalResBlock",
    "FusedTemporalConvLayer",
    "FusedTemporalResnetBlock",
    "Joined",
]

Convolution = nn.Conv2d | nn.Conv3d


class Joined(NamedTuple):
    """``torch.cat([x, skip], dim=1)`` that was not made; a ResNet block takes it that has no reason not to."""

    x: Tensor
    skip: Tensor


def _apart(x: Tensor | Joined) -> tuple[Tensor, Tensor | None]:
    return x if isinstance(x, Joined) else (x, None)


def _joined(x: Tensor, skip: Tensor | None) -> Tensor | Joined:
    return x if skip is None else Joined(x, skip)


class _ConvolutionBlock(FusedBlock):
    """What the blocks share that are made of GroupNorm, SiLU and convolution, in this order."""

    def _why_norms_unreadable(self, x: Tensor, *norms: nn.Module) -> str | None:
        if not self._vidaccel.enabled("group_norm_silu"):
            return None
        return next(filter(None, (why_unreadable(norm, nn.GroupNorm, x) for norm in norms)), None)

    def _norm_silu(
        self, norm: nn.GroupNorm, x: Tensor, shift: Tensor | None = None, skip: Tensor | None = None
    ) -> Tensor:
        """``silu(norm(x + shift))``; with a ``skip`` connection, which the fused norm alone takes, of both joined."""
        if self._vidaccel.enabled("group_norm_silu"):
            return group_norm_module(norm, x, silu=True, shift=shift, tail=skip)
        if shift is not None:
            x = x + shift.mT.unflatten(2, (-1, *(1 for _ in x.shape[3:])))  # [N, C, T, 1, ...]
        return F.silu(norm(x))

    def _compile_norms_ahead(self, first: Any, *inner: Any) -> None:
        """For the norms of a chain; to all but the first, at least a convolution's bias is added on its way."""
        if self._vidaccel.enabled("group_norm_silu"):
            compile_group_norm_ahead(first)
            for norm in inner:
                compile_group_norm_ahead(norm, shift=True)

    def _compile_sum_ahead(self, conv: Any, shortcut: Any = None) -> None:
        """For the sum behind the last convolution of a block, if its parameters are plain ones."""
        if self._vidaccel.enabled("conv_epilogue") and type(getattr(conv, "weight", None)) is nn.Parameter:
            compile_ahead(conv.weight, residual_bias=shortcut is not None)

    def _convolve_to_norm(self, conv: Any, x: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """``conv(x)`` and what the norm behind it is to add to that: `shift`, and perhaps the bias instead of here."""
        if not self._splits_bias(conv, x) or not self._vidaccel.enabled("group_norm_silu"):
            return conv(x), shift
        bias = conv.bias.to(x.dtype)
        return _without_bias(conv, x), bias.expand(x.shape[0], 1, -1) if shift is None else shift + bias

    def _convolve_to_residual(
        self,
        conv: Any,
        x: Tensor,
        residual: Tensor,
        shortcut: Any = None,
        skip: Tensor | None = None,
        **epilogue: Any,
    ) -> Tensor:
        """``shortcut(residual) + conv(x)``; ``epilogue`` is what ``conv_epilogue`` takes for a blend.

        With a ``skip`` connection, both convolutions have to be such that :meth:`_splits_bias`.
        """
        if not self._splits_bias(conv, x):
            return (residual if shortcut is None else shortcut(residual)) + conv(x)
        if shortcut is None and self._vidaccel.enabled("temporal_conv") and _is_temporal(conv):
            return temporal_conv(x, conv.weight, conv.bias, residual, **epilogue)
        if shortcut is not None and self._splits_bias(shortcut, residual):
            epilogue["residual_bias"] = shortcut.bias
            residual = _without_bias(shortcut, residual) if skip is None else _project(shortcut, residual, skip)
        elif shortcut is not None:
            residual = shortcut(residual)
        x = _without_bias(conv, x)
        return conv_epilogue(x, conv.bias, residual, inplace=True, **epilogue)

    def _splits_bias(self, conv: Convolution, x: Tensor) -> bool:
        """Whether to run ``conv`` without its bias: only where a kernel then adds it on its way."""
        if not self._vidaccel.enabled("conv_epilogue") or not runs_triton("conv_epilogue", x):
            return False
        return why_unreadable(conv, nn.Conv2d if x.ndim == 4 else nn.Conv3d, x) is None


def _is_temporal(conv: Convolution) -> bool:
    """Whether it is a plain (3, 1, 1) convolution that keeps the number of frames."""
    geometry = (conv.kernel_size, conv.padding, conv.stride, conv.dilation, conv.groups, conv.padding_mode)
    return geometry == ((3, 1, 1), (1, 0, 0), (1, 1, 1), (1, 1, 1), 1, "zeros")


def _is_pointwise(conv: Convolution) -> bool:
    """Whether it is a plain 1x1 convolution."""
    return (conv.kernel_size, conv.padding, conv.stride, conv.groups) == ((1, 1), (0, 0), (1, 1), 1)


def _without_bias(conv: Convolution, x: Tensor) -> Tensor:
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return conv._conv_forward(x, conv.weight, None)
    convolution = F.conv2d if x.ndim == 4 else F.conv3d
    return convolution(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)


def _project(pointwise: nn.Conv2d, x: Tensor, skip: Tensor) -> Tensor:
    """``pointwise`` without its bias, of the two joined: a matrix product of each, with its columns of the weight."""
    for_x, for_skip = pointwise.weight.flatten(1).split([x.shape[1], skip.shape[1]], dim=1)  # views
    rows = F.linear(_rows(x), for_x)
    rows.addmm_(_rows(skip), for_skip.t())
    samples, _, *image = x.shape
    return rows.unflatten(0, (samples, *image)).permute(0, 3, 1, 2)


def _rows(image: Tensor) -> Tensor:
    """``[N, C, H, W]`` as ``[N*H*W, C]``: a view of a channels-last image."""
    return image.permute(0, 2, 3, 1).flatten(0, 2)


class _ResnetBlock(_ConvolutionBlock):
    """What the two kinds of ResNet block share; ``time_embedding`` is ``[N, T, C]``, a row for each of T frames."""

    norm1: Any
    norm2: Any
    conv1: Any
    conv2: Any
    dropout: Any
    conv_shortcut: Any

    def why_unserved(self, input_tensor: Tensor, temb: Tensor | None) -> str | None:
        return self._why_norms_unreadable(input_tensor, self.norm1, self.norm2)

    def compile_ahead(self) -> None:
        self._compile_norms_ahead(self.norm1, self.norm2)
        self._compile_sum_ahead(self.conv2, self.conv_shortcut)

    def residual_branch(
        self, x: Tensor, time_embedding: Tensor | None, skip: Tensor | None = None, **epilogue: Any
    ) -> Tensor:
        """The whole block, up to and with the sum; ``epilogue`` is what ``conv_epilogue`` takes for a blend."""
        hidden_states = self._norm_silu(self.norm1, x, skip=skip)
        hidden_states, shift = self._convolve_to_norm(self.conv1, hidden_states, time_embedding)
        hidden_states = self.dropout(self._norm_silu(self.norm2, hidden_states, shift))
        return self._convolve_to_residual(self.conv2, hidden_states, x, self.conv_shortcut, skip, **epilogue)


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

    def why_concatenated(self, skip: Tensor) -> str | None:
        """Why this block has to get ``skip`` concatenated with its input, or None if :class:`Joined` will do."""
        if self._vidaccel.broken:
            return "its ResNet block is back to the original code"
        if reason := why_not_bypassed(self, ResnetBlock2D) or self.why_unserved(skip, None):
            return reason
        for conv in (self.conv2, self.conv_shortcut):
            if not self._splits_bias(conv, skip):
                return why_unreadable(conv, nn.Conv2d, skip) or "the convolutions of its ResNet block add their biases"
        if not self._vidaccel.enabled("group_norm_silu"):
            return "the first norm of its ResNet block is not fused"
        return None if _is_pointwise(self.conv_shortcut) else "the convolution on its residual is not a 1x1 one"

    def forward(self, input_tensor: Tensor | Joined, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x, skip = _apart(input_tensor)
        return self.guarded(x, temb, *args, skip=skip, **kwargs)

    def original_forward(self, input_tensor: Tensor, *args: Any, skip: Tensor | None, **kwargs: Any) -> Tensor:
        joined = input_tensor if skip is None else torch.cat([input_tensor, skip], dim=1)
        return super().original_forward(joined, *args, **kwargs)

    def why_unserved(
        self, input_tensor: Tensor, temb: Tensor | None, *args: Any, skip: Tensor | None = None, **kwargs: Any
    ) -> str | None:
        if args or kwargs:
            return "deprecated arguments beyond the time embedding were passed"
        return super().why_unserved(input_tensor, temb)

    def fused_forward(self, input_tensor: Tensor, temb: Tensor | None, skip: Tensor | None) -> Tensor:
        time_embedding = None
        if temb is not None and self.time_emb_proj is not None:
            temb = temb if self.skip_time_act else self.nonlinearity(temb)
            time_embedding = self.time_emb_proj(temb)[:, None, :]
        hidden_states = self.residual_branch(input_tensor, time_embedding, skip)
        if self.output_scale_factor == 1.0 and self._vidaccel.enabled("unit_division"):
            return hidden_states
        return hidden_states / self.output_scale_factor


@fuses(
    TemporalResnetBlock,
    {"group_norm_silu": "math-exact", "conv_epilogue": "math-exact", "temporal_conv": "math-exact"},
)
class FusedTemporalResnetBlock(_ResnetBlock, TemporalResnetBlock):
    """The same over ``[B, C, F, H, W]``: statistics run over all frames, the time embedding has a row for each."""

    def forward(self, input_tensor: Tensor, temb: Tensor) -> Tensor:
        return self.guarded(input_tensor, temb)

    def fused_forward(self, input_tensor: Tensor, temb: Tensor | None, **epilogue: Any) -> Tensor:
        time_embedding = None if self.time_emb_proj is None else self.time_emb_proj(self.nonlinearity(temb))
        return self.residual_branch(input_tensor, time_embedding, **epilogue)

    def compile_ahead(self) -> None:  # the sum is its parent's
        self._compile_norms_ahead(self.norm1, self.norm2)

    def takes_blend(self, x: Tensor) -> bool:
        """Whether the last kernel of this block can take a blend with its input on its way."""
        return self.serves_parent(x, None) and self._splits_bias(self.conv2, x)


@fuses(
    TemporalConvLayer,
    {
        "group_norm_silu": "math-exact",
        "conv_epilogue": "math-exact",
        "temporal_conv": "math-exact",
        "channels_last": "math-exact",
    },
)
class FusedTemporalConvLayer(_ConvolutionBlock, TemporalConvLayer):
    """ModelScope's and I2VGenXL's four (3, 1, 1) convolutions with a norm and SiLU before each, and the residual.

    Stock code permutes ``[B*F, C, H, W]`` to ``[B, C, F, H, W]`` and back; of channels-last memory both are views.
    """

    def forward(self, hidden_states: Tensor, num_frames: int = 1) -> Tensor:
        return self.guarded(hidden_states, num_frames)

    def why_unserved(self, hidden_states: Tensor, num_frames: int) -> str | None:
        for stage in self._stages():
            if reason := why_not_bypassed(stage, nn.Sequential) or why_not_bypassed(stage[1], nn.SiLU):
                return reason
        return self._why_norms_unreadable(hidden_states, *(stage[0] for stage in self._stages()))

    def fused_forward(self, hidden_states: Tensor, num_frames: int) -> Tensor:
        clip = as_clip(hidden_states, num_frames)
        *inner, last = self._stages()
        x, shift = clip, None
        for stage in inner:
            x, shift = self._convolve_to_norm(stage[-1], self._normalise(stage, x, shift))
        return as_frames(self._convolve_to_residual(last[-1], self._normalise(last, x, shift), clip))

    def compile_ahead(self) -> None:
        self._compile_norms_ahead(*(stage[0] for stage in self._stages()))
        self._compile_sum_ahead(self.conv4[-1])

    def _stages(self) -> tuple[Any, ...]:
        """Each GroupNorm, SiLU, dropout (but in the first) and convolution."""
        return self.conv1, self.conv2, self.conv3, self.conv4

    def _normalise(self, stage: Any, x: Tensor, shift: Tensor | None) -> Tensor:
        """What the convolution of a stage gets for ``x + shift``."""
        norm, _, *dropout, _ = stage
        x = self._norm_silu(norm, x, shift)
        for layer in dropout:
            x = layer(x)
        return x


@fuses(SpatioTemporalResBlock, {"conv_epilogue": "math-exact"})
class FusedSpatioTemporalResBlock(FusedBlock, SpatioTemporalResBlock):
    """The temporal block's last kernel (bias, residual) also blends its result with the spatial block's.

    Its own input goes to the spatial block only, and so does a ``skip`` connection beside it.
    """

    @classmethod
    def why_left_alone(cls, module: nn.Module) -> str | None:
        assert isinstance(module, SpatioTemporalResBlock)
        if module.time_mixer.merge_strategy == "fixed":
            return "its blend factor is fixed"
        return None if module.temporal_res_block.conv_shortcut is None else "its temporal block changes the width"

    def compile_ahead(self) -> None:
        conv, mixer = self.temporal_res_block.conv2, self.time_mixer
        if type(getattr(conv, "weight", None)) is nn.Parameter:
            images = mixer.merge_strategy == "learned_with_images"
            second = mixer.switch_spatial_to_temporal_mix
            compile_ahead(conv.weight, mix=True, image_only=images, spatial_is_second=second)

    def forward(
        self, hidden_states: Tensor | Joined, temb: Tensor | None = None, image_only_indicator: Tensor | None = None
    ) -> Tensor:
        x, skip = _apart(hidden_states)
        return self.guarded(x, temb, image_only_indicator, skip=skip)

    def original_forward(self, x: Tensor, *args: Any, skip: Tensor | None) -> Tensor:
        return super().original_forward(_joined(x, skip), *args)

    def why_unserved(
        self, x: Tensor, temb: Tensor | None, image_only_indicator: Tensor | None, skip: Tensor | None
    ) -> str | None:
        return "no image_only_indicator was passed" if image_only_indicator is None else None

    def fused_forward(
        self, x: Tensor, temb: Tensor | None, image_only_indicator: Tensor, skip: Tensor | None
    ) -> Tensor:
        hidden_states = self.spatial_res_block(_joined(x, skip), temb)
        num_frames = image_only_indicator.shape[-1]
        temb = None if temb is None else temb.unflatten(0, (-1, num_frames))
        return as_frames(self._temporal_blend(as_clip(hidden_states, num_frames), temb, image_only_indicator))

    def _temporal_blend(self, spatial: Tensor, temb: Tensor | None, image_only_indicator: Tensor) -> Tensor:
        temporal, mixer = self.temporal_res_block, self.time_mixer
        if not (isinstance(temporal, FusedTemporalResnetBlock) and temporal.takes_blend(spatial)):
            return mixer(spatial, temporal(spatial, temb), image_only_indicator)
        indicator = image_only_indicator if mixer.merge_strategy == "learned_with_images" else None
        return temporal.run_part(
            temporal.fused_forward,
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

    def fused_forward(
        self,
        x_spatial: Tensor,
        x_temporal: Tensor,
        image_only_indicator: Tensor | None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """``residual``, what the temporal branch still lacks, comes from a fused parent only."""
        return alpha_blend(
            x_spatial,
            x_temporal,
            self.mix_factor,
            image_only_indicator if self.merge_strategy == "learned_with_images" else None,
            residual=residual,
            spatial_is_second=self.switch_spatial_to_temporal_mix,
        )
