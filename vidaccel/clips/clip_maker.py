"""What ``vidaccel generate`` does: check all, load once, make clip after clip, write each whole or not at all."""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from tqdm import tqdm

from vidaccel import patch_pipeline
from vidaccel.clips.clip_request import RANDOM_SEED, request_from_arguments
from vidaccel.clips.comparison import Comparison
from vidaccel.clips.generation import Clip, call_arguments, generate, resolve
from vidaccel.clips.jobs import Job, LineErrors, jobs_from_file, numbered_jobs
from vidaccel.clips.outputs import (
    Claims,
    aside,
    check_output,
    comparison_path,
    discard,
    fingerprint,
    in_words,
    is_done,
    record_path,
    recover,
    write_json,
)
from vidaccel.clips.video import write_clip
from vidaccel.clips.video_model import VideoModel, dtype_of, find_model, load_pipeline, parameters_of_call
from vidaccel.environment import device_of, environment
from vidaccel.errors import OutputError, UsageError

if TYPE_CHECKING:
    from vidaccel.patching.report import PatchReport

__all__ = ["make_clips"]


def make_clips(args: argparse.Namespace) -> int:
    """Run the command; the exit code is 1 if a clip failed."""
    with _warnings_off() if args.quiet else nullcontext():
        return _make_clips(args)


@contextmanager
def _warnings_off() -> Iterator[None]:
    """Log errors alone; of diffusers nothing, whose errors are raised as well."""
    levels = {"vidaccel": logging.ERROR, "diffusers": logging.CRITICAL}
    before = {name: logging.getLogger(name).level for name in levels}
    try:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _make_clips(args: argparse.Namespace) -> int:
    if args.no_patch and (args.compare or args.only or args.skip or args.strict or args.cuda_graph):
        raise UsageError("--no-patch leaves nothing to do for --compare, --only, --skip, --strict or --cuda-graph")
    device = device_of(args.device)
    dtype = dtype_of(args.dtype, device)
    if args.cuda_graph and device.type != "cuda":
        raise UsageError(f"--cuda-graph needs a GPU, and the device is {device}")
    model = find_model(args.model, args.allow_pickle)
    if not args.no_patch:
        model.check_patchable()
    settings = {
        "model": model.source,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        **{name: getattr(args, name) for name in ("no_patch", "only", "skip", "compare")},
    }
    errors = LineErrors()
    jobs = _not_done(_asked_for(args, model, errors), model, settings, args, errors)
    if jobs:
        if args.only or args.skip:
            model.check_sites(args.only, args.skip)
        start = time.perf_counter()
        pipe = load_pipeline(model, dtype, device, show_progress=not args.quiet)
        loaded = time.perf_counter()
        report = None if args.no_patch else _patch(pipe, args)
        patched = time.perf_counter()
        _make_all(pipe, report, jobs, args, settings, errors)
        if not args.quiet:
            print(f"load {loaded - start:.1f} s · patch {patched - loaded:.1f} s")
    return 1 if errors.count else 0


def _asked_for(args: argparse.Namespace, model: VideoModel, errors: LineErrors) -> list[Job]:
    asked = request_from_arguments(args)
    request = resolve(model, asked)
    if asked.seed == RANDOM_SEED:
        request = replace(request, seed=RANDOM_SEED)  # each clip draws its own
    if args.jobs is None:
        return numbered_jobs(request, args.out, args.num_clips)
    takes = parameters_of_call(model.pipeline_class)
    return jobs_from_file(args.jobs, request, args.out, takes, errors, args.allow_outside)


def _not_done(
    jobs: list[Job], model: VideoModel, settings: dict[str, Any], args: argparse.Namespace, errors: LineErrors
) -> list[Job]:
    """The jobs that are left to do, each checked as far as that goes without the model's weights."""
    todo: list[Job] = []
    claims = Claims()
    for job in jobs:
        with errors.survived(job.origin):
            request = resolve(model, job.request)
            call_arguments(model.pipeline_class, request)
            check_output(job.out, cast(float, request.fps), args.compare)
            claims.add(job.out, args.compare)
            recover(job.out)
            if args.overwrite or not is_done(job.out, asdict(job.request) | settings):
                todo.append(replace(job, request=request))
            elif not args.quiet:
                print(f"{job.out}: done already, skipped")
    return todo


def _make_all(
    pipe: DiffusionPipeline,
    report: PatchReport | None,
    jobs: list[Job],
    args: argparse.Namespace,
    settings: dict[str, Any],
    errors: LineErrors,
) -> None:
    versions = environment(pipe.device)
    if report and args.compare:
        report.restore()  # so far it was patched only to find a wrong name before the first clip
    report_text = ""
    for job in tqdm(jobs, desc="clips", disable=args.quiet or len(jobs) == 1):
        with errors.survived(job.origin), ExitStack() as until_saved:
            stock = _run(pipe, job, args) if args.compare else None
            if stock:
                report = until_saved.enter_context(_patch(pipe, args))
            clip = _run(pipe, job, args)
            comparison = Comparison(stock, clip) if stock else None
            record = {
                "arguments": asdict(job.request) | settings,
                "seed": job.request.seed,
                "versions": versions,
                "timings": asdict(clip.timings),
                "report": report.summary() if report else None,
                "comparison": comparison.summary() if comparison else None,
            }
            _save(job, clip, comparison, record)
            report_text = report.overview() if report else ""  # while it is patched: it tells the present state
            tqdm.write("\n".join([str(job.out), *_figures(job, clip, comparison, args.quiet)]))
    if report_text and not args.quiet:
        print(report_text)


def _figures(job: Job, clip: Clip, comparison: Comparison | None, quiet: bool) -> list[str]:
    """What is printed below the name of a clip; if ``quiet``, only what was asked for."""
    if quiet:
        return [str(comparison)] if comparison else []
    return [f"  seed {job.request.seed}", str(comparison or f"  {clip.timings}")]


def _patch(pipe: DiffusionPipeline, args: argparse.Namespace) -> PatchReport:
    return patch_pipeline(
        pipe, only=args.only, skip=args.skip, strict=args.strict, cuda_graph=args.cuda_graph or "auto"
    )


def _run(pipe: DiffusionPipeline, job: Job, args: argparse.Namespace) -> Clip:
    """One clip; for a comparison after a single unmeasured step, so that neither side pays for tuning and compiling."""
    arguments = call_arguments(type(pipe), job.request)
    seed = cast(int, job.request.seed)
    if args.compare:
        generate(pipe, {**arguments, "num_inference_steps": 1}, seed)
    clip = generate(pipe, arguments, seed, show_progress=not args.quiet)
    if not np.isfinite(clip.frames).all():
        raise UsageError(f"{job.out}: the clip is not finite, so it is not written; try another --dtype")
    return clip


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
