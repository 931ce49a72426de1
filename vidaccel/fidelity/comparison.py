"""One clip unpatched and patched: every figure of it, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from vidaccel.fidelity.metrics import Likeness, Scores
from vidaccel.fidelity.verdict import Verdict

__all__ = ["Blame", "Comparison", "Control", "Guard", "Latents", "LeftOut", "Steps", "compare"]


@dataclass(frozen=True)
class Latents:
    """The patched latents before the VAE beside the reference's: relative L2 error; PSNR with the reference's range."""

    relative_error: float
    psnr_db: float


@dataclass(frozen=True)
class Control:
    """A clip of equal maths beside the reference."""

    control: str
    clip: Likeness
    latents_relative_error: float | None


@dataclass(frozen=True)
class LeftOut:
    """A control that does not apply, or a part of the check that could not run, and why."""

    control: str
    reason: str


@dataclass(frozen=True)
class Steps:
    """Relative L2 error of each call of a denoiser on the reference's own inputs; lists of one length.

    Attributes:
        timesteps: Of each call.
        patched: The patched model's error.
        controls: That of each control, by its name.
        left_out: Why there is nothing, if so.
    """

    timesteps: tuple[float, ...] = ()
    patched: tuple[float, ...] = ()
    controls: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    left_out: str = ""


@dataclass(frozen=True)
class Blame:
    """A site, held against the original code on its own real inputs.

    Attributes:
        path: Of its module.
        op: What it fuses.
        fidelity: Its class.
        error: The largest that was seen.
        budget: What that error may be.
        ratio: ``error / budget``: above 1 the site is at fault.
        detail: What was off, in words.
        skip: What to give ``patch_pipeline(skip=...)`` to leave it out.
    """

    path: str
    op: str
    fidelity: str
    error: float
    budget: float
    ratio: float
    detail: str
    skip: str


@dataclass(frozen=True)
class Guard:
    """Something that a figure alone would not tell; ``fails``: whether it fails the clip."""

    what: str
    detail: str
    fails: bool


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        reference: The unpatched clip, ``[F, H, W, 3]`` uint8.
        patched: The patched clip, the same.
        verdict: Whether it passed, and by which rule.
        clip: The patched clip beside the reference.
        latents: None where nothing could be seen before the VAE.
        vae_psnr_db: The reference's latents decoded by the patched VAE, frame by frame; None where there is no VAE.
        floor: Clips of equal maths beside the reference.
        floor_left_out: Controls that do not apply.
        steps: Errors of single calls of the denoiser.
        blame: Sites by error / budget, the worst first; None if nobody looked.
        guards: Guard rails that were hit.
        seconds: What each part of the check took.
        patch: The patch report's summary, before anybody looked for whom to blame.
        environment: Device, software and versions.
        arguments: What was compared: pipeline, call and patch, as plain types.
    """

    reference: np.ndarray
    patched: np.ndarray
    verdict: Verdict
    clip: Likeness
    latents: Latents | None
    vae_psnr_db: Scores | None
    floor: tuple[Control, ...]
    floor_left_out: tuple[LeftOut, ...]
    steps: Steps
    blame: tuple[Blame, ...] | None
    guards: tuple[Guard, ...]
    seconds: Mapping[str, float]
    patch: Mapping[str, Any]
    environment: Mapping[str, Any]
    arguments: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        return self.verdict.passed

    def summary(self) -> dict[str, Any]:
        """Everything but the frames as plain types; floats may be infinite or NaN."""
        frames, height, width, _ = self.reference.shape
        return {
            "verdict": asdict(self.verdict) | {"reasons": list(self.verdict.reasons)},
            "clip": {"frames": frames, "height": height, "width": width, **self.clip.summary()},
            "latents": self.latents and asdict(self.latents),
            "vae": self.vae_psnr_db and {"psnr_db": self.vae_psnr_db.summary()},
            "floor": [
                {
                    "control": control.control,
                    **control.clip.summary(),
                    "latents_relative_error": control.latents_relative_error,
                }
                for control in self.floor
            ],
            "floor_left_out": [asdict(left_out) for left_out in self.floor_left_out],
            "steps": {
                "timesteps": list(self.steps.timesteps),
                "patched": list(self.steps.patched),
                "controls": {name: list(errors) for name, errors in self.steps.controls.items()},
                "left_out": self.steps.left_out,
            },
            "blame": None if self.blame is None else [asdict(site) for site in self.blame],
            "guard_rails": [asdict(guard) for guard in self.guards],
            "seconds": dict(self.seconds),
            "patch": dict(self.patch),
            "environment": dict(self.environment),
            "arguments": dict(self.arguments),
        }


def compare(
    pipe: Any,
    patch: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    margin_db: float = 3.0,
    min_psnr_db: float | None = None,
    require_bit_exact: bool = False,
    quick: bool = False,
    blame: str | bool = "on failure",
    controls: list[str] | None = None,
    compile_control: bool = False,
    progress: bool = True,
    **call: Any,
) -> Comparison:
    raise NotImplementedError
