"""Launching a compiled Triton kernel without the search for it.

``kernel[grid](...)`` spends most of a launch on finding out which compiled kernel to run: it classifies every argument,
spells out the compiler's options as a string, and builds what its hooks might ask for. A video UNet of small clips is
bound by that. An op prepares a :class:`Launch` for each set of sizes it meets, and keeps it; a call then brings the
tensors.

Triton compiles a kernel for the types and values of its numbers, the dtypes and the alignment (to 16 bytes) of its
tensors, its constants and options. A ``Launch`` fixes all of them but the tensors, and keeps a compiled kernel for each
combination of dtypes and alignments. The first launch of a combination goes through Triton.

Every launch goes through Triton where this one would not be the same: another version of Triton than those listed here,
an AMD GPU (Triton looks at the size of a tensor there), an interpreted kernel, a kernel that reads globals, a hook of a
profiler or a debugger.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime import JITFunction

from vidaccel.kernels import compile_ahead, settings
from vidaccel.kernels.compile_cache import ensure_writable
from vidaccel.kernels.context import while_set

__all__ = ["DIRECT", "Launch", "ahead_on", "launching_ahead", "multiprocessors", "prepared"]

DIRECT_VERSIONS = ("3.6.",)  # of Triton: those whose launcher and cache keys this file knows
MOST_COMPILED = 64  # that a launch keeps: combinations of dtypes and alignments
DIRECT = triton.__version__.startswith(DIRECT_VERSIONS) and torch.version.hip is None

_Made = TypeVar("_Made")
_ahead: ContextVar[torch.device | None] = ContextVar("ahead", default=None)


def launching_ahead(device: torch.device) -> AbstractContextManager[object]:
    """Inside the ``with`` block, a launch begins to compile its kernel for ``device``, and launches nothing."""
    return while_set(_ahead, device)


ahead_on = _ahead.get  # the device to compile for in place of a launch, or None


def prepared(make: Callable[..., _Made]) -> Callable[..., _Made]:
    """Keep what ``make`` returns; 0, 0.0 and False are not the same to a compiler."""

    @functools.lru_cache(maxsize=1024, typed=True)
    def kept(overridden: Any, *args: Any) -> _Made:
        return make(*args)

    return lambda *args: kept(settings.overridden_constants(), *args)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; 1 where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class _Compiled(NamedTuple):
    """A compiled kernel.

    Attributes:
        run: Launches it; takes the grid, the stream, ``head``, then the kernel's own arguments.
        head: What comes between.
        stream: Takes the number of a GPU; its current stream.
    """

    run: Callable[..., None]
    head: tuple[Any, ...]
    stream: Callable[[int], int]


class Launch:
    """``kernel[grid](*tensors, *numbers, **constants)``, complete but for the tensors.

    Args:
        kernel: What ``triton.jit`` made; its parameters are tensors, then numbers, then constexprs.
        grid: How many programs, along one to three axes.
        numbers: The kernel's integers and floats, in order.
        constants: All its constexprs, and options of the compiler (``num_warps``).
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], *numbers: float, **constants: Any) -> None:
        constants |= {name: value for name, value in settings.overridden_constants() if name in constants}
        self._kernel, self._grid, self._numbers, self._constants = kernel, grid, numbers, constants
        self._grid_xyz = (*grid, 1, 1)[:3]
        self._tail = (*numbers, *(constants[name] for name in kernel.arg_names if name in constants))
        self._direct = DIRECT and isinstance(kernel, JITFunction)
        if isinstance(kernel, JITFunction):
            ensure_writable()
        self._compiled: dict[tuple[Any, ...], _Compiled] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch on the device of the tensors, on its current stream.

        Args:
            tensors: All on one device; the first is not None.
        """
        x: Any = tensors[0]
        if ahead := ahead_on():
            self.compile_ahead(ahead, *(x.dtype if tensor is None else tensor.dtype for tensor in tensors))
            return
        if not x.is_cuda:
            self._through_triton(tensors)
            return
        device = x.get_device()
        if device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self(*tensors)
            return
        if not self._direct or _observed(self._kernel):
            self._through_triton(tensors)
            return
        # Triton's launcher takes addresses too; it asks the driver about every tensor, but not about those.
        found: list[Any] = [device]
        addresses = []
        for tensor in tensors:
            if tensor is None:
                tensor = x
            address = tensor.data_ptr()
            addresses.append(address)
            found.append(tensor.dtype)
            found.append(address % 16)
        key = tuple(found)
        compiled = self._compiled.get(key)
        if compiled is None:
            self._first(key, tensors)
        else:
            run, head, stream = compiled
            run(*self._grid_xyz, stream(device), *head, *addresses, *self._tail)

    def compile_ahead(self, device: torch.device, *dtypes: torch.dtype) -> None:
        """Begin to compile the kernel in the background, for tensors of these dtypes, aligned as PyTorch aligns them.

        The first launch with these dtypes waits for it if it has begun. A kernel or a device that is not compiled for
        is passed over.
        """
        if self._direct and device.type == "cuda":
            if compile_ahead.foreseen().upcast:
                dtypes = (torch.float32,) * len(dtypes)
            arguments = (*dtypes, *self._numbers)
            compile_ahead.begin((*self._identity(), *dtypes), self._kernel, device, arguments, self._constants)

    def is_awaited(self, *dtypes: torch.dtype) -> bool:
        """Whether what :meth:`compile_ahead` has begun for these dtypes is still under way."""
        return compile_ahead.is_under_way((*self._identity(), *dtypes))

    def _identity(self) -> tuple[Any, ...]:
        return self._kernel, *sorted(self._constants.items())

    def _first(self, key: tuple[Any, ...], tensors: tuple[Tensor | None, ...]) -> None:
        kernel = self._through_triton(tensors)
        # Triton compares the globals that a kernel reads at every launch.
        if kernel is not None and not self._kernel.used_global_vals:
            if len(self._compiled) >= MOST_COMPILED:
                self._compiled.clear()
            self._compiled[key] = _compiled(kernel)

    def _through_triton(self, tensors: tuple[Tensor | None, ...]) -> Any:
        # The kernel does not read a tensor that is not there, so any will do. For None Triton would compile another
        # launcher, with the C compiler, which takes about as long as a small kernel.
        given: list[Any] = [tensors[0] if tensor is None else tensor for tensor in tensors]
        if compile_ahead.under_way:
            compile_ahead.finish((*self._identity(), *(tensor.dtype for tensor in given)))
        return self._kernel[self._grid](*given, *self._numbers, **self._constants)


def _observed(kernel: JITFunction) -> bool:
    """Whether somebody wants to see this launch, or wants kernels with checks in them."""
    runtime = triton.knobs.runtime
    if kernel.pre_run_hooks or runtime.debug:
        return True
    # A chain of hooks may be empty; whatever else stands in its place is a hook.
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _compiled(kernel: Any) -> _Compiled:
    """What launches a ``CompiledKernel`` that has run."""
    run, function, metadata, no_hooks = kernel.run, kernel.function, kernel.packed_metadata, (None, None, None)
    stream = triton.runtime.driver.active.get_current_stream
    if type(run).__name__ == "CudaLauncher" and not run.global_scratch_size and not run.profile_scratch_size:
        # What CudaLauncher calls once it has found that there is no scratch memory to allocate.
        head = (function, run.launch_cooperative_grid, run.launch_pdl, None, None, metadata, *no_hooks)
        return _Compiled(run.launch, head, stream)
    return _Compiled(run, (function, metadata, *no_hooks), stream)
