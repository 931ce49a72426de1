"""What a call of a model takes for granted about it, and whether that still holds.

Every decision of the blocks, and every address in a CUDA graph, follows from what the model is: classes of modules
(patched, restored, LoRA layers) and what these do, their attributes (geometry, FreeU, chunking, training), hooks,
parameters and where they lie, processors. So before a call all of that is compared with how it was. A thousand modules
take about a millisecond, for the comparisons themselves are C.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from operator import getitem, itemgetter
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vidaccel.parallel.asked import CALL_SLOT
from vidaccel.sites.memo import generation
from vidaccel.sites.plain import functions_of, hook_reason, hooks_on_all, stock_class

__all__ = ["Premises", "capture_reason"]

_TABLES = ("_modules", "_forward_hooks", "_forward_pre_hooks")
_PLAIN = (nn.Parameter, Tensor)
_OF_EVERY_MODULE = frozenset([*vars(nn.Module()), CALL_SLOT])


def capture_reason(model: nn.Module) -> str | None:
    """Why no call of ``model``, as it is now, could be captured as a graph, or None."""
    for module in model.modules():
        if reason := hook_reason(module):
            return reason
        if module.training:
            return "it is in training mode"
    for weight in (*model.parameters(), *model.buffers()):
        if type(weight) not in _PLAIN:
            return f"a weight of it is a {type(weight).__name__}, not a plain tensor"
    return None


class Premises:
    """How ``model`` is now.

    Attributes:
        generation: Of the plans that its blocks are run by (``sites/memo.py``).
    """

    def __init__(self, model: nn.Module) -> None:
        # Nothing here refers to the model itself, which refers to this: it is to go as soon as nobody else uses it.
        self._model = weakref.ref(model)
        self.generation = generation()
        self._own = _own_attributes(model)
        modules = list(model.modules())
        self._modules = modules[1:]
        self._classes = list(map(type, self._modules))
        places = dict.fromkeys(place for kind in _kinds(modules) for place in functions_of(kind))
        self._places_of_functions = [owner for owner, _ in places], [name for _, name in places]
        self._functions = _functions(*self._places_of_functions)
        self._attributes = list(map(vars, self._modules))
        self._counts = list(map(len, self._attributes))  # one more: somebody replaced a method of an instance
        told = [(own, name) for own in self._attributes for name in own if name not in _OF_EVERY_MODULE]
        told += [(own, "training") for own in self._attributes]
        self._owners, self._names = [own for own, _ in told], [name for _, name in told]
        self._values_then = list(map(getitem, self._owners, self._names))
        self._tables = [vars(module)[name] for module in modules for name in _TABLES]
        self._tables_then = list(map(dict, self._tables))
        self._containers = list(_containers(modules))
        self._containers_then = list(map(_copy, self._containers))
        self._processors = [processor for module in modules for processor in _processors(module)]
        self._processor_kinds = list(map(type, self._processors))
        self._of_processors = list(map(vars, self._processors))
        self._of_processors_then = list(map(dict, self._of_processors))
        self._weights = _Weights(modules)

    def hold(self) -> bool:
        """Whether every decision would be taken as before."""
        model = self._model()
        assert model is not None
        try:
            return (
                self.generation == generation()
                and self._own == _own_attributes(model)
                and self._classes == list(map(type, self._modules))
                and self._processor_kinds == list(map(type, self._processors))
                and self._functions == _functions(*self._places_of_functions)
                and self._counts == list(map(len, self._attributes))
                and self._values_then == list(map(getitem, self._owners, self._names))
                and self._tables == self._tables_then
                and self._containers == self._containers_then
                and self._weights.hold()
            )
        except Exception:  # a tensor stands where another stood, and does not compare to one bool
            return False

    def values_hold(self) -> bool:
        """Whether the attributes of processors, which only a graph takes for granted, are as they were."""
        try:
            return self._of_processors == self._of_processors_then
        except Exception:
            return False


class _Weights:
    """The parameters and buffers of ``modules`` as they are. None is kept alive: who replaces one may need its room."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._tables = [vars(module)[name] for module in modules for name in ("_parameters", "_buffers")]
        self._sizes = list(map(len, self._tables))
        named = [(type(x) in _PLAIN, own, name, x) for own in self._tables for name, x in own.items()]
        named.sort(key=itemgetter(0), reverse=True)
        self._owners, self._names = [own for _, own, _, _ in named], [name for _, _, name, _ in named]
        found = [x for _, _, _, x in named]
        self._ids = list(map(id, found))
        self._gone: list[Any] = []  # as long as all are alive, nothing else has the id of one
        self._refs = [weakref.ref(x, self._gone.append) if isinstance(x, Tensor) else x for x in found]
        self._plain = sum(plain for plain, _, _, _ in named)  # how many of the first
        weights = found[: self._plain]
        self._places = list(map(Tensor.data_ptr, weights))
        # One weight of each rank stands for all: a change of dtype or memory order that ends at the very same
        # addresses has to go through another device, and takes the whole model there.
        self._samples = list({weight.ndim: i for i, weight in enumerate(weights)}.values())
        self._layouts = self._layouts_of(weights)

    def hold(self) -> bool:
        """Whether the same tensors have the same names, and lie where they lay."""
        found: list[Any] = list(map(getitem, self._owners, self._names))
        weights = found[: self._plain]
        return (
            self._ids == list(map(id, found))
            and not self._gone
            and self._sizes == list(map(len, self._tables))
            and self._places == list(map(Tensor.data_ptr, weights))
            and self._layouts == self._layouts_of(weights)
        )

    def _layouts_of(self, weights: list[Tensor]) -> list[Any]:
        return [(weights[i].dtype, weights[i].device, weights[i].stride()) for i in self._samples]


def _own_attributes(model: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(model).items() if name != CALL_SLOT}


def _kinds(modules: list[nn.Module]) -> list[type]:
    """The classes of modules and of their processors, as the libraries have them."""
    processors = (processor for module in modules if (processor := vars(module).get("processor")) is not None)
    return list({*map(stock_class, modules), *map(stock_class, processors)})


def _functions(owners: list[Any], names: list[str]) -> list[Any]:
    """What calls of instances run, and what runs at a call of any module."""
    return [*map(getattr, owners, names), *hooks_on_all(), F.scaled_dot_product_attention]


def _processors(module: nn.Module) -> Iterator[Any]:
    processor = vars(module).get("processor")
    if isinstance(getattr(processor, "__dict__", None), dict) and not isinstance(processor, nn.Module):
        yield processor


def _containers(modules: list[nn.Module]) -> Iterator[Any]:
    """Every dict, list and set that is an attribute of a module and no module has by itself, each of them once."""
    seen: set[int] = set()
    for module in modules:
        for name, value in vars(module).items():
            if name not in _OF_EVERY_MODULE and isinstance(value, dict | list | set) and id(value) not in seen:
                seen.add(id(value))
                yield value


def _copy(container: Any) -> Any:
    """A plain copy that compares equal to ``container`` for as long as that has the same content."""
    return next(kind(container) for kind in (dict, list, set) if isinstance(container, kind))
