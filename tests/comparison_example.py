"""A :class:`~vidaccel.fidelity.comparison.Comparison` of invented figures, for tests of whatever shows one."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from vidaccel.fidelity.blame import Blame
from vidaccel.fidelity.comparison import Comparison, Latents
from vidaccel.fidelity.guard_rails import Guard
from vidaccel.fidelity.metrics import Scores, likeness, psnr
from vidaccel.fidelity.noise_floor import Control, LeftOut
from vidaccel.fidelity.teacher_forcing import Steps
from vidaccel.fidelity.verdict import Verdict

__all__ = ["example_comparison"]


def example_comparison(*, passed: bool = True, frames: int = 4, **changes: Any) -> Comparison:
    """A clip ``[frames, 32, 48, 3]``; with ``passed=False`` one with a verdict against it, blame and a guard rail."""
    generator = np.random.default_rng(0)
    reference = generator.random((frames, 32, 48, 3))
    noise = generator.standard_normal(reference.shape)
    patched, control = reference + (2e-3 if passed else 5e-2) * noise, reference - 1e-3 * noise
    reasons = () if passed else ("the worst frame has 26.0 dB, and may have 57.0 (the floor's worst has 60.0)",)
    site = Blame(
        path="unet.down_blocks.0.resnets.0",
        op="group_norm_silu",
        fidelity="math-exact",
        error=1e-2,
        budget=1e-3,
        ratio=10.0,
        detail="the worst row",
        skip="unet.down_blocks.0.resnets.0:group_norm_silu",
    )
    example = Comparison(
        reference=_bytes(reference),
        patched=_bytes(patched),
        verdict=Verdict(passed, "the clip's worst frame", reasons, margin_db=3.0, allowed_db=57.0),
        clip=likeness(reference, patched),
        latents=Latents(relative_error=3e-4, psnr_db=70.0),
        vae_psnr_db=Scores(psnr(reference, control)),
        floor=(Control("math attention", likeness(reference, control), 2e-4),),
        floor_left_out=(LeftOut("flash attention", "No available kernel"),),
        steps=Steps((900.0, 500.0, 100.0), (3e-4, 2e-4, 1e-4), {"math attention": (2e-4, 2e-4, 1e-4)}),
        decodes=Steps((0.0,), (1e-4,), {"math attention": (1e-4,)}),
        blame=None if passed else (site,),
        guards=() if passed else (Guard("a site failed its check", "unet.conv_in: conv_epilogue: off by 1", True),),
        seconds={"reference": 1.0, "patched": 0.5},
        patch={"active": 3, "ops": {}, "left_alone": [], "failed": [], "fallbacks": []},
        environment={"device": "x86_64 CPU", "torch": "2.13.0"},
        arguments={"pipeline": "StableVideoDiffusionPipeline", "seed": 0, "call": {"num_frames": frames}, "patch": {}},
    )
    return dataclasses.replace(example, **changes)


def _bytes(clip: np.ndarray) -> np.ndarray:
    return (clip.clip(0, 1) * 255).round().astype(np.uint8)
