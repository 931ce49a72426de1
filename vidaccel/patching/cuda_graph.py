"""CUDA graphs: a denoiser's whole call recorded once for each kind of arguments, then sent to the GPU as one launch.

A denoiser at a small size is thousands of kernels of a few microseconds, and the GPU waits for Python to launch them. A
recorded graph runs the same kernels on the same memory, so the result has the same bits; only the launches are saved.

The graph sits in ``module._compiled_call_impl``, the slot that ``module.compile()`` uses: the model keeps its class and
its forward, and deepcopy and pickle drop the slot. A call goes one of three ways:

* the first of its kind (shapes, strides, dtypes, Python values) runs as ever: kernels compile, sites check themselves;
* the second runs on static buffers and is captured there, and the graph's first replay is held against it bit for bit;
* the later ones copy their tensors into those buffers, replay, and return copies of the static outputs.

If anything else that a graph takes for granted has changed (``graph_premises.py``), all graphs are dropped and the
calls begin anew. What cannot be captured runs as ever, and the report counts why. While a graph lives, the memory that
the call works in stays reserved for it.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from vidaccel.config import preferred_implementations
from vidaccel.errors import first_line
from vidaccel.patching.cuda_capture import Captured, CaptureError, CudaCapture
from vidaccel.patching.premises import CALL_SLOT, Premises, why_not_capturable
from vidaccel.sites.self_check import disagreement
from vidaccel.sites.site import Site

__all__ = ["GraphedCall", "graph_calls", "graphed_call", "is_denoiser", "ungraph", "why_not_graphed"]

logger = logging.getLogger(__name__)

MAX_KINDS = 8
# A Python value that differs at every call (a time step as a float) would push out all other kinds, and never return.
MAX_VALUES_PER_SHAPE = 4
# "auto" keeps a graph that takes at most this part of the time of separate launches.
WORTH_IT = 0.95
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


def graphed_call(model: nn.Module) -> GraphedCall | None:
    """What :func:`graph_calls` put on ``model``, if it is there."""
    call = vars(model).get(CALL_SLOT)
    return call if isinstance(call, GraphedCall) else None


def why_not_graphed(model: nn.Module) -> str | None:
    """Why no call of ``model``, as it is now, could be captured, or None."""
    if vars(model).get(CALL_SLOT) is not None and graphed_call(model) is None:
        return "it was compiled with module.compile(), which needs the same slot"
    return CudaCapture.why_unavailable() or why_not_capturable(model)


def graph_calls(model: nn.Module, path: str, *, self_check: bool, only_if_faster: bool) -> Site:
    """Let ``model`` capture and replay its calls; one that does so already stays as it is.

    Args:
        model: A denoiser.
        path: Where it is listed in the report.
        self_check: Compare the first replay of every graph with the call it was captured from.
        only_if_faster: Time a replay and the call itself at capture, and keep the graph only if it gains something. (A
            host that is held up by a full launch queue looks as busy as one that cannot keep up, so the time that a
            call takes to launch would not tell.)

    Returns:
        The site: active, or left alone with the reason.
    """
    if found := graphed_call(model):
        return found.site
    site = GraphSite(path, "cuda_graph", "bit-exact")
    if reason := why_not_graphed(model):
        site.state, site.reason = "left alone", reason
    else:
        vars(model)[CALL_SLOT] = GraphedCall(model, site, self_check, only_if_faster)
    return site


def ungraph(model: nn.Module) -> None:
    """Undo :func:`graph_calls`, and give back the memory."""
    if call := graphed_call(model):
        del vars(model)[CALL_SLOT]
        call.site.state = "restored"
        call.forget()


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
        return _Kind(self.structure, tensors, plain + _switches())

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
    """One kind of call: seen once, captured, or refused for good (``reason``)."""

    kind: _Kind
    reason: str = ""
    graph: Captured | None = None
    buffers: list[Tensor] = field(default_factory=list)

    def fill(self, tensors: list[Tensor]) -> None:
        for buffer, x in zip(self.buffers, tensors, strict=True):
            _unexpanded(buffer).copy_(_unexpanded(x))


class GraphedCall:
    """Stands in a model's call slot; see the module's docstring for a call's way through it."""

    def __init__(self, model: nn.Module, site: Site, self_check: bool, only_if_faster: bool) -> None:
        self.site = site
        # weak, so that a model nobody uses any more goes at once, and its memory with it
        self._model = weakref.ref(model)
        self._self_check = self_check
        self._only_if_faster = only_if_faster
        self._gpu = CudaCapture()
        self._entries: list[_Entry] = []  # the one used last comes last
        self._premises: Premises | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self._model()
        if torch.compiler.is_compiling() or self._gpu.capturing():
            return model._call_impl(*args, **kwargs)
        call = _Call(model, args, kwargs)
        if reason := self._why_not_served(call):
            return self._fall_back(call, reason)
        if self._premises is None:
            return self._begin(call)
        if not self._premises.hold():
            self.forget()
            self.site.fallbacks[CHANGED] += 1
            return self._begin(call)
        if self._premises.problem:
            return self._fall_back(call, self._premises.problem)
        return self._serve(call)

    def forget(self) -> None:
        """Drop all graphs, and what they were captured under."""
        if any(entry.graph for entry in self._entries):
            self._gpu.wait()
            self._entries = []
            self._gpu.give_back_memory()
        self._entries, self._premises = [], None

    def _why_not_served(self, call: _Call) -> str | None:
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

    def _begin(self, call: _Call) -> Any:
        out = self._first_of_kind(call)
        self._premises = Premises(call.model)
        if self._premises.problem:
            self.site.fallbacks[self._premises.problem] += 1
        return out

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
            return self._capture(call, entry)
        entry.fill(call.tensors)
        entry.graph.replay()
        return tree_map_only(Tensor, torch.clone, entry.graph.outputs)

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
        return out

    def _capture(self, call: _Call, entry: _Entry) -> Any:
        """Run the call on static buffers, then capture it there; a failure costs the graph, never the result."""
        out = self._rehearse(call, entry)
        if entry.reason:
            return self._fall_back(call, entry.reason)
        run = call.on(entry.buffers)
        try:
            # one pool for all: no two replays run at the same time, and what they return is copied at once
            pool = next((other.graph.pool for other in self._entries if other.graph), None)
            entry.graph = self._gpu.capture(run, call.tensors[0].device, pool)
            entry.reason = self._why_not_kept(entry.graph, run, out, call.tensors[0].device) or ""
        except Exception as error:
            entry.reason = _one_line(error)
        if entry.reason:
            logger.warning("%s: no CUDA graph: %s", self.site.path or type(call.model).__name__, entry.reason)
            self.site.fallbacks[entry.reason] += 1
            self._gpu.wait()
            entry.graph, entry.buffers = None, []
            self._gpu.give_back_memory()
        else:
            self.site.implementations.add("cuda graph")
        return out

    def _rehearse(self, call: _Call, entry: _Entry) -> Any:
        """What the call returns, run on new static buffers; or a reason in ``entry``."""
        try:
            entry.buffers = [_buffer_like(x) for x in call.tensors]
            entry.fill(call.tensors)
            return self._gpu.rehearse(call.on(entry.buffers))
        except Exception as error:
            entry.reason, entry.buffers = _one_line(error), []
            return None

    def _why_not_kept(self, graph: Captured, run: Callable[[], Any], expected: Any, device: torch.device) -> str | None:
        """Why the graph just captured is of no use, or None."""
        if self._self_check:
            graph.replay()
            pairs = zip(tree_leaves(graph.outputs), tree_leaves(expected), strict=True)
            if any(disagreement(x, y, "bit-exact") for x, y in pairs if isinstance(x, Tensor)):
                return "a replay differs in some bits from the call that was captured"
        if self._only_if_faster:
            launches, replay = (self._gpu.milliseconds(way, device) for way in (run, graph.replay))
            if replay > WORTH_IT * launches:
                return f"it is no faster: {replay:.1f} ms, separate launches {launches:.1f} ms"
        return None


def _switches() -> tuple[Any, ...]:
    """The settings of PyTorch and of this project that decide which kernels a call launches."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return (
        (matmul.fp32_precision, cudnn.conv.fp32_precision),  # type: ignore[attr-defined]
        (matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction),
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, torch.are_deterministic_algorithms_enabled()),
        (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()),
        (torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()),
        preferred_implementations(),
    )


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
