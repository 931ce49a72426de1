"""diffusers' ``autoencoders/autoencoder_kl_ltx2.py``: the decoder of LTX-2's video, as rows.

Made of the same parts as LTX-Video's (``autoencoder_kl_ltx.py``). Whether it is causal is said at every call, and its
pictures are padded by reflection, which ``rms_norm_silu`` writes.
"""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import (
    LTX2VideoCausalConv3d,
    LTX2VideoDecoder3d,
    LTX2VideoMidBlock3d,
    LTX2VideoResnetBlock3d,
    LTX2VideoUpBlock3d,
    LTX2VideoUpsampler3d,
    PerChannelRMSNorm,
)
from torch import Tensor, nn

from vidaccel.blocks.vae.autoencoder_kl_ltx import OPS, Family, RowsDecoder
from vidaccel.sites.block import call_site, fuses

__all__ = ["FusedLTX2VideoDecoder3d"]


@fuses(LTX2VideoDecoder3d, OPS)
class FusedLTX2VideoDecoder3d(RowsDecoder, LTX2VideoDecoder3d):
    """The decoder of LTX-2 and LTX-2.3."""

    family = Family(
        conv=LTX2VideoCausalConv3d,
        shortcut=nn.Conv3d,
        norm=PerChannelRMSNorm,
        resnet=LTX2VideoResnetBlock3d,
        mid_block=LTX2VideoMidBlock3d,
        up_block=LTX2VideoUpBlock3d,
        upsampler=LTX2VideoUpsampler3d,
    )

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None, causal: bool | None = None) -> Tensor:
        if torch.compiler.is_compiling():
            return LTX2VideoDecoder3d.forward(self, hidden_states, temb, causal)
        return call_site(FusedLTX2VideoDecoder3d, self, hidden_states, temb, bool(causal or self.is_causal))
