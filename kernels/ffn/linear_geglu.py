"""A linear layer with GEGLU after it: two steps, or one where ours is measured faster.

    y = value * gelu(gate),   value = x @ W[:D].T + b[:D],   gate = x @ W[D:].T + b[D:]

* ``two-step``: ``F.linear``, then ``geglu``'s kernel. The projection, twice as wide as y, is written and read.
* ``gluon``: ours for Hopper, in ``linear_geglu_gluon.py``: the product in the GEMM's epilogue.

The first call of a large shape times both, once, holds ours against the other's results, and keeps the answer on disk
(``tuning_cache``). Both round value, gate and GELU where eager does. Fidelity: math-exact. Bound by the tensor cores.

What ran is recorded as a choice for ``geglu``, whose second implementation this is.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from vidaccel.config import preferred_implementation, preferred_implementations, tuning_enabled
from vidaccel.kernels import tuning_cache
from vidaccel.kernels.dispatch import Choice, record_choice, record_choices, requested, tensors_problem
from vidaccel.kernels.ffn.geglu import geglu, geglu_ref

__all__ = ["linear_geglu", "linear_geglu_ref"]

logger = logging.getLogger(__name__)

OP, RECORDED_AS = "linear_geglu", "geglu"
TWO_STEP = "two-step"
GLUON_VERSIONS = ("3.6.", "3.7.")  # Triton's; Gluon changes from release to release
MEASURED_PRODUCTS = 4e9  # M * K * D; fewer take too little of a model's time
CHECKED_ROWS = 128
UNITS_IN_LAST_PLACE = 8  # that two correct results may be apart, relative L2


def linear_geglu_ref(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The specification. Pass float64 inputs for gold values."""
    return geglu_ref(F.linear(x, weight, bias))


def _run_two_steps(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return geglu(F.linear(x, weight, bias))


def _launch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from vidaccel.kernels.ffn.linear_geglu_gluon import launch

    out = _empty_output(x, weight)
    x, weight, bias = (tensor if _is_aligned(tensor) else tensor.clone() for tensor in (x, weight, bias))
    launch(x.reshape(-1, x.shape[-1]), weight, bias, out.view(-1, out.shape[-1]))
    return out


def _is_aligned(x: Tensor) -> bool:
    """Whether TMA can start here; Dynamo, which knows no addresses, leaves it to the launch to find out."""
    return torch.compiler.is_compiling() or x.data_ptr() % 16 == 0


def _empty_output(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))


@torch.library.custom_op("vidaccel::linear_geglu_gluon", mutates_args=())
def _linear_geglu_gluon(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _launch(x, weight, bias)


@_linear_geglu_gluon.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _empty_output(x, weight)


def _run_gluon(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    run = _linear_geglu_gluon if torch.compiler.is_compiling() else _launch
    return run(x, weight, bias)


IMPLEMENTATIONS = {"gluon": _run_gluon, TWO_STEP: _run_two_steps}

# What runs for a shape, and why ours does not if it failed; the keys are those of _shape.
_chosen: dict[tuple[Any, ...], tuple[str, str]] = {}


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _gluon_problem(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    if not x.is_cuda or _capability(x.device)[0] != 9:
        return "the kernel is for Hopper GPUs"
    if not triton.__version__.startswith(GLUON_VERSIONS):
        return f"the kernel is written for Triton {' or '.join(GLUON_VERSIONS)}*, this is {triton.__version__}"
    if torch.is_autocast_enabled():
        return "autocast decides the dtype of a linear layer"
    return _layout_problem(x, weight, bias) or _shape_problem(x, weight) or tensors_problem(x, weight, bias)


def _layout_problem(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"the kernel takes float16 and bfloat16, x is {x.dtype}"
    if not x.dtype == weight.dtype == bias.dtype:
        return f"the kernel takes one dtype, got {x.dtype}, {weight.dtype} and {bias.dtype}"
    if not all(tensor.is_contiguous() and _is_aligned(tensor) for tensor in (x, weight, bias)):
        return "TMA takes contiguous rows that start at multiples of 16 bytes"
    return None


def _shape_problem(x: Tensor, weight: Tensor) -> str | None:
    from vidaccel.kernels.ffn.linear_geglu_gluon import TILE_ROWS, choose_config

    dim, in_features = weight.shape[0] // 2, weight.shape[1]
    if choose_config(dim, in_features) is None:
        return f"the kernel takes D in steps of 64 and a K up to 640 in steps of 64, got D={dim}, K={in_features}"
    if x.numel() // in_features <= TILE_ROWS:
        return f"the kernel takes more than {TILE_ROWS} rows"
    return None


def _shape(x: Tensor, weight: Tensor) -> tuple[Any, ...]:
    """Device, dtype, M, K, D."""
    dim, in_features = weight.shape[0] // 2, weight.shape[1]
    return x.device.index, x.dtype, x.numel() // in_features, in_features, dim


def _choose(x: Tensor, weight: Tensor, bias: Tensor, impl: str | None) -> tuple[str, str]:
    """The implementation to run, and why one that was wished for or measured faster does not."""
    problem = functools.partial(_gluon_problem, x, weight, bias)
    asked, reason = requested(OP, impl, {"gluon": problem, TWO_STEP: lambda: None})
    if asked is not None:
        return asked, ""
    if _two_steps_wished() or not _large(x, weight) or problem():
        return TWO_STEP, reason
    shape = _shape(x, weight)
    if torch.compiler.is_compiling():
        return _chosen.get(shape, (TWO_STEP, ""))[0], ""
    if shape not in _chosen:
        first = _first_choice(x, weight, bias)
        if first is None:
            return TWO_STEP, reason
        _chosen[shape] = first
    return _chosen[shape]


def _two_steps_wished() -> bool:
    """Whether somebody chose how ``geglu`` itself runs, or something that only it has."""
    return any(
        preferred_implementation(op, preferred_implementations()) not in (None, "gluon") for op in (OP, RECORDED_AS)
    )


def _large(x: Tensor, weight: Tensor) -> bool:
    """Whether a choice would be worth measuring for these."""
    return x.is_cuda and x.numel() * weight.shape[0] // 2 >= MEASURED_PRODUCTS and tuning_enabled()


def _first_choice(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[str, str] | None:
    """The choice for a shape not seen before; None if it has to wait, because a graph is being captured."""
    measure = functools.partial(_measure, x, weight, bias)
    measured = tuning_cache.settled(OP, _cache_key(x, weight), IMPLEMENTATIONS, measure, x)
    if measured is None:
        return None
    problem = measured.problems.get("gluon")
    return measured.winner or TWO_STEP, f"gluon: {problem}" if problem else ""


def _cache_key(x: Tensor, weight: Tensor) -> dict[str, Any]:
    _, dtype, rows, in_features, dim = _shape(x, weight)
    return {
        "device": torch.cuda.get_device_name(x.device),
        "capability": list(_capability(x.device)),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dtype": str(dtype),
        "rows": rows,
        "in_features": in_features,
        "out_features": dim,
    }


def _measure(x: Tensor, weight: Tensor, bias: Tensor) -> tuning_cache.Measured | None:
    """Time both; ours has to compute what the two steps do, and to beat them by a margin."""
    arguments = x, weight, bias
    with record_choices(), torch.no_grad(), torch.cuda.device_of(x):  # what runs for the clock is no choice
        why_wrong = functools.partial(_why_wrong, arguments, _run_two_steps(*arguments))
        runs = {name: functools.partial(run, *arguments) for name, run in IMPLEMENTATIONS.items()}
        measured = tuning_cache.fastest(runs, why_wrong, tuning_cache.cuda_milliseconds, favourite=TWO_STEP)
    logger.debug("%s of %s: %s", OP, _shape(x, weight), measured)
    return measured


def _why_wrong(arguments: tuple[Tensor, Tensor, Tensor], expected: Tensor, out: Tensor) -> str | None:
    """What is wrong with ``out``: everywhere against the two steps' result, and in some rows against float64."""
    x, weight, bias = arguments
    eps = torch.finfo(x.dtype).eps
    apart = float(torch.linalg.vector_norm(out - expected, dtype=torch.float32))
    if not apart <= UNITS_IN_LAST_PLACE * eps * float(torch.linalg.vector_norm(expected, dtype=torch.float32)):
        return "its result is not that of two steps"
    x, expected, out = (tensor.flatten(0, -2) for tensor in (x, expected, out))
    rows = torch.linspace(0, x.shape[0] - 1, min(x.shape[0], CHECKED_ROWS), dtype=torch.float64, device=x.device).long()
    gold = linear_geglu_ref(x[rows].double(), weight.double(), bias.double())
    error, own = ((tensor[rows].double() - gold).norm() for tensor in (out, expected))
    if not error <= 2 * own + eps * gold.norm():
        return f"its error against float64 is {float(error / own):.1f} times that of two steps"
    return None


def _validate(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if weight.ndim != 2 or weight.shape[0] % 2 or bias.shape != weight.shape[:1] or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"{OP}: x must be [..., K], weight [2 * D, K], bias [2 * D], "
            f"got x {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {tuple(bias.shape)}"
        )


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor, *, impl: str | None = None) -> Tensor:
    """``value * F.gelu(gate)`` with ``value, gate = F.linear(x, weight, bias).chunk(2, dim=-1)``.

    Args:
        x: ``[..., K]``.
        weight: ``[2 * D, K]``.
        bias: ``[2 * D]``.
        impl: ``"gluon"`` or ``"two-step"``; None for the fastest (see the module's docstring).

    Returns:
        ``[..., D]``, contiguous, in the dtype of ``F.linear``'s result.

    Raises:
        ValueError: The shapes do not fit one another; ``impl`` is unknown or cannot run here.
    """
    _validate(x, weight, bias)
    chosen, reason = _choose(x, weight, bias, impl)
    if chosen == TWO_STEP:
        return _two_steps_because(reason, x, weight, bias)
    if impl is None and not torch.compiler.is_compiling():
        return _run_gluon_or_two_steps(x, weight, bias)
    record_choice(Choice(RECORDED_AS, chosen))
    return _run_gluon(x, weight, bias)


def _run_gluon_or_two_steps(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    try:
        out = IMPLEMENTATIONS["gluon"](x, weight, bias)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a measurement of another day may not hold on this GPU: the clip goes on without
        reason = f"gluon: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        logger.warning("%s: two steps from now on for this shape: %s", OP, reason)
        _chosen[_shape(x, weight)] = TWO_STEP, reason
        return _two_steps_because(reason, x, weight, bias)
    record_choice(Choice(RECORDED_AS, "gluon"))
    return out


def _two_steps_because(reason: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if reason:
        record_choice(Choice(RECORDED_AS, TWO_STEP, reason))
    return _run_two_steps(x, weight, bias)
