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

from functools import partial
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

from vidaccel.blocks.pixel_rows import convolve_rows, whole_pictures
from vidaccel.blocks.unet.convolution import PLAIN_3X3, geometry_of
from vidaccel.blocks.unet.frames import convolve_frames, whole_clip
from vidaccel.blocks.unet.normalization import (
    as_clip,
    as_frames,
    compile_group_norm_ahead,
    group_norm_module,
    norms_reason,
)
from vidaccel.kernels.conv.alpha_blend import alpha_blend
from vidaccel.kernels.conv.conv_epilogue import compile_ahead, conv_epilogue, conv_epilogue_and_statistics
from vidaccel.kernels.conv.joined_projection import joined_projection
from vidaccel.kernels.conv.temporal_conv import compile_ahead as compile_temporal_conv_ahead
from vidaccel.kernels.conv.temporal_conv import temporal_conv
from vidaccel.kernels.norm.channel_statistics import ChannelStatistics
from vidaccel.kernels.op import runs_triton
from vidaccel.parallel.layout import frames, pixel_rows
from vidaccel.sites.block import FusedBlock, call_site, fuses, run_part
from vidaccel.sites.memo import once_per_call
from vidaccel.sites.plain import plain_reason, readable_reason

__all__ = [
    "FusedAlphaBlender",
    "FusedResnetBlock2D",
    "FusedSpatioTemporalResBlock",
    "FusedTemporalConvLayer",
    "FusedTemporalResnetBlock",
    "Joined",
]

_TEMPORAL = (3, 1, 1), (1, 1, 1), (1, 0, 0), (1, 1, 1), 1, "zeros"
_POINTWISE = (1, 1), (1, 1), (0, 0), (1, 1), 1, "zeros"


class Joined(NamedTuple):
    """``torch.cat([x, skip], dim=1)`` that was not made; a ResNet block takes it that has no reason not to."""

    x: Tensor
    skip: Tensor


def _apart(x: Tensor | Joined) -> tuple[Tensor, Tensor | None]:
    return x if isinstance(x, Joined) else (x, None)


def _whole(x: Tensor, skip: Tensor | None) -> Tensor:
    return x if skip is None else torch.cat([x, skip], dim=1)


@once_per_call
def _is_silu(activation: nn.Module) -> bool:
    return plain_reason(activation, nn.SiLU) is None


class _ConvolutionBlock(FusedBlock):
    """What the blocks share that are made of GroupNorm, SiLU and convolution, in this order."""

    def _norms_reason(self, x: Tensor, *norms: nn.Module) -> str | None:
        return norms_reason(nn.GroupNorm, x, *norms) if self.runs("group_norm_silu") else None

    def _spread_reason(self, x: Tensor, kind: type[nn.Conv2d | nn.Conv3d], *convs: Any) -> str | None:
        """Why this block, whose norms and ``convs`` of a ``kind`` mix what is spread over ranks, needs all of it."""
        if pixel_rows() is None and (frames() is None or kind is nn.Conv2d):
            return None
        if not self.runs("group_norm_silu"):
            return "its norms are not fused, and take all frames of the clip"
        if torch.is_autocast_enabled(x.device.type):
            return "autocast chooses the dtypes of matrix products"
        plain = PLAIN_3X3 if kind is nn.Conv2d else _TEMPORAL
        for conv in convs:
            if reason := readable_reason(conv, kind, x):
                return reason
            if geometry_of(conv) != plain:
                return "a convolution needs more of its neighbours than a frame or a row"
        return None

    def _norm_silu(
        self,
        norm: nn.GroupNorm,
        x: Tensor,
        shift: Tensor | None = None,
        skip: Tensor | None = None,
        statistics: ChannelStatistics | None = None,
    ) -> Tensor:
        """``silu(norm(x + shift))``; with a ``skip`` connection, which the fused norm alone takes, of both joined."""
        if self.runs("group_norm_silu"):
            return group_norm_module(norm, x, silu=True, shift=shift, tail=skip, statistics=statistics)
        if shift is not None:
            x = x + shift.mT.unflatten(2, (-1, *(1 for _ in x.shape[3:])))  # [N, C, T, 1, ...]
        return F.silu(norm(x))

    def _compile_norms_ahead(self, first: Any, *inner: Any) -> None:
        """For the norms of a chain; to all but the first, at least a convolution's bias is added on its way."""
        if self.runs("group_norm_silu"):
            compile_group_norm_ahead(first)
            for norm in inner:
                compile_group_norm_ahead(norm, shift=True)

    def _compile_sum_ahead(self, conv: Any, shortcut: Any = None, *, statistics: bool = False) -> None:
        """For the sum behind the last convolution of a block, if its parameters are plain ones."""
        if self.runs("conv_epilogue") and type(getattr(conv, "weight", None)) is nn.Parameter:
            compile_ahead(conv.weight, residual_bias=shortcut is not None, statistics=statistics)

    def _convolve_to_norm(self, conv: Any, x: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """``conv(x)`` and what the norm behind it is to add to that: `shift`, and perhaps the bias instead of here."""
        if not self._splits_bias(conv, x) or not self.runs("group_norm_silu"):
            return _with_bias(conv, x), shift
        bias = conv.bias.to(x.dtype)
        return _without_bias(conv, x), bias.expand(x.shape[0], 1, -1) if shift is None else shift + bias

    def _convolve_to_residual(
        self,
        conv: Any,
        x: Tensor,
        residual: Tensor,
        shortcut: Any = None,
        skip: Tensor | None = None,
        statistics: bool = False,
        **epilogue: Any,
    ) -> tuple[Tensor, ChannelStatistics | None]:
        """``shortcut(residual) + conv(x)``; ``epilogue`` is what ``conv_epilogue`` takes for a blend.

        With ``statistics`` also those of the sum, if they can be had, for a norm that comes next. With a ``skip``
        connection, both convolutions have to be such that :meth:`_splits_bias`.
        """
        if not self._splits_bias(conv, x):
            return (residual if shortcut is None else shortcut(residual)) + _with_bias(conv, x), None
        temporal = shortcut is None and self.runs("temporal_conv") and geometry_of(conv) == _TEMPORAL
        if temporal and not statistics and frames() is None:
            return temporal_conv(x, conv.weight, conv.bias, residual, **epilogue), None
        if shortcut is not None and self._splits_bias(shortcut, residual):
            epilogue["residual_bias"] = shortcut.bias
            if skip is None:
                residual = _without_bias(shortcut, residual)
            else:
                residual = joined_projection(residual, skip, shortcut.weight)
        elif shortcut is not None:
            residual = shortcut(residual)
        x = _without_bias(conv, x)
        if statistics:
            return conv_epilogue_and_statistics(x, conv.bias, residual, inplace=True, **epilogue)
        return conv_epilogue(x, conv.bias, residual, inplace=True, **epilogue), None

    def _splits_bias(self, conv: Any, x: Tensor) -> bool:
        """Whether to run ``conv`` without its bias: only where a kernel then adds it on its way."""
        if not self.runs("conv_epilogue") or not runs_triton("conv_epilogue", x):
            return False
        return readable_reason(conv, nn.Conv2d if x.ndim == 4 else nn.Conv3d, x) is None


def _with_bias(conv: Any, x: Tensor) -> Tensor:
    return convolve_frames(conv, conv, x) if x.ndim == 5 else convolve_rows(conv, conv, x)


def _without_bias(conv: Any, x: Tensor) -> Tensor:
    if x.ndim == 5 and conv.kernel_size[0] > 1:
        return convolve_frames(conv, partial(_convolve, conv), x)
    return convolve_rows(conv, partial(_convolve, conv), x)


def _convolve(conv: Any, x: Tensor) -> Tensor:
    if conv.padding_mode != "zeros":
        return conv._conv_forward(x, conv.weight, None)
    convolve: Any = F.conv2d if x.ndim == 4 else F.conv3d
    return convolve(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)


class _ResnetBlock(_ConvolutionBlock):
    """What the two kinds of ResNet block share; ``time_embedding`` is ``[N, T, C]``, a row for each of T frames."""

    norm1: Any
    norm2: Any
    conv1: Any
    conv2: Any
    dropout: Any
    nonlinearity: Any
    conv_shortcut: Any

    def call_reason(self, input_tensor: Tensor, *args: Any, **kwargs: Any) -> str | None:
        if not _is_silu(self.nonlinearity):
            return f"its activation is {type(self.nonlinearity).__name__}, or somebody hooked it"
        return self._norms_reason(input_tensor, self.norm1, self.norm2)

    def compile_ahead(self, statistics: bool = False) -> None:
        self._compile_norms_ahead(self.norm1, self.norm2)
        self._compile_sum_ahead(self.conv2, self.conv_shortcut, statistics=statistics)

    def residual_branch(
        self,
        x: Tensor,
        time_embedding: Tensor | None,
        skip: Tensor | None = None,
        given: ChannelStatistics | None = None,
        **epilogue: Any,
    ) -> tuple[Tensor, ChannelStatistics | None]:
        """The whole block, up to and with the sum; see :meth:`_convolve_to_residual`; ``given`` are x's statistics."""
        hidden_states = self._norm_silu(self.norm1, x, skip=skip, statistics=given)
        hidden_states, shift = self._convolve_to_norm(self.conv1, hidden_states, time_embedding)
        hidden_states = self._norm_silu(self.norm2, hidden_states, shift)
        if self.dropout.training or plain_reason(self.dropout, nn.Dropout):
            hidden_states = self.dropout(hidden_states)
        return self._convolve_to_residual(self.conv2, hidden_states, x, self.conv_shortcut, skip, **epilogue)


@fuses(ResnetBlock2D, {"group_norm_silu": "math-exact", "conv_epilogue": "math-exact", "unit_division": "bit-exact"})
class FusedResnetBlock2D(_ResnetBlock, ResnetBlock2D):
    """Norm, SiLU and the adds before them in one kernel, bias and residual in another, no division by 1.0."""

    @classmethod
    def left_alone_reason(cls, module: Any) -> str | None:
        if module.upsample is not None or module.downsample is not None:
            return "it resamples inside the block"
        group = module.time_embedding_norm == "group" and module.time_emb_proj is None  # the image VAE's decoder
        if module.time_embedding_norm != "default" and not group:
            return f"its time embedding is of the kind {module.time_embedding_norm!r}"
        return None

    def joining_reason(self, skip: Tensor) -> str | None:
        """Why this block has to get ``skip`` concatenated with its input, or None if :class:`Joined` will do."""
        if not self.serves_parent(skip, None):
            return "its ResNet block is not fused, or has to be called"
        for conv in (self.conv2, self.conv_shortcut):
            if not self._splits_bias(conv, skip):
                return readable_reason(conv, nn.Conv2d, skip) or "its ResNet block adds its biases in convolutions"
        if not self.runs("group_norm_silu"):
            return "the first norm of its ResNet block is not fused"
        pointwise = geometry_of(self.conv_shortcut) == _POINTWISE
        return None if pointwise else "the convolution on its residual is not a 1x1 one"

    def forward(self, input_tensor: Tensor | Joined, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x, skip = _apart(input_tensor)
        return call_site(FusedResnetBlock2D, self, x, temb, *args, skip=skip, **kwargs)

    @classmethod
    def original_forward(cls, host: Any, x: Tensor, *args: Any, skip: Tensor | None = None, **kwargs: Any) -> Tensor:
        return whole_pictures(ResnetBlock2D.forward, host, _whole(x, skip), *args, **kwargs)

    def call_reason(
        self, input_tensor: Tensor, temb: Tensor | None, *args: Any, skip: Tensor | None = None, **kwargs: Any
    ) -> str | None:
        if args or kwargs:
            return "deprecated arguments beyond the time embedding were passed"
        if temb is not None and self.time_emb_proj is None:
            return "a time embedding was passed, and it has no projection of one"
        return super().call_reason(input_tensor) or self._spread_reason(input_tensor, nn.Conv2d, self.conv1, self.conv2)

    def fused_forward(self, x: Tensor, temb: Tensor | None, skip: Tensor | None = None) -> Tensor:
        out, _ = self.with_statistics(x, temb, skip, statistics=False)
        return out

    def with_statistics(
        self,
        x: Tensor,
        temb: Tensor | None,
        skip: Tensor | None = None,
        given: ChannelStatistics | None = None,
        statistics: bool = True,
    ) -> tuple[Tensor, ChannelStatistics | None]:
        """The fused forward, and the statistics of the result for a norm behind it; ``given`` are those of x."""
        time_embedding = None
        if temb is not None and self.time_emb_proj is not None:
            temb = temb if self.skip_time_act else self.nonlinearity(temb)
            time_embedding = self.time_emb_proj(temb)[:, None, :]
        out, found = self.residual_branch(x, time_embedding, skip, given, statistics=statistics)
        if self.output_scale_factor == 1.0 and self.runs("unit_division"):
            return out, found
        return out / self.output_scale_factor, None


@fuses(
    TemporalResnetBlock,
    {"group_norm_silu": "math-exact", "conv_epilogue": "math-exact", "temporal_conv": "math-exact"},
)
class FusedTemporalResnetBlock(_ResnetBlock, TemporalResnetBlock):
    """The same over ``[B, C, F, H, W]``: statistics run over all frames, the time embedding has a row for each."""

    def forward(self, input_tensor: Tensor, temb: Tensor) -> Tensor:
        return call_site(FusedTemporalResnetBlock, self, input_tensor, temb)

    @classmethod
    def original_forward(cls, host: Any, *args: Any) -> Tensor:
        out: Tensor = whole_pictures(partial(whole_clip, TemporalResnetBlock), host, *args)
        return out

    def call_reason(self, input_tensor: Tensor, *args: Any, **kwargs: Any) -> str | None:
        reason = super().call_reason(input_tensor, *args, **kwargs)
        return reason or self._spread_reason(input_tensor, nn.Conv3d, self.conv1, self.conv2)

    def fused_forward(self, input_tensor: Tensor, temb: Tensor | None) -> Tensor:
        out, _ = self.with_blend(input_tensor, temb)
        return out

    def with_blend(self, x: Tensor, temb: Tensor | None, **options: Any) -> tuple[Tensor, ChannelStatistics | None]:
        """The fused forward, a blend with ``x`` at its end; ``options`` as of :meth:`residual_branch`."""
        time_embedding = None if self.time_emb_proj is None else self.time_emb_proj(self.nonlinearity(temb))
        return self.residual_branch(x, time_embedding, **options)

    def compile_ahead(self, statistics: bool = False) -> None:  # the sum is its parent's
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
        return call_site(FusedTemporalConvLayer, self, hidden_states, num_frames)

    @classmethod
    def original_forward(cls, host: Any, *args: Any) -> Tensor:
        out: Tensor = whole_clip(TemporalConvLayer, host, *args)
        return out

    def call_reason(self, hidden_states: Tensor, num_frames: int) -> str | None:
        for stage in self._stages():
            if reason := plain_reason(stage, nn.Sequential) or plain_reason(stage[1], nn.SiLU):
                return reason
        norms, convs = zip(*((stage[0], stage[-1]) for stage in self._stages()), strict=True)
        return self._norms_reason(hidden_states, *norms) or self._spread_reason(hidden_states, nn.Conv3d, *convs)

    def fused_forward(self, hidden_states: Tensor, num_frames: int) -> Tensor:
        clip = as_clip(hidden_states, num_frames)
        *inner, last = self._stages()
        x, shift = clip, None
        for stage in inner:
            x, shift = self._convolve_to_norm(stage[-1], self._normalise(stage, x, shift))
        out, _ = self._convolve_to_residual(last[-1], self._normalise(last, x, shift), clip)
        return as_frames(out)

    def compile_ahead(self) -> None:
        self._compile_norms_ahead(*(stage[0] for stage in self._stages()))
        last: Any = self.conv4[-1]
        self._compile_sum_ahead(last)
        if self.runs("temporal_conv") and type(getattr(last, "weight", None)) is nn.Parameter:
            compile_temporal_conv_ahead(last.weight)

    def _stages(self) -> tuple[Any, ...]:
        """Each GroupNorm, SiLU, dropout (but in the first) and convolution."""
        return self.conv1, self.conv2, self.conv3, self.conv4

    def _normalise(self, stage: Any, x: Tensor, shift: Tensor | None) -> Tensor:
        """What the convolution of a stage gets for ``x + shift``."""
        norm, _, *dropout, _ = stage
        x = self._norm_silu(norm, x, shift)
        for layer in dropout:
            if layer.training or plain_reason(layer, nn.Dropout):
                x = layer(x)
        return x


@fuses(SpatioTemporalResBlock, {"conv_epilogue": "math-exact"})
class FusedSpatioTemporalResBlock(FusedBlock, SpatioTemporalResBlock):
    """The temporal block's last kernel (bias, residual) also blends its result with the spatial block's.

    Its own input goes to the spatial block only, and so does a ``skip`` connection beside it.
    """

    @classmethod
    def left_alone_reason(cls, module: Any) -> str | None:
        for part, kind in ((module.temporal_res_block, TemporalResnetBlock), (module.time_mixer, AlphaBlender)):
            if not isinstance(part, kind):
                return plain_reason(part, kind)
        if module.time_mixer.merge_strategy == "fixed":
            return "its blend factor is fixed"
        return None if module.temporal_res_block.conv_shortcut is None else "its temporal block changes the width"

    def compile_ahead(self, statistics: bool = False) -> None:
        conv, mixer = self.temporal_res_block.conv2, self.time_mixer
        if type(getattr(conv, "weight", None)) is nn.Parameter:
            images = mixer.merge_strategy == "learned_with_images"
            second = mixer.switch_spatial_to_temporal_mix
            blend = {"mix": True, "image_only": images, "spatial_is_second": second}
            compile_ahead(conv.weight, **blend, statistics=statistics)
            if isinstance(self.temporal_res_block, FusedBlock) and self.temporal_res_block.runs("temporal_conv"):
                compile_temporal_conv_ahead(conv.weight, **blend)

    def forward(
        self, hidden_states: Tensor | Joined, temb: Tensor | None = None, image_only_indicator: Tensor | None = None
    ) -> Tensor:
        x, skip = _apart(hidden_states)
        return call_site(FusedSpatioTemporalResBlock, self, x, temb, image_only_indicator, skip=skip)

    @classmethod
    def original_forward(cls, host: Any, x: Tensor, *args: Any, skip: Tensor | None = None) -> Tensor:
        return SpatioTemporalResBlock.forward(host, _whole(x, skip), *args)

    def call_reason(
        self,
        x: Tensor,
        temb: Tensor | None = None,
        image_only_indicator: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> str | None:
        return "no image_only_indicator was passed" if image_only_indicator is None else None

    def fused_forward(
        self, x: Tensor, temb: Tensor | None, image_only_indicator: Tensor, skip: Tensor | None = None
    ) -> Tensor:
        spatial = self.spatial_res_block(x if skip is None else Joined(x, skip), temb)
        out, _ = self._temporal_blend(spatial, temb, image_only_indicator, statistics=False)
        return out

    def with_statistics(
        self, x: Tensor, image_only_indicator: Tensor, given: ChannelStatistics | None
    ) -> tuple[Tensor, ChannelStatistics | None]:
        """The fused forward of a VAE's block, which has no time embedding, and the statistics of its result."""
        spatial = self.spatial_res_block
        if isinstance(spatial, FusedResnetBlock2D) and spatial.serves_parent(x, None):
            x, _ = run_part(spatial, spatial.with_statistics, x, None, None, given, False)
        else:
            x = spatial(x, None)
        return self._temporal_blend(x, None, image_only_indicator, statistics=True)

    def _temporal_blend(
        self, frames: Tensor, temb: Tensor | None, image_only_indicator: Tensor, statistics: bool
    ) -> tuple[Tensor, ChannelStatistics | None]:
        num_frames = image_only_indicator.shape[-1]
        temb = None if temb is None else temb.unflatten(0, (-1, num_frames))
        spatial, temporal, mixer = as_clip(frames, num_frames), self.temporal_res_block, self.time_mixer
        bypassed = isinstance(temporal, FusedTemporalResnetBlock) and temporal.takes_blend(spatial)
        if not (bypassed and _mixes_plainly(mixer, frames.device)):
            mixed = mixer(
                x_spatial=spatial, x_temporal=temporal(spatial, temb), image_only_indicator=image_only_indicator
            )
            return as_frames(mixed), None
        indicator = image_only_indicator if mixer.merge_strategy == "learned_with_images" else None
        assert isinstance(temporal, FusedTemporalResnetBlock)
        out, found = run_part(
            temporal,
            temporal.with_blend,
            spatial,
            temb,
            statistics=statistics,
            mix_factor=mixer.mix_factor,
            image_only=indicator,
            spatial_is_second=mixer.switch_spatial_to_temporal_mix,
        )
        return as_frames(out), found


@once_per_call
def _mixes_plainly(mixer: Any, device: torch.device) -> bool:
    """Whether a blend of ours, by the mixer's factor, may stand for a call of it."""
    return plain_reason(mixer, AlphaBlender) is None and mixer.mix_factor.device == device


@fuses(AlphaBlender, {"alpha_blend": "math-exact"})
class FusedAlphaBlender(FusedBlock, AlphaBlender):
    """``alpha * spatial + (1 - alpha) * temporal`` in one pass, alpha worked out inside it from its parameter."""

    mix_factor: Tensor

    @classmethod
    def left_alone_reason(cls, module: Any) -> str | None:
        return "its blend factor is fixed" if module.merge_strategy == "fixed" else None

    def forward(self, x_spatial: Tensor, x_temporal: Tensor, image_only_indicator: Tensor | None = None) -> Tensor:
        return call_site(FusedAlphaBlender, self, x_spatial, x_temporal, image_only_indicator)

    def call_reason(self, x_spatial: Tensor, x_temporal: Tensor, image_only_indicator: Tensor | None) -> str | None:
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
