"""The rules of the verdict, each alone, on invented evidence."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from vidaccel.fidelity.blame import Blame
from vidaccel.fidelity.guard_rails import Guard, guards_of_clip
from vidaccel.fidelity.metrics import Likeness, Scores
from vidaccel.fidelity.noise_floor import Control
from vidaccel.fidelity.teacher_forcing import Steps
from vidaccel.fidelity.verdict import Evidence, Gates, Verdict, judge


def clip(*psnr: float) -> Likeness:
    frames = np.array(psnr)
    return Likeness(bool(np.isinf(frames).all()), Scores(frames), Scores(np.ones(len(psnr))), None)


def verdict(psnr: tuple[float, ...], floor: tuple[float, ...] = (), gates: Gates | None = None, **more: Any) -> Verdict:
    controls = [Control(f"control {at}", clip(value), None) for at, value in enumerate(floor)]
    return judge(Evidence(clip(*psnr), controls, **more), gates or Gates())


@pytest.mark.parametrize(
    ("psnr", "floor", "passed"),
    [
        pytest.param((60.5, 80.0), (90.0,), True, id="above-60"),
        pytest.param((52.5, 58.0), (55.0, 70.0), True, id="within-the-margin"),
        pytest.param((58.0, 51.5), (55.0, 70.0), False, id="below-the-margin"),
        pytest.param((59.0,), (70.0,), False, id="below-60"),
        pytest.param((math.nan, 80.0), (55.0,), False, id="nan"),
        pytest.param((math.inf, math.inf), (55.0,), True, id="identical"),
        pytest.param((10.0,), (20.0,), True, id="chaotic"),
    ],
)
def test_the_worst_frame_beside_the_worst_control(
    psnr: tuple[float, ...], floor: tuple[float, ...], passed: bool
) -> None:
    found = verdict(psnr, floor, steps=Steps((1.0,), (1e-3,), {"control": (1e-3,)}))
    assert found.passed is passed
    assert found.chaotic == (floor == (20.0,)) == (found.allowed_db is None)
    assert passed or "worst frame" in found.reasons[0]


def test_the_margin_is_an_argument() -> None:
    assert not verdict((52.0,), (56.0,)).passed
    assert verdict((52.0,), (56.0,), Gates(margin_db=5)).passed


def test_without_a_floor_the_steps_decide_and_without_steps_sixty_decibels() -> None:
    assert verdict((45.0,), steps=Steps((1.0,), (1e-7,))).passed
    assert not verdict((45.0,)).passed


@pytest.mark.parametrize(("error", "passed"), [(1.9e-3, True), (2.2e-3, False), (math.inf, False)])
def test_a_step_may_be_off_by_twice_the_worst_control(error: float, passed: bool) -> None:
    steps = Steps((2.0, 1.0), (1e-5, error), {"one": (1e-4, 1e-3), "other": (1e-3, 5e-4)})
    found = verdict((20.0,), (20.0,), steps=steps, roundings=1e-4)
    assert found.passed is passed
    assert passed or (found.rule == "steps" and found.reasons[0].startswith("call 1 of the denoiser"))


def test_a_decoder_is_judged_as_a_step_is() -> None:
    found = verdict((70.0,), decodes=Steps((0.0,), (1.0,), {"one": (1e-3,)}))
    assert [reason.split(",")[0] for reason in found.reasons] == ["call 0 of the VAE's decoder"]


def test_every_rule_that_fails_is_told_with_the_first_as_the_rule() -> None:
    fault = Blame("unet.conv", "conv_epilogue", "math-exact", 1.0, 0.1, 10.0, "the worst row", "unet.conv")
    guards = [Guard("constant frames", "frame 0", True), Guard("nondeterministic baseline", "", False)]
    found = verdict(
        (30.0,), (55.0,), Gates(min_psnr_db=40, require_bit_exact=True), faults=[fault], guards=guards
    )  # fmt: skip
    assert found.rule == "guard rail" and len(found.reasons) == 5
    assert "constant frames" in found.reasons[0] and found.reasons[-1] == "unet.conv: conv_epilogue: the worst row"


def test_clips_that_are_no_clips() -> None:
    frames = np.random.default_rng(0).random((4, 8, 8, 3))
    assert not list(guards_of_clip("a", frames))
    spoilt = frames.copy()
    spoilt[1], spoilt[2, 0, 0, 0] = 0.0, np.nan
    assert [(guard.what, guard.fails) for guard in guards_of_clip("a", spoilt, frames)] == [
        ("not finite", True),
        ("constant frames", True),
    ]
    black = np.zeros_like(frames)
    assert [guard.fails for guard in guards_of_clip("the reference", black)] == [False]
    assert [guard.fails for guard in guards_of_clip("a", black, black)] == [False]
