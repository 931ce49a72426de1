"""The one wrapper of a model's call: what is settled once per call is settled here, before any block runs.

It sits in ``module._compiled_call_impl``, the slot that ``module.compile()`` uses: the model keeps its class and its
forward, and deepcopy and pickle drop the slot. A call

* waits for another thread's call of the same model: what is kept from call to call is for one at a time;
* freezes the settings (``kernels/settings.py``) and compares the model with what it was (``premises.py``): while both
  are the same, what was found out in earlier calls stands (``sites/memo.py``), but where somebody's own code runs in
  the call, and may change the model on the way;
* lets those who asked for it see the arguments (the text, ``blocks/unet/text_context.py``);
* goes to a CUDA graph where one serves it (``cuda_graph.py``), else to the model.

Where a clip is split over several GPUs, each rank comes here with its part of the arguments (``parallel.py``).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from vidaccel.kernels.sampling import sampling
from vidaccel.kernels.settings import FIDELITIES, Fidelity, Settings, allowed, frozen
from vidaccel.parallel.asked import CALL_SLOT, Answer, HearsStandIns, stand_in_of
from vidaccel.parallel.layout import layout
from vidaccel.patching.cuda_graph import Graphs, Shared
from vidaccel.patching.parallel import ParallelCall, is_looked_at
from vidaccel.patching.premises import Premises
from vidaccel.sites.block import have_no_numbers, numberless_way
from vidaccel.sites.memo import Memo, generation, holding, preparations, watched
from vidaccel.sites.plain import rows_are_seen, stock_method

__all__ = ["DecodeCall", "ModelCall", "uncompiled", "unwrap_call", "wrap_call", "wrap_decode"]

MOST_ANSWERS = 2**16  # that a memo keeps: more than several shapes of the largest model


class ModelCall(HearsStandIns):
    """Stands in a model's call slot; see the module's docstring.

    Attributes:
        graphs: The model's CUDA graphs, or None.
        parallel: How the call is split over ranks, or None.
    """

    def __init__(self, model: nn.Module, allow: Fidelity) -> None:
        # weak, so that a model nobody uses any more goes at once, and its memory with it
        self._model = weakref.ref(model)
        self._allow = allow
        self._lock = threading.RLock()
        self._premises: Premises | None = None
        self._settings: Settings | None = None
        self._memo = Memo()
        self._looked_at = False
        self.graphs: Graphs | None = None
        self.parallel: ParallelCall | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self._model()
        if torch.compiler.is_compiling():
            return model._call_impl(*args, **kwargs)
        if (stand_in := stand_in_of(model)) is not None:
            return stand_in(*args, **kwargs)
        with self._lock, allowed(self._allow), frozen() as settings:
            self._settle(model, settings)
            run = partial(self._run, model, settings)
            if self.parallel is None:
                return run(*args, **kwargs)
            return self.parallel.call(run, model, args, kwargs, self._looked_at)

    def allow_too(self, fidelity: Fidelity) -> None:
        """Allow what is this loose: a model that is patched twice runs the sites of both patches."""
        self._allow = max(self._allow, fidelity, key=FIDELITIES.index)

    def asked(self, question: Callable[[], Answer]) -> Answer:
        model: Any = self._model()
        with self._lock, allowed(self._allow), frozen() as settings:
            self._settle(model, settings)
            try:
                with holding(self._memo):
                    return question()
            finally:
                self._memo.of_call.clear()

    def _run(self, model: Any, settings: Settings, *args: Any, **kwargs: Any) -> Any:
        if self._premises is None or self._premises.generation != generation():
            self._settle(model, settings)  # what failed on another rank has just been switched off here
        memo, graphs = self._memo, self.graphs
        if way := watched():
            memo, graphs = Memo(), None
            memo.way, memo.hooked, memo.of_model = way, self._memo.hooked, self._memo.of_model
        elif have_no_numbers(args, kwargs):
            memo = Memo()
            memo.way = numberless_way
        try:
            if memo.way is not numberless_way:  # they look at what is in the tensors
                for prepare in preparations(model):
                    prepare(memo, args, kwargs)
            with holding(memo), sampling():
                over, parallel = layout(), self.parallel
                if graphs is None or (over is not None and parallel is None):
                    return model._call_impl(*args, **kwargs)
                shared = Shared(over, parallel.agreement) if over is not None and parallel is not None else None
                return graphs.call(model, args, kwargs, shared)
        finally:
            memo.text = None  # also after an interrupt: no later call may take it for its own
            memo.of_call.clear()
            memo.flops = memo.ops = 0
            memo.postpone.clear()

    def _settle(self, model: nn.Module, settings: Settings) -> None:
        """Forget what was found out if the model or the settings are not what they were."""
        premises = self._premises
        if premises is not None and settings is self._settings and premises.hold():
            if self.graphs is not None and not premises.values_hold():
                self.graphs.changed()
                self._premises = Premises(model)
            memo = self._memo
            # a hook or a forward of somebody's own may change the model within the call
            if len(memo) > MOST_ANSWERS or memo.hooked or not memo.of_model:
                memo.clear()
            return
        if self.graphs is not None and premises is not None:
            self.graphs.changed()
        if self.parallel is not None:
            self.parallel.model_changed()
        self._memo.clear()
        self._premises, self._settings = Premises(model), settings
        self._memo.hooked = rows_are_seen(*list(model.modules())[1:])
        self._memo.of_model = not rows_are_seen(model)
        self._looked_at = is_looked_at(model)


def wrap_call(model: nn.Module, allow: Fidelity) -> ModelCall | None:
    """The wrapper of ``model``'s call, put there if there is none; None where the slot is somebody else's."""
    call = vars(model).get(CALL_SLOT)
    if call is None:
        call = vars(model)[CALL_SLOT] = ModelCall(model, allow)
    if not isinstance(call, ModelCall):
        return None
    call.allow_too(allow)
    return call


class DecodeCall:
    """Stands for the ``decode`` of a VAE, which several ranks share: pipelines call that, and not the VAE.

    Attributes:
        parallel: How they do.
    """

    def __init__(self, vae: nn.Module, parallel: ParallelCall) -> None:
        self._vae = weakref.ref(vae)
        self._lock = threading.RLock()
        self.parallel = parallel

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        vae: Any = self._vae()
        run = partial(type(vae).decode, vae)
        if torch.compiler.is_compiling():
            return run(*args, **kwargs)
        with self._lock:
            return self.parallel.call(run, vae, args, kwargs, is_looked_at(vae))

    def __reduce__(self) -> Any:
        """A copy decodes by itself."""
        return stock_method, (self._vae(), "decode")


def wrap_decode(vae: Any, parallel: ParallelCall) -> DecodeCall | None:
    """What stands for the ``decode`` of ``vae``, put there if nothing does; None where it is somebody else's."""
    found = vars(vae).get("decode")
    if found is None or getattr(found, "__func__", None) is type(vae).decode:
        found = vars(vae)["decode"] = DecodeCall(vae, parallel)
    return found if isinstance(found, DecodeCall) else None


def unwrap_call(model: nn.Module) -> None:
    """Undo :func:`wrap_call` and :func:`wrap_decode`; if that is interrupted, doing it again finishes it."""
    decode = vars(model).get("decode")
    if isinstance(decode, DecodeCall):
        decode.parallel.taken_away()
        del vars(model)["decode"]
    call = vars(model).get(CALL_SLOT)
    if isinstance(call, ModelCall):
        if call.parallel is not None:
            call.parallel.taken_away()
        if call.graphs is not None:
            call.graphs.site.taken_away()
            call.graphs.forget()
        del vars(model)[CALL_SLOT]


@contextmanager
def uncompiled(model: nn.Module, allow: Fidelity) -> Iterator[None]:
    """Let what ``module.compile()`` made of ``model`` not be called inside the ``with`` block, but ``model`` itself."""
    compiled = vars(model).get(CALL_SLOT)
    if compiled is None or isinstance(compiled, ModelCall):
        yield
        return
    try:
        vars(model)[CALL_SLOT] = None
        wrap_call(model, allow)
        yield
    finally:
        unwrap_call(model)
        vars(model)[CALL_SLOT] = compiled
