"""Single calls of the denoisers on the inputs of the reference's own trajectory, where drift cannot add up.

The calls of the reference clip are recorded, evenly thinned out where they are many, with their tensors on the host;
the patched model, and the unpatched one under each change of equal maths, are then given the very same inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from vidaccel.fidelity.take import Call, on_host, run_again, tensors_of
from vidaccel.patching.families import unwrapped

__all__ = ["MOST_STEPS", "Recording", "Steps", "recording", "replay", "timestep_of"]

MOST_STEPS = 25
MOST_BYTES = 2**32  # of the inputs and outputs that are kept
_PLAIN = (Tensor, int, float, bool, str, torch.dtype, torch.device)


@dataclass(frozen=True)
class Steps:
    """Relative L2 error of each call of a denoiser on the reference's own inputs; lists of one length.

    Attributes:
        timesteps: Of each call.
        patched: The patched model's error.
        controls: That of each control, by its name.
        left_out: Why there is nothing, if so.
    """

    timesteps: tuple[float, ...] = ()
    patched: tuple[float, ...] = ()
    controls: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    left_out: str = ""

    def summary(self) -> dict[str, Any]:
        """Plain types."""
        controls = {name: list(errors) for name, errors in self.controls.items()}
        return asdict(self) | {
            "timesteps": list(self.timesteps),
            "patched": list(self.patched),
            "controls": controls,
        }


@dataclass
class Recording:
    """Calls of denoisers, in their order.

    Attributes:
        calls: At most ``most`` of them, evenly spread.
        reason: Why there are none, if so.
    """

    calls: list[Call]
    most: int
    reason: str = ""
    _every: int = 1
    _seen: int = 0
    _bytes: int = 0

    def keep(self, call: Call) -> None:
        """Note ``call`` if it is its turn."""
        if self.reason:
            return
        if self._seen % self._every == 0:
            self.calls.append(call)
            self._bytes += _bytes_of(call)
        self._seen += 1
        while len(self.calls) > 2 and (len(self.calls) > self.most or self._bytes > MOST_BYTES):
            self.calls = self.calls[::2]
            self._bytes = sum(map(_bytes_of, self.calls))
            self._every *= 2

    def refuse(self, reason: str) -> None:
        """Keep no calls, for ``reason``."""
        self.calls, self.reason = [], reason


@contextmanager
def recording(denoisers: dict[str, nn.Module], most: int) -> Iterator[Recording]:
    """Record the calls of unpatched ``denoisers`` inside the ``with`` block."""
    record = Recording([], most)
    with ExitStack() as hooks:
        for name, model in denoisers.items():
            if reason := _state_reason(unwrapped(model)):
                record.refuse(f"{name}: {reason}")
                continue
            for handle in _hook(name, model, record):
                hooks.callback(handle.remove)
        yield record


def _hook(name: str, model: nn.Module, record: Recording) -> Iterator[Any]:
    given: list[tuple[Any, Any]] = []  # a stack: of a model that calls itself, the inner call returns first

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        given.append((on_host(args), on_host(kwargs)))

    def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        args, kwargs = given.pop()
        if foreign := next((x for x in tree_leaves((args, kwargs)) if not (x is None or isinstance(x, _PLAIN))), None):
            record.refuse(f"{name}: its call takes a {type(foreign).__name__}, which it may write into")
        else:
            record.keep(Call(name, args, kwargs, [x.cpu() for x in tensors_of(output)]))

    yield model.register_forward_pre_hook(before, with_kwargs=True)
    yield model.register_forward_hook(after, with_kwargs=True)


def _state_reason(model: nn.Module) -> str | None:
    """Why a call of ``model`` cannot be made again on its own, or None."""
    for part in model.modules():
        registry: Any = vars(part).get("_diffusers_hook")
        for hook in getattr(registry, "hooks", {}).values():
            if getattr(hook, "_is_stateful", False):
                return f"a {type(hook).__name__} keeps state from call to call"
        if part._forward_hooks or part._forward_pre_hooks:
            return f"a {type(part).__name__} has forward hooks, which are not to run twice"
    return None


def _bytes_of(call: Call) -> int:
    tensors = tensors_of((call.args, call.kwargs, call.outputs))
    return sum(x.numel() * x.element_size() for x in tensors)


def timestep_of(call: Call) -> float:
    """The timestep that a denoiser was called with; NaN where that cannot be told."""
    value = call.kwargs.get("timestep", call.args[1] if len(call.args) > 1 else None)
    if isinstance(value, Tensor) and value.numel():
        return float(value.flatten()[0])
    return float(value) if isinstance(value, int | float) else float("nan")


def replay(pipe: Any, calls: Sequence[Call], what: str, *, progress: bool) -> list[float]:
    """Make ``calls`` again with the components of ``pipe`` as they are now.

    Returns:
        For each the relative L2 error of what it returns; infinite where a value is not finite and the recorded one is.
    """
    shown = tqdm(calls, desc=what, leave=False, disable=not progress)
    return [_error(tensors_of(run_again(pipe, call)), call.outputs or []) for call in shown]


def _error(outputs: Sequence[Tensor], recorded: Sequence[Tensor]) -> float:
    apart, size = 0.0, 0.0
    for found, expected in zip(outputs, recorded, strict=True):
        expected = expected.to(found.device, torch.float32)
        known = expected.isfinite()
        difference = torch.where(known, found.float() - expected, 0)
        apart += float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2
        size += float(torch.linalg.vector_norm(torch.where(known, expected, 0), dtype=torch.float64)) ** 2
    if not math.isfinite(apart):
        return math.inf
    return math.sqrt(apart / size) if size else math.inf if apart else 0.0
