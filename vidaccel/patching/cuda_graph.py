"""CUDA graphs: a denoiser's whole call recorded once for each kind of arguments, then sent to the GPU as one launch.

A denoiser at a small size is thousands of kernels of a few microseconds, and the GPU waits for Python to launch them. A
recorded graph runs the same kernels on the same memory, so the result has the same bits; only the launches are saved.
A call that comes through ``model_call.py`` goes one of three ways:

* the first of its kind (shapes, strides, dtypes, Python values, settings) runs as ever: kernels compile, sites are
  checked. Then it runs once more, on static buffers, and is captured there, so that a user's second call is a replay;
  the graph's first replay is held against it bit for bit;
* the later ones copy their tensors into those buffers, replay, and return copies of the static outputs;
* now and then one also runs without its graph, for its sites to check themselves, and the graph is held against it.

If anything that a graph takes for granted has changed (``premises.py``), all graphs are dropped, and from then on a
kind is captured when it is seen for the second time: what changes at every call is never captured. What cannot be
captured runs as ever, and the report counts why. While a graph lives, the memory that the call works in stays reserved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from vidaccel.errors import first_line
from vidaccel.kernels import settings
from vidaccel.patching.cuda_capture import Captured, CaptureError, CudaCapture
from vidaccel.patching.premises import capture_reason
from vidaccel.sites.site import Site

__all__ = ["GraphSite", "Graphs", "is_denoiser"]

logger = logging.getLogger(__name__)

MAX_KINDS = 8
# A Python value that differs at every call (a time step as a float) would push out all other kinds, and never return.
MAX_VALUES_PER_SHAPE = 4
# "auto" captures a call whose launches take at least this part of its time, and keeps a graph that takes at most this.
HOST_BOUND, WORTH_IT = 0.8, 0.95
FIRST_AUDIT, AUDIT_GROWTH = 64, 8
PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)

CHANGED = "the model has changed since the call before (weights, adapters, processors or settings)"
VALUES_CHANGE = "Python values among the arguments keep changing (a time step is best passed as a tensor)"


class GraphSite(Site):
    """The whole call of a denoiser as a site of the report."""

    @property
    def implementation(self) -> str:
        return "+".join(sorted(self.implementations)) or "not captured yet"


def is_denoiser(model: nn.Module) -> bool:
    """Whether ``model`` is called once a step, as a graph needs it; a VAE is not called but asked to ``decode``."""
    return not hasattr(model, "decode")


class _Call:
    """One call of a model: its arguments taken apart."""

    def __init__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.model = model
        self.run = partial(model._call_impl, *args, **kwargs)
        self.leaves, self.structure = tree_flatten((args, kwargs))
        self.tensors = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def kind(self) -> _Kind:
        tensors = tuple((x.shape, x.stride(), x.dtype, x.device) for x in self.tensors)
        plain = tuple(... if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in self.leaves)
        return _Kind(self.structure, tensors, (*plain, settings.current()))

    def on(self, buffers: list[Tensor]) -> Callable[[], Any]:
        """The same call with ``buffers`` for its tensors."""
        remaining = iter(buffers)
        leaves = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.structure)
        return partial(self.model._call_impl, *args, **kwargs)


@dataclass(frozen=True)
class _Kind:
    """What two calls must share to be served by one graph."""

    structure: TreeSpec
    tensors: tuple[Any, ...]
    plain: tuple[Any, ...]

    def differs_in_values(self, other: _Kind) -> bool:
        return self.tensors == other.tensors and self.structure == other.structure and self.plain != other.plain


@dataclass(eq=False)
class _Entry:
    """One kind of call: seen, captured, or refused for good (``reason``)."""

    kind: _Kind
    reason: str = ""
    graph: Captured | None = None
    buffers: list[Tensor] = field(default_factory=list)
    replays: int = 0
    audit: int = field(default_factory=lambda: FIRST_AUDIT)

    def fill(self, tensors: list[Tensor]) -> None:
        for buffer, x in zip(self.buffers, tensors, strict=True):
            _unexpanded(buffer).copy_(_unexpanded(x))


class Graphs:
    """The graphs of one model; see the module's docstring.

    Args:
        site: What is told of them.
        checks: Hold the first replay of every graph against the call that it was captured from.
        only_if_faster: Capture only calls that wait for their launches, and keep only graphs that gain something.
    """

    def __init__(self, site: Site, checks: bool, only_if_faster: bool) -> None:
        self.site = site
        self._checks = checks
        self._only_if_faster = only_if_faster
        self._gpu = CudaCapture()
        self._entries: list[_Entry] = []  # the one used last comes last
        self._model_reason: str | None = None
        self._has_changed = False

    def call(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of ``model``, by its graph if there is one."""
        if not self.site.on or self._gpu.capturing():
            return model._call_impl(*args, **kwargs)
        call = _Call(model, args, kwargs)
        if self._model_reason is None:
            self._model_reason = capture_reason(model) or ""
        if reason := self._model_reason or self._call_reason(call):
            return self._fall_back(call, reason)
        return self._serve(call)

    def changed(self) -> None:
        """The model is not what it was: drop all graphs."""
        self.forget()
        self._has_changed = True
        self.site.fallbacks[CHANGED] += 1

    def forget(self) -> None:
        """Drop all graphs, and give back their memory."""
        if any(entry.graph for entry in self._entries):
            self._gpu.wait()
            self._entries = []
            self._gpu.give_back_memory()
        self._entries, self._model_reason = [], None

    def _call_reason(self, call: _Call) -> str | None:
        """Why this very call is neither captured nor replayed, or None."""
        if torch.is_grad_enabled():
            return "gradients are enabled (call it under torch.no_grad)"
        if torch.is_autocast_enabled(self._gpu.device_type):
            return "autocast is on, and a graph would outlive the casts of weights that it keeps"
        if _has_any_global_hook():
            return "a hook on all modules is registered, which a replay would not run"
        if not call.tensors:
            return "no argument is a tensor"
        for x in call.tensors:
            if type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided:
                return f"an argument is a {type(x).__name__} that is no plain tensor"
            if x.device.type != self._gpu.device_type or x.device != call.tensors[0].device:
                return f"an argument is on {x.device}, and a graph cannot fetch it to the GPU"
        strange = next((leaf for leaf in call.leaves if not isinstance(leaf, (Tensor, *PLAIN))), None)
        return None if strange is None else f"an argument is a {type(strange).__name__}"

    def _serve(self, call: _Call) -> Any:
        kind = call.kind()
        entry = next((entry for entry in self._entries if entry.kind == kind), None)
        if entry is None:
            if sum(kind.differs_in_values(entry.kind) for entry in self._entries) >= MAX_VALUES_PER_SHAPE:
                return self._fall_back(call, VALUES_CHANGE)
            return self._first_of_kind(call)
        self._entries.remove(entry)
        self._entries.append(entry)
        if entry.reason:
            return self._fall_back(call, entry.reason)
        self._gpu.follow_last_stream(call.tensors[0].device)
        if entry.graph is None:
            out = self._capture(call, entry)
            return call.run() if out is None else out
        entry.fill(call.tensors)
        entry.graph.replay()
        entry.replays += 1
        if entry.replays == entry.audit:
            entry.audit *= AUDIT_GROWTH
            return self._audit(call, entry)
        return tree_map_only(Tensor, torch.clone, entry.graph.outputs)

    def _audit(self, call: _Call, entry: _Entry) -> Any:
        """The call without its graph, which is dropped if the replay just made differs."""
        assert entry.graph is not None
        out = call.run()
        if not _same_bits(entry.graph.outputs, out):
            self._drop(entry, "a later replay differs in some bits from the call")
        return out

    def _fall_back(self, call: _Call, reason: str) -> Any:
        self.site.fallbacks[reason] += 1
        return call.run()

    def _first_of_kind(self, call: _Call) -> Any:
        kind = call.kind()  # before the model may write to its arguments
        versions = _versions(call.tensors)
        out = call.run()
        entry = _Entry(kind)
        strange = next((leaf for leaf in tree_leaves(out) if not isinstance(leaf, (Tensor, *PLAIN))), None)
        if _versions(call.tensors) != versions:
            entry.reason = "it writes to its arguments"
        elif strange is not None:
            entry.reason = f"it returns a {type(strange).__name__}"
        if len(self._entries) == MAX_KINDS:
            self._gpu.wait()
            del self._entries[0]
        self._entries.append(entry)
        if not entry.reason and not self._has_changed:
            self._gpu.follow_last_stream(call.tensors[0].device)
            self._capture(call, entry)
        return out

    def _capture(self, call: _Call, entry: _Entry) -> Any:
        """Run the call on static buffers, then capture it there; a failure costs the graph, never the result.

        Returns:
            What the call returns; None if it did not get as far.
        """
        device = call.tensors[0].device
        try:
            entry.buffers = [_buffer_like(x) for x in call.tensors]
            entry.fill(call.tensors)
            run = call.on(entry.buffers)
            if self._only_if_faster and (reason := self._launches_reason(run, device)):
                return self._refuse(call, entry, reason)
            out = run()  # what is still to compile or to choose for these addresses, a capture could not do
        except Exception as error:
            return self._refuse(call, entry, _one_line(error), warn=True)
        try:
            # one pool for all: no two replays run at the same time, and what they return is copied at once
            pool = next((other.graph.pool for other in self._entries if other.graph), None)
            entry.graph = self._gpu.capture(run, device, pool)
            if reason := self._graph_reason(entry.graph, run, out, device):
                self._drop(entry, reason)
            else:
                self.site.implementations.add("cuda graph")
        except Exception as error:
            self._drop(entry, _one_line(error))
        except BaseException:  # an interrupt: nobody has checked this graph
            entry.graph = None
            raise
        return out

    def _refuse(self, call: _Call, entry: _Entry, reason: str, warn: bool = False) -> None:
        entry.reason, entry.buffers = reason, []
        self.site.fallbacks[reason] += 1
        if warn:
            logger.warning("%s: no CUDA graph: %s", self.site.path or type(call.model).__name__, reason)

    def _drop(self, entry: _Entry, reason: str) -> None:
        logger.warning("%s: no CUDA graph: %s", self.site.path or "the model", reason)
        entry.reason = reason
        self.site.fallbacks[reason] += 1
        self._gpu.wait()
        entry.graph, entry.buffers = None, []
        self._gpu.give_back_memory()

    def _launches_reason(self, run: Callable[[], Any], device: torch.device) -> str | None:
        """Why saving the launches of ``run`` would gain nothing, or None."""
        queueing, total = self._gpu.queueing_milliseconds(run, device)
        if queueing >= HOST_BOUND * total:
            return None
        return f"the GPU is the slower one: launching takes {queueing:.1f} ms of {total:.1f}"

    def _graph_reason(self, graph: Captured, run: Callable[[], Any], expected: Any, device: torch.device) -> str | None:
        """Why the graph just captured is of no use, or None."""
        if self._checks:
            graph.replay()
            if not _same_bits(graph.outputs, expected):
                return "a replay differs in some bits from the call that was captured"
        if self._only_if_faster:
            launches, replay = (self._gpu.milliseconds(way, device) for way in (run, graph.replay))
            if replay > WORTH_IT * launches:
                return f"it is no faster: {replay:.1f} ms, separate launches {launches:.1f} ms"
        return None


def _same_bits(outputs: Any, expected: Any) -> bool:
    pairs = zip(tree_leaves(outputs), tree_leaves(expected), strict=True)
    return all(bool(((x == y) | (x.isnan() & y.isnan())).all()) for x, y in pairs if isinstance(x, Tensor))


def _versions(tensors: list[Tensor]) -> list[int]:
    return [x._version for x in tensors if not x.is_inference()]


def _buffer_like(x: Tensor) -> Tensor:
    """Memory of the same shape and strides; no inference tensor, for calls in and out of that mode write to it."""
    with torch.inference_mode(False):
        once = _unexpanded(x)
        return torch.empty_strided(once.shape, once.stride(), dtype=x.dtype, device=x.device).expand(x.shape)


def _unexpanded(x: Tensor) -> Tensor:
    """``x`` without the copies that ``expand`` shows of it: one element cannot be written to twice."""
    return x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())] if 0 in x.stride() else x


def _one_line(error: Exception) -> str:
    return str(error) if isinstance(error, CaptureError) else first_line(error)
