"""Guidance on two ranks: the same clip as one process makes, half of the work each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Team
from tiny_models import tiny_synthetic_pipeline
from torch import nn

from vidaccel import patch_pipeline

BATCHED = ["svd", "animatediff", "i2vgen-xl", "modelscope", "cogvideox-5b", "ltx-video-2b", "mochi-1"]
ONE_AFTER_THE_OTHER = ["wan2.1-t2v-1.3b", "hunyuanvideo1.5-480p"]
STEPS = 3


@contextmanager
def counting(model: nn.Module) -> Iterator[Counter[str]]:
    """How many samples, and calls, ``model`` itself runs."""
    count: Counter[str] = Counter()
    forward = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        count["calls"] += 1
        count["samples"] += len(out[0])
        return out

    model.forward = counted
    try:
        yield count
    finally:
        del model.forward


def clip(pipe: Any, call: dict[str, Any]) -> np.ndarray[Any, Any]:
    torch.manual_seed(0)  # I2VGenXL's VAE draws from the default generator
    out = pipe(**call, generator=torch.Generator().manual_seed(3), output_type="latent")
    return out.frames.float().numpy()


def two_clips(name: str) -> dict[str, Any]:
    pipe, call = tiny_synthetic_pipeline(name)
    call |= {"num_inference_steps": STEPS}
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    denoiser = getattr(pipe, part)
    with patch_pipeline(pipe, only=part), counting(denoiser) as alone:
        expected = clip(pipe, call)
    report = patch_pipeline(pipe, only=part, parallel="guidance")
    with counting(denoiser) as shared:
        found = clip(pipe, call)
    site = next(site for site in report.sites if site.op == "guidance")
    outcome = {
        "error": float(np.abs(found - expected).max() / np.abs(expected).max()),
        "alone": dict(alone),
        "shared": dict(shared),
        "site": (site.state, site.implementation, dict(site.fallbacks)),
        "sum": float(found.sum()),
    }
    report.restore()
    outcome["restored"] = bool((clip(pipe, call) == clip(tiny_synthetic_pipeline(name)[0], call)).all())
    return outcome


@pytest.mark.parametrize("name", [*BATCHED, *ONE_AFTER_THE_OTHER])
def test_the_clip_is_the_same_for_half_of_the_work(two_ranks: Team, name: str) -> None:
    first, second = two_ranks.run(two_clips, name)
    assert first == second, "both ranks have the same clip, and say the same"
    assert first["error"] < 1e-4 and first["restored"]
    assert first["site"] == ("active", "2 ranks", {})
    whole = first["alone"]["samples"]
    # of the first step, each rank runs both calls: it is not known yet that there will be a second one
    assert first["shared"]["samples"] == (whole // 2 if name in BATCHED else whole // 2 + 1)
