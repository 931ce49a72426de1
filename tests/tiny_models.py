"""Tiny random-weight pipelines with the structure of the real ones: seconds on one CPU core, no downloads."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    SparseControlNetModel,
    StableVideoDiffusionPipeline,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
from PIL import Image
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from vidaccel.bench.synthetic import build_pipeline, pipeline_inputs, specification

__all__ = [
    "tiny_animatediff_pipeline",
    "tiny_autoencoder_kl",
    "tiny_autoencoder_kl_cogvideox",
    "tiny_autoencoder_kl_hunyuan_video",
    "tiny_autoencoder_kl_hunyuanvideo15",
    "tiny_autoencoder_kl_ltx_video",
    "tiny_autoencoder_kl_mochi",
    "tiny_autoencoder_kl_wan",
    "tiny_controlnet",
    "tiny_motion_unet",
    "tiny_relative",
    "tiny_sparse_controlnet",
    "tiny_svd_pipeline",
    "tiny_svd_unet",
    "tiny_synthetic_pipeline",
    "tiny_video",
]

CONTEXT_DIM = 32


def tiny_svd_pipeline() -> StableVideoDiffusionPipeline:
    """Stable Video Diffusion, fp32 on the CPU: 64 channels, head dims 32 and 64, 3 frames, VAE factor 2.

    Made for clips of 16 x 16 pixels or more; the weights are always the same.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = {"unet": _svd_unet(), "vae": _vae(), "image_encoder": _image_encoder()}
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


def tiny_svd_unet(**options: Any) -> UNetSpatioTemporalConditionModel:
    """The UNet of :func:`tiny_svd_pipeline`, or one with other ``options``."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = _svd_unet(**options)
        _leave_the_initial_values(unet)
    return unet


def tiny_animatediff_pipeline(pipeline_class: type[DiffusionPipeline] = AnimateDiffPipeline, **components: Any) -> Any:
    """AnimateDiff or a variant of it, for text given as ``prompt_embeds`` ``[1, 77, 32]``; VAE factor 2.

    Its UNet is ``tiny_motion_unet``'s unless ``components`` has one; what else the class wants is in there too.
    """
    absent = {"text_encoder": None, "tokenizer": None, "motion_adapter": None}
    scheduler = DDIMScheduler(beta_schedule="linear", steps_offset=1, clip_sample=False)
    defaults = absent | {"unet": components.pop("unet", None) or tiny_motion_unet()}
    pipe = pipeline_class(vae=tiny_autoencoder_kl(), scheduler=scheduler, **defaults, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_motion_unet(seed: int = 0, **options: Any) -> UNetMotionModel:
    """AnimateDiff's UNet: 64 channels, head dim 32, a text of width 32."""
    config = {
        "sample_size": 16,
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
        "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
        "block_out_channels": (64, 64),
        "layers_per_block": 1,
        "num_attention_heads": 2,
        "motion_num_attention_heads": 2,
        "cross_attention_dim": CONTEXT_DIM,
    }
    return _seeded(UNetMotionModel, config | options, seed)


def tiny_controlnet(seed: int = 0) -> ControlNetModel:
    """A ControlNet for :func:`tiny_motion_unet`."""
    config = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "conditioning_embedding_out_channels": (16, 32),  # halves the sides, as the VAE does
    }
    return _seeded(ControlNetModel, config | _CONTROLNET, seed)


def tiny_sparse_controlnet() -> SparseControlNetModel:
    """A SparseCtrl model for :func:`tiny_motion_unet`, which takes latents of key frames."""
    config = {
        "conditioning_channels": 4,
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
        "motion_num_attention_heads": 2,
    }
    return _seeded(SparseControlNetModel, config | _CONTROLNET)


_CONTROLNET = {
    "block_out_channels": (64, 64),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": CONTEXT_DIM,
}


def _seeded(model_class: type[nn.Module], config: dict[str, Any], seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(**config).eval()
        _leave_the_initial_values(model)
    return model


def _drawn(vae_class: type[nn.Module], config: dict[str, Any], seed: int = 0) -> Any:
    """A video VAE, no parameter of which is left at 0 or 1."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = vae_class(**config).eval()
        for parameter in vae.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return vae


def tiny_autoencoder_kl_cogvideox(**options: Any) -> AutoencoderKLCogVideoX:
    """CogVideoX's video VAE, on the CPU: 4 latent channels, 8 and 16 channels, factors 8 and 4, 64-pixel tiles."""
    config = {
        "latent_channels": 4,
        "block_out_channels": (8, 8, 8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_height": 64,
        "sample_width": 64,
    }
    return _drawn(AutoencoderKLCogVideoX, config | options)


def tiny_autoencoder_kl_hunyuanvideo15(**options: Any) -> AutoencoderKLHunyuanVideo15:
    """HunyuanVideo 1.5's video VAE, on the CPU: 4 latent channels, 8 to 32 channels, factors 16 and 4."""
    config = {"latent_channels": 4, "block_out_channels": (8, 8, 16, 32, 32), "layers_per_block": 1}
    return _drawn(AutoencoderKLHunyuanVideo15, config | options)


def tiny_autoencoder_kl_hunyuan_video(**options: Any) -> AutoencoderKLHunyuanVideo:
    """HunyuanVideo's video VAE, on the CPU: 4 latent channels, 8 to 32 channels, factors 8 and 4."""
    config = {
        "latent_channels": 4,
        "block_out_channels": (8, 16, 32, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    return _drawn(AutoencoderKLHunyuanVideo, config | options)


def tiny_autoencoder_kl_ltx_video(**options: Any) -> AutoencoderKLLTXVideo:
    """LTX-Video's VAE, on the CPU: 4 latent channels, 8 channels, a factor of 2."""
    config = {
        "block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1, 1),
        "spatio_temporal_scaling": (True, False),
        "decoder_spatio_temporal_scaling": (True, False),
        "decoder_inject_noise": (False, False, False),
        "upsample_residual": (False, False),
        "upsample_factor": (1, 1),
        "latent_channels": 4,
        "patch_size": 1,
    }
    return _drawn(AutoencoderKLLTXVideo, config | options)


def tiny_autoencoder_kl_mochi(**options: Any) -> AutoencoderKLMochi:
    """Mochi's video VAE, on the CPU: 12 latent channels, 32 and 64 channels, factors 8 and 6."""
    config = {
        "encoder_block_out_channels": (32,) * 4,
        "decoder_block_out_channels": (32, 32, 32, 64),
        "layers_per_block": (1, 1, 1, 1, 1),
    }
    return _drawn(AutoencoderKLMochi, config | options)


def tiny_autoencoder_kl_wan(seed: int = 0, **options: Any) -> AutoencoderKLWan:
    """Wan's video VAE, on the CPU: 4 latent channels, 8 to 32 channels, factors 8 and 4."""
    config = {
        "base_dim": 8,
        "z_dim": 4,
        "num_res_blocks": 1,
        "latents_mean": [0.0] * 4,
        "latents_std": [1.0] * 4,
    }
    return _drawn(AutoencoderKLWan, config | options, seed)


def tiny_autoencoder_kl() -> AutoencoderKL:
    """The image VAE of the text-to-video pipelines, on the CPU: 32 and 64 channels, factor 2, 16-pixel tiles."""
    config = {
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
        "block_out_channels": (32, 64),
        "sample_size": 16,
    }
    return _seeded(AutoencoderKL, config)


def tiny_synthetic_pipeline(name: str) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """The synthetic pipeline called ``name``, tiny and fp32 on the CPU, and what to call it with."""
    specified, cpu = specification(name, "tiny"), torch.device("cpu")
    pipe = build_pipeline(specified, cpu, torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for model in pipe.components.values():
            if isinstance(model, nn.Module):
                _leave_the_initial_values(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe, specified["call"] | pipeline_inputs(specified, cpu, torch.float32)


def tiny_relative(name: str, pipeline_class: type[DiffusionPipeline], **components: Any) -> tuple[Any, dict[str, Any]]:
    """A ``pipeline_class`` made of what the synthetic pipeline called ``name`` has, and what to call that with.

    ``components`` come in place of that pipeline's, or beside them.
    """
    pipe, arguments = tiny_synthetic_pipeline(name)
    taken = inspect.signature(pipeline_class.__init__).parameters
    shared = {part: model for part, model in pipe.components.items() if part in taken}
    relative = pipeline_class(**{**shared, **components})
    relative.set_progress_bar_config(disable=True)
    return relative, arguments


def tiny_video(frames: int, height: int, width: int) -> list[Image.Image]:
    """Pictures of noise, always the same."""
    pixels = torch.randint(256, (frames, height, width, 3), generator=torch.Generator().manual_seed(0))
    return [Image.fromarray(picture.byte().numpy()) for picture in pixels]


def _svd_unet(**options: Any) -> UNetSpatioTemporalConditionModel:
    config = {
        "sample_size": 16,
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        "block_out_channels": (64, 64),
        "num_attention_heads": (2, 1),  # head dim 32 in the outer level, 64 in the middle
        "layers_per_block": 1,
        "cross_attention_dim": CONTEXT_DIM,
        "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": 3 * 32,
        "num_frames": 3,
    }
    return UNetSpatioTemporalConditionModel(**config | options).eval()


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
    """Shift norms, biases and blend factors off 1, 0 and 0.5, where a kernel that forgets them would still pass.

    Weights that start at zero would switch off whatever comes before them.
    """
    for parameter in model.parameters():
        if parameter.ndim <= 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
        elif not parameter.any():
            nn.init.normal_(parameter, std=0.02)
