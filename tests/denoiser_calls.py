"""A tiny pipeline with what it gives its UNet in the first step, for tests that call the UNet by itself."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import tiny_synthetic_pipeline
from torch import Tensor, nn


class Reached(Exception):
    """The UNet's first call."""


def first_call(name: str, frames: int) -> tuple[Any, dict[str, Any]]:
    """A pipeline, and what it gives its UNet first."""
    pipe, call = tiny_synthetic_pipeline(name)
    found: dict[str, Any] = {}

    def keep(unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.update(zip(("sample", "timestep"), args, strict=False), **kwargs)
        raise Reached

    hook = pipe.unet.register_forward_pre_hook(keep, with_kwargs=True)
    torch.manual_seed(0)  # I2VGenXL's VAE draws from the default generator
    try:
        pipe(**call | {"num_frames": frames}, generator=torch.Generator().manual_seed(3), output_type="latent")
    except Reached:
        hook.remove()
    return pipe, found


def denoised(pipe: Any, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return pipe.unet(**given)[0]
