"""diffusers' ``models/upsampling.py``: nearest-neighbour upsampling and its convolution as one convolution."""

from __future__ import annotations

from typing import Any

from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from vidaccel.blocks.pixel_rows import upsampled_by_rows, whole_pictures
from vidaccel.blocks.unet.convolution import PLAIN_3X3, geometry_of
from vidaccel.kernels.conv.upsample_conv import compile_ahead, upsample_conv, upsample_conv_and_statistics
from vidaccel.kernels.norm.channel_statistics import ChannelStatistics
from vidaccel.kernels.op import runs_triton
from vidaccel.parallel.layout import pixel_rows
from vidaccel.sites.block import FusedBlock, call_site, cut_corner, fuses
from vidaccel.sites.memo import once_per_call
from vidaccel.sites.plain import plain_reason, readable_reason

__all__ = ["FusedUpsample2D"]


@fuses(Upsample2D, {"upsample_conv": "math-exact"})
class FusedUpsample2D(FusedBlock, Upsample2D):
    """Upsampling by 2 and a 3 x 3 convolution, without the upsampled tensor between them; stays channels-last.

    The stock block makes its input contiguous from 64 images or 2**30 elements on, which copies a channels-last one.
    """

    conv: Any

    @classmethod
    def left_alone_reason(cls, module: Any) -> str | None:
        return _configuration_reason(module)

    def compile_ahead(self, statistics: bool = False) -> None:
        if type(getattr(self.conv, "weight", None)) is nn.Parameter:
            compile_ahead(self.conv.weight, statistics=statistics)

    def forward(self, hidden_states: Tensor, output_size: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
        return call_site(FusedUpsample2D, self, hidden_states, output_size, *args, **kwargs)

    @classmethod
    def original_forward(cls, host: Any, *args: Any, **kwargs: Any) -> Tensor:
        return whole_pictures(Upsample2D.forward, host, *args, **kwargs)

    def call_reason(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> str | None:
        if args or kwargs:
            return "deprecated arguments beyond the output size were passed"
        if output_size is not None and tuple(output_size) != tuple(2 * side for side in hidden_states.shape[2:]):
            return "the output size is not twice the input's"
        if hidden_states.ndim != 4 or hidden_states.shape[1] != self.channels:
            return "the input is not an image of this layer's width"
        return _configuration_reason(self) or readable_reason(self.conv, nn.Conv2d, hidden_states)

    def fused_forward(self, hidden_states: Tensor, output_size: Any = None) -> Tensor:
        def upsample(x: Tensor) -> Tensor:
            if not runs_triton("upsample_conv", x):
                return Upsample2D.forward(self, x, output_size)
            # The weights are added up at every call: fusing LoRA into one leaves its address and version as they were.
            return upsample_conv(x, self.conv.weight, self.conv.bias)

        return upsampled_by_rows(self.conv.weight, upsample, hidden_states)

    def with_statistics(self, hidden_states: Tensor) -> tuple[Tensor, ChannelStatistics | None]:
        """The fused forward, and what a GroupNorm behind it needs to know of the result, for a fused parent."""
        if pixel_rows() is not None:  # its first and last row are not done yet when the statistics are computed
            return self.fused_forward(hidden_states), None
        return upsample_conv_and_statistics(hidden_states, self.conv.weight, self.conv.bias)

    def corner(self, args: Any, kwargs: Any) -> Any:
        hidden_states, *_ = args
        return cut_corner((hidden_states,), {})  # of another size than the output size that was asked for


@once_per_call
def _configuration_reason(upsampler: Any) -> str | None:
    if upsampler.norm is not None or not upsampler.interpolate:
        return "it normalises its input, or does not interpolate"
    if not upsampler.use_conv or upsampler.use_conv_transpose or upsampler.name != "conv":
        return "it has no convolution after its interpolation"
    conv = upsampler.conv
    if not isinstance(conv, nn.Conv2d):
        return plain_reason(conv, nn.Conv2d)
    return (
        None if geometry_of(conv) == PLAIN_3X3 and conv.bias is not None else "its convolution is not a plain 3 x 3 one"
    )
