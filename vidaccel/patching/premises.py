"""What a captured graph takes for granted about the model it was captured from, and whether that still holds.

A graph has the addresses of weights and the outcome of every Python decision baked in. So before a replay all that
users change on a model between calls is compared with how it was: classes of modules (patched, restored, LoRA layers),
addresses and versions of weights, processors, adapters and their scales, hooks, and the plain attributes of modules
(FreeU, chunking, training). A thousand modules take well under a millisecond, for the comparisons themselves are C.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from operator import attrgetter, getitem, is_
from typing import Any

from torch import Tensor, nn

from vidaccel.blocks.unet.text_context import is_text_hook
from vidaccel.sites.parameters import has_hook
from vidaccel.sites.site import BlockState

__all__ = ["CALL_SLOT", "Premises", "why_not_capturable"]

CALL_SLOT = "_compiled_call_impl"

# What a patch changes shows in classes, processors and block states; its own list of sites need not be followed.
_NOT_FOLLOWED = frozenset([*vars(nn.Module()), CALL_SLOT, "_vidaccel_patches"])
_version = attrgetter("_version")


def why_not_capturable(model: nn.Module) -> str | None:
    """Why no call of ``model``, as it is now, could be captured, or None."""
    modules = list(model.modules())
    if any(has_hook(module) for module in modules):
        return "a hook replaced the forward of one of its modules (offload, casting or cache)"
    if not all(map(is_text_hook, _forward_hooks(modules))):
        return "one of its modules has forward hooks, which a replay would not run"
    if any(module.training for module in modules):
        return "it is in training mode"
    for weight in (*model.parameters(), *model.buffers()):
        if type(weight) not in (nn.Parameter, Tensor):
            return f"a weight of it is a {type(weight).__name__}, not a plain tensor"
    return None


def _forward_hooks(modules: list[nn.Module]) -> Iterator[Any]:
    for module in modules:
        yield from module._forward_pre_hooks.values()
        yield from module._forward_hooks.values()


class Premises:
    """How ``model`` is now.

    Attributes:
        problem: Why its calls cannot be captured, or empty.
    """

    def __init__(self, model: nn.Module) -> None:
        self.problem = why_not_capturable(model) or ""
        # Nothing here refers to the model itself, which refers to this: it is to go as soon as nobody else uses it.
        self._model = weakref.ref(model)
        self._own = _own_attributes(model)
        modules = list(model.modules())
        self._modules = modules[1:]
        self._classes = list(map(type, self._modules))
        self._attributes = list(map(vars, self._modules))
        self._attribute_counts = list(map(len, self._attributes))
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._hook_counts = list(map(len, self._hooks))
        self._containers = list(_containers(modules))
        self._copies = list(map(_copy, self._containers))
        tables = [table for m in modules for table in (m._parameters, m._buffers)]
        self._tables = [table for table in tables for _ in table]
        self._names = [name for table in tables for name in table]
        self._entries = list(map(getitem, self._tables, self._names))
        self._weights = [] if self.problem else [weight for weight in self._entries if weight is not None]
        self._places = list(map(Tensor.data_ptr, self._weights))
        # An update in place is seen by a replay, but what a block made of the weight before is not.
        self._versioned = [weight for weight in self._weights if not weight.is_inference()]
        self._versions = list(map(_version, self._versioned))
        # One weight of each rank stands for all: a change of dtype or memory order that ends at the very same
        # addresses has to go through another device, and takes the whole model there.
        self._samples = list({weight.ndim: weight for weight in self._weights}.values())
        self._layouts = _layouts(self._samples)

    def hold(self) -> bool:
        """Whether everything is still as it was."""
        model = self._model()
        assert model is not None
        try:
            return (
                self._own == _own_attributes(model)
                and self._classes == list(map(type, self._modules))
                and self._attribute_counts == list(map(len, self._attributes))
                and self._hook_counts == list(map(len, self._hooks))
                and self._containers == self._copies
                and all(map(is_, self._entries, map(getitem, self._tables, self._names)))
                and self._places == list(map(Tensor.data_ptr, self._weights))
                and self._versions == list(map(_version, self._versioned))
                and self._layouts == _layouts(self._samples)
            )
        except Exception:  # a name is gone, or a tensor stands where another stood, and does not compare to one bool
            return False


def _own_attributes(model: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(model).items() if name != CALL_SLOT}


def _layouts(weights: list[Tensor]) -> list[Any]:
    return [(weight.dtype, weight.stride()) for weight in weights]


def _containers(modules: list[nn.Module]) -> Iterator[Any]:
    """Every dict, list and set whose content decides what a call does, each of them once."""
    model = modules[0]
    seen: set[int] = set()
    for module in modules:
        attributes = [value for name, value in vars(module).items() if name not in _NOT_FOLLOWED]
        found = [container for value in attributes for container in _below(value)]
        if module._modules:
            found.append(module._modules)
        if module is not model and found:  # of a leaf without a state of its own the attributes are only counted
            found.append(vars(module))
        for container in found:
            if id(container) not in seen:
                seen.add(id(container))
                yield container


def _below(value: Any, follow_object: bool = True) -> Iterator[Any]:
    """The containers that ``value`` consists of; of an object (a processor, say) its attributes, but not theirs."""
    if isinstance(value, BlockState):
        yield vars(value)  # it tells whether the block has failed; its counts and verdicts change no call seen before
    elif isinstance(value, dict | list | tuple | set):
        if not isinstance(value, tuple):
            yield value
        for part in value.values() if isinstance(value, dict) else value:
            yield from _below(part, follow_object)
    elif follow_object and _is_plain_object(value):
        yield vars(value)
        for part in vars(value).values():
            yield from _below(part, follow_object=False)


def _is_plain_object(value: Any) -> bool:
    return isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, nn.Module | Tensor | type)


def _copy(container: Any) -> Any:
    """A plain copy that compares equal to ``container`` for as long as that has the same content."""
    return next(kind(container) for kind in (dict, list, set) if isinstance(container, kind))
