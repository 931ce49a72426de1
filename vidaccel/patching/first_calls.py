"""What the first calls of a patched pipeline need compiles from the patch on; see ``kernels/compile_ahead.py``."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import islice

import torch
from torch import nn

from vidaccel.errors import first_line
from vidaccel.kernels import screen
from vidaccel.kernels.compile_ahead import USUAL, foreseeing, start_if_cold
from vidaccel.kernels.launch import DIRECT
from vidaccel.patching.cuda_graph import is_denoiser
from vidaccel.sites.block import FusedBlock

__all__ = ["compile_first_calls", "start_compiler"]

logger = logging.getLogger(__name__)


def start_compiler(models: Iterable[nn.Module]) -> None:
    """Start the process that compiles, if a model is on a GPU and nothing has been compiled yet."""
    if DIRECT and any(parameter.is_cuda for model in models for parameter in islice(model.parameters(), 1)):
        start_if_cold()


def compile_first_calls(models: Iterable[nn.Module], blocks: Iterable[nn.Module]) -> None:
    """Begin to compile what the first calls of fused blocks will need, in the order in which a pipeline calls them."""
    models = list(models)
    for device, dtype in {(x.device, x.dtype) for model in models for x in islice(model.parameters(), 1)}:
        screen.compile_ahead(device, dtype)
    encode: set[nn.Module] = set()
    upcast: set[nn.Module] = set()
    denoise: set[nn.Module] = set()
    calls = USUAL
    for model in models:
        config, encoder = getattr(model, "config", None), getattr(model, "encoder", None)
        if is_denoiser(model):
            denoise.update(model.modules())
            calls = calls._replace(frames=getattr(config, "num_frames", None) or calls.frames)
        elif isinstance(encoder, nn.Module):
            encode.update(encoder.modules())
            if getattr(config, "force_upcast", False):  # pipelines encode in float32 with such a VAE
                upcast.update(part for part in encoder.modules() if _is_half(part))
    for block in sorted(blocks, key=lambda block: (block not in encode, block not in denoise)):
        with foreseeing(calls._replace(upcast=block in upcast)):
            _compile(block)


def _is_half(module: nn.Module) -> bool:
    return all(parameter.dtype == torch.float16 for parameter in module.parameters())


def _compile(block: nn.Module) -> None:
    try:
        if isinstance(block, FusedBlock):
            block.compile_ahead()
    except Exception as error:  # a layer is somebody's own, or its weights are elsewhere, as with DeepSpeed's ZeRO-3
        logger.debug("%s: nothing is compiled beforehand: %s", type(block).__name__, first_line(error))
