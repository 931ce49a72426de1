"""ModelScope text to video and its descendants (Zeroscope): an image UNet with temporal layers between its blocks.

What the family offers:

* after every ResNet block four convolutions over frames, after every spatial transformer one over frames, and one more
  after the first convolution: stock code permutes the activations for each and back (``channels_last``);
* GroupNorm over all frames runs on 64 thread blocks in stock PyTorch (``group_norm_silu``);
* temporal attention, twice in a block, is 16 or 24 frames for each of thousands of pixels (``temporal_attention``);
* each of the four convolutions over frames has a bias that PyTorch adds in a pass of its own (``conv_epilogue``).
"""

from __future__ import annotations

from typing import Any

from diffusers.models.unets.unet_3d_condition import UNet3DConditionModel

from vidaccel.blocks.unet.activations import FusedGEGLU
from vidaccel.blocks.unet.attention import FusedTextTransformerBlock
from vidaccel.blocks.unet.attention_processor import Processor
from vidaccel.blocks.unet.convolution import FusedFewChannelConv2d
from vidaccel.blocks.unet.normalization import FusedGroupNorm
from vidaccel.blocks.unet.resnet import FusedResnetBlock2D, FusedTemporalConvLayer
from vidaccel.blocks.unet.text_context import TextSource
from vidaccel.blocks.unet.transformer_2d import FusedTransformer2DModel
from vidaccel.blocks.unet.transformer_temporal import FusedTransformerTemporalModel
from vidaccel.blocks.unet.unet_3d_blocks import FusedCrossAttnUpBlock3D, FusedUpBlock3D
from vidaccel.blocks.unet.upsampling import FusedUpsample2D
from vidaccel.pipelines.autoencoder_kl import TINY_VAE, VAE
from vidaccel.sites.rules import ChannelsLastWeights, Family, Swap

__all__ = ["BLOCK_RULES", "FAMILY", "SYNTHETIC", "TINY_UNET", "UNET"]

BLOCK_RULES = (
    Swap(FusedUpBlock3D),
    Swap(FusedCrossAttnUpBlock3D),
    Swap(FusedTransformer2DModel),
    Swap(FusedTextTransformerBlock),
    Swap(FusedTransformerTemporalModel),
    Swap(FusedTemporalConvLayer),
    Swap(FusedResnetBlock2D),
    Swap(FusedUpsample2D),
    Swap(FusedFewChannelConv2d, names=("conv_in",)),
    Swap(FusedGEGLU),
    Swap(FusedGroupNorm, names=("norm", "conv_norm_out")),
    Processor(),
)

FAMILY = Family(
    name="text_to_video_synthesis",
    pipelines=("TextToVideoSDPipeline", "VideoToVideoSDPipeline"),
    rules={
        "UNet3DConditionModel": (
            TextSource(UNet3DConditionModel, repeats_text=True),
            ChannelsLastWeights(UNet3DConditionModel),
            *BLOCK_RULES,
        ),
    },
)

# The released checkpoints' configurations (ali-vilab/text-to-video-ms-1.7b, cerspense/zeroscope_v2_576w).
UNET = {
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 1024,
    "attention_head_dim": 64,
    "norm_num_groups": 32,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock3D",) * 3 + ("DownBlock3D",),
    "up_block_types": ("UpBlock3D",) + ("CrossAttnUpBlock3D",) * 3,
}
_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
TINY_UNET = {
    "cross_attention_dim": 32,
    "attention_head_dim": 32,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
}
_TINY = {
    "components": {"unet": TINY_UNET, "vae": TINY_VAE},
    "inputs": {"prompt_embeds": (1, 7, 32), "negative_prompt_embeds": (1, 7, 32)},
    "call": {"height": 32, "width": 32, "num_frames": 3, "num_inference_steps": 2},
}


def _synthetic(num_frames: int, height: int, width: int) -> dict[str, Any]:
    return {
        "pipeline": "TextToVideoSDPipeline",
        "components": {
            "unet": ("UNet3DConditionModel", UNET),
            "vae": ("AutoencoderKL", VAE),
            "scheduler": ("DDIMScheduler", _SCHEDULER),
        },
        "inputs": {"prompt_embeds": (1, 77, 1024), "negative_prompt_embeds": (1, 77, 1024)},
        "call": {"height": height, "width": width, "num_frames": num_frames, "num_inference_steps": 50},
        "tiny": _TINY,
    }


SYNTHETIC = {"modelscope": _synthetic(16, 256, 256), "zeroscope": _synthetic(24, 320, 576)}
