"""What ``vidaccel validate`` does: :func:`compare` on a model and a clip that the command line names."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from vidaccel.clips.clip_request import request_from_arguments
from vidaccel.clips.generation import call_arguments, resolve
from vidaccel.clips.video_model import dtype_of, find_model, load_pipeline
from vidaccel.environment import device_of
from vidaccel.fidelity.comparison import compare
from vidaccel.fidelity.output import check_files, put_out
from vidaccel.fidelity.table import comparison_lines
from vidaccel.parallel.team import check_parallel, parallel_of, team

__all__ = ["validate"]


def validate(args: argparse.Namespace) -> int:
    """Run the command; exit code 1 if the clips are not the same clip."""
    check_parallel(args)
    if team().leads:
        check_files(args)
    device = device_of(args.device)
    dtype = dtype_of(args.dtype, device)
    model = find_model(args.model, args.allow_pickle)
    model.check_patchable()
    model.check_sites(args.only, args.skip)
    request = resolve(model, request_from_arguments(args))
    arguments = call_arguments(model.pipeline_class, request)
    pipe = load_pipeline(model, dtype, device, show_progress=team().leads)
    comparison = compare(
        pipe,
        {"only": args.only, "skip": args.skip, "strict": args.strict, "parallel": parallel_of(args)},
        seed=request.seed or 0,
        margin_db=args.margin,
        min_psnr_db=args.min_psnr,
        require_bit_exact=args.require_bit_exact,
        quick=args.quick,
        blame=True if args.blame else "on failure",
        controls=args.controls,
        compile_control=args.compile_control,
        progress=team().leads,
        **arguments,
    )
    if not team().leads:
        return 0  # the leading one's exit code counts
    summary = comparison.summary()
    record = {"command": "validate", "model": model.source, "request": asdict(request)}
    record |= {"dtype": str(dtype).removeprefix("torch."), **summary}
    pairs = zip(comparison.reference, comparison.patched, strict=True)
    put_out(args, record, comparison_lines(summary), pairs, ("unpatched", "patched"), request.fps or 0)
    return 0 if comparison.passed else 1
