"""A diffusers video pipeline, on disk or on the hub: found, judged by its small JSON files, and loaded."""

from __future__ import annotations

import inspect
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import huggingface_hub
import torch
import transformers
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from vidaccel.clips.clip_request import ClipRequest, option_called, pipeline_names
from vidaccel.errors import UsageError, first_line
from vidaccel.patching.families import served_models, unserved_pipeline
from vidaccel.patching.patch import check_choice

__all__ = ["VideoModel", "dtype_of", "find_model", "load_pipeline", "parameters_of_call"]

_SAMPLES = Path(__file__).resolve().parents[2] / "samples"
_BUNDLED_MODEL = _SAMPLES / "models" / "svd-tiny-scenes"
_BUNDLED_IMAGES = _SAMPLES / "images"
_PICKLE_ADVICE = "weights are read as safetensors only; --allow-pickle also loads pickles, which can run any code"
_SMALLEST_MULTIPLE = 8  # diffusers' pipelines insist on it whatever the VAE


@dataclass(frozen=True)
class VideoModel:
    """What is known of a pipeline without its weights.

    Attributes:
        source: Folder or hub id.
        pipeline_class: What it is loaded as.
        components: Class names of its parts, by part.
        defaults: What its ``generation_defaults.json`` suggests for a request; for the bundled model also an image.
        size_multiple: What height and width must be multiples of.
        allow_pickle: Whether weights may be loaded that are not safetensors: such a file can run any code.
    """

    source: str
    pipeline_class: type[DiffusionPipeline]
    components: Mapping[str, str]
    defaults: Mapping[str, Any]
    size_multiple: int
    allow_pickle: bool = False

    def check_patchable(self) -> None:
        """Find out before loading whether ``patch_pipeline`` could do anything.

        Raises:
            UsageError: no part belongs to a family that vidaccel has an adapter for.
        """
        models = self.components.values()
        if set(served_models()).isdisjoint(models):
            raise UsageError(unserved_pipeline(self.pipeline_class.__name__, models))

    def check_sites(self, only: Sequence[str] | None, skip: Sequence[str] | None) -> None:
        """Find out before loading whether ``only`` and ``skip`` name anything.

        Raises:
            UsageError: one of them names no site.
        """
        try:
            with torch.device("meta"):
                components = {part: self._empty(part) for part in self.components if self._empty_class(part)}
        except Exception:  # it may need more than its configuration; then loading will tell
            return
        if components:
            check_choice(SimpleNamespace(components=components), only, skip)

    def _empty(self, part: str) -> nn.Module:
        model_class: Any = self._empty_class(part)
        return model_class.from_config(_load_config(model_class, self.source, subfolder=part))

    def _empty_class(self, part: str) -> type[ModelMixin] | None:
        model_class = getattr(diffusers, self.components[part], None)
        return model_class if isinstance(model_class, type) and issubclass(model_class, ModelMixin) else None


def find_model(source: str | None = None, allow_pickle: bool = False) -> VideoModel:
    """What is at ``source``, a folder or a hub id; the bundled model if None.

    Raises:
        UsageError: there is no model, it is not a video pipeline, or it has parts that are not only weights.
    """
    if source is None:
        if not _BUNDLED_MODEL.is_dir():
            raise UsageError("give --model: the bundled one comes with the repository, not with the installed package")
        source = _from_here(_BUNDLED_MODEL)
    transformers.utils.logging.set_verbosity_error()  # importing a pipeline is reason enough for it to warn
    index = _read_index(source)
    name = index.get("_class_name", "")
    pipeline_class: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    if pipeline_class is None:
        raise UsageError(f"{source}: diffusers {diffusers.__version__} has no pipeline {name!r}")
    if not set(pipeline_names("frames")) & parameters_of_call(pipeline_class).keys():
        raise UsageError(f"{source}: {name} does not make video from text or an image (it takes no num_frames)")
    parts = {part: entry for part, entry in index.items() if isinstance(entry, list) and len(entry) == 2 and entry[1]}
    for part, (library, _) in parts.items():
        if library not in ("diffusers", "transformers") and not hasattr(diffusers.pipelines, str(library)):
            raise UsageError(f"{source}: its {part} is of {library!r}; only diffusers and transformers are imported")
    components = {part: entry[1] for part, entry in parts.items()}
    multiple = _size_multiple(source, components)
    return VideoModel(source, pipeline_class, components, _defaults(source), multiple, allow_pickle)


def _read_index(source: str) -> dict[str, Any]:
    folder = Path(source)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise UsageError(f"{source} is not a diffusers pipeline: it holds no model_index.json")
    if not folder.is_dir() and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        raise UsageError(f"no such model folder: {source}")
    try:
        return _load_config(DiffusionPipeline, source)
    except (OSError, ValueError) as error:
        where = source if folder.is_dir() else f"{source} is no folder here, and the Hugging Face hub does not give it"
        raise UsageError(f"{where}: {first_line(error)}") from error


def _load_config(owner: Any, source: str, **options: Any) -> dict[str, Any]:
    # A hub that cannot be reached is reported once, by the error, and not by every retry.
    huggingface_hub.utils.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return owner.load_config(source, **options)


def _defaults(source: str) -> dict[str, Any]:
    image = None
    if Path(source).resolve() == _BUNDLED_MODEL:
        image = next((_from_here(path) for path in sorted(_BUNDLED_IMAGES.glob("*.png"))), None)
    path = Path(source) / "generation_defaults.json"
    if not path.is_file():
        return {"image": image}
    try:
        values = json.loads(path.read_text())
        options = {option_called(name): value for name, value in values.items()}
        return asdict(ClipRequest(image=image).filled_from(options))
    except (ValueError, AttributeError, UsageError) as error:
        raise UsageError(f"{path}: {error}") from error


def _from_here(path: Path) -> str:
    """The path relative to the current folder where that is possible: records then say nothing of the machine."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _size_multiple(source: str, components: Mapping[str, str]) -> int:
    vae_class = getattr(diffusers, components.get("vae", ""), None)
    if vae_class is None:
        return _SMALLEST_MULTIPLE
    try:
        config = _load_config(vae_class, source, subfolder="vae")
    except (OSError, ValueError) as error:
        raise UsageError(f"{source}: {first_line(error)}") from error
    factor = config.get("spatial_compression_ratio") or config.get("scale_factor_spatial")
    levels = len(config.get("block_out_channels", [0]))
    return max(_SMALLEST_MULTIPLE, factor or 2 ** (levels - 1))


def parameters_of_call(pipeline_class: type[DiffusionPipeline]) -> dict[str, inspect.Parameter]:
    """What a pipeline of this class takes by name when it is called."""
    parameters = list(inspect.signature(pipeline_class.__call__).parameters.values())[1:]
    return {p.name: p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def dtype_of(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype called ``name``; for None float16, and float32 on a CPU, where half precision is slow."""
    return getattr(torch, name or ("float32" if device.type == "cpu" else "float16"))


def load_pipeline(
    model: VideoModel, dtype: torch.dtype, device: torch.device, show_progress: bool = False
) -> DiffusionPipeline:
    """The model's pipeline on ``device``; for float16 from its fp16 files if it has such, else from the plain ones.

    Raises:
        UsageError: it cannot be loaded.
    """
    for library in (diffusers, transformers):
        switch = library.utils.logging
        switch.enable_progress_bar() if show_progress else switch.disable_progress_bar()
    try:
        return _from_pretrained(model.source, dtype, None if model.allow_pickle else True).to(device)
    except torch.OutOfMemoryError:
        raise UsageError(f"{model.source} does not fit into the memory of {device}") from None
    except Exception as error:  # a broken folder can raise anything
        advice = "" if model.allow_pickle or "safetensors" not in str(error) else f" ({_PICKLE_ADVICE})"
        raise UsageError(f"cannot load {model.source}: {first_line(error)}{advice}") from error


def _from_pretrained(source: str, dtype: torch.dtype, safetensors: bool | None) -> DiffusionPipeline:
    """With ``safetensors`` None also from pickles, where there are no safetensors."""
    preferred, other = ("fp16", None) if dtype == torch.float16 else (None, "fp16")
    try:
        return DiffusionPipeline.from_pretrained(source, dtype=dtype, variant=preferred, use_safetensors=safetensors)
    except (OSError, ValueError) as error:
        try:
            return DiffusionPipeline.from_pretrained(source, dtype=dtype, variant=other, use_safetensors=safetensors)
        except (OSError, ValueError) as second:
            # without the variant the message says what is wrong with the folder, not that there is no variant
            raise (second if preferred else error) from None
