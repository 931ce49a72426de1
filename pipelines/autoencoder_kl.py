"""``AutoencoderKL``, the image VAE that AnimateDiff, ModelScope, Zeroscope, I2VGenXL and Latte decode each frame with.

No pipeline of its own: whatever pipeline holds one has it patched by these rules, beside its denoiser. Encoder and
decoder are made of the same ResNet blocks; only the decoder, which sees every frame of a clip, has more done to it.
"""

from __future__ import annotations

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from vidaccel.blocks.unet.attention_processor import Processor
from vidaccel.blocks.unet.convolution import FusedFewChannelConv2d
from vidaccel.blocks.unet.normalization import FusedGroupNorm
from vidaccel.blocks.unet.resnet import FusedResnetBlock2D
from vidaccel.blocks.unet.upsampling import FusedUpsample2D
from vidaccel.blocks.vae.tile_batches import TileBatches
from vidaccel.blocks.vae.tile_blends import TileBlends
from vidaccel.blocks.vae.vae import FusedDecoder
from vidaccel.sites.rules import ChannelsLastWeights, Swap

__all__ = ["RULES"]

RULES = {
    "AutoencoderKL": (
        ChannelsLastWeights(AutoencoderKL),
        Swap(FusedDecoder),
        Swap(FusedResnetBlock2D),
        Swap(FusedUpsample2D),
        Swap(FusedFewChannelConv2d, names=("conv_in",)),
        Swap(FusedGroupNorm, names=("group_norm", "conv_norm_out")),
        Processor(),
        TileBatches(),
        TileBlends(),
    ),
}
