"""How every kernel here is launched: through Triton's JIT the first time, and from then on directly.

``kernel[grid](...)`` spends most of a launch on finding out, anew, which compiled kernel it is about: it classifies
every argument, reads environment variables, spells out the compiler's options as a string, and builds what its hooks
might ask for. A video UNet of small clips is bound by that. Here an op prepares a :class:`Launch` for each set of sizes
it meets and keeps it; what is left to a call are the tensors.

A compiled kernel is right for the specialisation it was compiled for: types and values of numbers, dtypes and
alignments of pointers, constants and options. All but the pointers are fixed in a ``Launch``; those are classified by
the very function of Triton's that its own cache asks. So a launch can tell apart no less than Triton does.

What is called of Triton is private. Other versions of Triton than those this was written for launch as ever; so do
interpreted kernels, kernels that read globals, and any launch that a profiler or debugger has hooked itself into.

A model's first call needs dozens of kernels, one after the other. What can be foretold of them from its weights alone
is compiled by several threads meanwhile (:meth:`Launch.compile_ahead`): most of that is LLVM and ptxas, which run
beside Python.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import JITFunction

__all__ = ["Launch", "constants_overridden", "prepared"]

DIRECT_VERSIONS = ("3.6.",)  # Triton's
DIRECT = triton.__version__.startswith(DIRECT_VERSIONS)
if DIRECT:
    from triton._C.libtriton import native_specialize_impl

# Keeps what a function makes of sizes and flags; 0, 0.0 and False are not the same to a compiler.
prepared = functools.lru_cache(maxsize=1024, typed=True)

_overrides: dict[str, Any] = {}

MOST_COMPILERS = 16
# What is being compiled, by kernel and constants, then by the dtypes of its tensors.
_ahead: dict[tuple[Any, ...], dict[tuple[torch.dtype, ...], Future[None]]] = {}


class _Compiled(NamedTuple):
    """A compiled kernel: what launches it, and what that takes between the stream and the kernel's own arguments."""

    run: Callable[..., None]
    head: tuple[Any, ...]


class Launch:
    """``kernel[grid](*tensors, *numbers, **constants)``, complete but for the tensors.

    Args:
        kernel: What ``triton.jit`` made; its parameters are tensors, then numbers, then constexprs.
        grid: How many programs, along one to three axes.
        numbers: The kernel's integers and floats, in order.
        constants: All its constexprs, and options of the compiler (``num_warps``).
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], *numbers: float, **constants: Any) -> None:
        self._kernel, self._grid, self._numbers, self._constants = kernel, grid, numbers, constants
        self._grid_xyz = (*grid, 1, 1)[:3]
        self._tail = (*numbers, *(constants[name] for name in kernel.arg_names if name in constants))
        self._direct = DIRECT and isinstance(kernel, JITFunction)
        self._compiled: dict[tuple[Any, ...], _Compiled] = {}
        self._variants: dict[tuple[Any, ...], Launch] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch on the device of the first of the kernel's tensors, which is not None, on its current stream."""
        launch = self._overridden() if _overrides else self
        x: Any = tensors[0]
        # What is not there is not read: any tensor will do. For other types Triton would build another launcher, with
        # the C compiler, which takes about as long as compiling a small kernel.
        tensors = tuple(x if tensor is None else tensor for tensor in tensors)
        if not x.is_cuda:
            launch._through_triton(tensors)
            return
        device = x.get_device()
        if device == torch.cuda.current_device():
            launch._here(device, tensors)
            return
        with torch.cuda.device(device):
            launch._here(device, tensors)

    def _here(self, device: int, tensors: tuple[Tensor | None, ...]) -> None:
        """Launch on the current device, number ``device``."""
        if not self._direct or _observed(self._kernel):
            self._through_triton(tensors)
            return
        backend, stream = _runtime(device)
        key = (device, *[native_specialize_impl(backend, x, False, True, True) for x in tensors])
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled.run(*self._grid_xyz, stream(device), *compiled.head, *tensors, *self._tail)
            return
        kernel = self._through_triton(tensors)
        # not kept where the values of globals would have to be compared at every launch
        if kernel is not None and not self._kernel.used_global_vals:
            self._compiled[key] = _compiled(kernel)

    def _through_triton(self, tensors: tuple[Tensor | None, ...]) -> Any:
        for begun in _ahead.pop(self._identity(), {}).values():
            begun.exception()  # waits; what went wrong there will go wrong here, where somebody wants to know
        return self._kernel[self._grid](*tensors, *self._numbers, **self._constants)

    def compile_ahead(self, device: torch.device, *dtypes: torch.dtype) -> None:
        """Begin to compile the kernel in the background, for tensors of these dtypes, aligned as PyTorch aligns them.

        The first launch waits for it. A kernel, or a device, that is not compiled for is passed over.
        """
        if device.type != "cuda" or not isinstance(self._kernel, JITFunction):
            return
        begun = _ahead.setdefault(self._identity(), {})
        if dtypes not in begun:
            begun[dtypes] = _compilers().submit(self._compile, device, dtypes)

    def _compile(self, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> None:
        with torch.cuda.device(device):
            self._kernel.warmup(*dtypes, *self._numbers, grid=self._grid, **self._constants)

    def _identity(self) -> tuple[Any, ...]:
        return self._kernel, *sorted(self._constants.items())

    def _overridden(self) -> Launch:
        """This launch as it is inside :func:`constants_overridden`."""
        values = tuple((name, value) for name, value in _overrides.items() if name in self._constants)
        if values not in self._variants:
            constants = self._constants | dict(values)
            self._variants[values] = Launch(self._kernel, self._grid, *self._numbers, **constants)
        return self._variants[values]


@functools.cache
def _compilers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_COMPILERS), thread_name_prefix="vidaccel-compile")


def _observed(kernel: JITFunction) -> bool:
    """Whether somebody wants to see this launch, or wants kernels with checks in them."""
    runtime = triton.knobs.runtime
    if kernel.pre_run_hooks or runtime.debug:
        return True
    # a chain without calls is no hook; what has no calls but is there was put in the chain's place
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


@functools.cache
def _runtime(device: int) -> tuple[Any, Callable[[int], int]]:
    """The compiler's backend for a device, and what tells its current stream."""
    active = triton.runtime.driver.active
    return triton.compiler.make_backend(active.get_current_target()), active.get_current_stream


def _compiled(kernel: Any) -> _Compiled:
    """What launches a ``CompiledKernel`` that has run."""
    run, function, metadata, no_hooks = kernel.run, kernel.function, kernel.packed_metadata, (None, None, None)
    if type(run).__name__ == "CudaLauncher" and not run.global_scratch_size and not run.profile_scratch_size:
        # what CudaLauncher would call, once it has found out that there is no scratch memory to allocate
        head = (function, run.launch_cooperative_grid, run.launch_pdl, None, None, metadata, *no_hooks)
        return _Compiled(run.launch, head)
    return _Compiled(run, (function, metadata, *no_hooks))


@contextmanager
def constants_overridden(**values: Any) -> Iterator[None]:
    """Inside the ``with`` block, these values stand in for the same-named constants of every launch that has them."""
    before = dict(_overrides)
    _overrides.update(values)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)
