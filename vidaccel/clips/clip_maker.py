"""One job's clip: a model is loaded once and makes clip after clip; each is written whole or not at all."""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from vidaccel import patch_pipeline
from vidaccel.clips.comparison import Comparison
from vidaccel.clips.generation import Clip, call_arguments, generate
from vidaccel.clips.jobs import Job
from vidaccel.clips.outputs import aside, comparison_path, discard, fingerprint, in_words, record_path, write_json
from vidaccel.clips.video import write_clip
from vidaccel.clips.video_model import VideoModel, load_pipeline
from vidaccel.environment import environment
from vidaccel.errors import OutputError, UsageError
from vidaccel.parallel.team import parallel_of, team

if TYPE_CHECKING:
    from vidaccel.patching.report import PatchReport

__all__ = ["ClipMaker", "Setup"]


@dataclass(frozen=True)
class Setup:
    """What every clip of a run is made with; it can be pickled.

    Attributes:
        model: What to load.
        dtype: As what.
        args: The command's options.
        settings: What of them a clip depends on, besides its job: they go into its record.
    """

    model: VideoModel
    dtype: torch.dtype
    args: argparse.Namespace
    settings: dict[str, Any]


class ClipMaker:
    """A model on its device, patched unless asked not to.

    Attributes:
        load_seconds: What loading took.
        patch_seconds: What patching took.
        overview: What the patch had done when the last clip was made.
    """

    def __init__(self, setup: Setup, device: torch.device, show_progress: bool) -> None:
        self._args, self._settings, self._show_progress = setup.args, setup.settings, show_progress
        start = time.perf_counter()
        self._pipe = load_pipeline(setup.model, setup.dtype, device, show_progress)
        loaded = time.perf_counter()
        self._report = None if self._args.no_patch else _patch(self._pipe, self._args)
        self.load_seconds, self.patch_seconds = loaded - start, time.perf_counter() - loaded
        self.overview = ""
        self._versions = environment(self._pipe.device)
        if self._report and self._args.compare:
            self._report.restore()  # so far it was patched only to find a wrong name before the first clip

    def make(self, job: Job) -> str:
        """Make the clip of ``job`` and write it with its record; what is to be printed of it.

        Raises:
            UsageError: it cannot be made.
            OutputError: it cannot be written.
        """
        with ExitStack() as until_saved:
            stock = self._run(job) if self._args.compare else None
            report = until_saved.enter_context(_patch(self._pipe, self._args)) if stock else self._report
            clip = self._run(job)
            comparison = Comparison(stock, clip) if stock else None
            record = {
                "arguments": asdict(job.request) | self._settings,
                "seed": job.request.seed,
                "versions": self._versions,
                "timings": asdict(clip.timings),
                "report": report.summary() if report else None,
                "comparison": comparison.summary() if comparison else None,
            }
            if team().leads:
                _save(job, clip, comparison, record)
            self.overview = report.overview() if report else ""  # while it is patched: it tells the present state
        return "\n".join([str(job.out), *_figures(job, clip, comparison, self._args.quiet)])

    def _run(self, job: Job) -> Clip:
        """One clip; for a comparison after a single unmeasured step, so that neither side pays for tuning and
        compiling."""
        arguments = call_arguments(type(self._pipe), job.request)
        seed = cast(int, job.request.seed)
        if self._args.compare:
            generate(self._pipe, {**arguments, "num_inference_steps": 1}, seed)
        clip = generate(self._pipe, arguments, seed, show_progress=self._show_progress)
        if not np.isfinite(clip.frames).all():
            raise UsageError(f"{job.out}: the clip is not finite, so it is not written; try another --dtype")
        return clip


def _figures(job: Job, clip: Clip, comparison: Comparison | None, quiet: bool) -> list[str]:
    """What is printed below the name of a clip; if ``quiet``, only what was asked for."""
    if quiet:
        return [str(comparison)] if comparison else []
    return [f"  seed {job.request.seed}", str(comparison or f"  {clip.timings}")]


def _patch(pipe: DiffusionPipeline, args: argparse.Namespace) -> PatchReport:
    return patch_pipeline(
        pipe,
        only=args.only,
        skip=args.skip,
        strict=args.strict,
        cuda_graph=args.cuda_graph or "auto",
        parallel=parallel_of(args),
    )


def _save(job: Job, clip: Clip, comparison: Comparison | None, record: dict[str, Any]) -> None:
    """Write the clip, what stands beside it, and its record; a clip that cannot be written there is kept elsewhere."""
    try:
        _write(job.out, job, clip, comparison, record)
    except OSError as error:
        kept = _keep_elsewhere(job, clip, comparison, record)
        where = f"the clip is saved as {kept}" if kept else "and no other place takes the clip"
        raise OutputError(f"cannot write {job.out}: {in_words(error)}; {where}") from error


def _write(out: Path, job: Job, clip: Clip, comparison: Comparison | None, record: dict[str, Any]) -> None:
    """None of the files appears before all are written; the record, by which :func:`recover` goes, appears first."""
    fps = cast(float, job.request.fps)
    with aside(out) as part:
        write_clip(clip.frames, part, fps)
        with ExitStack() as beside:
            if comparison:
                write_clip(comparison.side_by_side(), beside.enter_context(aside(comparison_path(out))), fps)
            write_json(record_path(out), {**record, "output": fingerprint(part)})
        if not comparison and out.exists():
            discard(comparison_path(out))  # of the clip that is replaced


def _keep_elsewhere(job: Job, clip: Clip, comparison: Comparison | None, record: dict[str, Any]) -> Path | None:
    """Write a clip that cannot go where it should to another place, as a folder of PNG frames if need be."""
    for place in (Path(tempfile.gettempdir()), Path.cwd()):
        for name in dict.fromkeys((f"clip{job.out.suffix}", "clip")):
            folder = None
            try:
                folder = Path(tempfile.mkdtemp(prefix="vidaccel-", dir=place))
                _write(folder / name, job, clip, comparison, record)
                return folder / name
            except OSError:
                if folder is not None:
                    discard(folder)
    return None
