"""A model's first convolution, ``conv_in``: few channels in, padded so that a pixel is aligned in memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vidaccel.kernels.conv.padded_channels import padded_channels
from vidaccel.sites.block import FusedBlock, call_site, fuses
from vidaccel.sites.plain import readable_reason

__all__ = ["PLAIN_3X3", "FusedFewChannelConv2d", "geometry_of"]

PLAIN_3X3 = (3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros"


def geometry_of(convolution: Any) -> tuple[Any, ...]:
    """Kernel size, stride, padding, dilation, groups and padding mode."""
    c = convolution
    return c.kernel_size, c.stride, c.padding, c.dilation, c.groups, c.padding_mode


@fuses(nn.Conv2d, {"padded_channels": "math-exact"})
class FusedFewChannelConv2d(FusedBlock, nn.Conv2d):
    """A convolution whose input channels, in 16 bits each, do not fill 16 bytes: padded where they do not."""

    weight: nn.Parameter

    @classmethod
    def stands_for(cls, module: Any) -> bool:
        return module.kernel_size == (3, 3) and module.in_channels % 8 != 0

    def forward(self, input: Tensor) -> Tensor:
        return call_site(FusedFewChannelConv2d, self, input)

    def call_reason(self, input: Tensor) -> str | None:
        if input.ndim != 4 or input.shape[1] != self.in_channels:
            return "the input is not a batch of images of this layer's width"
        if self.dilation != (1, 1) or self.groups != 1 or self.padding_mode != "zeros" or isinstance(self.padding, str):
            return "it is not a plain convolution"
        return readable_reason(self, nn.Conv2d, input, with_bias=False)

    def fused_forward(self, input: Tensor) -> Tensor:
        assert not isinstance(self.padding, str)
        return padded_channels(input, self.weight, self.bias, self.stride, self.padding)
