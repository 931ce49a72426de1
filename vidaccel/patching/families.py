"""Which adapter, ``pipelines/<family>.py``, serves a model: found by the name of its class, imported when needed.

An adapter that cannot be imported, because diffusers has removed or renamed a class, is switched off with that as the
reason; the other families go on. A model is found through whatever it is wrapped in, and through its base classes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from vidaccel.errors import did_you_mean, first_line

if TYPE_CHECKING:
    from vidaccel.sites.rules import Rule

__all__ = [
    "UNSERVED",
    "off_reason",
    "reason_unserved",
    "rules_for",
    "served_models",
    "served_pipelines",
    "spread_for",
    "unserved_denoiser",
    "unserved_pipeline",
    "unwrapped",
]

logger = logging.getLogger(__name__)


class _Family(NamedTuple):
    """What an adapter serves, by class name; a model that many pipelines share may have an adapter of its own."""

    models: tuple[str, ...]
    pipelines: tuple[str, ...] = ()


_FAMILIES = {
    "allegro": _Family(models=("AllegroTransformer3DModel",), pipelines=("AllegroPipeline",)),
    "animatediff": _Family(
        models=("UNetMotionModel", "ControlNetModel", "MultiControlNetModel", "SparseControlNetModel"),
        pipelines=(
            "AnimateDiffControlNetPipeline",
            "AnimateDiffPAGPipeline",
            "AnimateDiffPipeline",
            "AnimateDiffSDXLPipeline",
            "AnimateDiffSparseControlNetPipeline",
            "AnimateDiffVideoToVideoControlNetPipeline",
            "AnimateDiffVideoToVideoPipeline",
            "PIAPipeline",
        ),
    ),
    "anyflow": _Family(
        models=("AnyFlowTransformer3DModel", "AnyFlowFARTransformer3DModel"),
        pipelines=("AnyFlowFARPipeline", "AnyFlowPipeline"),
    ),
    "autoencoder_kl": _Family(models=("AutoencoderKL",)),
    "autoencoder_kl_cogvideox": _Family(models=("AutoencoderKLCogVideoX",)),
    "autoencoder_kl_hunyuanvideo15": _Family(models=("AutoencoderKLHunyuanVideo15",)),
    "autoencoder_kl_wan": _Family(models=("AutoencoderKLWan",)),
    "chronoedit": _Family(models=("ChronoEditTransformer3DModel",), pipelines=("ChronoEditPipeline",)),
    "cogvideox": _Family(
        models=("CogVideoXTransformer3DModel",),
        pipelines=(
            "CogVideoXFunControlPipeline",
            "CogVideoXImageToVideoPipeline",
            "CogVideoXPipeline",
            "CogVideoXVideoToVideoPipeline",
        ),
    ),
    "consisid": _Family(models=("ConsisIDTransformer3DModel",), pipelines=("ConsisIDPipeline",)),
    "cosmos": _Family(
        models=("CosmosControlNetModel", "CosmosTransformer3DModel"),
        pipelines=(
            "Cosmos2VideoToWorldPipeline",
            "Cosmos2_5_PredictBasePipeline",
            "Cosmos2_5_TransferPipeline",
            "CosmosTextToWorldPipeline",
            "CosmosVideoToWorldPipeline",
        ),
    ),
    "easyanimate": _Family(
        models=("EasyAnimateTransformer3DModel",),
        pipelines=("EasyAnimateControlPipeline", "EasyAnimateInpaintPipeline", "EasyAnimatePipeline"),
    ),
    "helios": _Family(models=("HeliosTransformer3DModel",), pipelines=("HeliosPipeline", "HeliosPyramidPipeline")),
    "hunyuan_video": _Family(
        models=(
            "AutoencoderKLHunyuanVideo",
            "HunyuanVideoTransformer3DModel",
            "HunyuanVideoFramepackTransformer3DModel",
        ),
        pipelines=(
            "HunyuanSkyreelsImageToVideoPipeline",
            "HunyuanVideoFramepackPipeline",
            "HunyuanVideoImageToVideoPipeline",
            "HunyuanVideoPipeline",
        ),
    ),
    "hunyuan_video1_5": _Family(
        models=("HunyuanVideo15Transformer3DModel",),
        pipelines=("HunyuanVideo15ImageToVideoPipeline", "HunyuanVideo15Pipeline"),
    ),
    "i2vgen_xl": _Family(models=("I2VGenXLUNet",), pipelines=("I2VGenXLPipeline",)),
    "kandinsky5": _Family(
        models=("Kandinsky5Transformer3DModel",), pipelines=("Kandinsky5I2VPipeline", "Kandinsky5T2VPipeline")
    ),
    "kandinsky6": _Family(models=("Kandinsky6Transformer3DModel",), pipelines=("Kandinsky6TI2VAPipeline",)),
    "latte": _Family(models=("LatteTransformer3DModel",), pipelines=("LattePipeline",)),
    "ltx": _Family(
        models=("AutoencoderKLLTXVideo", "LTXVideoTransformer3DModel"),
        pipelines=(
            "LTXConditionPipeline",
            "LTXI2VLongMultiPromptPipeline",
            "LTXImageToVideoPipeline",
            "LTXPipeline",
        ),
    ),
    "ltx2": _Family(
        models=("AutoencoderKLLTX2Video", "LTX2VideoTransformer3DModel"),
        pipelines=(
            "LTX2ConditionPipeline",
            "LTX2DFRPipeline",
            "LTX2DFRTemporalRefinePipeline",
            "LTX2HDRPipeline",
            "LTX2ImageToVideoPipeline",
            "LTX2InContextPipeline",
            "LTX2Pipeline",
        ),
    ),
    "mochi": _Family(models=("AutoencoderKLMochi", "MochiTransformer3DModel"), pipelines=("MochiPipeline",)),
    "motif_video": _Family(
        models=("MotifVideoTransformer3DModel",), pipelines=("MotifVideoImage2VideoPipeline", "MotifVideoPipeline")
    ),
    "sana_video": _Family(
        models=("SanaVideoTransformer3DModel",), pipelines=("SanaImageToVideoPipeline", "SanaVideoPipeline")
    ),
    "skyreels_v2": _Family(
        models=("SkyReelsV2Transformer3DModel",),
        pipelines=(
            "SkyReelsV2DiffusionForcingImageToVideoPipeline",
            "SkyReelsV2DiffusionForcingPipeline",
            "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
            "SkyReelsV2ImageToVideoPipeline",
            "SkyReelsV2Pipeline",
        ),
    ),
    "stable_video_diffusion": _Family(
        models=("UNetSpatioTemporalConditionModel", "AutoencoderKLTemporalDecoder"),
        pipelines=("StableVideoDiffusionPipeline",),
    ),
    "text_to_video_synthesis": _Family(
        models=("UNet3DConditionModel",), pipelines=("TextToVideoSDPipeline", "VideoToVideoSDPipeline")
    ),
    "wan": _Family(
        models=("WanTransformer3DModel", "WanVACETransformer3DModel", "WanAnimateTransformer3DModel"),
        pipelines=(
            "LucyEditPipeline",
            "WanAnimatePipeline",
            "WanImageToVideoPipeline",
            "WanPipeline",
            "WanVACEPipeline",
            "WanVideoToVideoPipeline",
        ),
    ),
}
_NO_DENOISER = "it runs no denoiser, only an upsampler or a decoder of latents, which has no fused blocks yet"
# Every other pipeline of diffusers that makes a video, and why it has no adapter.
UNSERVED = {
    "Cosmos3OmniPipeline": "its transformer is a language model with experts, another design than Cosmos 1 and 2",
    "Kandinsky6SRPipeline": "its attention is sparse, and works under torch.compile alone",
    "LTX2LatentUpsamplePipeline": _NO_DENOISER,
    "LTX2VideoDiffusionDecodePipeline": _NO_DENOISER,
    "LTXLatentUpsamplePipeline": _NO_DENOISER,
    "SanaWMPipeline": "its attention is linear, of which there is no kernel yet",
    "TextToVideoZeroPipeline": "it runs an image UNet with a processor of its own",
    "TextToVideoZeroSDXLPipeline": "it runs an image UNet with a processor of its own",
}
_FAMILY_OF_MODEL = {model: name for name, family in _FAMILIES.items() for model in family.models}


def served_pipelines() -> tuple[str, ...]:
    """Class names of the pipelines that have an adapter, sorted."""
    return tuple(sorted(name for family in _FAMILIES.values() for name in family.pipelines))


def served_models() -> tuple[str, ...]:
    """Class names of the models that have an adapter, sorted."""
    return tuple(sorted(_FAMILY_OF_MODEL))


def rules_for(model: nn.Module) -> tuple[Rule, ...]:
    """The rules for a model's modules, whatever it is wrapped in; none if it has no adapter, or that is off."""
    name = _served_class(model)
    adapter = _adapter(_FAMILY_OF_MODEL[name]) if name else {}
    return () if name is None or isinstance(adapter, str) else adapter.get(name, ())


def spread_for(model: nn.Module) -> Any:
    """How a denoiser's frames or tokens are spread over ranks (``SPREAD`` of its adapter), or None."""
    name = _served_class(model)
    if name is None or off_reason(model):
        return None
    adapter = import_module(f"vidaccel.pipelines.{_FAMILY_OF_MODEL[name]}")
    return getattr(adapter, "SPREAD", {}).get(name)


def off_reason(model: nn.Module) -> str | None:
    """Why the adapter of a model is switched off, or None if it is not, or there is none."""
    name = _served_class(model)
    adapter = _adapter(_FAMILY_OF_MODEL[name]) if name else {}
    return adapter if isinstance(adapter, str) else None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of ``torch.compile`` and PEFT, or ``model`` itself."""
    inner: Any = getattr(model, "_orig_mod", None)  # OptimizedModule
    if inner is None and callable(base := getattr(model, "get_base_model", None)):  # PeftModel
        inner = base()
    return model if inner is None or inner is model else unwrapped(inner)


def reason_unserved(pipe_or_model: Any) -> str:
    """Why a pipeline, or a model, gets nothing: for the error that says so."""
    components = getattr(pipe_or_model, "components", None)
    if isinstance(components, Mapping):
        parts = [unwrapped(part) for part in components.values() if isinstance(part, nn.Module)]
        reasons = [reason for part in parts if (reason := off_reason(part))]
        return _with_reasons(unserved_pipeline(type(pipe_or_model).__name__, _class_names(parts)), reasons)
    if not isinstance(pipe_or_model, nn.Module):
        return f"vidaccel takes a diffusers pipeline, got {type(pipe_or_model).__name__}; {_supported()}"
    model = unwrapped(pipe_or_model)
    name = type(model).__name__
    if rules_for(model):
        return f"{name} is a model, not a pipeline: patch_module takes it"
    text = f"{name} is not a model that vidaccel can patch; supported models: {', '.join(served_models())}"
    return _with_reasons(text + did_you_mean(name, served_models()), filter(None, [off_reason(model)]))


def unserved_pipeline(name: str, models: Iterable[str]) -> str:
    """The same for a pipeline of which only class names are known: its own, and those of its models."""
    text = f"{name} has no part that vidaccel can patch (it has {', '.join(sorted(models)) or 'no model'})"
    if reason := UNSERVED.get(name):
        return f"{text}: {reason}; {_supported()}"
    return f"{text}; {_supported()}{did_you_mean(name, served_pipelines())}"


def unserved_denoiser(pipeline: str, model: nn.Module) -> str:
    """Why the denoiser of a pipeline, of which only other parts have an adapter, runs as it is."""
    return UNSERVED.get(pipeline, f"{type(model).__name__} has no adapter")


def _supported() -> str:
    return f"supported families, whose pipelines `vidaccel env` lists: {', '.join(_FAMILIES)}"


def _with_reasons(text: str, reasons: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(reasons)) or text


def _class_names(models: Iterable[nn.Module]) -> list[str]:
    return [type(model).__name__ for model in models]


def _served_class(model: nn.Module) -> str | None:
    """The nearest of a model's class and base classes that has an adapter."""
    names = (kind.__name__ for kind in type(unwrapped(model)).__mro__)
    return next((name for name in names if name in _FAMILY_OF_MODEL), None)


@cache
def _adapter(family: str) -> Mapping[str, tuple[Rule, ...]] | str:
    """The rules of a family by model class, or why it is switched off."""
    try:
        rules: Mapping[str, tuple[Rule, ...]] = import_module(f"vidaccel.pipelines.{family}").RULES
        return rules
    except Exception as error:  # whatever another diffusers breaks, it breaks this family only
        models = ", ".join(_FAMILIES[family].models)
        reason = f"{models} cannot be patched with the installed diffusers: {first_line(error)}"
        logger.warning("%s", reason)
        return reason
