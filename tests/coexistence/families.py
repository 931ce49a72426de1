"""The families of the matrix: a tiny pipeline of each, always with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import diffusers
import tiny_pipelines
from coexistence.feature import Subject
from tiny_models import (
    tiny_animatediff_pipeline,
    tiny_controlnet,
    tiny_sparse_controlnet,
    tiny_synthetic_pipeline,
    tiny_video,
)
from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ["FAMILIES", "ROUNDED", "build"]

ROUNDED = ("Cosmos 2",)  # whose guardrail is given pixels of 8 bits

SMALL_UNET = {"height": 16, "width": 16}


def _synthetic(name: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    pipe, arguments = tiny_synthetic_pipeline(name)
    return pipe, arguments | changes


def _controlled(pipeline_class: str, make: Callable[[], Any], **arguments: Any) -> tuple[Any, dict[str, Any]]:
    """AnimateDiff with one of its ControlNets."""
    pipe = tiny_animatediff_pipeline(getattr(diffusers, pipeline_class), controlnet=make())
    _, call = tiny_synthetic_pipeline("animatediff")
    return pipe, call | SMALL_UNET | {"conditioning_frames": tiny_video(3, 16, 16)} | arguments


def _cosmos() -> tuple[Any, dict[str, Any]]:
    config = {"extra_pos_embed_type": None, "in_channels": 17, "out_channels": 16}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    given = {"image": tiny_video(1, 32, 48)[0]}
    return tiny_pipelines.cosmos(
        "cosmos2_video2world", "Cosmos2VideoToWorldPipeline", tiny_pipelines.wide_vae_of_wan(), scheduler, config, given
    )


FAMILIES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "AnimateDiff": partial(_synthetic, "animatediff", **SMALL_UNET),
    "ControlNet": partial(_controlled, "AnimateDiffControlNetPipeline", tiny_controlnet),
    "SparseCtrl": partial(
        _controlled, "AnimateDiffSparseControlNetPipeline", tiny_sparse_controlnet, controlnet_frame_indices=[0, 1, 2]
    ),
    "SVD": partial(_synthetic, "svd"),
    "ModelScope": partial(_synthetic, "modelscope", **SMALL_UNET),
    "I2VGenXL": partial(_synthetic, "i2vgen-xl"),
    "CogVideoX": partial(_synthetic, "cogvideox-5b"),
    "HunyuanVideo": partial(_synthetic, "hunyuanvideo"),
    "HunyuanVideo 1.5": partial(_synthetic, "hunyuanvideo1.5-480p"),
    "LTX": partial(_synthetic, "ltx-video-2b"),
    "LTX-2": partial(_synthetic, "ltx-2"),
    "Mochi": partial(_synthetic, "mochi-1"),
    "Wan 2.1": partial(_synthetic, "wan2.1-t2v-1.3b", num_frames=5),
    "Wan 2.2 A14B": partial(_synthetic, "wan2.2-t2v-a14b"),
    "Wan VACE": partial(_synthetic, "wan2.1-vace-1.3b"),
    # not Allegro: its VAE decodes whole tiles of 320 pixels, and leaves a tiny clip black
    "AnyFlow": tiny_pipelines.anyflow,
    "ChronoEdit": tiny_pipelines.chronoedit,
    "ConsisID": tiny_pipelines.consisid,
    "Cosmos 2": _cosmos,
    "EasyAnimate": tiny_pipelines.easyanimate,
    "Helios": tiny_pipelines.helios,
    "Kandinsky 5": tiny_pipelines.kandinsky,
    "Kandinsky 6": tiny_pipelines.kandinsky_6,
    "Latte": tiny_pipelines.latte,
    "Motif-Video": tiny_pipelines.motif_video,
    "Sana-Video": tiny_pipelines.sana_video,
    "SkyReels-V2": tiny_pipelines.skyreels,
}


def build(family: str) -> Subject:
    """A new pipeline of ``family``."""
    pipe, arguments = FAMILIES[family]()
    return Subject(family, pipe, arguments, _call(family))


@cache
def _call(family: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the denoiser's first call in a clip."""
    calls: list[Any] = []
    subject = Subject(family, *FAMILIES[family]())
    hook = subject.denoiser.register_forward_pre_hook(
        lambda module, *call: calls.append(tree_map(_copied, call)), with_kwargs=True
    )
    subject.clip()
    hook.remove()
    return calls[0]


def _copied(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x
