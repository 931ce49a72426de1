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
from vidaccel.blocks.vae.vae import FusedDecoder
from vidaccel.sites.rules import ChannelsLastWeights, Family, Swap

__all__ = ["FAMILY", "TINY_VAE", "VAE"]

FAMILY = Family(
    name="autoencoder_kl",
    pipelines=(),
    rules={
        "AutoencoderKL": (
            ChannelsLastWeights(AutoencoderKL),
            Swap(FusedDecoder),
            Swap(FusedResnetBlock2D),
            Swap(FusedUpsample2D),
            Swap(FusedFewChannelConv2d, names=("conv_in",)),
            Swap(FusedGroupNorm, names=("group_norm", "conv_norm_out")),
            Processor(),
        ),
    },
)

# Stable Diffusion 1.5's, which the text-to-video checkpoints come with, too.
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
TINY_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (32, 64),
}
