"""Every variant of a pipeline through every scope: first call, correctness, then latency and memory."""

from __future__ import annotations

import itertools
import logging
import statistics
import time
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from vidaccel.bench.record import Recorder, Row
from vidaccel.bench.settings import Settings
from vidaccel.bench.timing import time_call, time_calls
from vidaccel.bench.variants import applied, cudnn_benchmark, dtype_of, is_split, without_benchmark
from vidaccel.bench.workloads import PipelineWorkload, Workload, workloads
from vidaccel.environment import free_memory, peak_memory_gib, peak_reserved_gib, reset_peak_memory
from vidaccel.errors import first_line
from vidaccel.fidelity.metrics import psnr, relative_error
from vidaccel.patching.report import PatchReport

__all__ = ["measure_pipeline"]

logger = logging.getLogger(__name__)

_HOST_CALLS = 5


def measure_pipeline(
    pipe: DiffusionPipeline, arguments: dict[str, Any], device: torch.device, settings: Settings, recorder: Recorder
) -> None:
    """Fill ``recorder`` with one row per scope and variant.

    Args:
        pipe: On ``device``, unpatched; left as it was.
        arguments: Of the pipeline's call.
        device: Where the pipeline runs.
        settings: How to measure.
        recorder: Also receives the shapes and, per patched variant, the patch report.
    """
    split = any(map(is_split, settings.variants))
    by_scope = workloads(pipe, arguments, settings.scopes, settings.seed, whole_decode=split)
    recorder.record["patch_reports"] = {}
    recorder.record["shapes"] = {scope: workload.shapes for scope, workload in by_scope.items()}
    yardsticks = {scope: _Yardstick(scope, settings.variants[0], settings.with_reference) for scope in by_scope}
    for code, variants in itertools.groupby(settings.variants, key=without_benchmark):
        with ExitStack() as stack:
            started = time.perf_counter()
            try:
                report = stack.enter_context(applied(code, pipe, settings))
            except Exception as error:  # a variant that cannot be put in place is no reason to lose the others
                for variant, scope in itertools.product(variants, by_scope):
                    recorder.fail(scope, variant, error)
                continue
            prepared: float | None = time.perf_counter() - started
            for variant in variants:
                with cudnn_benchmark(dtype_of(pipe)) if variant != code else nullcontext():
                    for scope, workload in by_scope.items():
                        # A whole pipeline that comes after its parts finds them warm.
                        start_up = prepared if scope != "end-to-end" or len(by_scope) == 1 else None
                        work = partial(
                            _measure, workload, yardsticks[scope], variant, device, settings, start_up, report
                        )
                        recorder.measure(scope, variant, work)
                if report is not None:
                    recorder.record["patch_reports"][variant] = report.summary()
                prepared = None  # the next one finds the same code compiled


def _measure(
    workload: Workload,
    yardstick: _Yardstick,
    variant: str,
    device: torch.device,
    settings: Settings,
    start_up: float | None,
    report: PatchReport | None,
) -> Row:
    free_memory()
    first_call = time_call(workload.run, device).wall_ms / 1e3
    output = workload.output()
    if variant == settings.variants[0]:
        yardstick.adopt(output, workload)
    likeness = yardstick.compare(output)
    free_memory()  # of what the first calls left behind, which would count as reserved
    reset_peak_memory(device)
    sent = report.bytes_sent if report else 0
    latency = time_calls(
        workload.run, device, repeats=settings.repeats, warmup=settings.warmup, budget_seconds=settings.budget_seconds
    )
    if report and is_split(variant):
        likeness["sent_gb"] = (report.bytes_sent - sent) / (settings.warmup + latency.repeats) / 1e9
    parts, memory, reserved = workload.parts(), peak_memory_gib(device), peak_reserved_gib(device)
    return {
        **latency._asdict(),
        **parts,
        "host_ms": _host_ms(workload, device, settings),
        "cold_start_s": None if start_up is None else start_up + first_call,
        "peak_memory_gib": memory,
        "peak_reserved_gib": reserved,
        **likeness,
    }


def _host_ms(workload: Workload, device: torch.device, settings: Settings) -> float | None:
    """Time that a call takes to queue, where a device works beside the host; of a whole pipeline it says nothing."""
    if device.type != "cuda" or isinstance(workload, PipelineWorkload):
        return None
    calls = min(settings.repeats, _HOST_CALLS)
    return statistics.median(time_call(workload.run, device).host_ms for _ in range(calls))


class _Yardstick:
    """What every variant's output in one scope is held against: the first one's, and if wanted a float32 one."""

    def __init__(self, scope: str, first: str, with_reference: bool) -> None:
        self._scope = scope
        self._first_variant = first
        self._with_reference = with_reference
        self._first: Tensor | None = None
        self._reference: Tensor | None = None

    def adopt(self, output: Tensor, workload: Workload) -> None:
        """Take the first variant's output, if it is finite, and let its workload compute the float32 one."""
        if not output.isfinite().all():
            logger.warning("%s: %s's output is not finite: no error is measured", self._scope, self._first_variant)
            return
        self._first = output
        if self._with_reference:
            try:
                self._reference = workload.reference()
            except torch.OutOfMemoryError as error:
                logger.warning("no float32 reference for %s: %s", self._scope, first_line(error))

    def compare(self, output: Tensor) -> Row:
        """Relative L2 errors, and for frames the PSNR of the worst one.

        Raises:
            ArithmeticError: the output holds an infinity or a NaN, the first one's holds none.
        """
        if self._first is None:
            return {}
        if not output.isfinite().all():
            raise ArithmeticError(f"the output is not finite, {self._first_variant}'s is")
        row: Row = {"bit_identical": torch.equal(output, self._first)}
        for name, other in ((self._first_variant, self._first), ("reference", self._reference)):
            if other is not None and other is not output:
                row[f"error_to_{name}"] = relative_error(output, other)
                if self._scope not in ("denoiser", "encode"):
                    worst = psnr(_frames(self._scope, output), _frames(self._scope, other)).min()
                    row[f"psnr_min_to_{name}_db"] = float(worst)
        return row


def _frames(scope: str, output: Tensor) -> np.ndarray:
    """``[F, H, W, C]`` in 0..1; a decoder gives -1..1 as ``[F, C, H, W]`` or ``[B, C, F, H, W]``."""
    if scope == "vae":
        output = (output / 2 + 0.5).clamp(0, 1)
        output = output.movedim(1, -1).flatten(0, -4)
    return output.numpy()
