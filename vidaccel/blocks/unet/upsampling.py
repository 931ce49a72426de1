"""diffusers' ``models/upsampling.py``: nearest-neighbour upsampling and its convolution as one convolution."""

from __future__ import annotations

from typing import Any

from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from vidaccel.kernels.conv.upsample_conv import compile_ahead, upsample_conv
from vidaccel.kernels.dispatch import runs_triton
from vidaccel.sites.parameters import why_unreadable
from vidaccel.sites.site import FusedBlock, fuses

__all__ = ["FusedUpsample2D"]


@fuses(Upsample2D, {"upsample_conv": "math-exact"})
class FusedUpsample2D(FusedBlock, Upsample2D):
    """Upsampling by 2 and a 3 x 3 convolution, without the upsampled tensor between them; stays channels-last.

    The stock block makes its input contiguous from 64 images or 2**30 elements on, which copies a channels-last one.
    """

    conv: Any

    @classmethod
    def why_left_alone(cls, module: nn.Module) -> str | None:
        assert isinstance(module, Upsample2D)
        if module.norm is not None or not module.interpolate:
            return "it normalises its input, or does not interpolate"
        if not module.use_conv or module.use_conv_transpose or module.name != "conv":
            return "it has no convolution after its interpolation"
        return _why_not_3x3(module.conv)

    def compile_ahead(self) -> None:
        if type(getattr(self.conv, "weight", None)) is nn.Parameter:
            compile_ahead(self.conv.weight)

    def forward(self, hidden_states: Tensor, output_size: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
        return self.guarded(hidden_states, output_size, *args, **kwargs)

    def why_unserved(self, hidden_states: Tensor, output_size: Any, *args: Any, **kwargs: Any) -> str | None:
        if args or kwargs:
            return "deprecated arguments beyond the output size were passed"
        if output_size is not None and tuple(output_size) != tuple(2 * side for side in hidden_states.shape[2:]):
            return "the output size is not twice the input's"
        if hidden_states.ndim != 4 or hidden_states.shape[1] != self.channels:
            return "the input is not an image of this layer's width"
        return why_unreadable(self.conv, nn.Conv2d, hidden_states)

    def fused_forward(self, hidden_states: Tensor, output_size: Any) -> Tensor:
        if not runs_triton("upsample_conv", hidden_states):
            return self.original_forward(hidden_states, output_size)
        # The weights are added up at every call: fusing LoRA into one leaves its address and its version as they were.
        return upsample_conv(hidden_states, self.conv.weight, self.conv.bias)


def _why_not_3x3(conv: Any) -> str | None:
    if not isinstance(conv, nn.Conv2d):
        return f"its convolution is a {type(conv).__name__}"
    plain = conv.kernel_size == (3, 3) and conv.padding == (1, 1) and conv.stride == conv.dilation == (1, 1)
    if not plain or conv.groups != 1 or conv.padding_mode != "zeros" or conv.bias is None:
        return "its convolution is not a plain 3 x 3 one"
    return None
