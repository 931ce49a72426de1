"""What a choice of implementation depends on besides the arguments: PyTorch's flags, ours, and what a patch allows.

Reading all of it takes as long as launching a kernel, so a caller of many ops freezes it (:func:`frozen`) for the time
of a model's call. Outside of that every op reads it anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from vidaccel.config import preferred_implementations, tuning_enabled
from vidaccel.kernels.context import while_set

__all__ = [
    "FIDELITIES",
    "Fidelity",
    "Settings",
    "allowed",
    "constants_overridden",
    "current",
    "frozen",
    "overridden_constants",
    "tf32_convolutions",
    "tf32_products",
    "untraced",
]

Fidelity = Literal["bit-exact", "math-exact", "lossy"]
Constants = tuple[tuple[str, Any], ...]  # of kernels: names and values
FIDELITIES: tuple[Fidelity, ...] = get_args(Fidelity)  # the strictest first

_allowed: ContextVar[Fidelity] = ContextVar("allowed", default="math-exact")
_overridden: ContextVar[Constants] = ContextVar("overridden", default=())
_frozen: ContextVar[Settings | None] = ContextVar("frozen", default=None)


@dataclass(frozen=True, eq=False)
class Settings:
    """All of it. Equal settings are one object, so that comparing two, or hashing one, takes no time.

    Attributes:
        allowed: The loosest fidelity class that may run.
        preferred: ``VIDACCEL_IMPL``.
        tunes: Whether implementations may be measured.
        autocast: The devices on which autocast is on.
        precision: How float32 is multiplied: by matrix products, by convolutions.
        reduced: Whether products may add in half precision: float16, bfloat16.
        cudnn: Enabled, benchmark, deterministic.
        attention: PyTorch's attention backends that are on: flash, efficient, cuDNN, math.
        constants: Those of kernels that :func:`constants_overridden` replaces.
    """

    allowed: Fidelity
    preferred: str
    tunes: bool
    autocast: tuple[bool, bool] = (False, False)
    precision: tuple[str, str] = ("none", "none")
    reduced: tuple[bool, bool] = (True, True)
    cudnn: tuple[bool, bool, bool] = (True, False, False)
    attention: tuple[bool, bool, bool, bool] = (True, True, True, True)
    constants: Constants = ()


MOST_SETTINGS = 256  # that are kept: more than a program switches between

_interned: dict[tuple[Any, ...], Settings] = {}


def current() -> Settings:
    """The settings of this call: those frozen around it, or as they are now."""
    if torch.compiler.is_compiling():  # PyTorch's own flags are Inductor's business
        return Settings(*_ours())
    return untraced()


def untraced() -> Settings:
    """:func:`current` for code that Dynamo does not see."""
    return _frozen.get() or _read()


@torch.compiler.assume_constant_result
def _ours() -> tuple[Fidelity, str, bool]:
    """What Dynamo, which knows no context variables, is to take for a constant."""
    return _allowed.get(), preferred_implementations(), tuning_enabled()


def _read() -> Settings:
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    values = (
        _allowed.get(),
        preferred_implementations(),
        tuning_enabled(),
        (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
        (cuda.matmul.fp32_precision, cudnn.conv.fp32_precision),  # type: ignore[attr-defined]
        (
            bool(cuda.matmul.allow_fp16_reduced_precision_reduction),
            bool(cuda.matmul.allow_bf16_reduced_precision_reduction),
        ),
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic or torch.are_deterministic_algorithms_enabled()),
        (
            cuda.flash_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
            cuda.cudnn_sdp_enabled(),
            cuda.math_sdp_enabled(),
        ),
        _overridden.get(),
    )
    found = _interned.get(values)
    if found is None:
        if len(_interned) >= MOST_SETTINGS:
            _interned.clear()
        found = _interned.setdefault(values, Settings(*values))  # two threads get the same
    return found


@contextmanager
def frozen() -> Iterator[Settings]:
    """Inside the ``with`` block, in this thread, the settings are read no more."""
    settings = current()
    with while_set(_frozen, settings):
        yield settings


@contextmanager
def allowed(fidelity: Fidelity) -> Iterator[None]:
    """Inside the ``with`` block, in this thread, implementations of a looser class than ``fidelity`` do not run."""
    with while_set(_allowed, fidelity), while_set(_frozen, None):
        yield


def overridden_constants() -> Constants:
    """What :func:`constants_overridden` replaces in this context."""
    return _overridden.get()


@contextmanager
def constants_overridden(**values: Any) -> Iterator[None]:
    """Inside the ``with`` block, in this thread, these values replace the same-named constants of all kernels."""
    overridden = tuple((dict(_overridden.get()) | values).items())
    with while_set(_overridden, overridden), while_set(_frozen, None):
        yield


def tf32_products() -> bool:
    """Whether matrix products cut float32 to 10 bits, as either of PyTorch's two ways to say so has it."""
    return current().precision[0] == "tf32"


def tf32_convolutions() -> bool:
    """The same of cuDNN's convolutions."""
    return current().precision[1] == "tf32"
