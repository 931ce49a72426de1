"""What ``vidaccel generate`` does: check all, then have an engine load the model and make clip after clip."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any, Protocol, cast

import torch
from tqdm import tqdm

from vidaccel.clips.clip_maker import ClipMaker, Setup
from vidaccel.clips.clip_request import RANDOM_SEED, request_from_arguments
from vidaccel.clips.generation import call_arguments, resolve
from vidaccel.clips.jobs import Job, LineErrors, jobs_from_file, numbered_jobs
from vidaccel.clips.outputs import Claims, check_output, is_done, recover
from vidaccel.clips.video_model import VideoModel, dtype_of, find_model, parameters_of_call
from vidaccel.environment import device_of
from vidaccel.errors import UsageError, first_line
from vidaccel.parallel.team import check_parallel, team

__all__ = ["make_clips"]


class Engine(Protocol):
    """Where clips are made."""

    @property
    def device(self) -> torch.device:
        """What the model will be on."""

    def make_all(self, jobs: list[Job], setup: Setup, errors: LineErrors) -> None:
        """Make the clip of every job, and print what there is to say; what goes wrong with one goes to ``errors``."""


class ThisProcess:
    """The engine that makes clip after clip right here."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = device_of(args.device)

    def make_all(self, jobs: list[Job], setup: Setup, errors: LineErrors) -> None:
        quiet = setup.args.quiet
        maker = ClipMaker(setup, self.device, show_progress=not quiet)
        for job in tqdm(jobs, desc="clips", disable=quiet or len(jobs) == 1):
            failed = errors.count
            with errors.survived(job.origin):
                told = maker.make(job)
                if team().leads:
                    tqdm.write(told)
            team().meet(failed=errors.count > failed)
        if quiet:
            return
        if maker.overview:
            print(maker.overview)
        print(f"load {maker.load_seconds:.1f} s · patch {maker.patch_seconds:.1f} s")


def make_clips(args: argparse.Namespace) -> int:
    """Run the command; the exit code is 1 if a clip failed. All processes of ``torchrun`` make each clip together."""
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
    _check_options(args)
    leads = team().leads
    args.quiet |= not leads  # one process of several speaks, and says what is left to do
    model = find_model(args.model, args.allow_pickle)
    if not args.no_patch:
        model.check_patchable()
    with _engine(args) as engine:
        device = engine.device
        dtype = dtype_of(args.dtype, device)
        if args.cuda_graph and device.type != "cuda":
            raise UsageError(f"--cuda-graph needs a GPU, and the device is {device}")
        settings = {
            "model": model.source,
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(device) if team().size == 1 else device.type,
            **{name: getattr(args, name) for name in ("no_patch", "only", "skip", "compare")},
        }
        errors = LineErrors()
        jobs = team().tell(_not_done(_asked_for(args, model, errors), model, settings, args, errors) if leads else [])
        if jobs:
            if args.only or args.skip:
                model.check_sites(args.only, args.skip)
            engine.make_all(jobs, Setup(model, dtype, args, settings), errors)
    return 1 if errors.count else 0


def _check_options(args: argparse.Namespace) -> None:
    if args.no_patch and (args.compare or args.only or args.skip or args.strict or args.cuda_graph or args.parallel):
        raise UsageError(
            "--no-patch leaves nothing to do for --compare, --only, --skip, --strict, --cuda-graph or --parallel"
        )
    check_parallel(args)
    if args.engine == "ray":
        if team().size > 1:
            raise UsageError("--engine ray starts its own processes: run it without torchrun")
        if args.jobs is None:
            raise UsageError("--engine ray makes the clips of a job file; give it with --jobs")
        if args.workers is not None and args.workers < 1:
            raise UsageError(f"workers must be at least 1, got {args.workers}")
    elif args.address is not None or args.workers is not None or args.ray_logs:
        raise UsageError("--address, --workers and --ray-logs are for --engine ray")


def _engine(args: argparse.Namespace) -> AbstractContextManager[Engine]:
    if args.engine != "ray":
        return nullcontext(ThisProcess(args))
    try:
        from vidaccel.clips.ray_engine import RayEngine
    except ImportError as error:
        raise UsageError(f"--engine ray needs Ray ({first_line(error)}): pip install 'vidaccel[ray]'") from error
    return RayEngine(args)


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
