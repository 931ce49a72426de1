"""AnimateDiff, on SD 1.5 and SDXL: an image UNet with motion modules between its blocks, per-frame VAE.

What the family offers:

* the pipeline repeats the text for every frame, and it stays the same for all steps (``text_keys_values``);
* the spatial transformers leave channels-last and copy back (``channels_last``);
* GEGLU, norms and residuals are a quarter of the time of an eager step.

Its ControlNets are the same blocks. PIA's UNet only has more input channels.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.controlnets.controlnet_sparsectrl import SparseControlNetModel
from diffusers.models.unets.unet_motion_model import UNetMotionModel

from vidaccel.blocks.unet.activations import FusedGEGLU
from vidaccel.blocks.unet.attention import FusedTextTransformerBlock
from vidaccel.blocks.unet.attention_processor import Processor
from vidaccel.blocks.unet.convolution import FusedFewChannelConv2d
from vidaccel.blocks.unet.normalization import FusedGroupNorm
from vidaccel.blocks.unet.resnet import FusedResnetBlock2D
from vidaccel.blocks.unet.text_context import TextSource
from vidaccel.blocks.unet.transformer_2d import FusedTransformer2DModel
from vidaccel.blocks.unet.unet_motion_model import (
    FusedAnimateDiffTransformer3D,
    FusedCrossAttnUpBlockMotion,
    FusedUpBlockMotion,
)
from vidaccel.blocks.unet.upsampling import FusedUpsample2D
from vidaccel.pipelines.autoencoder_kl import TINY_VAE, VAE
from vidaccel.sites.rules import ChannelsLastWeights, Family, Swap

__all__ = ["FAMILY", "SYNTHETIC"]

_BLOCK_RULES = (
    Swap(FusedTransformer2DModel),
    Swap(FusedTextTransformerBlock),
    Swap(FusedAnimateDiffTransformer3D),
    Swap(FusedGEGLU),
    Swap(FusedResnetBlock2D),
    Swap(FusedUpsample2D),
    Swap(FusedFewChannelConv2d, names=("conv_in",)),
    Swap(FusedGroupNorm, names=("norm", "conv_norm_out")),
    Processor(),
)
_CONTROLNET_RULES = (ChannelsLastWeights(ControlNetModel), *_BLOCK_RULES)

FAMILY = Family(
    name="animatediff",
    pipelines=(
        "AnimateDiffPipeline",
        "AnimateDiffControlNetPipeline",
        "AnimateDiffPAGPipeline",
        "AnimateDiffSDXLPipeline",
        "AnimateDiffSparseControlNetPipeline",
        "AnimateDiffVideoToVideoPipeline",
        "AnimateDiffVideoToVideoControlNetPipeline",
        "PIAPipeline",
    ),
    rules={
        "UNetMotionModel": (
            TextSource(UNetMotionModel),
            ChannelsLastWeights(UNetMotionModel),
            Swap(FusedUpBlockMotion),
            Swap(FusedCrossAttnUpBlockMotion),
            *_BLOCK_RULES,
        ),
        "ControlNetModel": _CONTROLNET_RULES,
        "MultiControlNetModel": _CONTROLNET_RULES,
        "SparseControlNetModel": (
            TextSource(SparseControlNetModel),
            ChannelsLastWeights(SparseControlNetModel),
            *_BLOCK_RULES,
        ),
    },
)

# Stable Diffusion 1.5 with guoyww/animatediff-motion-adapter-v1-5-2, and SDXL with its adapter (sdxl-beta).
_SD15_UNET = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "num_attention_heads": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlockMotion",) * 3 + ("DownBlockMotion",),
    "up_block_types": ("UpBlockMotion",) + ("CrossAttnUpBlockMotion",) * 3,
    "layers_per_block": 2,
    "motion_num_attention_heads": 8,
    "motion_max_seq_length": 32,
    "use_motion_mid_block": True,
}
_SDXL_UNET = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "num_attention_heads": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlockMotion",) + ("CrossAttnDownBlockMotion",) * 2,
    "up_block_types": ("CrossAttnUpBlockMotion",) * 2 + ("UpBlockMotion",),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "motion_num_attention_heads": 8,
    "motion_max_seq_length": 32,
    "use_motion_mid_block": False,
}
_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "linear",
    "steps_offset": 1,
    "clip_sample": False,
    "timestep_spacing": "linspace",
}
_TINY_UNET = {
    "cross_attention_dim": 32,
    "block_out_channels": (64, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
    "num_attention_heads": 2,
    "motion_num_attention_heads": 2,
}
_TINY_SDXL_UNET = _TINY_UNET | {
    "down_block_types": ("DownBlockMotion", "CrossAttnDownBlockMotion"),
    "up_block_types": ("CrossAttnUpBlockMotion", "UpBlockMotion"),
    "transformer_layers_per_block": (1, 2),
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
}
_TINY_CALL = {"height": 32, "width": 32, "num_frames": 3, "num_inference_steps": 2}


def _synthetic(
    pipeline: str, unet: dict[str, Any], vae: dict[str, Any], side: int, tiny_unet: dict[str, Any], **inputs: Any
) -> dict[str, Any]:
    """``inputs`` are the shapes of the text's embeddings, full and tiny."""
    return {
        "pipeline": pipeline,
        "components": {
            "unet": ("UNetMotionModel", unet),
            "vae": ("AutoencoderKL", vae),
            "scheduler": ("DDIMScheduler", _SCHEDULER),
        },
        "inputs": {name: full for name, (full, _) in inputs.items()},
        "call": {"height": side, "width": side, "num_frames": 16, "num_inference_steps": 50},
        "tiny": {
            "components": {"unet": tiny_unet, "vae": TINY_VAE},
            "inputs": {name: tiny for name, (_, tiny) in inputs.items()},
            "call": _TINY_CALL,
        },
    }


SYNTHETIC = {
    "animatediff": _synthetic(
        "AnimateDiffPipeline",
        _SD15_UNET,
        VAE,
        512,
        _TINY_UNET,
        prompt_embeds=((1, 77, 768), (1, 77, 32)),
        negative_prompt_embeds=((1, 77, 768), (1, 77, 32)),
    ),
    "animatediff-sdxl": _synthetic(
        "AnimateDiffSDXLPipeline",
        _SDXL_UNET,
        VAE | {"sample_size": 1024, "scaling_factor": 0.13025},
        1024,
        _TINY_SDXL_UNET,
        prompt_embeds=((1, 77, 2048), (1, 77, 32)),
        negative_prompt_embeds=((1, 77, 2048), (1, 77, 32)),
        pooled_prompt_embeds=((1, 1280), (1, 16)),
        negative_pooled_prompt_embeds=((1, 1280), (1, 16)),
    ),
}
