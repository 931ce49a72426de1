"""Is the patched clip the same clip, and by which rule.

One number cannot tell: two right implementations of the same maths drift apart over a clip, in half precision by much.
So three things are judged, and each of them has to hold:

* the clip: its worst frame against the worst frame that a change of equal maths gives here (``noise_floor.py``), or
  above 60 dB. Not where the clip is chaotic: where equal maths itself gives another clip, one more clip says nothing;
* the steps: single calls on the reference's inputs, where drift cannot add up, against the same changes;
* the sites: each against the original code, on its own inputs (``blame.py``).

A guard rail that was hit fails the clip, and so do ``min_psnr_db`` and ``require_bit_exact`` where they are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from vidaccel.fidelity.blame import Blame
from vidaccel.fidelity.guard_rails import Guard
from vidaccel.fidelity.metrics import Likeness
from vidaccel.fidelity.noise_floor import Control
from vidaccel.fidelity.teacher_forcing import Steps

__all__ = ["Evidence", "Gates", "Verdict", "judge", "step_roundings", "steps_allowed"]

SAFE_DB = 60.0  # PSNR of 8-bit frames that are all but equal
CHAOTIC_DB = 35.0  # equal maths, and clips further apart than this: they went different ways
STEP_FACTOR = 2.0  # of the worst control's error
# What roundings alone give a step, beside that: half a unit in the last place; in float32 some, of long sums.
STEP_ROUNDINGS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
STEP_ROUNDINGS_FP32, STEP_ROUNDINGS_TF32 = 2.0**-21, 2.0**-11
NO_CONTROL = 16.0  # times that, where no change of equal maths changes anything


class Gates(NamedTuple):
    """What the user asks of a clip."""

    margin_db: float = 3.0
    min_psnr_db: float | None = None
    require_bit_exact: bool = False


@dataclass(frozen=True)
class Evidence:
    """What a verdict is made from; ``roundings`` is what a step's error may be by roundings alone."""

    clip: Likeness
    floor: Sequence[Control] = ()
    steps: Steps = field(default_factory=Steps)
    decodes: Steps = field(default_factory=Steps)
    faults: Sequence[Blame] = ()
    guards: Sequence[Guard] = ()
    roundings: float = STEP_ROUNDINGS_FP32


@dataclass(frozen=True)
class Verdict:
    """What the rules said.

    Attributes:
        passed: Whether every rule holds.
        rule: The rule that decided, in a few words.
        reasons: One line for each rule that failed, with its figures; empty if ``passed``.
        margin_db: How far below the worst floor control the worst frame may be.
        allowed_db: What that comes to for this clip: the PSNR that the worst frame must reach; None where the clip is
            chaotic, or has no floor, and the steps and sites decide.
        min_psnr_db: The hard gate, or None.
        require_bit_exact: Whether one bit that differs fails the clip.
        chaotic: Whether equal maths gives another clip here, so that a clip tells nothing.
    """

    passed: bool
    rule: str
    reasons: tuple[str, ...]
    margin_db: float
    allowed_db: float | None
    min_psnr_db: float | None = None
    require_bit_exact: bool = False
    chaotic: bool = False


def judge(evidence: Evidence, gates: Gates) -> Verdict:
    """The verdict on ``evidence``."""
    worst = min((control.clip.psnr_db.minimum for control in evidence.floor), default=None)
    chaotic = worst is not None and worst < CHAOTIC_DB
    allowed = None if worst is None or chaotic else min(worst - gates.margin_db, SAFE_DB)
    if worst is None and not evidence.steps.patched:
        allowed = SAFE_DB  # nothing else to go by
    failed = list(_failures(evidence, gates, worst, allowed))
    verdict = Verdict(not failed, "", tuple(reason for _, reason in failed), gates.margin_db, allowed)
    return replace(
        verdict,
        rule=failed[0][0] if failed else _passing_rule(evidence, allowed, chaotic),
        min_psnr_db=gates.min_psnr_db,
        require_bit_exact=gates.require_bit_exact,
        chaotic=chaotic,
    )


def _passing_rule(evidence: Evidence, allowed: float | None, chaotic: bool) -> str:
    if evidence.clip.bit_identical:
        return "bit-identical"
    if chaotic:
        return "steps and sites: the clip is chaotic"
    return "steps and sites: there is no floor" if allowed is None else "worst frame, steps and sites"


def _failures(
    evidence: Evidence, gates: Gates, worst: float | None, allowed: float | None
) -> Iterator[tuple[str, str]]:
    """A rule that failed, and a line that says how; hard gates and guard rails first."""
    clip = evidence.clip.psnr_db
    for guard in evidence.guards:
        if guard.fails:
            yield "guard rail", f"{guard.what}: {guard.detail}"
    if gates.require_bit_exact and not evidence.clip.bit_identical:
        yield (
            "bit-exact",
            f"the clips are not bit-identical: the worst frame ({clip.worst_frame}) has {_db(clip.minimum)}",
        )
    if gates.min_psnr_db is not None and not clip.minimum >= gates.min_psnr_db:
        yield (
            "minimum PSNR",
            f"the worst frame ({clip.worst_frame}) has {_db(clip.minimum)}, not the {_db(gates.min_psnr_db)} asked for",
        )
    if allowed is not None and not clip.minimum >= allowed:
        beside = (
            f"the worst of equal maths has {_db(worst)}" if worst is not None else "there is no floor to compare with"
        )
        yield (
            "worst frame",
            f"the worst frame ({clip.worst_frame}) has {_db(clip.minimum)}, and needs {_db(allowed)}: {beside}",
        )
    for what, steps in (("the denoiser", evidence.steps), ("the VAE's decoder", evidence.decodes)):
        yield from _steps_failures(what, steps, evidence.roundings)
    for fault in evidence.faults:
        yield "site", f"{fault.path}: {fault.op}: {fault.detail}"


def _steps_failures(what: str, steps: Steps, roundings: float) -> Iterator[tuple[str, str]]:
    budgets = steps_allowed(steps, roundings)
    over = [i for i, (error, budget) in enumerate(zip(steps.patched, budgets, strict=True)) if not error <= budget]
    if not over:
        return
    step = max(over, key=lambda i: steps.patched[i] / budgets[i] if math.isfinite(steps.patched[i]) else math.inf)
    yield (
        "steps",
        f"call {step} of {what}, on the reference's inputs, is off by {steps.patched[step]:.1e}, "
        f"and may be by {budgets[step]:.1e}: {STEP_FACTOR:g} times the worst of equal maths, and roundings "
        f"({len(over)} of {len(budgets)} calls are over)",
    )


def steps_allowed(steps: Steps, roundings: float) -> list[float]:
    """What the error of each step may be."""
    controls = [errors for errors in steps.controls.values() if any(errors)]
    if not controls:
        return [NO_CONTROL * roundings] * len(steps.patched)
    return [STEP_FACTOR * max(errors) + roundings for errors in zip(*controls, strict=True)]


def step_roundings(dtype: torch.dtype, tf32: bool) -> float:
    """What roundings alone may give a step in ``dtype``."""
    return STEP_ROUNDINGS.get(dtype, STEP_ROUNDINGS_TF32 if tf32 else STEP_ROUNDINGS_FP32)


def _db(value: float | None) -> str:
    return f"{value:.1f} dB"
