"""Stable Video Diffusion (image to video): the spatio-temporal UNet and the temporal VAE decoder.

What the family offers (measured and derived in the project's notes, repeated here as reasons):

* context is one CLIP image token, so cross-attention is a row per frame (``one_token_attention``);
* spatial and temporal ResNet blocks share one channels-last tensor (``channels_last``);
* GroupNorm over all frames runs on 64 thread blocks in stock PyTorch (``group_norm_silu``);
* temporal attention is 14 or 25 frames for each of thousands of pixels (``temporal_attention``).

The VAE's encoder sees a single image per clip; its ResNet blocks are the same classes and are patched with the rest.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import (
    AutoencoderKLTemporalDecoder,
)
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel

from vidaccel.blocks.unet.activations import FusedGEGLU
from vidaccel.blocks.unet.attention import FusedBasicTransformerBlock, FusedTemporalBasicTransformerBlock
from vidaccel.blocks.unet.attention_processor import Processor
from vidaccel.blocks.unet.convolution import FusedFewChannelConv2d
from vidaccel.blocks.unet.normalization import FusedGroupNorm
from vidaccel.blocks.unet.resnet import (
    FusedAlphaBlender,
    FusedResnetBlock2D,
    FusedSpatioTemporalResBlock,
    FusedTemporalResnetBlock,
)
from vidaccel.blocks.unet.transformer_temporal import FusedTransformerSpatioTemporalModel
from vidaccel.blocks.unet.unet_3d_blocks import FusedCrossAttnUpBlockSpatioTemporal, FusedUpBlockSpatioTemporal
from vidaccel.blocks.unet.upsampling import FusedUpsample2D
from vidaccel.blocks.vae.vae import FusedTemporalDecoder
from vidaccel.sites.rules import ChannelsLastWeights, Family, Swap

__all__ = ["FAMILY", "IMAGE_ENCODER", "SYNTHETIC"]

_RESNET_RULES = (
    Swap(FusedSpatioTemporalResBlock),
    Swap(FusedResnetBlock2D),
    Swap(FusedTemporalResnetBlock),
    Swap(FusedAlphaBlender),
    Swap(FusedUpsample2D),
    Swap(FusedGroupNorm, names=("norm", "group_norm", "conv_norm_out")),
    Processor(),
)

FAMILY = Family(
    name="stable_video_diffusion",
    pipelines=("StableVideoDiffusionPipeline",),
    rules={
        "UNetSpatioTemporalConditionModel": (
            ChannelsLastWeights(UNetSpatioTemporalConditionModel),
            Swap(FusedUpBlockSpatioTemporal),
            Swap(FusedCrossAttnUpBlockSpatioTemporal),
            Swap(FusedTransformerSpatioTemporalModel),
            Swap(FusedBasicTransformerBlock),
            Swap(FusedTemporalBasicTransformerBlock),
            Swap(FusedGEGLU),
            *_RESNET_RULES,
        ),
        "AutoencoderKLTemporalDecoder": (
            ChannelsLastWeights(AutoencoderKLTemporalDecoder),
            Swap(FusedTemporalDecoder),
            Swap(FusedFewChannelConv2d, names=("conv_in",)),
            *_RESNET_RULES,
        ),
    },
)

# The released checkpoints' configurations (stabilityai/stable-video-diffusion-img2vid and -xt), for random weights.
_UNET = {
    "sample_size": 96,
    "in_channels": 8,
    "out_channels": 4,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 768,
    "cross_attention_dim": 1024,
    "transformer_layers_per_block": 1,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "num_attention_heads": (5, 10, 20, 20),
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal",) * 3 + ("DownBlockSpatioTemporal",),
    "up_block_types": ("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * 3,
}
_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 768,
    "scaling_factor": 0.18215,
    "force_upcast": True,
}
IMAGE_ENCODER = {  # CLIP ViT-H/14
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "projection_dim": 1024,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
}
_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "interpolation_type": "linear",
    "timestep_spacing": "leading",
    "timestep_type": "continuous",
    "use_karras_sigmas": True,
    "sigma_min": 0.002,
    "sigma_max": 700.0,
    "steps_offset": 1,
}
_TINY_UNET = {
    "block_out_channels": (64, 64),
    "num_attention_heads": (2, 1),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
}
_TINY = {
    "components": {
        "unet": _TINY_UNET,
        "vae": {"down_block_types": ("DownEncoderBlock2D",) * 2, "block_out_channels": (32, 64)},
        "image_encoder": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    },
    "call": {"height": 32, "width": 32, "num_frames": 3, "num_inference_steps": 2},
}


def _synthetic(num_frames: int, decode_chunk_size: int) -> dict[str, Any]:
    return {
        "pipeline": "StableVideoDiffusionPipeline",
        "components": {
            "unet": ("UNetSpatioTemporalConditionModel", _UNET | {"num_frames": num_frames}),
            "vae": ("AutoencoderKLTemporalDecoder", _VAE),
            "image_encoder": ("CLIPVisionModelWithProjection", IMAGE_ENCODER),
            "scheduler": ("EulerDiscreteScheduler", _SCHEDULER),
            "feature_extractor": ("CLIPImageProcessor", {"crop_size": 224, "size": {"shortest_edge": 224}}),
        },
        "inputs": {"image": "image"},
        "call": {
            "height": 576,
            "width": 1024,
            "num_frames": num_frames,
            "num_inference_steps": 25,
            "decode_chunk_size": decode_chunk_size,
        },
        "tiny": _TINY,
    }


SYNTHETIC = {"svd": _synthetic(14, 14), "svd-xt": _synthetic(25, 8)}
