"""One op at a time, at the shapes that the models give it: stock code, torch.compile and ours, in one run.

``bytes`` and ``flops`` of a row are what our algorithm has to move and to multiply, for every provider, so that
``GB/s`` and ``TFLOP/s`` are nothing but the inverse of the time. What bounds it is the one that takes longer at the
rates that this GPU was seen to reach.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vidaccel.bench.op_case import Arguments, Case, Op, Outputs, Provider
from vidaccel.bench.op_cases import OPS
from vidaccel.bench.record import Recorder, Row
from vidaccel.bench.settings import Settings
from vidaccel.bench.timing import time_calls, time_queued, timed
from vidaccel.bench.variants import cudnn_benchmark
from vidaccel.fidelity.metrics import relative_error
from vidaccel.kernels.dispatch import record_choices, triton_device_problem
from vidaccel.kernels.settings import constants_overridden

__all__ = ["measure_ops", "one_stage_kernels"]

_CACHES = 4  # how many times over the inputs of all timed calls fill the L2 cache
_MOST_CALLS = 24
_SECONDS = 0.1  # for the timed calls of a provider
_MOST_ROUNDINGS = 16  # relative error, in units of the dtype's, beyond which a result is wrong and not worth a time


def measure_ops(
    names: list[str], size: str, device: torch.device, dtype: torch.dtype, settings: Settings, recorder: Recorder
) -> None:
    """Fill ``recorder`` with one row per op, case and provider; of many ops torch.compile gets the first case only.

    The record's ``failed_ops`` are those of which a provider failed.
    """
    cases = {name: (OPS[name].tiny,) if size == "tiny" else OPS[name].cases for name in names}
    recorder.expect(sum(len(cases[name]) * len(OPS[name].providers) for name in names))
    recorder.record["shapes"] = {
        _scope(name, case): ["x".join(map(str, shape)) for shape in case.shapes]
        for name in names
        for case in cases[name]
    }
    for name in names:
        for case in cases[name]:
            compiles = len(names) == 1 or case is cases[name][0]
            providers = {v: p for v, p in OPS[name].providers.items() if compiles or not p.compiled}
            _measure_case(_scope(name, case), OPS[name], case, providers, device, dtype, settings, recorder)
    failed = {row["scope"].partition(":")[0] for row in recorder.rows if row["status"] == "failed"}
    recorder.record["failed_ops"] = sorted(failed)


def _scope(name: str, case: Case) -> str:
    return f"{name}: {case.name}"


def _measure_case(
    scope: str,
    op: Op,
    case: Case,
    providers: Mapping[str, Provider],
    device: torch.device,
    dtype: torch.dtype,
    settings: Settings,
    recorder: Recorder,
) -> None:
    if recorder.out_of_time:
        for variant in providers:
            recorder.skip_for_time(scope, variant)
        return
    try:
        arguments = op.build(*_random_tensors(case, device, dtype, settings.seed))
        gold = _gold(op, case, arguments)
    except Exception as error:  # whatever one case does, the others are still worth measuring
        for variant in providers:
            recorder.fail(scope, variant, error)
        return
    for variant, provider in providers.items():
        if problem := _why_skipped(provider, arguments, case.scalars):
            recorder.skip(scope, variant, problem)
            continue
        measured = partial(_measure, provider, arguments, case.scalars, gold, dtype, device, settings)
        work = partial(_with_rates, measured, op, case, dtype.itemsize, recorder.record["ceilings"])
        recorder.measure(scope, variant, work)
        torch._dynamo.reset()


@torch.no_grad()
def _gold(op: Op, case: Case, arguments: Arguments) -> tuple[Tensor, ...]:
    in_float64 = (copy.deepcopy(x).double() if isinstance(x, nn.Module) else x.double() for x in arguments)
    return _tensors(op.reference(*in_float64, *case.scalars))


def _tensors(outputs: Outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _why_skipped(provider: Provider, arguments: Arguments, scalars: tuple[Any, ...]) -> str | None:
    first = next(x for x in arguments if isinstance(x, Tensor))
    if provider.one_stage and (problem := triton_device_problem(first)):
        return problem
    return provider.problem(*arguments, *scalars) if provider.problem else None


def _random_tensors(case: Case, device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in case.shapes]
    return tuple(x.movedim(1, -1).contiguous().movedim(-1, 1) if x.ndim > 3 else x for x in drawn)


@torch.no_grad()
def _measure(
    provider: Provider,
    arguments: Arguments,
    scalars: tuple[Any, ...],
    gold: tuple[Tensor, ...],
    dtype: torch.dtype,
    device: torch.device,
    settings: Settings,
) -> Row:
    run = torch.compile(provider.run, backend=settings.compile_backend) if provider.compiled else provider.run
    prepared = provider.prepare(*arguments, *scalars)
    call = partial(run, *prepared, *scalars)
    with ExitStack() as stack:
        if provider.one_stage:
            stack.enter_context(one_stage_kernels())
        if provider.cudnn_benchmark:
            stack.enter_context(cudnn_benchmark(dtype))
        first_call = timed(call, device)
        with record_choices() as choices:
            outputs = _tensors(call())
        error = max(relative_error(x.reshape(y.shape), y) for x, y in zip(outputs, gold, strict=True))
        if not error <= _MOST_ROUNDINGS * torch.finfo(dtype).eps:
            raise ArithmeticError(f"relative error {error:.1e} against float64")
        if device.type == "cuda":
            calls = [partial(run, *inputs, *scalars) for inputs in _input_sets(prepared, device)]
            latency = time_queued(calls, device, budget_seconds=_SECONDS)
        else:
            latency = time_calls(call, device, repeats=settings.repeats, warmup=settings.warmup)
    return {
        **latency._asdict(),
        "cold_start_s": first_call,
        "error_to_reference": error,
        "implementations": sorted({choice.impl for choice in choices}),
    }


def _input_sets(arguments: Arguments, device: torch.device) -> list[Arguments]:
    """The arguments and as many copies as it takes for none to be in the L2 cache when its turn comes."""
    nbytes = sum(x.nbytes for x in arguments if isinstance(x, Tensor))
    wanted = math.ceil(_CACHES * torch.cuda.get_device_properties(device).L2_cache_size / max(nbytes, 1))
    copies = min(max(wanted, 2), _MOST_CALLS) - 1
    return [arguments, *(tuple(x.clone() if isinstance(x, Tensor) else x for x in arguments) for _ in range(copies))]


def _with_rates(measure: Callable[[], Row], op: Op, case: Case, itemsize: int, ceilings: Mapping[str, float]) -> Row:
    """The row that ``measure`` returns, with what its time means against the ceilings of this device."""
    row = measure()
    nbytes, bound = op.numbers(case) * itemsize, "memory"
    gb_s = nbytes / row["median_ms"] / 1e6
    row |= {"bytes": nbytes, "gb_s": gb_s, "of_copy_bandwidth": gb_s / ceilings["copy_gb_s"]}
    if op.flops is not None:
        flops = op.flops(case)
        tflop_s = flops / row["median_ms"] / 1e9
        of_matmul = tflop_s / next(rate for name, rate in ceilings.items() if name.startswith("matmul_"))
        row |= {"flops": flops, "tflop_s": tflop_s, "of_matmul_rate": of_matmul}
        bound = "matmul" if of_matmul > row["of_copy_bandwidth"] else "memory"
    return row | {"bound": bound}


def one_stage_kernels() -> AbstractContextManager[None]:
    """Launch every kernel that takes its prefetch depth as ``STAGES``, as ours do, with a depth of one."""
    return constants_overridden(STAGES=1)
