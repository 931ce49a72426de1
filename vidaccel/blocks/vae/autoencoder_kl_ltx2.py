"""diffusers' ``autoencoders/autoencoder_kl_ltx2.py``: decoder and encoder of LTX-2's video, as rows.

Made of the same parts as LTX-Video's (``autoencoder_kl_ltx.py``). Whether they are causal is said at every call, and
the decoder's pictures are padded by reflection, which ``rms_norm_silu`` writes.
"""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import (
    LTX2VideoCausalConv3d,
    LTX2VideoDecoder3d,
    LTX2VideoDownBlock3D,
    LTX2VideoDownsampler3d,
    LTX2VideoEncoder3d,
    LTX2VideoMidBlock3d,
    LTX2VideoResnetBlock3d,
    LTX2VideoUpBlock3d,
    LTX2VideoUpsampler3d,
    PerChannelRMSNorm,
)
from torch import Tensor, nn

from vidaccel.blocks.vae.autoencoder_kl_ltx import DECODER_OPS, ENCODER_OPS, Family, RowsDecoder, RowsEncoder
from vidaccel.sites.block import call_site, fuses

__all__ = ["FusedLTX2VideoDecoder3d", "FusedLTX2VideoEncoder3d"]

LTX2 = Family(
    conv=LTX2VideoCausalConv3d,
    shortcut=nn.Conv3d,
    norm=PerChannelRMSNorm,
    resnet=LTX2VideoResnetBlock3d,
    mid_block=LTX2VideoMidBlock3d,
    up_block=LTX2VideoUpBlock3d,
    upsampler=LTX2VideoUpsampler3d,
    down_blocks=(LTX2VideoDownBlock3D,),
    downsampler=LTX2VideoDownsampler3d,
)


@fuses(LTX2VideoDecoder3d, DECODER_OPS)
class FusedLTX2VideoDecoder3d(RowsDecoder, LTX2VideoDecoder3d):
    """The decoder of LTX-2 and LTX-2.3."""

    family = LTX2

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None, causal: bool | None = None) -> Tensor:
        if torch.compiler.is_compiling():
            return LTX2VideoDecoder3d.forward(self, hidden_states, temb, causal)
        return call_site(FusedLTX2VideoDecoder3d, self, hidden_states, temb, bool(causal or self.is_causal))


@fuses(LTX2VideoEncoder3d, ENCODER_OPS)
class FusedLTX2VideoEncoder3d(RowsEncoder, LTX2VideoEncoder3d):
    """The encoder of LTX-2 and LTX-2.3."""

    family = LTX2

    def forward(self, hidden_states: Tensor, causal: bool | None = None) -> Tensor:
        if torch.compiler.is_compiling():
            return LTX2VideoEncoder3d.forward(self, hidden_states, causal)
        return call_site(FusedLTX2VideoEncoder3d, self, hidden_states, bool(causal or self.is_causal))
