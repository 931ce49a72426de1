"""A model's first convolution, ``conv_in``: few channels in, padded so that a pixel is aligned in memory.

Channels-last, a pixel of 3 or 4 channels of float16 is 6 or 8 bytes. cuDNN's kernels for tensor cores read 16 bytes at
once; for less it has one that computes an index for every element and is several times as slow. Channels of zeros with
weights of zeros change no sum, and the padded input of so few channels is small beside the output.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vidaccel.kernels.dispatch import Choice, record_choice, runs_triton
from vidaccel.sites.parameters import why_unreadable
from vidaccel.sites.site import FusedBlock, fuses

__all__ = ["FusedFewChannelConv2d"]

ALIGNMENT = 16  # bytes
OP = "padded_channels"


@fuses(nn.Conv2d, {OP: "math-exact"})
class FusedFewChannelConv2d(FusedBlock, nn.Conv2d):
    """A convolution whose input channels, in 16 bits each, do not fill 16 bytes: padded where they do not."""

    weight: nn.Parameter

    @classmethod
    def stands_for(cls, module: nn.Module) -> bool:
        assert isinstance(module, nn.Conv2d)
        return module.kernel_size == (3, 3) and module.in_channels % 8 != 0

    @classmethod
    def why_left_alone(cls, module: nn.Module) -> str | None:
        assert isinstance(module, nn.Conv2d)
        return "its channels are in groups" if module.groups != 1 else None

    def forward(self, input: Tensor) -> Tensor:
        return self.guarded(input)

    def why_unserved(self, input: Tensor) -> str | None:
        if input.ndim != 4 or input.shape[1] != self.in_channels:
            return "the input is not a batch of images of this layer's width"
        return why_unreadable(self, nn.Conv2d, input, with_bias=False)

    def fused_forward(self, input: Tensor) -> Tensor:
        aligned = self.in_channels * input.element_size() % ALIGNMENT == 0  # as 4 channels of float32 are
        if aligned or not runs_triton(OP, input):  # on a CPU there is nothing to gain
            return self.original_forward(input)
        record_choice(Choice(OP, "padded"))
        return self._conv_forward(_pad_channels(input), _pad_channels(self.weight), self.bias)


def _pad_channels(x: Tensor) -> Tensor:
    """``[N, C, H, W]`` with channels of zeros up to a multiple of 16 bytes, channels-last."""
    missing = -x.shape[1] % (ALIGNMENT // x.element_size())
    return F.pad(x.permute(0, 2, 3, 1), (0, missing)).contiguous().permute(0, 3, 1, 2)
