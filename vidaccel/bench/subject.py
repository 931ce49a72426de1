"""The pipeline that the command line asks for, and the arguments of its call."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

import diffusers
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image

from vidaccel.bench.synthetic import build_pipeline, pipeline_inputs, specification
from vidaccel.clips.clip_request import ClipRequest, pipeline_names, request_from_arguments
from vidaccel.clips.generation import call_arguments, resolve
from vidaccel.clips.video_model import find_model, load_pipeline, parameters_of_call
from vidaccel.errors import UsageError

__all__ = ["Subject", "load_subject"]

Subject = tuple[DiffusionPipeline, dict[str, Any]]

_SYNTHETIC_STEPS = 4  # a step is also timed by itself


def load_subject(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Subject:
    """A pipeline on ``device``, unpatched, and the keyword arguments of its call."""
    if args.synthetic:
        return _synthetic(args, device, dtype)
    model = find_model(args.model, args.allow_pickle)
    if args.only or args.skip:
        model.check_sites(args.only, args.skip)
    request = resolve(model, request_from_arguments(args))
    arguments = call_arguments(model.pipeline_class, request, _stand_ins(request) if _of_vae(args) else None)
    return load_pipeline(model, dtype, device, show_progress=True), arguments


def _of_vae(args: argparse.Namespace) -> bool:
    """Whether the VAE alone is timed, and what leads up to its latents does not matter."""
    return args.scope in ("vae", "encode")


def _stand_ins(request: ClipRequest) -> dict[str, Any]:
    """What a clip may be made from whose VAE alone is timed: that takes as long for any other."""
    return {"prompt": "a clip", "image": Image.new("RGB", (request.width or 512, request.height or 512), "grey")}


def _synthetic(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Subject:
    specified = specification(args.synthetic, args.size, shallow_denoiser=_of_vae(args))
    call = specified["call"]
    call["num_inference_steps"] = min(call["num_inference_steps"], _SYNTHETIC_STEPS)
    request = request_from_arguments(args)
    takes = parameters_of_call(getattr(diffusers, specified["pipeline"]))
    for option in fields(request):
        value = getattr(request, option.name)
        names = pipeline_names(option.name)
        if value is None or option.name == "seed":
            continue
        # a text or an image would come beside the random ones
        if not (taken := set(names) & ({*call, *takes} if isinstance(value, int | float) else call.keys())):
            raise UsageError(f"--{option.name.replace('_', '-')} means nothing to --synthetic {args.synthetic}")
        call[taken.pop()] = value
    return build_pipeline(specified, device, dtype), call | pipeline_inputs(specified, device, dtype)
