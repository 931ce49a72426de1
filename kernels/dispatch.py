"""Which implementation of an op runs: decided here, from argument, environment, device and what the kernel serves.

Order: the ``impl`` argument (an error if that implementation cannot run), then ``VIDACCEL_IMPL`` (a wish: passed over
if it cannot run), then the default: Triton on a GPU or under ``TRITON_INTERPRET=1``, plain PyTorch elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from vidaccel.config import preferred_implementation as preferred
from vidaccel.config import preferred_implementations
from vidaccel.kernels import op as op_module
from vidaccel.kernels.op import Listener, note

__all__ = [
    "Choice",
    "choices_so_far",
    "choose",
    "record_choice",
    "record_choices",
    "requested",
    "runs_triton",
    "tensors_problem",
    "triton_device_problem",
]


class Choice(NamedTuple):
    """One decision: ``op`` ran as ``impl``; ``reason`` says why a preferred one did not (empty if it did)."""

    op: str
    impl: str
    reason: str = ""


# Fixed when Triton is imported, and not a thing that Dynamo can trace.
INTERPRETED = bool(triton.knobs.runtime.interpret)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


_recorded: ContextVar[list[Choice] | None] = ContextVar("recorded", default=None)


@contextmanager
def record_choices() -> Iterator[list[Choice]]:
    """Collect the choices made inside the ``with`` block, in order; what a nested recorder sees is its own."""
    choices: list[Choice] = []
    heard = op_module._listener.set(Listener(lambda event: choices.append(Choice(*event[:3]))))
    token = _recorded.set(choices)
    try:
        yield choices
    finally:
        _recorded.reset(token)
        op_module._listener.reset(heard)


def choices_so_far() -> list[Choice] | None:
    return None if torch.compiler.is_compiling() else _recorded.get()


def record_choice(choice: Choice) -> None:
    note(*choice)


def triton_device_problem(x: Tensor) -> str | None:
    """Why no Triton kernel can run on ``x``'s device, or None."""
    if x.is_cuda or INTERPRETED:
        return None
    return f"Triton has no {x.device.type} backend here (TRITON_INTERPRET=1 interprets the kernels)"


def tensors_problem(x: Tensor, *others: Tensor | None) -> str | None:
    """Why no kernel here can take ``x`` together with ``others`` (dtype, gradients), or None."""
    if x.dtype not in DTYPES:
        return f"the kernel takes float16, bfloat16 and float32, x is {x.dtype}"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others)):
        return "the kernel has no backward pass (call it under torch.no_grad)"
    return None


def runs_triton(op: str, x: Tensor) -> bool:
    """Whether ``op`` would run as Triton on ``x``'s device: for callers whose detour only the kernel makes worth it."""
    return preferred(op, preferred_implementations()) != "torch" and triton_device_problem(x) is None


def choose(op: str, x: Tensor, impl: str | None, problem: str | None = None) -> str:
    """Name of the implementation that ``op`` runs on ``x``: ``"triton"`` or ``"torch"``.

    Args:
        op: Name of the op, as in its file name.
        x: The op's main input; its device decides the default.
        impl: Forced implementation, or None.
        problem: Why the op's kernel does not serve these arguments (dtype, shape, strides), or None if it does.

    Raises:
        ValueError: ``impl`` is unknown, or it is ``"triton"`` and cannot run here.
    """
    if impl not in (None, "triton", "torch"):
        raise ValueError(f"{op}: impl must be 'triton' or 'torch', got {impl!r}")
    device_problem = triton_device_problem(x)
    problem = device_problem or problem
    if impl == "triton" and problem:
        raise ValueError(f"{op}: impl='triton' cannot run: {problem}")
    chosen = impl or preferred(op, preferred_implementations()) or ("torch" if device_problem else "triton")
    reason = ""
    if chosen != "torch" and problem:
        chosen, reason = "torch", problem
    record_choice(Choice(op, chosen, reason))
    return chosen


def requested(op: str, impl: str | None, problems: Mapping[str, Callable[[], str | None]]) -> tuple[str | None, str]:
    """For an op of many implementations: the one that was asked for, or None; and why a mere wish is passed over.

    Args:
        op: Name of the op, as in its file name.
        impl: Forced implementation, or None.
        problems: By implementation, what tells why it does not serve the arguments at hand, or None if it does.

    Raises:
        ValueError: ``impl`` is unknown, or cannot run here.
    """
    if impl is not None:
        if impl not in problems:
            raise ValueError(f"{op}: impl must be one of {', '.join(problems)}, got {impl!r}")
        if problem := problems[impl]():
            raise ValueError(f"{op}: impl={impl!r} cannot run: {problem}")
        return impl, ""
    wish = preferred(op, preferred_implementations())
    if wish is None or wish not in problems:
        return None, ""
    problem = problems[wish]()
    return (None, problem) if problem else (wish, "")
