"""How every kernel here is launched: through Triton's JIT once, and from then on directly.

``kernel[grid](...)`` spends most of a launch on finding out, anew, which compiled kernel it is about: it reads
environment variables, spells out the compiler's options as a string, and builds what its hooks might ask for. A video
UNet of small clips is bound by that. :func:`launch` asks Triton's own binder for the specialisation of the arguments
(dtype and alignment of pointers, value class and width of integers, constants, options), and remembers the compiled
kernel under exactly that: it can tell apart no less than Triton does.

What it calls of Triton is private, so other versions of Triton than those it was written for launch as ever; so do
interpreted kernels, kernels that read globals, and any launch that a profiler or debugger has hooked itself into.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime import JITFunction

__all__ = ["cdiv", "constants_overridden", "launch", "next_power_of_2"]

DIRECT_VERSIONS = ("3.6.",)  # Triton's
DIRECT = triton.__version__.startswith(DIRECT_VERSIONS)

_overrides: dict[str, Any] = {}


class _Compiled(NamedTuple):
    """A compiled kernel: what launches it, and what that takes between the stream and the kernel's own arguments."""

    run: Callable[..., None]
    head: tuple[Any, ...]


class _Binding:
    """A kernel on one device: Triton's binder for it, and what it was compiled to, by specialisation and options."""

    def __init__(self, kernel: JITFunction, device: int) -> None:
        *_, self.bind = kernel.device_caches[device]
        self.stream = triton.runtime.driver.active.get_current_stream
        self.compiled: dict[tuple[Any, ...], _Compiled] = {}
        self.kernel = kernel  # keeps its id from being given to another


# by id, because hashing a kernel hashes its source
_bindings: dict[tuple[int, int], _Binding] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)`` on the device of the first argument, which is a tensor, in less time.

    Args:
        kernel: What ``triton.jit`` made.
        grid: Numbers of programs, along one to three axes.
        args: The kernel's arguments up to the first constexpr, in order.
        constants: Its constexprs, and the compiler's options (``num_warps``).
    """
    if _overrides:
        constants |= {name: value for name, value in _overrides.items() if name in constants}
    x = args[0]
    if not x.is_cuda:
        kernel[grid](*args, **constants)
        return
    device = x.get_device()
    if device == torch.cuda.current_device():
        _launch_here(device, kernel, grid, args, constants)
        return
    with torch.cuda.device(device):
        _launch_here(device, kernel, grid, args, constants)


def _launch_here(
    device: int, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    """The launch on the current device, number ``device``."""
    if not DIRECT or _must_go_through_triton(kernel):
        kernel[grid](*args, **constants)
        return
    binding = _bindings.get((id(kernel), device))
    if binding is None:
        binding = _bindings[id(kernel), device] = _Binding(kernel, device)
    bound, specialization, options = binding.bind(*args, **constants)
    key = (*specialization, *options.items())
    compiled = binding.compiled.get(key)
    if compiled is None:
        # not kept where the values of globals would have to be compared at every launch
        if (fresh := kernel[grid](*args, **constants)) is not None and not kernel.used_global_vals:
            binding.compiled[key] = _compiled(fresh)
        return
    grid_x, grid_y, grid_z = (*grid, 1, 1)[:3]
    compiled.run(grid_x, grid_y, grid_z, binding.stream(device), *compiled.head, *bound.values())


def _must_go_through_triton(kernel: Any) -> bool:
    """Whether this launch has an observer, or the kernel is interpreted."""
    runtime = triton.knobs.runtime
    # a chain without calls is no hook; what has no calls but is there was put in the chain's place
    return (
        bool(getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook))
        or bool(getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook))
        or runtime.debug
        or not isinstance(kernel, JITFunction)
        or bool(kernel.pre_run_hooks)
    )


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


def cdiv(dividend: int, divisor: int) -> int:
    """``triton.cdiv`` for the host: Triton's own, made for kernels as well, takes 2 microseconds."""
    return -(-dividend // divisor)


def next_power_of_2(n: int) -> int:
    """``triton.next_power_of_2``, likewise."""
    return 1 << (n - 1).bit_length()
