"""Triton's interpreter, made faster: most of its time goes into what no kernel asks for.

As it comes, it reduces one element after the other where a function of ours combines two, looks through all of
``triton.language`` at every call of a device function, makes a table of dtypes whenever it asks for one, describes the
type and the shape of every tensor anew, and looks for overflows, of which it would say nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

__all__ = ["make_faster"]

_MODULES = (tl, tl.core)
_PLACES = (*_MODULES, tl.math, tl.tensor, tl.core.tensor_descriptor_base)


def make_faster() -> None:
    """Replace the slow parts of the Triton that this is written for; another one stays as it is."""
    if not triton.__version__.startswith("3.6."):
        return
    interpreter._get_np_dtype = _once_per_dtype(interpreter._get_np_dtype)
    interpreter._patch_builtin = _patching_of_builtins()
    interpreter._patch_lang = _once_per_launch(interpreter._patch_lang)
    interpreter.ReduceOps.generic_reduce = _reduce_by_halves
    tl.tensor.__init__ = _set_tensor
    tl.block_type.__init__ = _once_per_block_type(tl.block_type.__init__)
    builder = interpreter.interpreter_builder
    if not builder.options.debug:  # else it would say so
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _once_per_dtype(np_dtype_of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    found: dict[str, Any] = {}  # by name: not every type can be hashed

    def np_dtype(dtype: Any) -> Any:
        dtype = dtype.scalar  # of a block: that of its elements
        if dtype.name not in found:
            found[dtype.name] = np_dtype_of(dtype)
        return found[dtype.name]

    return np_dtype


def _patching_of_builtins() -> Callable[[Any, Any, Any], None]:
    # Listed now, while nothing is patched.
    listed = {place: [name for name, x in inspect.getmembers(place) if tl.core.is_builtin(x)] for place in _PLACES}

    def patch(place: Any, builder: Any, scope: Any) -> None:
        for name in listed[place]:
            member = getattr(place, name)
            if tl.core.is_builtin(member):
                interpreter._patch_attr(place, name, member, builder, scope)

    return patch


def _once_per_launch(patch_lang: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Of a device function, the modules are patched already by its kernel's launch, or by a call before."""
    stock = {module: module.range for module in _MODULES}

    @functools.cache
    def modules(fn: Any) -> list[Any]:
        return [module for module in _MODULES if any(x is module for x in fn.__globals__.values())]

    def patch(fn: Any) -> Any:
        if all(module.range is not stock[module] for module in modules(fn)):
            return interpreter._LangPatchScope()
        return patch_lang(fn)

    return patch


def _reduce_by_halves(self: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """The second half of an axis into the first, and so on, as GPUs do; all lengths in Triton are powers of two."""
    axis, rank = self.axis, inputs[0].handle.data.ndim
    if axis is None:
        inputs = tuple(self.to_tensor(x.handle.data.reshape(-1), x.dtype) for x in inputs)
    along = axis or 0
    while (length := inputs[0].handle.data.shape[along]) > 1:
        halves = [np.split(x.handle.data, [length // 2], along) for x in inputs]
        first, second = (
            [self.to_tensor(half[i], x.dtype) for half, x in zip(halves, inputs, strict=True)] for i in (0, 1)
        )
        combined = self.combine_fn.fn(*first, *second)
        combined = combined if isinstance(combined, tuple) else (combined,)
        inputs = tuple(self.to_tensor(x.handle.data, like.dtype) for x, like in zip(combined, inputs, strict=True))
    results = []
    for x in inputs:
        data = x.handle.data
        if not self.keep_dims:
            data = data.squeeze(along)
        elif axis is None:
            data = data.reshape((1,) * rank)
        results.append(self.to_tensor(data if data.ndim else data.item(), x.dtype))
    return results


def _set_tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _shape(tuple(type.shape) if type.is_block() else ())


@functools.cache
def _shape(sizes: tuple[int, ...]) -> tuple[Any, Any]:
    size = tl.constexpr(int(np.prod(sizes)))
    return tl.tuple([tl.constexpr(n) for n in sizes]), size


def _once_per_block_type(set_block_type: Callable[..., None]) -> Callable[..., None]:
    found: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}

    def set_known(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, tuple(getattr(n, "value", n) for n in shape)
        if key not in found:
            set_block_type(self, element_ty, shape)
            found[key] = dict(vars(self))
        vars(self).update(found[key], element_ty=element_ty)

    return set_known
