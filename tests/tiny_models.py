"""Tiny random-weight pipelines with the structure of the real ones: seconds on one CPU core, no downloads."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

__all__ = ["tiny_autoencoder_kl", "tiny_svd_pipeline"]

CONTEXT_DIM = 32


def tiny_svd_pipeline(seed: int = 0) -> StableVideoDiffusionPipeline:
    """Stable Video Diffusion, fp32 on the CPU: 64 channels, head dims 32 and 64, 3 frames, VAE factor 2.

    Made for 32 x 32 or 64 x 64 pixels; the same ``seed`` gives the same weights.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        models = {"unet": _unet(), "vae": _vae(), "image_encoder": _image_encoder()}
        for model in models.values():
            _leave_the_initial_values(model)
    pipe = StableVideoDiffusionPipeline(
        **models,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            interpolation_type="linear",
            timestep_type="continuous",
            timestep_spacing="leading",
            sigma_min=0.002,
            sigma_max=700.0,
            steps_offset=1,
            use_karras_sigmas=True,
        ),
        feature_extractor=CLIPImageProcessor(crop_size=224, size={"shortest_edge": 224}),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_autoencoder_kl(seed: int = 0) -> AutoencoderKL:
    """The image VAE of the text-to-video pipelines, on the CPU: 32 and 64 channels, factor 2, 16-pixel tiles."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=(32, 64),
            sample_size=16,
        ).eval()
        _leave_the_initial_values(vae)
    return vae


def _unet() -> UNetSpatioTemporalConditionModel:
    return UNetSpatioTemporalConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(64, 64),
        num_attention_heads=(2, 1),  # head dim 32 in the outer level, 64 in the middle
        layers_per_block=1,
        cross_attention_dim=CONTEXT_DIM,
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=3 * 32,
        num_frames=3,
    ).eval()


def _vae() -> AutoencoderKLTemporalDecoder:
    return AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=2,  # with one, the decoder never gets to its attention
        sample_size=32,
    ).eval()


def _image_encoder() -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=37,
        projection_dim=CONTEXT_DIM,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=224,  # the pipeline resizes to this, whatever the encoder
        patch_size=56,
    )
    return CLIPVisionModelWithProjection(config).eval()


def _leave_the_initial_values(model: nn.Module) -> None:
    """Shift norms, biases and blend factors off 1, 0 and 0.5, where a kernel that forgets them would still pass."""
    for parameter in model.parameters():
        if parameter.ndim <= 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
