"""Tiny pipelines of the families that have no synthetic one: their transformers' sizes, and how they are put together.

Each function returns a pipeline, fp32 on the CPU and always with the same weights, and what to call it with.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from block_checks import frozen
from diffusers import (
    AllegroPipeline,
    AnyFlowPipeline,
    AutoencoderKLAllegro,
    AutoencoderKLCosmos,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLMagvit,
    ChronoEditPipeline,
    ClassifierFreeGuidance,
    DDIMScheduler,
    EasyAnimatePipeline,
    EulerAncestralDiscreteScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeliosPipeline,
    HeliosScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    Kandinsky5T2VPipeline,
    Kandinsky6TI2VAPipeline,
    LattePipeline,
    MotifVideoPipeline,
    SanaVideoPipeline,
    SkyReelsV2Pipeline,
)
from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline  # the top level has it with OpenCV only
from tiny_models import tiny_autoencoder_kl, tiny_autoencoder_kl_wan, tiny_relative, tiny_synthetic_pipeline, tiny_video
from torch import Tensor, nn
from transformer_checks import tiny_transformer
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

__all__ = [
    "ALLEGRO",
    "ANYFLOW",
    "CHRONOEDIT",
    "CONSISID",
    "COSMOS",
    "EASYANIMATE",
    "FRAMEPACK",
    "HELIOS",
    "KANDINSKY",
    "KANDINSKY_6",
    "LATTE",
    "MOTIF",
    "SANA_VIDEO",
    "SKYREELS",
    "Guardrail",
    "Made",
    "allegro",
    "anyflow",
    "chronoedit",
    "consisid",
    "consisid_face",
    "cosmos",
    "cosmos_vae",
    "easyanimate",
    "helios",
    "hunyuan_image_to_video",
    "kandinsky",
    "kandinsky_6",
    "latte",
    "motif_video",
    "sana_video",
    "skyreels",
    "wide_vae_of_wan",
]

Made = tuple[Any, dict[str, Any]]

ALLEGRO = {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2, "cross_attention_dim": 48,
           "caption_channels": 12, "sample_width": 6, "sample_height": 4, "sample_frames": 3}  # fmt: skip
ANYFLOW = SKYREELS = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32,
                      "num_layers": 2}  # fmt: skip
CHRONOEDIT = {**ANYFLOW, "in_channels": 36, "image_dim": 32, "added_kv_proj_dim": 24}
HELIOS = {**ANYFLOW, "rope_dim": [4, 4, 4]}
CONSISID = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 4, "in_channels": 8, "out_channels": 4,
            "time_embed_dim": 8, "text_embed_dim": 12, "max_text_seq_length": 6, "sample_width": 6, "sample_height": 4,
            "sample_frames": 9, "use_rotary_positional_embeddings": True, "attention_bias": True,
            "is_train_face": True, "cross_attn_dim_head": 8, "cross_attn_num_heads": 2, "LFE_id_dim": 7,
            "LFE_vit_dim": 8, "LFE_depth": 2, "LFE_dim_head": 4, "LFE_num_heads": 2, "LFE_num_id_token": 2,
            "LFE_num_querie": 3, "LFE_output_dim": 21, "LFE_num_scale": 2}  # fmt: skip
COSMOS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "in_channels": 4, "out_channels": 4,
          "mlp_ratio": 2, "text_embed_dim": 12, "adaln_lora_dim": 4, "max_size": (4, 32, 32), "patch_size": (1, 2, 2),
          "concat_padding_mask": False}  # fmt: skip
# one block of two streams, one block of one
EASYANIMATE = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "patch_size": 2,
               "num_layers": 2, "mmdit_layers": 1, "time_embed_dim": 8, "text_embed_dim": 12,
               "after_norm": True}  # fmt: skip
FRAMEPACK = {"kind": HunyuanVideoFramepackTransformer3DModel, "has_image_proj": True, "image_proj_dim": 8,
             "has_clean_x_embedder": True}  # fmt: skip
KANDINSKY = {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 12, "in_text_dim2": 6, "time_dim": 8,
             "model_dim": 32, "ff_dim": 24, "num_text_blocks": 1, "num_visual_blocks": 2,
             "axes_dims": (4, 6, 6)}  # fmt: skip
# as released: rotary tables between the streams, gates of the other one, each stream modulated by its own timestep
KANDINSKY_6 = {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 12, "in_text_dim2": 6, "time_dim": 8,
               "model_dim": 32, "ff_dim": 24, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 6, 6),
               "in_audio_dim": 3, "out_audio_dim": 3, "model_dim_a": 48, "time_dim_a": 8, "ff_dim_a": 24,
               "axes_dims_a": (4, 6, 6), "ca_rope": True, "cross_gates": True, "fix_modulation": True,
               "visual_token_type_num_embeddings": 2}  # fmt: skip
LATTE = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "in_channels": 4, "out_channels": 8,
         "cross_attention_dim": 24, "attention_bias": True, "sample_size": 8, "patch_size": 2, "caption_channels": 12,
         "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 10, "norm_type": "ada_norm_single",
         "norm_elementwise_affine": False, "norm_eps": 1e-6, "video_length": 3}  # fmt: skip
# two blocks of two streams, one of one, and one of one that decodes
MOTIF = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "num_single_layers": 2,
         "num_decoder_layers": 1, "text_embed_dim": 12, "image_embed_dim": 8, "rope_axes_dim": (4, 6, 6),
         "enable_text_cross_attention_dual": True, "enable_text_cross_attention_single": True}  # fmt: skip
SANA_VIDEO = {"num_attention_heads": 2, "attention_head_dim": 12, "num_cross_attention_heads": 2, "num_layers": 2,
              "cross_attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 12, "in_channels": 16,
              "out_channels": 16, "attention_bias": True, "sample_size": 4, "rope_max_seq_len": 32}  # fmt: skip


def allegro() -> Made:
    torch.manual_seed(0)
    levels = {"block_out_channels": (8, 8, 8, 8), "temporal_downsample_blocks": (True, True, False, False),
              "temporal_upsample_blocks": (False, True, True, False)}  # fmt: skip
    vae = AutoencoderKLAllegro(layers_per_block=1, norm_num_groups=2, latent_channels=4, **levels)
    vae.enable_tiling()  # stock code decodes no other way
    transformer = tiny_transformer("AllegroTransformer3DModel", ALLEGRO)
    pipe = AllegroPipeline(None, None, frozen(vae), transformer, EulerAncestralDiscreteScheduler())
    call = {"height": 32, "width": 48, "num_frames": 8, "num_inference_steps": 2, "negative_prompt": None}
    return _quiet(pipe), call | _texts((torch.arange(5) < 3)[None].long())


def anyflow() -> Made:
    transformer = tiny_transformer("AnyFlowTransformer3DModel", ANYFLOW)
    scheduler = FlowMapEulerDiscreteScheduler()
    pipe, call = tiny_relative("wan2.1-t2v-1.3b", AnyFlowPipeline, transformer=transformer, scheduler=scheduler)
    return pipe, call | {"guidance_scale": 3.0}


def chronoedit() -> Made:
    transformer = tiny_transformer("ChronoEditTransformer3DModel", CHRONOEDIT)
    return tiny_relative("wan2.1-i2v-14b", ChronoEditPipeline, transformer=transformer)


def consisid() -> Made:
    transformer = tiny_transformer("ConsisIDTransformer3DModel", CONSISID)
    pipe, call = tiny_relative("cogvideox-5b-i2v", ConsisIDPipeline, transformer=transformer)
    return pipe, call | consisid_face(1)


def consisid_face(batch: int) -> dict[str, Any]:
    """What the transformer is told of a face."""
    generator = torch.Generator().manual_seed(2)
    hidden = [torch.randn(batch, 4, 8, generator=generator) for _ in range(2)]
    return {"id_cond": torch.randn(batch, 7, generator=generator), "id_vit_hidden": hidden}


class Guardrail(nn.Module):
    """Stands in for Cosmos', which lets nobody go without it: lets everything pass."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def cosmos_vae() -> Any:
    return AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(8, 8, 8, 8), decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,), resolution=64, num_layers=1, spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )  # fmt: skip


def wide_vae_of_wan() -> Any:
    """With as many latent channels as the released one has."""
    return tiny_autoencoder_kl_wan(z_dim=16, latents_mean=[0.0] * 16, latents_std=[1.0] * 16)


def cosmos(
    module: str, name: str, vae: nn.Module, scheduler: Any, config: dict[str, Any], given: dict[str, Any]
) -> Made:
    """The pipeline called ``name`` of that ``module`` of diffusers, without a padding mask, which takes torchvision."""
    kind = getattr(importlib.import_module(f"diffusers.pipelines.cosmos.pipeline_{module}"), name)
    torch.manual_seed(0)
    pipe = kind(
        text_encoder=None, tokenizer=None, vae=frozen(vae), scheduler=scheduler, safety_checker=Guardrail(),
        transformer=tiny_transformer("CosmosTransformer3DModel", COSMOS | config),
    )  # fmt: skip
    texts = {part: torch.randn(1, 5, 12) for part in ("prompt_embeds", "negative_prompt_embeds")}
    call = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 2}
    return _quiet(pipe), call | texts | given


def easyanimate() -> Made:
    torch.manual_seed(0)
    levels = ["Spatial", *["SpatialTemporal"] * 3]
    vae = AutoencoderKLMagvit(
        block_out_channels=[8, 8, 8, 8], layers_per_block=1, latent_channels=4, norm_num_groups=2,
        down_block_types=[f"{level}DownBlock3D" for level in levels],
        up_block_types=[f"{level}UpBlock3D" for level in levels], spatial_group_norm=False,
    )  # fmt: skip
    transformer = tiny_transformer("EasyAnimateTransformer3DModel", EASYANIMATE)
    pipe = EasyAnimatePipeline(frozen(vae), None, None, transformer, FlowMatchEulerDiscreteScheduler())
    call = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2}
    return _quiet(pipe), call | _texts(torch.ones(1, 5))


def helios(**options: Any) -> Made:
    transformer = tiny_transformer("HeliosTransformer3DModel", HELIOS | options)
    scheduler = HeliosScheduler(stages=1, stage_range=[0, 1], use_dynamic_shifting=True)
    pipe, call = tiny_relative("wan2.1-t2v-1.3b", HeliosPipeline, transformer=transformer, scheduler=scheduler)
    return pipe, call | {"history_sizes": [4, 2, 1], "num_latent_frames_per_chunk": 3, "num_frames": 18}


def hunyuan_image_to_video(pipeline_class: type[Any], **config: Any) -> Made:
    """Of the parts of the text-to-video pipeline, with a transformer of another configuration, or another ``kind``."""
    is_1_5 = pipeline_class is HunyuanVideo15ImageToVideoPipeline
    pipe, call = tiny_synthetic_pipeline("hunyuanvideo1.5-480p" if is_1_5 else "hunyuanvideo")
    parts = dict(pipe.components)
    if config:
        kind = config.pop("kind", HunyuanVideoTransformer3DModel)
        parts["transformer"] = frozen(kind(**dict(parts["transformer"].config) | config))
    for part in ("image_processor", "image_encoder", "feature_extractor"):
        if part in pipeline_class.__init__.__annotations__:
            parts[part] = None
    if "image_encoder" in parts:
        vision = SiglipVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                                    image_size=28, patch_size=14)  # fmt: skip
        parts["image_encoder"] = SiglipVisionModel(vision).eval()
        parts["feature_extractor"] = SiglipImageProcessor(size={"height": 28, "width": 28})
    texts = {name: value for name, value in call.items() if isinstance(value, Tensor)}
    shape = {} if is_1_5 else {"height": 32, "width": 32}
    given = {"image": tiny_video(1, 32, 32)[0], "num_frames": 5, "num_inference_steps": 2}
    return _quiet(pipeline_class(**parts)), texts | shape | given


def _vae_of_hunyuan_video() -> Any:
    widths = (8, 8, 8, 8)
    return frozen(
        AutoencoderKLHunyuanVideo(block_out_channels=widths, layers_per_block=1, latent_channels=4, norm_num_groups=4)
    )


def kandinsky(pipeline_class: type[Any] = Kandinsky5T2VPipeline) -> Made:
    """In bfloat16, which the family is made for; its VAE in float32, or a decode would be rounded otherwise."""
    torch.manual_seed(0)
    vae = _vae_of_hunyuan_video()
    encode = vae.encode
    vae.encode = lambda x, *args, **kwargs: encode(x.float(), *args, **kwargs)  # the pipeline encodes in bfloat16
    transformer = tiny_transformer("Kandinsky5Transformer3DModel", {**KANDINSKY, "visual_cond": True}, torch.bfloat16)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = pipeline_class(
        **parts,
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
    call: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 17, "num_inference_steps": 2}
    for which in ("", "negative_"):
        call |= {
            f"{which}prompt_embeds_qwen": torch.randn(1, 5, 12).bfloat16(),
            f"{which}prompt_embeds_clip": torch.randn(1, 6).bfloat16(),
            f"{which}prompt_cu_seqlens": torch.tensor([0, 5]),
        }
    return _quiet(pipe), call


def kandinsky_6() -> Made:
    """Without sound, for which the pipeline would need a decoder and a vocoder."""
    torch.manual_seed(0)
    pipe = Kandinsky6TI2VAPipeline(
        tiny_transformer("Kandinsky6Transformer3DModel", KANDINSKY_6),
        _vae_of_hunyuan_video(),
        *[None] * 4,
        FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
    call = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 2, "sample_audio": False}
    for which in ("", "negative_"):
        call |= {f"{which}prompt_embeds": torch.randn(1, 5, 12), f"{which}pooled_prompt_embeds": torch.randn(1, 6)}
    return _quiet(pipe), call


def latte() -> Made:
    torch.manual_seed(0)
    pipe = LattePipeline(
        None, None, tiny_autoencoder_kl(), tiny_transformer("LatteTransformer3DModel", LATTE), DDIMScheduler()
    )
    texts = {name: torch.randn(1, 5, 12) for name in ("prompt_embeds", "negative_prompt_embeds")}
    call = {"height": 16, "width": 16, "video_length": 3, "num_inference_steps": 2, "negative_prompt": None}
    return _quiet(pipe), call | texts


class _SeesImages(SiglipVisionModel):
    """Stands for the text encoder, whose part for images an image-to-video pipeline takes."""

    @property
    def vision_tower(self) -> SiglipVisionModel:
        return self


def motif_video(pipeline_class: type[Any] = MotifVideoPipeline) -> Made:
    torch.manual_seed(0)
    vision = SiglipVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                                image_size=28, patch_size=14)  # fmt: skip
    pipe = pipeline_class(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        wide_vae_of_wan(),
        _SeesImages(vision).eval(),
        None,
        tiny_transformer("MotifVideoTransformer3DModel", MOTIF),
        ClassifierFreeGuidance(),
        SiglipImageProcessor(size={"height": 28, "width": 28}),
    )
    call = {"prompt": None, "height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 2}
    return _quiet(pipe), call | _texts((torch.arange(5) < 3)[None])


def sana_video(pipeline_class: type[Any] = SanaVideoPipeline) -> Made:
    torch.manual_seed(0)
    transformer = tiny_transformer("SanaVideoTransformer3DModel", SANA_VIDEO)
    pipe = pipeline_class(None, None, wide_vae_of_wan(), transformer, FlowMatchEulerDiscreteScheduler())
    call = {"height": 32, "width": 32, "frames": 9, "num_inference_steps": 2, "negative_prompt": None,
            "use_resolution_binning": False}  # fmt: skip
    return _quiet(pipe), call | _texts((torch.arange(5) < 3)[None].long())


def skyreels() -> Made:
    transformer = tiny_transformer("SkyReelsV2Transformer3DModel", SKYREELS)
    return tiny_relative("wan2.1-t2v-1.3b", SkyReelsV2Pipeline, transformer=transformer)


def _texts(mask: Tensor) -> dict[str, Tensor]:
    texts = {}
    for which in ("", "negative_"):
        texts[f"{which}prompt_embeds"] = torch.randn(1, 5, 12)
        texts[f"{which}prompt_attention_mask"] = mask
    return texts


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe
