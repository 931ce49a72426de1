"""What ``vidaccel generate`` does: check all, load once, make clip after clip, write each whole or not at all."""

from __future__ import annotations

import argparse
import json
import time
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from tqdm import tqdm

from vidaccel import patch_pipeline
from vidaccel.clips.clip_request import request_from_arguments
from vidaccel.clips.comparison import Comparison
from vidaccel.clips.generation import Clip, call_arguments, generate, resolve
from vidaccel.clips.jobs import Job, LineErrors, jobs_from_file, numbered_jobs
from vidaccel.clips.outputs import aside, check_output, comparison_path, discard, is_done, record_path
from vidaccel.clips.video import write_clip
from vidaccel.clips.video_model import VideoModel, dtype_of, find_model, load_pipeline, parameters_of_call
from vidaccel.environment import device_of, environment
from vidaccel.errors import UsageError

if TYPE_CHECKING:
    from vidaccel.patching.report import PatchReport

__all__ = ["make_clips"]


def make_clips(args: argparse.Namespace) -> int:
    """Run the command; the exit code is 1 if a line of the job file failed."""
    if args.no_patch and (args.compare or args.only or args.skip or args.strict or args.cuda_graph):
        raise UsageError("--no-patch leaves nothing to do for --compare, --only, --skip, --strict or --cuda-graph")
    device = device_of(args.device)
    dtype = dtype_of(args.dtype, device)
    if args.cuda_graph and device.type != "cuda":
        raise UsageError(f"--cuda-graph needs a GPU, and the device is {device}")
    model = find_model(args.model)
    if not args.no_patch:
        model.check_patchable()
    settings = {
        "model": model.source,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        **{name: getattr(args, name) for name in ("no_patch", "only", "skip", "compare")},
    }
    errors = LineErrors()
    jobs = _not_done(_asked_for(args, model, errors), model, settings, args.overwrite, errors)
    if jobs:
        start = time.perf_counter()
        pipe = load_pipeline(model, dtype, device, show_progress=not args.quiet)
        loaded = time.perf_counter()
        report = None if args.no_patch else _patch(pipe, args)
        patched = time.perf_counter()
        _make_all(pipe, report, jobs, args, settings, errors)
        print(f"load {loaded - start:.1f} s · patch {patched - loaded:.1f} s")
    return 1 if errors.count else 0


def _asked_for(args: argparse.Namespace, model: VideoModel, errors: LineErrors) -> list[Job]:
    request = resolve(model, request_from_arguments(args))
    if args.jobs is None:
        return numbered_jobs(request, args.out, args.num_clips)
    return jobs_from_file(args.jobs, request, args.out, parameters_of_call(model.pipeline_class), errors)


def _not_done(
    jobs: list[Job], model: VideoModel, settings: dict[str, Any], overwrite: bool, errors: LineErrors
) -> list[Job]:
    """The jobs that are left to do, each checked as far as that goes without the model's weights."""
    todo: list[Job] = []
    taken: set[Any] = set()
    for job in jobs:
        with errors.survived(job.origin):
            call_arguments(model.pipeline_class, resolve(model, job.request))
            check_output(job.out)
            if job.out in taken:
                raise UsageError(f"an earlier job writes {job.out} already")
            taken.add(job.out)
            if overwrite or not is_done(job.out, asdict(job.request) | settings):
                todo.append(job)
            else:
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
            tqdm.write(f"{job.out}\n{comparison or f'  {clip.timings}'}")
    if report_text and not args.quiet:
        print(report_text)


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
    """Write the clip, what stands beside it, and its record; none of them appears before all are written."""
    fps = cast(int, job.request.fps)
    try:
        with ExitStack() as files:  # they are renamed in reverse order: the clip itself comes last
            write_clip(clip.frames, files.enter_context(aside(job.out)), fps)
            files.enter_context(aside(record_path(job.out))).write_text(json.dumps(record, indent=2) + "\n")
            if comparison:
                write_clip(comparison.side_by_side(), files.enter_context(aside(comparison_path(job.out))), fps)
            if job.out.exists():  # to be overwritten; no new record may stand beside an old clip, nor the reverse
                discard(job.out)
                discard(comparison_path(job.out))
    except OSError as error:
        raise UsageError(f"cannot write {job.out}: {error}") from error
