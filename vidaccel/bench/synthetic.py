"""Whole pipelines with random weights, built from configurations: no download, no checkpoint, any size.

What is built is declared in ``samples/models/configurations/<name>.json``::

    {
      "source": "stabilityai/stable-video-diffusion-img2vid",
      "pipeline": "StableVideoDiffusionPipeline",
      "components": {"unet": ["UNetSpatioTemporalConditionModel", {...}], "scheduler": [...], ...},
      "options": {},
      "tiling": true,
      "inputs": {"image": "image", "prompt_embeds": [1, 77, 768]},
      "call": {"height": 576, "width": 1024, "num_frames": 14, "num_inference_steps": 25},
      "tiny": {"components": {"unet": {...}}, "inputs": {...}, "call": {...}}
    }

Component classes are named as diffusers or transformers export them (``"ltx2.LTX2Vocoder"``: a part of a pipeline of
diffusers), with the configuration of the released checkpoint (``source``). What may be missing: ``options``, what else
the pipeline is made with, and ``tiling``, whether the VAE works in tiles. An input is ``"image"`` (a random picture of
the call's size), the shape of a random tensor, ``{"zeros": shape}``, or ``{"mask": shape, "valid": 60}``: the mask of a
text that is padded behind its 60 tokens. ``tiny`` overrides single entries for a dry run on a CPU.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from vidaccel.errors import UsageError, nearest

__all__ = ["build_component", "build_pipeline", "configurations", "pipeline_inputs", "specification"]

_FOLDER = Path(__file__).resolve().parents[2] / "samples" / "models" / "configurations"
_LAYERS = ("num_layers", "num_single_layers")

Specification = dict[str, Any]


def configurations() -> list[str]:
    """The names of all there are, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def specification(name: str, size: str = "full", *, shallow_denoiser: bool = False) -> Specification:
    """What is declared under ``name``, with its ``tiny`` overrides applied if ``size`` says so.

    ``shallow_denoiser``: transformers get as few layers as their tiny ones, for a decode, which they only lead up to.

    Raises:
        UsageError: there is no such declaration, or none at all, as in an installed package.
    """
    names = configurations()
    if not names:
        raise UsageError("--synthetic: the configurations come with the repository, not with the installed package")
    if name not in names:
        raise UsageError(f"--synthetic {name}: unknown{nearest(name, names)}")
    declared = json.loads((_FOLDER / f"{name}.json").read_text())
    tiny = declared["tiny"] if size == "tiny" else {}
    changes = tiny.get("components", {})
    if shallow_denoiser and size != "tiny":
        smallest = declared["tiny"].get("components", {}).get("transformer", {})
        changes = {"transformer": {name: count for name, count in smallest.items() if name in _LAYERS}}
    components = {
        name: (class_name, config | changes.get(name, {}))
        for name, (class_name, config) in declared["components"].items()
    }
    return {
        "pipeline": declared["pipeline"],
        "components": components,
        "options": declared.get("options", {}),
        "tiling": declared.get("tiling", False),
        "inputs": declared["inputs"] | tiny.get("inputs", {}),
        "call": declared["call"] | tiny.get("call", {}),
    }


def build_pipeline(specified: Specification, device: torch.device, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline with random weights, as ``from_pretrained(..., torch_dtype=dtype).to(device)`` would leave it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        components = {
            name: build_component(class_name, config, device, dtype)
            for name, (class_name, config) in specified["components"].items()
        }
    pipeline_class = getattr(diffusers, specified["pipeline"])
    given = components | specified["options"]
    absent = dict.fromkeys(set(inspect.signature(pipeline_class.__init__).parameters) - {"self"} - set(given))
    pipe = pipeline_class(**given, **absent)
    if specified["tiling"]:
        pipe.vae.enable_tiling()
    return pipe


def build_component(class_name: str, config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """A model, scheduler or processor of diffusers or transformers from its configuration alone."""
    component_class = _component_class(class_name)
    if not issubclass(component_class, nn.Module):
        return component_class(**config)
    # A default dtype rather than a cast afterwards: buffers that the model asks for in fp32 stay fp32.
    with _default_dtype(dtype), device:
        if issubclass(component_class, transformers.PreTrainedModel):
            model = component_class(component_class.config_class(**config))
        else:
            model = component_class(**config)
    _settle(model, device, dtype)
    _wake_zero_weights(model)
    return model.eval().requires_grad_(False)


def _component_class(class_name: str) -> Any:
    pipeline, _, name = class_name.rpartition(".")
    if pipeline:
        return getattr(import_module(f"diffusers.pipelines.{pipeline}"), name)
    return getattr(diffusers, name, None) or getattr(transformers, name)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _settle(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Bring along parameters made by ``torch.Tensor([...])``, which heeds neither the device nor the dtype in force."""
    nn.Module.to(model, device)
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if kept & set(name.split(".")) else dtype)


@torch.no_grad()
def _wake_zero_weights(model: nn.Module) -> None:
    """Layers that start at zero would switch whole branches off, and hide what a benchmark or a validation is for."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)


def pipeline_inputs(specified: Specification, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Random inputs for one call of the pipeline."""
    call = specified["call"]
    inputs: dict[str, Any] = {}
    for seed, (name, kind) in enumerate(specified["inputs"].items()):
        if kind == "image":
            pixels = np.random.default_rng(seed).integers(0, 256, (call["height"], call["width"], 3), np.uint8)
            inputs[name] = Image.fromarray(pixels)
        else:
            inputs[name] = _tensor(kind, seed, dtype).to(device)
    return inputs


def _tensor(kind: list[int] | dict[str, Any], seed: int, dtype: torch.dtype) -> Tensor:
    if isinstance(kind, list):
        return torch.randn(kind, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if "zeros" in kind:
        return torch.zeros(kind["zeros"], dtype=dtype)
    shape: list[int] = kind["mask"]
    return (torch.arange(shape[-1]) < kind["valid"]).long().expand(shape)
