"""From a request to a clip: fill in the defaults, translate into the pipeline's arguments, call it, time its phases."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from tqdm import tqdm

from vidaccel.clips.clip_request import RANDOM_SEED, ClipRequest, pipeline_names
from vidaccel.clips.pixels import pinned_pixels
from vidaccel.clips.video import fit_image, read_image
from vidaccel.clips.video_model import VideoModel, parameters_of_call
from vidaccel.environment import memory_ran_out, peak_memory_gib, reset_peak_memory
from vidaccel.errors import UsageError, first_line

__all__ = ["Clip", "Timings", "call_arguments", "generate", "resolve"]

_FPS = 8  # of the file, where neither the model nor its pipeline knows a frame rate


@dataclass(frozen=True)
class Timings:
    """Wall times of one pipeline call, in seconds, and its peak memory.

    The pipeline's progress bar marks the borders: ``encode`` ends where the bar is opened, ``decode`` begins where it
    is closed, and with ``denoise`` between them they add up to ``total``. The GPU is waited for at the borders and
    after the first step, never between steps; so ``step`` is the mean over the steps after the first, which alone
    pays for compiling, tuning and self-checks (of a single step: that one).
    """

    encode: float
    denoise: float
    decode: float
    total: float
    step: float
    steps: int
    peak_memory_gib: float

    def __str__(self) -> str:
        return (
            f"{self.step:.3g} s per step x {self.steps} · encode {self.encode:.2f} s · decode {self.decode:.2f} s · "
            f"total {self.total:.2f} s · peak memory {self.peak_memory_gib:.2f} GiB"
        )


@dataclass(frozen=True)
class Clip:
    """``frames`` is ``[F, H, W, C]`` float32 in 0..1, not yet rounded to 8 bits."""

    frames: np.ndarray
    timings: Timings


def resolve(model: VideoModel, request: ClipRequest) -> ClipRequest:
    """``request`` with the model's and then its pipeline's own defaults in place of None, and a random seed drawn.

    Raises:
        UsageError: the height or width is not a multiple of the VAE's factor.
    """
    request = request.filled_from(model.defaults).filled_from(_defaults_of_call(model.pipeline_class))
    request = request.filled_from({"fps": _FPS, "seed": 0})
    if request.seed == RANDOM_SEED:
        request = replace(request, seed=secrets.randbits(32))
    for side in ("height", "width"):
        pixels = getattr(request, side)
        if pixels and pixels % model.size_multiple:
            raise UsageError(f"{side} {pixels} is not a multiple of {model.size_multiple}, the factor of the VAE")
    return request


def _defaults_of_call(pipeline_class: type[DiffusionPipeline]) -> dict[str, Any]:
    taken = parameters_of_call(pipeline_class)
    defaults: dict[str, Any] = {}
    for option in fields(ClipRequest):
        for name in pipeline_names(option.name):
            if name in taken and isinstance(taken[name].default, int | float):
                defaults.setdefault(option.name, option.metadata["kind"](taken[name].default))
    return defaults


def call_arguments(
    pipeline_class: type[DiffusionPipeline], request: ClipRequest, stand_ins: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """``request`` as keyword arguments of a pipeline of this class; its image is read and fitted to width x height.

    Where the pipeline needs what the request does not have, one of ``stand_ins`` will do.

    Raises:
        UsageError: the pipeline does not take an option of the request, or needs what the request does not have.
    """
    taken = parameters_of_call(pipeline_class)
    arguments: dict[str, Any] = {}
    for option in fields(ClipRequest):
        value = getattr(request, option.name)
        names = pipeline_names(option.name)
        if value is None or not names:
            continue
        if name := next((name for name in names if name in taken), None):
            # a frame rate may be any number, but not to a pipeline whose own is a whole one
            whole = option.name == "fps" and isinstance(taken[name].default, int)
            arguments[name] = round(value) if whole else value
        elif option.name != "fps":  # which the file has in any case
            raise UsageError(f"{pipeline_class.__name__} takes no {option.name.replace('_', '-')}")

    needed = {name for name in taken if name == "prompt" or taken[name].default is taken[name].empty}
    arguments |= {name: value for name, value in (stand_ins or {}).items() if name in needed - arguments.keys()}
    if missing := sorted(needed - arguments.keys()):
        raise UsageError(f"{pipeline_class.__name__} needs {' and '.join(missing)}")
    if "min_guidance_scale" in arguments and request.frames == 1:
        least, most = arguments["min_guidance_scale"], arguments["max_guidance_scale"]
        if least <= 1 < most:  # it makes ready for guidance by the last frame's scale, and guides by the first's
            raise UsageError(
                f"frames 1: {pipeline_class.__name__} fails unless min-guidance-scale, {least:g}, is more than 1 as "
                f"guidance-scale is, or neither is; ask for 2 frames, or for --guidance-scale {least:g}"
            )
    if request.image is not None:
        image = read_image(request.image)
        if request.width and request.height:
            image = fit_image(image, request.width, request.height)
        arguments["image"] = image
    return arguments


def generate(pipe: Any, arguments: dict[str, Any], seed: int, show_progress: bool = False, what: str = "steps") -> Clip:
    """Call ``pipe`` with ``arguments`` and the noise of ``seed``, drawn on the CPU: the same for every device.

    The progress bar says ``what``.

    Raises:
        UsageError: the pipeline refuses the arguments before its first step, or memory runs out.
    """
    device = pipe.device
    clock = _PhaseClock(device, show_progress, what)
    pipe.progress_bar = clock.open_bar
    reset_peak_memory(device)
    try:
        clock.mark("start")
        # I2VGenXL draws the latents of its image from PyTorch's own generator
        with pinned_pixels(pipe), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            frames = pipe(**arguments, generator=torch.Generator().manual_seed(seed), output_type="np").frames[0]
        clock.mark("end")
    except (ValueError, RuntimeError, MemoryError) as error:
        if memory_ran_out(error):
            raise UsageError(f"out of memory on {device}: ask for fewer frames or a smaller size") from error
        if clock.steps or not isinstance(error, ValueError):
            raise
        raise UsageError(f"{type(pipe).__name__}: {first_line(error)}") from error
    finally:
        del pipe.progress_bar
    return Clip(np.asarray(frames, np.float32), clock.timings(peak_memory_gib(device) or _peak_resident_gib()))


class _PhaseClock:
    """Stands in for ``pipe.progress_bar``, which diffusers' pipelines open where denoising starts, update after every
    step and close after the last."""

    def __init__(self, device: torch.device, show: bool, what: str) -> None:
        self.steps = 0
        self._what = what
        self._device = device
        self._show = show
        self._marks: dict[str, float] = {}

    def mark(self, border: str) -> None:
        if self._device.type == "cuda":
            # not for the whole device: while another thread captures a graph, that is an error, in both threads
            torch.cuda.current_stream(self._device).synchronize()
        self._marks[border] = time.perf_counter()

    def open_bar(self, iterable: Any = None, total: int | None = None) -> tqdm:
        if not self.steps:
            self.mark("open")
        return _StepBar(self, iterable, total=total, desc=self._what, leave=False, disable=not self._show)

    def count_step(self) -> None:
        self.steps += 1
        if self.steps == 1:
            self.mark("first step")

    def timings(self, peak_memory: float) -> Timings:
        marks = self._marks
        start, end = marks["start"], marks["end"]
        # a pipeline that opens bars of its own is taken for denoising from start to end
        opened, closed = marks.get("open", start), marks.get("close", end)
        return Timings(
            encode=opened - start,
            denoise=closed - opened,
            decode=end - closed,
            total=end - start,
            step=(closed - marks["first step"]) / (self.steps - 1) if self.steps > 1 else closed - opened,
            steps=self.steps,
            peak_memory_gib=peak_memory,
        )


class _StepBar(tqdm):
    def __init__(self, clock: _PhaseClock, *args: Any, **kwargs: Any) -> None:
        self._clock: _PhaseClock | None = clock
        super().__init__(*args, **kwargs)

    def update(self, n: float | None = 1) -> bool | None:
        if self._clock:
            self._clock.count_step()
        return super().update(n)

    def close(self) -> None:
        clock, self._clock = self._clock, None  # tqdm closes again when it is collected
        if clock:
            clock.mark("close")
        super().close()


def _peak_resident_gib() -> float:
    """Most memory this process has held so far: what a CPU has for a peak."""
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
