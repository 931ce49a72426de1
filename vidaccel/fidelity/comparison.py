"""Is the patched clip still the same clip? One call makes all the clips that the answer needs, and gives it.

    comparison = compare(pipe, patch={"skip": "vae"}, prompt="a fish", num_frames=25)
    comparison.passed, comparison.verdict.reasons, comparison.summary()

In this order: the unpatched clip, twice; clips of equal maths (``noise_floor.py``); the patched clip; single calls on
the reference's inputs, of all of them (``teacher_forcing.py``); every site beside the original code (``blame.py``); the
verdict (``verdict.py``). Two clips at most are kept in float32, on the host.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from vidaccel.clips.video_model import parameters_of_call
from vidaccel.environment import environment, free_memory
from vidaccel.errors import UsageError, first_line, nearest
from vidaccel.fidelity.blame import Blame, failed_already, inspect, switched
from vidaccel.fidelity.guard_rails import Guard, guards_of_clip, guards_of_patch
from vidaccel.fidelity.metrics import Likeness, Scores, likeness, psnr, relative_error
from vidaccel.fidelity.noise_floor import Control, EqualMaths, LeftOut, controls_for
from vidaccel.fidelity.take import Call, Take, as_frames, film, run_again, run_device, tensors_of
from vidaccel.fidelity.teacher_forcing import MOST_STEPS, Steps, recording, replay, timestep_of
from vidaccel.fidelity.verdict import Evidence, Gates, Verdict, judge, step_roundings, steps_allowed
from vidaccel.kernels import settings
from vidaccel.kernels.settings import Fidelity
from vidaccel.patching.families import unwrapped
from vidaccel.patching.patch import DENOISERS, patch_pipeline
from vidaccel.patching.report import PatchReport
from vidaccel.sites.rules import patches_of

__all__ = ["Baseline", "Comparison", "Latents", "compare", "unpatched"]

QUICK_STEPS, QUICK_FRAMES, QUICK_CONTROLS = 3, 9, 2  # 9 frames are 4 k + 1 and 8 k + 1, as causal VAEs have it
NOT_EQUAL = 0.1  # the error of a control's first call: no roundings, but another meaning
TOO_SLOW = 4.0  # times the reference's call
FLOOR_CONTROLS, FLOOR_SECONDS = 3, 45.0  # with so many controls, and after so long, no further one is tried
_OURS = ("generator", "output_type", "return_dict", "callback_on_step_end")


@dataclass(frozen=True)
class Latents:
    """The patched latents before the VAE beside the reference's: relative L2 error; PSNR with the reference's range."""

    relative_error: float
    psnr_db: float


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
        decodes: The same of the VAE's decoder.
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
    decodes: Steps
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
            "steps": self.steps.summary(),
            "decodes": self.decodes.summary(),
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
    blame: Literal["on failure"] | bool = "on failure",
    controls: Sequence[str] | None = None,
    compile_control: bool = False,
    baseline: Baseline | None = None,
    progress: bool = True,
    **call: Any,
) -> Comparison:
    """Make the clip of ``call`` with ``pipe`` as it is and patched, and judge whether it is the same clip.

    Args:
        pipe: A loaded pipeline of a supported family, not patched. It comes back as it was.
        patch: Arguments of ``patch_pipeline``.
        seed: Of the noise, which is drawn on the CPU.
        margin_db: How far the worst frame may be below the worst frame that equal maths gives.
        min_psnr_db: What the worst frame must reach besides.
        require_bit_exact: Let one bit that differs fail the clip.
        quick: At most 3 steps, 9 frames and 2 clips of equal maths.
        blame: Sites are held against the original code in any case, at two calls of the denoiser and one of the VAE.
            "on failure": at more calls where the clip failed and no site was found. True: at more calls anyway. False:
            at none; the verdict is of the clip and the steps alone.
        controls: Names of the changes of equal maths to use; None: all that apply.
        compile_control: Let ``torch.compile`` be one of them.
        baseline: What :func:`unpatched` made of the same pipeline; its call, seed and floor serve, and none are given.
        progress: Show bars.
        **call: The pipeline's own arguments (``prompt``, ``image``, ``num_frames``, ...).

    Raises:
        UsageError: The pipeline is patched, is of no supported family, or refuses its arguments; a number is none; the
            frames are smaller than 11x11 pixels; memory runs out.
    """
    gates = Gates(_decibels("margin_db", margin_db), min_psnr_db, require_bit_exact)
    if min_psnr_db is not None:
        _decibels("min_psnr_db", min_psnr_db)
    if blame not in (True, False, "on failure"):
        raise UsageError(f"blame must be True, False or 'on failure', got {blame!r}")
    _check_patchable(pipe, patch or {})
    if baseline is None:
        baseline = unpatched(
            pipe, seed=seed, quick=quick, controls=controls, compile_control=compile_control, progress=progress, **call
        )
    elif call:
        raise UsageError(f"the baseline has a call of its own: leave out {', '.join(call)}")
    study = _Study(pipe, baseline, dict(patch or {}).get("allow", "math-exact"), progress)
    with patch_pipeline(pipe, **dict(patch or {})) as report:
        study.make_patched(report)
        verdict = study.look_at_sites(report, gates, blame)
    return study.comparison(verdict, {"patch": _described(dict(patch or {})), "margin_db": margin_db, "blame": blame})


def unpatched(
    pipe: Any,
    *,
    seed: int = 0,
    quick: bool = False,
    controls: Sequence[str] | None = None,
    compile_control: bool = False,
    progress: bool = True,
    **call: Any,
) -> Baseline:
    """What :func:`compare` makes of the unpatched pipeline, for those who compare several patches with it.

    The arguments are those of :func:`compare`.
    """
    _check_patchable(pipe, {})
    making = _Baseline(pipe, _checked_call(pipe, call, quick), seed, quick, progress)
    tried = controls_for(making.denoisers, making.vae, making.device, wanted=controls, compile=compile_control)
    making.make_reference()
    return making.make_floor(tried)


def _check_patchable(pipe: Any, patch: Mapping[str, Any]) -> None:
    """Find out before a clip is made whether the patch can be."""
    components = getattr(pipe, "components", None)
    for name, part in components.items() if isinstance(components, Mapping) else ():
        if isinstance(part, nn.Module) and any(map(patches_of, unwrapped(part).modules())):
            raise UsageError(f"compare patches the pipeline itself, but its {name} is patched: restore it first")
    try:
        patch_pipeline(pipe, **patch).restore()
    except TypeError as error:
        raise UsageError(f"patch: {first_line(error)}") from error


def _decibels(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise UsageError(f"{name} must be a number of decibels, 0 or more, got {value!r}")
    return value


def _checked_call(pipe: Any, call: dict[str, Any], quick: bool) -> dict[str, Any]:
    for name in _OURS:
        if name in call:
            hint = ": give seed=" if name == "generator" else ""
            raise UsageError(f"compare sets {name} itself{hint}")
    taken = parameters_of_call(type(pipe))
    for name in call:
        if name not in taken:
            raise UsageError(f"{type(pipe).__name__} takes no {name}{nearest(name, taken)}")
    for most, names in ((QUICK_STEPS, ("num_inference_steps",)), (QUICK_FRAMES, ("num_frames", "video_length"))):
        for name in names:
            if quick and name in taken:
                wanted = call.get(name, taken[name].default)
                call = call | {name: min(wanted, most) if isinstance(wanted, int) else most}
    return call


@dataclass(frozen=True)
class Baseline:
    """What a pipeline gives unpatched: its clip, the calls that made it, and what equal maths makes of both."""

    take: Take
    call: Mapping[str, Any]
    seed: int
    quick: bool
    steps: Sequence[Call]
    decodes: Sequence[Call]
    no_steps: str
    floor: Sequence[Control]
    left_out: Sequence[LeftOut]
    step_controls: Mapping[str, tuple[float, ...]]
    decode_controls: Mapping[str, tuple[float, ...]]
    guards: Sequence[Guard]
    seconds: Mapping[str, float]

    def likeness(self, frames: np.ndarray) -> Likeness:
        """Every metric of ``frames`` beside the reference.

        Raises:
            UsageError: they are too small for SSIM.
        """
        try:
            return likeness(self.take.frames, frames)
        except ValueError as error:
            raise UsageError(str(error)) from error

    def latents_error(self, take: Take) -> float | None:
        """Relative L2 error of the latents of ``take``; None where there are none to compare."""
        mine, expected = take.latents, self.take.latents
        if mine is None or expected is None or mine.shape != expected.shape:
            return None
        return relative_error(mine, expected)


class _Maker:
    """Makes clips and single calls of a pipeline, and knows what each part took."""

    def __init__(self, pipe: Any, call: Mapping[str, Any], seed: int, quick: bool, progress: bool) -> None:
        self._pipe, self._call, self._seed, self._quick, self._progress = pipe, dict(call), seed, quick, progress
        models = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
        self.denoisers = {name: models[name] for name in DENOISERS if name in models}
        self.vae = models.get("vae")
        self.device = run_device(pipe)
        self._seconds: dict[str, float] = {}

    def _film(self, what: str, with_outputs: bool = False) -> Take:
        return film(self._pipe, self._call, self._seed, what, progress=self._progress, with_outputs=with_outputs)

    def _replay(self, calls: Sequence[Call], what: str) -> tuple[float, ...]:
        return tuple(replay(self._pipe, calls, what, progress=self._progress))

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[part] = time.perf_counter() - start


class _Baseline(_Maker):
    """A :class:`Baseline` in the making."""

    def make_reference(self) -> None:
        """The unpatched clip, with its calls recorded; and once more."""
        with self._timed("reference"):
            with recording(self.denoisers, QUICK_STEPS if self._quick else MOST_STEPS) as recorded:
                take = self._film("unpatched", with_outputs=True)
            decodes = take.decodes[:1] if self._quick else _ends(take.decodes)
            guards = list(guards_of_clip("the unpatched clip", take.frames))
            parts = take, self._call, self._seed, self._quick, recorded.calls, decodes, recorded.reason
            self._made = Baseline(*parts, [], [], {}, {}, guards, self._seconds)
            self._made.likeness(take.frames)  # too small a clip is told before the other clips are made
            guards += self._wavers()

    def _wavers(self) -> Iterator[Guard]:
        """Whether the unpatched pipeline gives other bits the second time."""
        first = self._made.steps[:1]
        errors = self._replay(first, "unpatched again")
        start = time.perf_counter()
        errors += self._replay(first, "unpatched again")
        self._step_seconds = time.perf_counter() - start
        if any(errors):
            detail = f"the unpatched denoiser, called again on the same inputs, is off by {max(errors):.1e}"
            yield Guard("nondeterministic baseline", detail, False)
        if not self._quick or not first:
            again = self._made.likeness(self._film("unpatched again").frames)
            if not again.bit_identical:
                detail = f"two unpatched clips of one seed differ: the worst frame has {again.psnr_db.minimum:.1f} dB"
                yield Guard("nondeterministic baseline", detail, False)

    def make_floor(self, controls: Sequence[EqualMaths]) -> Baseline:
        """Steps and clips of equal maths."""
        found: list[Control] = []
        left_out: list[LeftOut] = []
        self._step_controls: dict[str, tuple[float, ...]] = {}
        self._decode_controls: dict[str, tuple[float, ...]] = {}
        start = time.perf_counter()
        with self._timed("floor"):
            for control in tqdm(controls, desc="equal maths", leave=False, disable=not self._progress):
                if reason := self._enough(len(found), time.perf_counter() - start):
                    left_out.append(LeftOut(control.name, reason))
                    continue
                try:
                    with control.applied():
                        made = self._try(control.name)
                except Exception as error:  # whatever a backend says that does not serve these shapes
                    made = first_line(error)
                    free_memory()
                if isinstance(made, str):
                    left_out.append(LeftOut(control.name, made))
                else:
                    found.append(made)
        return replace(
            self._made,
            floor=found,
            left_out=left_out,
            step_controls=self._step_controls,
            decode_controls=self._decode_controls,
        )

    def _enough(self, found: int, seconds: float) -> str | None:
        """Why no further control is tried, or None."""
        if self._quick and found >= QUICK_CONTROLS:
            return "not tried, to be quick"
        if found >= FLOOR_CONTROLS and seconds > FLOOR_SECONDS:
            return f"not tried: {found} others took {seconds:.0f} s"
        return None

    def _try(self, name: str) -> Control | str:
        """The clip of the control that is applied now; or why there is none."""
        steps, decodes = self._made.steps, self._made.decodes
        if steps:
            start = time.perf_counter()
            first = self._replay(steps[:1], name)
            slower = (time.perf_counter() - start) / max(self._step_seconds, 1e-3)
            if not first[0] <= NOT_EQUAL:
                return f"its first call is off by {first[0]:.1e}: that is no equal maths for this model"
            if slower > TOO_SLOW and name != "torch.compile":
                return f"its first call takes {slower:.0f} times as long"
            errors = (*first, *self._replay(steps[1:], name))
            if not any(errors):
                return "it gives the same bits here"
        of_decodes = self._replay(decodes, name)
        take = self._film(name)
        if steps:
            self._step_controls[name] = errors
        if decodes:
            self._decode_controls[name] = of_decodes
        return Control(name, self._made.likeness(take.frames), self._made.latents_error(take))


class _Study(_Maker):
    """What has been found of a patch so far."""

    def __init__(self, pipe: Any, baseline: Baseline, allow: Fidelity, progress: bool) -> None:
        super().__init__(pipe, baseline.call, baseline.seed, baseline.quick, progress)
        self._baseline, self._allow = baseline, allow
        self._steps, self._decodes = baseline.steps, baseline.decodes
        self._seconds |= baseline.seconds
        self._guards = list(baseline.guards)
        self._left_out = list(baseline.left_out)
        self._blame: tuple[Blame, ...] | None = None
        self._faults: list[Blame] = []

    def make_patched(self, report: PatchReport) -> None:
        """The patched clip, and its single calls."""
        with self._timed("patched"):
            take = self._film("patched")
            self._summary = report.summary()
            self._guards += guards_of_patch(report)
        expected = self._baseline.take
        if take.frames.shape != expected.frames.shape:
            raise UsageError(f"the patched clip is {take.frames.shape}, and the unpatched one {expected.frames.shape}")
        self._guards += guards_of_clip("the patched clip", take.frames, expected.frames)
        self._patched_frames = _bytes(take.frames)
        self._clip = self._baseline.likeness(take.frames)
        self._latents = self._compared_latents(take)
        with self._timed("steps"):
            times = tuple(map(timestep_of, self._steps))
            errors = self._replay(self._steps, "patched")
            self.steps = Steps(times, errors, self._baseline.step_controls, self._baseline.no_steps)
            errors = self._replay(self._decodes, "patched")
            self.decodes = Steps(tuple(map(float, range(len(errors)))), errors, self._baseline.decode_controls)
            self._vae_psnr = self._compared_decodes()

    def look_at_sites(self, report: PatchReport, gates: Gates, blame: str | bool) -> Verdict:
        """The verdict, for which sites are held against the original code as far as ``blame`` asks for it."""
        with self._timed("sites"):
            if blame is not False:
                self._blame = tuple(failed_already(report))
                calls = self._steps[:1] if self._quick else _ends(self._steps)
                self._inspect(report, [*calls, *self._decodes[:1]])
            verdict = judge(self._evidence(), gates)
            if blame is True or (blame and not verdict.passed and not self._faults):
                self._inspect(report, [*self._worst_steps(), *self._decodes[1:]])
                if not verdict.passed and not self._faults:
                    self._switch(report)
                verdict = judge(self._evidence(), gates)
        return verdict

    def _inspect(self, report: PatchReport, calls: Sequence[Call]) -> None:
        found = inspect(self._pipe, report, calls, progress=self._progress, allow=self._allow)
        self._faults += found.faults
        worst = {(site.path, site.op): site for site in sorted((*(self._blame or ()), *found.sites), key=_ratio)}
        self._blame = tuple(sorted(worst.values(), key=_ratio, reverse=True))
        self._left_out += [LeftOut(f"site {path}", reason) for path, reason in found.left_out.items()]

    def _worst_steps(self) -> list[Call]:
        """The calls whose errors are the largest beside their budgets."""
        budgets = steps_allowed(self.steps, self._roundings())
        order = sorted(range(len(budgets)), key=lambda i: -self.steps.patched[i] / budgets[i])
        return [self._steps[i] for i in sorted(order[:3])]

    def _switch(self, report: PatchReport) -> None:
        """Find the site by whose absence a call is right that is wrong."""
        for calls, steps in ((self._steps, self.steps), (self._decodes, self.decodes)):
            budgets = steps_allowed(steps, self._roundings())
            ratios = [error / budget for error, budget in zip(steps.patched, budgets, strict=True)]
            if not ratios or max(ratios) <= 1:
                continue
            at = ratios.index(max(ratios))

            def ratio(call: Call = calls[at], budget: float = budgets[at]) -> float:
                return self._replay([call], "sites off")[0] / budget

            found = switched(report, ratio, progress=self._progress)
            self._faults += found
            self._blame = (*found, *(self._blame or ()))

    def comparison(self, verdict: Verdict, asked: dict[str, Any]) -> Comparison:
        """All of it."""
        self._seconds["total"] = sum(self._seconds.values())
        call = {name: _described(value) for name, value in self._call.items()}
        dtype = str(self._dtype()).removeprefix("torch.")
        return Comparison(
            reference=_bytes(self._baseline.take.frames),
            patched=self._patched_frames,
            verdict=verdict,
            clip=self._clip,
            latents=self._latents,
            vae_psnr_db=self._vae_psnr,
            floor=tuple(self._baseline.floor),
            floor_left_out=tuple(self._left_out),
            steps=self.steps,
            decodes=self.decodes,
            blame=self._blame,
            guards=tuple(self._guards),
            seconds=self._seconds,
            patch=self._summary,
            environment=environment(self.device),
            arguments={"pipeline": type(self._pipe).__name__, "dtype": dtype, "seed": self._seed, "quick": self._quick}
            | {"call": call, **asked},
        )

    def _evidence(self) -> Evidence:
        return Evidence(
            self._clip, self._baseline.floor, self.steps, self.decodes, self._faults, self._guards, self._roundings()
        )  # fmt: skip

    def _roundings(self) -> float:
        tf32 = self.device.type == "cuda" and (settings.tf32_products() or settings.tf32_convolutions())
        return step_roundings(self._dtype(), tf32)

    def _dtype(self) -> torch.dtype:
        """Of the first denoiser, or of the VAE where there is none."""
        models = [*self.denoisers.values(), *([self.vae] if self.vae is not None else [])]
        return next((unwrapped(model).dtype for model in models), torch.float32)  # type: ignore[return-value]

    def _compared_latents(self, take: Take) -> Latents | None:
        error, mine, expected = self._baseline.latents_error(take), take.latents, self._baseline.take.latents
        if error is None or mine is None or expected is None:
            return None
        squares, span = (
            float((mine.double() - expected.double()).square().mean()),
            float(expected.max() - expected.min()),
        )
        return Latents(error, 10 * math.log10(span**2 / squares) if squares and span else math.inf)

    def _compared_decodes(self) -> Scores | None:
        """The VAE alone, frame by frame."""
        values = []
        for call in self._decodes:
            found, expected = tensors_of(run_again(self._pipe, call))[0].cpu(), (call.outputs or [])[0]
            if expected.ndim in (4, 5) and found.shape == expected.shape:
                values.append(psnr(as_frames(expected), as_frames(found)))
        return Scores(np.concatenate(values)) if values else None


def _ratio(site: Blame) -> float:
    return site.ratio


def _ends(calls: Sequence[Call]) -> list[Call]:
    return [calls[0], calls[-1]] if len(calls) > 1 else list(calls)


def _bytes(frames: np.ndarray) -> np.ndarray:
    colours = np.nan_to_num(frames[..., :3]).clip(0, 1)
    pixels: np.ndarray = (colours * 255).round().astype(np.uint8)
    return pixels if pixels.shape[-1] == 3 else pixels.repeat(3, axis=-1)


def _described(value: Any) -> Any:
    """An argument as a plain type."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, dict):
        return {str(name): _described(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_described(part) for part in value] if len(value) <= 8 else f"{len(value)} x {_described(value[0])}"
    size = getattr(value, "size", None)
    shown = f" {size[0]}x{size[1]}" if isinstance(size, tuple) and len(size) == 2 else ""
    return f"{type(value).__name__}{shown}"
