"""I2VGenXL (image and text to video): ModelScope's blocks around another entry.

The UNet itself prepares what it knows of the image: a few convolutions and a transformer over frames of four channels,
the same at every step. They belong to the top-level model, which no rule touches.
"""

from __future__ import annotations

from diffusers.models.unets.unet_i2vgen_xl import I2VGenXLUNet

from vidaccel.blocks.unet.text_context import TextSource
from vidaccel.pipelines.autoencoder_kl import TINY_VAE, VAE
from vidaccel.pipelines.stable_video_diffusion import IMAGE_ENCODER
from vidaccel.pipelines.text_to_video_synthesis import BLOCK_RULES, TINY_UNET, UNET
from vidaccel.sites.rules import ChannelsLastWeights, Family

__all__ = ["FAMILY", "SYNTHETIC"]

FAMILY = Family(
    name="i2vgen_xl",
    pipelines=("I2VGenXLPipeline",),
    rules={
        "I2VGenXLUNet": (
            TextSource(I2VGenXLUNet, repeats_text=True),
            ChannelsLastWeights(I2VGenXLUNet),
            *BLOCK_RULES,
        )
    },
)

# The released checkpoint's configuration (ali-vilab/i2vgen-xl).
_SCHEDULER = {
    "beta_schedule": "squaredcos_cap_v2",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
_TINY_IMAGE_ENCODER = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "projection_dim": 32,
}

SYNTHETIC = {
    "i2vgen-xl": {
        "pipeline": "I2VGenXLPipeline",
        "components": {
            "unet": ("I2VGenXLUNet", UNET),
            "vae": ("AutoencoderKL", VAE),
            "image_encoder": ("CLIPVisionModelWithProjection", IMAGE_ENCODER),
            "scheduler": ("DDIMScheduler", _SCHEDULER),
            "feature_extractor": ("CLIPImageProcessor", {"crop_size": 224, "size": {"shortest_edge": 224}}),
        },
        "inputs": {"image": "image", "prompt_embeds": (1, 77, 1024), "negative_prompt_embeds": (1, 77, 1024)},
        "call": {"height": 704, "width": 1280, "num_frames": 16, "num_inference_steps": 50},
        "tiny": {
            "components": {"unet": TINY_UNET, "vae": TINY_VAE, "image_encoder": _TINY_IMAGE_ENCODER},
            "inputs": {"prompt_embeds": (1, 7, 32), "negative_prompt_embeds": (1, 7, 32)},
            "call": {"height": 32, "width": 32, "num_frames": 3, "num_inference_steps": 2},
        },
    }
}
