"""One op at a time, at the shapes that the models give it: stock code, torch.compile and ours, in one run.

``bytes`` and ``flops`` of a row are what the op itself says that a call has to move and to multiply, for every variant,
so that ``GB/s`` and ``TFLOP/s`` are nothing but the inverse of the time. What bounds it is the one that takes longer at
the rates that this GPU was seen to reach.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidaccel.bench.op_cases import CASES, TINY, Arguments, Float32, Stretches, Zeros
from vidaccel.bench.op_stock import STOCK, Stock, as_it_is
from vidaccel.bench.record import Recorder, Row
from vidaccel.bench.settings import Settings
from vidaccel.bench.timing import time_call, time_calls, time_queued
from vidaccel.kernels.check import Part, in_float64
from vidaccel.kernels.op import REFERENCE, Costs, Op, device_reason, listening, ops
from vidaccel.kernels.settings import constants_overridden

__all__ = ["arguments_of", "measure_ops", "measured_ops"]

# their kernels take their depth as STAGES
PREFETCHING = ("add_layer_norm", "gated_residual_norm", "group_norm_silu", "temporal_attention")
CACHES = 4  # how many times over the inputs of all timed calls fill the L2 cache
MOST_CALLS = 24
SECONDS = 0.1  # for the timed calls of a variant
MOST_ROUNDINGS = 16  # relative error, in units of the dtype's, beyond which a result is wrong and not worth a time


class _Variant(NamedTuple):
    """One way to compute an op: ``run`` takes what ``prepare`` makes of the op's arguments.

    What it returns is the op's outputs, or ``collect`` makes them of it.
    """

    run: Callable[..., Any]
    prepare: Callable[..., tuple[Any, ...]]
    collect: Callable[[Any], Any] = as_it_is
    compiled: bool = False
    one_stage: bool = False
    impl: str | None = None


class _Gold(NamedTuple):
    """The reference in float64 on a part of the arguments, and where that lies in the outputs."""

    of: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
    outputs: tuple[Tensor, ...]


def measure_ops(
    name: str, size: str, device: torch.device, dtype: torch.dtype, settings: Settings, recorder: Recorder
) -> None:
    """Fill ``recorder`` with one row per op, case and variant.

    ``name`` is that of an op, or "all": then torch.compile gets only the first case of each. The record's
    ``failed_ops`` are those of which a variant failed.
    """
    cases = {
        (op, case): arguments
        for op in (measured_ops() if name == "all" else [name])
        for case, arguments in CASES[op].items()
        if (case == TINY) == (size == TINY)
    }
    recorder.record["shapes"] = {
        f"{op}: {case}": {x: "x".join(map(str, shape)) for x, shape in arguments.items() if isinstance(shape, tuple)}
        for (op, case), arguments in cases.items()
    }
    compiled = set()
    for (op, case), arguments in cases.items():
        compiles = name != "all" or op not in compiled
        compiled.add(op)
        _measure_case(f"{op}: {case}", ops()[op], arguments, compiles, device, dtype, settings, recorder)
    failed = {row["scope"].partition(":")[0] for row in recorder.rows if row["status"] == "failed"}
    recorder.record["failed_ops"] = sorted(failed)


def measured_ops() -> list[str]:
    """The ops that have cases."""
    return [op for op in CASES if op in ops()]


def arguments_of(op: Op, case: Arguments, device: torch.device, dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    """The arguments of ``case`` by position, as ``op`` takes them."""
    generator = torch.Generator(device).manual_seed(seed)

    def made(value: Any) -> Any:
        if isinstance(value, Zeros):
            return torch.zeros(value, device=device, dtype=dtype)
        if isinstance(value, Float32):
            return torch.randn(value, generator=generator, device=device)
        if isinstance(value, Stretches):
            rows = enumerate(value.lengths)
            return torch.cat([torch.full((n,), i, device=device, dtype=torch.int32) for i, n in rows])
        if not isinstance(value, tuple):
            return value
        x = torch.randn(value, generator=generator, device=device, dtype=dtype)
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.ndim > 3 else x

    bound = inspect.signature(op.reference).bind(**{name: made(value) for name, value in case.items()})
    bound.apply_defaults()
    return (*bound.args, *bound.kwargs.values())


def _measure_case(
    scope: str,
    op: Op,
    case: Arguments,
    compiles: bool,
    device: torch.device,
    dtype: torch.dtype,
    settings: Settings,
    recorder: Recorder,
) -> None:
    if recorder.out_of_time:
        recorder.skip_for_time(scope, "all")
        return
    try:
        args = arguments_of(op, case, device, dtype, settings.seed)
        variants, gold, costs = dict(_variants(op, args, compiles)), _gold(op, args), op.costs(*args)
    except Exception as error:  # whatever one case does, the others are still worth measuring
        recorder.fail(scope, "all", error)
        return
    for name, variant in variants.items():
        if variant.impl and (reason := op.unserved(*args, impl=variant.impl)):
            recorder.skip(scope, name, reason)
            continue
        measured = partial(_measure, variant, op, args, gold, device, dtype, settings)
        recorder.measure(scope, name, partial(_with_rates, measured, costs, recorder.record["ceilings"]))
        torch._dynamo.reset()


def _variants(op: Op, args: tuple[Any, ...], compiles: bool) -> Iterator[tuple[str, _Variant]]:
    """By name: stock code in each memory order, compiled or not, each implementation where there are several, ours."""
    stock = STOCK.get(op.name, Stock(op.reference, _as_they_are))
    images = any(isinstance(x, Tensor) and x.ndim > 3 and not x.is_contiguous() for x in args)
    for name in ("eager", "compile") if compiles else ("eager",):
        in_order = partial(_stock_order, stock.prepare)
        yield name, _Variant(stock.run, in_order, stock.collect, compiled=name == "compile")
        if images:
            yield f"{name}+channels_last", _Variant(stock.run, stock.prepare, compiled=name == "compile")
    ways = [name for name in op.implementations if name != REFERENCE]
    for way in ways if len(ways) > 1 else ():
        yield way, _Variant(partial(op, impl=way), _as_they_are, impl=way)
    yield "ours", _Variant(op, _as_they_are)
    if op.name in PREFETCHING and device_reason(args[0]) is None:
        yield "ours, one stage", _Variant(op, _as_they_are, one_stage=True)


def _as_they_are(*args: Any) -> tuple[Any, ...]:
    return args


def _stock_order(prepare: Callable[..., tuple[Any, ...]], *args: Any) -> tuple[Any, ...]:
    """Every image in the memory order of stock code."""
    return tuple(x.contiguous() if isinstance(x, Tensor) else x for x in prepare(*args))


@torch.no_grad()
def _gold(op: Op, args: tuple[Any, ...]) -> list[_Gold]:
    parts = op.parts(*args) if op.parts else [Part(args, lambda outputs: outputs)]
    return [_Gold(part.of, part.of_reference(_tensors(op.reference(*map(in_float64, part.args))))) for part in parts]


def _tensors(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _error(gold: list[_Gold], op: Op, args: tuple[Any, ...], outputs: Any) -> float:
    """The largest relative L2 error of an output."""
    # stock code may return another memory order, which a part cannot be cut from
    outputs = tuple(
        empty.copy_(x.reshape(empty.shape))
        for empty, x in zip(_tensors(op.fake(*args)), _tensors(outputs), strict=True)
    )
    squares = torch.zeros(2, len(outputs), dtype=torch.float64)
    for of, expected in gold:
        for i, (x, y) in enumerate(zip(of(outputs), expected, strict=True)):
            squares[:, i] += torch.stack([(x.double() - y).square().sum(), y.square().sum()]).cpu()
    errors, norms = squares.sqrt()
    return float((errors / norms).max())


@torch.no_grad()
def _measure(
    variant: _Variant,
    op: Op,
    args: tuple[Any, ...],
    gold: list[_Gold],
    device: torch.device,
    dtype: torch.dtype,
    settings: Settings,
) -> Row:
    run = torch.compile(variant.run, backend=settings.compile_backend) if variant.compiled else variant.run
    prepared = variant.prepare(*args)
    call = partial(run, *prepared)
    with ExitStack() as stack:
        if variant.one_stage:
            stack.enter_context(constants_overridden(STAGES=1))
        first_call = time_call(call, device)
        with listening() as events:
            error = _error(gold, op, args, variant.collect(call()))
        if not error <= MOST_ROUNDINGS * torch.finfo(dtype).eps:
            raise ArithmeticError(f"relative error {error:.1e} against float64")
        if device.type == "cuda":
            calls = [partial(run, *inputs) for inputs in _input_sets(prepared, device)]
            latency = time_queued(calls, device, budget_seconds=SECONDS)
        else:
            latency = time_calls(call, device, repeats=settings.repeats, warmup=settings.warmup)
    return {
        **latency._asdict(),
        "cold_start_s": first_call.wall_ms / 1e3,
        "error_to_reference": error,
        "implementations": sorted({event.implementation for event in events}),
    }


def _input_sets(args: tuple[Any, ...], device: torch.device) -> list[tuple[Any, ...]]:
    """The arguments and as many copies as it takes for none to be in the L2 cache when its turn comes."""
    nbytes = sum(x.nbytes for x in args if isinstance(x, Tensor))
    wanted = math.ceil(CACHES * torch.cuda.get_device_properties(device).L2_cache_size / max(nbytes, 1))
    copies = min(max(wanted, 2), MOST_CALLS) - 1
    return [args, *(tuple(x.clone() if isinstance(x, Tensor) else x for x in args) for _ in range(copies))]


def _with_rates(measure: Callable[[], Row], costs: Costs, ceilings: Mapping[str, float]) -> Row:
    """The row that ``measure`` returns, with what its time means against the ceilings of this device."""
    row = measure()
    gb_s = costs.bytes / row["median_ms"] / 1e6
    row |= {"bytes": costs.bytes, "gb_s": gb_s, "of_copy_bandwidth": gb_s / ceilings["copy_gb_s"], "bound": "memory"}
    if costs.flops:
        tflop_s = costs.flops / row["median_ms"] / 1e9
        of_matmul = tflop_s / next(rate for name, rate in ceilings.items() if name.startswith("matmul_"))
        row |= {"flops": costs.flops, "tflop_s": tflop_s, "of_matmul_rate": of_matmul}
        row["bound"] = "matmul" if of_matmul > row["of_copy_bandwidth"] else "memory"
    return row
