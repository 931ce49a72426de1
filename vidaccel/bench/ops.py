"""One op at a time, at the shapes that the models give it: stock code, torch.compile and ours, in one run.

A new op adds an entry to :data:`OPS`. ``GB/s`` counts the bytes that our algorithm has to move, and ``TFLOP/s`` what it
has to multiply, for every provider, so that they are nothing but the inverse of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.testing import do_bench

from vidaccel.bench.record import Recorder, Row
from vidaccel.bench.settings import Settings
from vidaccel.bench.timing import Latency, summarise, time_calls, timed
from vidaccel.fidelity.metrics import relative_error
from vidaccel.kernels import group_norm_silu as gn
from vidaccel.kernels import spatial_attention as sa
from vidaccel.kernels import temporal_attention as ta
from vidaccel.kernels import upsample_conv as uc
from vidaccel.kernels.dispatch import record_choices, triton_device_problem
from vidaccel.kernels.launch import constants_overridden

__all__ = ["OPS", "Case", "Op", "Provider", "measure_op", "one_stage_kernels"]

_MOST_ROUNDINGS = 16  # relative error, in units of the dtype's, beyond which a result is wrong and not worth a time

Tensors = tuple[Tensor, ...]


class Case(NamedTuple):
    """Arguments of an op: random tensors of these shapes (from 4-D on in channels-last memory), then these scalars."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    scalars: tuple[Any, ...]


def _as_they_are(*arguments: Any) -> Tensors:
    return tuple(x for x in arguments if isinstance(x, Tensor))


class Provider(NamedTuple):
    """One way to compute an op.

    Attributes:
        run: Called with the tensors and the scalars of a case.
        prepare: Puts the tensors as this way likes them best, before the clock runs.
        compiled: Whether ``run`` goes through torch.compile.
        one_stage: Whether ``run``, a kernel of ours, goes without prefetch: to see what the prefetch is worth.
        problem: Called as ``run`` is, tells why it is not to be tried here, or None.
    """

    run: Callable[..., Tensor]
    prepare: Callable[..., Tensors] = _as_they_are
    compiled: bool = False
    one_stage: bool = False
    problem: Callable[..., str | None] | None = None


class Op(NamedTuple):
    """An op as the bench sees it.

    Attributes:
        cases: At the models' sizes.
        tiny: For a dry run.
        reference: Its specification, run in float64.
        providers: By variant; ``eager`` is what stock diffusers runs.
        passes: How many times our algorithm moves as many bytes as the first tensor has.
        flops: Of a case, for an op that is bound by the tensor cores.
    """

    cases: tuple[Case, ...]
    tiny: Case
    reference: Callable[..., Tensor]
    providers: Mapping[str, Provider]
    passes: int
    flops: Callable[[Case], float] | None = None


def _norm_case(name: str, *shape: int, groups: int = 32) -> Case:
    return Case(name, (shape, shape[1:2], shape[1:2]), (groups, 1e-5))


def _stock_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    return F.silu(F.group_norm(x, groups, weight, bias, eps))


def _channels_first(x: Tensor, *others: Any) -> Tensors:
    return x.contiguous(), *_as_they_are(*others)


_GROUP_NORM_SILU = Op(
    cases=(
        _norm_case("svd level 0, frames apart", 28, 320, 72, 128),
        _norm_case("svd level 0, frames together", 2, 320, 14, 72, 128),
        _norm_case("svd level 1, frames together", 2, 640, 14, 36, 64),
        _norm_case("svd level 2, frames apart", 28, 1280, 18, 32),
        _norm_case("svd vae, frames apart", 14, 128, 576, 1024),
        _norm_case("svd vae, frames together", 1, 256, 14, 288, 512),
    ),
    tiny=_norm_case("tiny", 1, 32, 2, 4, 4, groups=8),
    reference=gn.group_norm_silu_ref,
    providers={
        "eager": Provider(_stock_norm, _channels_first),
        "eager+channels_last": Provider(_stock_norm),
        "compile": Provider(_stock_norm, _channels_first, compiled=True),
        "compile+channels_last": Provider(_stock_norm, compiled=True),
        "ours": Provider(gn.group_norm_silu),
        "ours, one stage": Provider(gn.group_norm_silu, one_stage=True),
    },
    passes=3,
)


def _attention_case(name: str, batch: int, frames: int, pixels: int, heads: int, head_dim: int) -> Case:
    return Case(name, ((batch * frames, pixels, heads * head_dim),) * 3, (frames, heads))


def _frames_inner(x: Tensor, frames: int) -> Tensor:
    """``[B F, HW, C]`` to ``[B, HW, F, C]``, the order of stock temporal blocks; a copy."""
    return x.unflatten(0, (-1, frames)).transpose(1, 2).contiguous()


def _all_frames_inner(q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int) -> Tensors:
    return _frames_inner(q, frames), _frames_inner(k, frames), _frames_inner(v, frames)


def _keys_frames_inner(q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int) -> Tensors:
    return q, _frames_inner(k, frames), _frames_inner(v, frames)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int) -> Tensor:
    """Self-attention over the frames of ``[B, HW, F, C]``; returns a view ``[B, F, HW, C]``."""
    q_items, k_items, v_items = (x.flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q_items, k_items, v_items).transpose(1, 2)
    return out.reshape(q.shape).transpose(1, 2)


def _stock_attention(x: Tensor, k: Tensor, v: Tensor, frames: int, heads: int) -> Tensor:
    """What a stock temporal block spends around its attention: the copy of its input, SDPA, the copy back."""
    return _sdpa(_frames_inner(x, frames), k, v, frames, heads).contiguous()


_TEMPORAL_ATTENTION = Op(
    cases=(
        _attention_case("svd level 0", 2, 14, 9216, 5, 64),
        _attention_case("svd level 1", 2, 14, 2304, 10, 64),
        _attention_case("svd level 2", 2, 14, 576, 20, 64),
        _attention_case("svd-xt level 0", 2, 25, 9216, 5, 64),
        _attention_case("animatediff level 0", 2, 16, 4096, 8, 40),
        _attention_case("animatediff level 1", 2, 16, 1024, 8, 80),
        _attention_case("animatediff level 2", 2, 16, 256, 8, 160),
    ),
    tiny=_attention_case("tiny", 1, 3, 4, 2, 32),
    reference=ta.temporal_attention_ref,
    providers={
        "eager": Provider(_stock_attention, _keys_frames_inner),
        "eager, SDPA alone": Provider(_sdpa, _all_frames_inner),
        "compile": Provider(_stock_attention, _keys_frames_inner, compiled=True),
        "ours": Provider(ta.temporal_attention),
        "ours, one stage": Provider(ta.temporal_attention, one_stage=True),
    },
    passes=4,
)


def _upsample_case(name: str, frames: int, channels: int, height: int, width: int) -> Case:
    return Case(name, ((frames, channels, height, width), (channels, channels, 3, 3), (channels,)), ())


def _with_cells(x: Tensor, weight: Tensor, bias: Tensor) -> Tensors:
    """The weight also as a block keeps it between calls."""
    return x, weight, bias, uc.cell_weights(weight)


_UPSAMPLE_CONV = Op(
    cases=(
        _upsample_case("svd vae, 72x128", 14, 512, 72, 128),
        _upsample_case("svd vae, 144x256", 4, 512, 144, 256),
        _upsample_case("svd vae, 288x512", 2, 256, 288, 512),
    ),
    tiny=_upsample_case("tiny", 1, 32, 4, 4),
    reference=uc.upsample_conv_ref,
    providers={
        "eager": Provider(uc.upsample_conv_ref, _channels_first),
        "eager+channels_last": Provider(uc.upsample_conv_ref),
        "compile": Provider(uc.upsample_conv_ref, _channels_first, compiled=True),
        "compile+channels_last": Provider(uc.upsample_conv_ref, compiled=True),
        "ours": Provider(lambda x, weight, bias, cells: uc.upsample_conv(x, weight, bias, cells=cells), _with_cells),
    },
    passes=13,
)


def _sequence_case(name: str, batch: int, heads: int, tokens: int, head_dim: int) -> Case:
    return Case(name, ((batch, tokens, heads * head_dim),) * 3, (heads,))


def _sequence_flops(case: Case) -> float:
    batch, tokens, channels = case.shapes[0]
    return 4.0 * batch * tokens**2 * channels


def _reference_in_parts(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """The specification on parts whose scores fit the memory in float64."""
    out = torch.empty_like(q)
    for sample in range(q.shape[0]):
        part = slice(sample, sample + 1)
        for rows in range(0, q.shape[1], 1024):
            cut = part, slice(rows, rows + 1024)
            out[cut] = sa.spatial_attention_ref(q[cut], k[part], v[part], num_heads)
    return out


def _implementation(name: str) -> Provider:
    def problem(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> str | None:
        return sa.IMPLEMENTATIONS[name].problem(q, k, v, num_heads, 1.0)

    return Provider(partial(sa.spatial_attention, impl=name), problem=problem)


_SPATIAL_ATTENTION = Op(
    cases=(
        _sequence_case("svd level 0", 28, 5, 9216, 64),
        _sequence_case("wan 1.3b", 2, 12, 32760, 128),
        _sequence_case("ltx", 2, 32, 8064, 64),
        _sequence_case("animatediff level 0", 32, 8, 4096, 40),
        _sequence_case("svd vae", 14, 1, 9216, 512),
    ),
    tiny=_sequence_case("tiny", 2, 2, 16, 32),
    reference=_reference_in_parts,
    providers={
        "eager": Provider(sa.spatial_attention_ref),
        **{name: _implementation(name) for name in ("cudnn", "flash", "fa3", "triton", "gluon", "gemm")},
        "ours": Provider(sa.spatial_attention),
    },
    passes=4,
    flops=_sequence_flops,
)

# `vidaccel bench --op NAME`
OPS = {
    "group_norm_silu": _GROUP_NORM_SILU,
    "spatial_attention": _SPATIAL_ATTENTION,
    "temporal_attention": _TEMPORAL_ATTENTION,
    "upsample_conv": _UPSAMPLE_CONV,
}


def measure_op(
    op: Op, size: str, device: torch.device, dtype: torch.dtype, settings: Settings, recorder: Recorder
) -> None:
    """Fill ``recorder`` with one row per case and provider."""
    cases = (op.tiny,) if size == "tiny" else op.cases
    recorder.expect(len(cases) * len(op.providers))
    recorder.record["shapes"] = {case.name: ["x".join(map(str, shape)) for shape in case.shapes] for case in cases}
    for case in cases:
        try:
            tensors = _random_tensors(case, device, dtype, settings.seed)
            gold = op.reference(*(x.double() for x in tensors), *case.scalars)
        except torch.OutOfMemoryError as error:
            for variant in op.providers:
                recorder.fail(case.name, variant, error)
            continue
        for variant, provider in op.providers.items():
            if problem := _why_skipped(provider, tensors, case.scalars):
                recorder.skip(case.name, variant, problem)
                continue
            measured = partial(_measure, provider, tensors, case.scalars, gold, settings)
            work = partial(_with_rates, measured, op, case, tensors[0].nbytes, recorder.record["ceilings"])
            recorder.measure(case.name, variant, work)
            torch._dynamo.reset()
        del tensors, gold


def _why_skipped(provider: Provider, tensors: Tensors, scalars: tuple[Any, ...]) -> str | None:
    if provider.one_stage and (problem := triton_device_problem(tensors[0])):
        return problem
    return provider.problem(*tensors, *scalars) if provider.problem else None


def _random_tensors(case: Case, device: torch.device, dtype: torch.dtype, seed: int) -> Tensors:
    generator = torch.Generator(device).manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in case.shapes]
    return tuple(x.movedim(1, -1).contiguous().movedim(-1, 1) if x.ndim > 3 else x for x in drawn)


@torch.no_grad()
def _measure(
    provider: Provider,
    tensors: Tensors,
    scalars: tuple[Any, ...],
    gold: Tensor,
    settings: Settings,
) -> Row:
    run = torch.compile(provider.run, backend=settings.compile_backend) if provider.compiled else provider.run
    call = partial(run, *provider.prepare(*tensors, *scalars), *scalars)
    with one_stage_kernels() if provider.one_stage else nullcontext():
        first_call = timed(call, gold.device)
        with record_choices() as choices:
            error = relative_error(call().reshape(gold.shape), gold)
        if not error <= _MOST_ROUNDINGS * torch.finfo(tensors[0].dtype).eps:
            raise ArithmeticError(f"relative error {error:.1e} against float64")
        latency = _latency(call, gold.device, settings)
    return {
        **latency._asdict(),
        "cold_start_s": first_call,
        "error_to_reference": error,
        "implementations": sorted({choice.impl for choice in choices}),
    }


def _with_rates(measure: Callable[[], Row], op: Op, case: Case, nbytes: int, ceilings: Mapping[str, float]) -> Row:
    """The row that ``measure`` returns, with what its time means against the ceiling that bounds the op."""
    row = measure()
    if op.flops is not None:
        return row | {"tflop_s": op.flops(case) / row["median_ms"] / 1e9}
    gb_s = op.passes * nbytes / row["median_ms"] / 1e6
    return row | {"gb_s": gb_s, "of_copy_bandwidth": gb_s / ceilings["copy_gb_s"]}


def one_stage_kernels() -> AbstractContextManager[None]:
    """Launch every kernel that takes its prefetch depth as ``STAGES``, as ours do, with a depth of one."""
    return constants_overridden(STAGES=1)


def _latency(call: Callable[[], object], device: torch.device, settings: Settings) -> Latency:
    if device.type == "cuda":
        return summarise(do_bench(call, return_mode="all"))  # empties the L2 cache before every call
    return time_calls(call, device, repeats=settings.repeats, warmup=settings.warmup)
