"""The one place that decides whether code of ours may stand for a child module, or read its weights.

LoRA, quantisation, casting, offload, caches and users change what a call of a child does: by its class, by its forward,
by another method of the instance, by hooks, by what ``weight`` is. A child is *plain* only if it is exactly what is
expected in all of these; all else is called, or left to the original code. So it is where somebody has changed a whole
class, or hung a hook on all modules.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from itertools import chain
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, NoneType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _SpectralNorm

from vidaccel.sites.memo import once_per_call

__all__ = [
    "fingerprint",
    "foreign_reason",
    "functions_of",
    "has_own_forward",
    "hook_reason",
    "hooks_on_all",
    "is_of_a_library",
    "is_replaced",
    "method_reason",
    "order_reason",
    "parameters_reason",
    "plain_reason",
    "random_reason",
    "readable_reason",
    "replaced_attention_reason",
    "replaced_reason",
    "rows_are_seen",
    "stock_class",
    "stock_method",
    "subtree_reason",
]

_LIBRARIES = ("torch.nn.", "diffusers.", "vidaccel.")
MOST_KINDS = 1024  # whose functions are remembered: some libraries make a class for each module
_places: dict[type, list[tuple[Any, str]]] = {}
# Whose functions those name.
_PACKAGES = ("torch", "diffusers", "vidaccel", "builtins", "functools", "contextlib")
# Whose layers treat all rows alike: those of LoRA and of quantised weights. Of step caches, what follows the pictures.
_ROWWISE = (
    *_LIBRARIES,
    *("torch.ao.nn.", "peft.", "loralib.", "bitsandbytes.", "torchao.", "optimum.", "quanto.", "cache_dit."),
)
_PLAIN_ATTRIBUTES = (int, float, bool, str, tuple, NoneType, FunctionType, BuiltinFunctionType)
_HOOKS = frozenset(["_hf_hook", "_diffusers_hook"])  # where libraries keep those that replaced an instance's forward
# Of torch.nn, what draws random numbers or changes its buffers in training mode.
_STATEFUL = (_DropoutNd, _NormBase, _SpectralNorm, nn.RReLU)


def stock_class(module: Any) -> type:
    """The class that a module or processor has, or had before it was fused."""
    kind: type = type(module)
    if torch.compiler.is_compiling():  # Dynamo does not follow the other
        return getattr(kind, "original", kind)
    return vars(kind).get("original", kind)  # its own: a class that somebody derived from a fused one is not stock


def stock_method(module: Any, name: str) -> Any:
    """What ``module.name`` is where nothing stands in its place; in a pickle, what stood there."""
    return MethodType(getattr(type(module), name), module)


@once_per_call
def plain_reason(child: nn.Module, expected: type[nn.Module]) -> str | None:
    """Why a call of ``child`` may do other than what an ``expected`` does, or None."""
    if stock_class(child) is not expected:
        return f"a {expected.__name__} was replaced by {_name_beside(expected, type(child))}"
    if reason := hook_reason(child) or replaced_reason(expected):
        return reason
    return "a forward hook on all modules is registered" if hooks_on_all() else None


def _name_beside(expected: type, kind: type) -> str:
    """The name of a class, with its package where that is all it differs in: PEFT's Linear is a Linear, too."""
    package = f" of {kind.__module__.partition('.')[0]}" if kind.__name__ == expected.__name__ else ""
    return kind.__name__ + package


def hook_reason(module: nn.Module) -> str | None:
    """What was hung on this very instance so that only a call of it runs that, or None."""
    name, own = stock_class(module).__name__, vars(module)
    if has_own_forward(module) or "_hf_hook" in own:
        return f"a hook replaced the forward of a {name} (offload, casting or cache)"
    if reason := method_reason(module):
        return reason
    if module._forward_hooks or module._forward_pre_hooks:
        return f"a {name} has forward hooks, which only a call of it runs"
    return None


def has_own_forward(module: nn.Module) -> bool:
    """Whether this very instance has another forward than its class, which hooks that are taken off leave there."""
    if "forward" not in vars(module):
        return False
    forward = vars(module)["forward"]
    of_classes = [getattr(kind, "forward", None) for kind in (type(module), stock_class(module))]
    return getattr(forward, "__self__", None) is not module or forward.__func__ not in of_classes


def method_reason(module: nn.Module) -> str | None:
    """Which method of this very instance, but for its forward, is not that of its class any more, or None."""
    if torch.compiler.is_compiling():
        return None
    kind = stock_class(module)
    replaced = vars(module).keys() & _methods(kind)
    return f"somebody replaced {min(replaced)} of a {kind.__name__}" if replaced else None


@once_per_call
def replaced_reason(kind: type) -> str | None:
    """Why what an instance of ``kind`` runs is no code of the library that wrote the class, or None."""
    if torch.compiler.is_compiling():
        return None
    for owner, name in functions_of(kind):
        if is_replaced(getattr(owner, name)):
            of_all = f"every {kind.__name__}" if isinstance(owner, type) else owner.__name__
            return f"somebody replaced the {name} of {of_all}"
    return None


def functions_of(kind: type) -> list[tuple[Any, str]]:
    """Where a call of an instance of ``kind`` finds the functions of libraries that it runs.

    They are classes and modules, each with a name: the forward, and what that names, and what this names, and so on.
    """
    places = _places.get(kind)
    if places is None:
        places = _found_places(kind)
        if not any(is_replaced(getattr(*place)) for place in places):  # what is behind a replaced one was not found
            if len(_places) >= MOST_KINDS:
                _places.clear()
            _places[kind] = places
    return places


def _found_places(kind: type) -> list[tuple[Any, str]]:
    found: dict[tuple[Any, str], None] = {}
    owners = [base for base in kind.__mro__ if base not in (nn.Module, object)]

    def follow(owner: Any, name: str) -> None:
        function = getattr(owner, name, None)
        if not callable(function) or isinstance(function, type) or (owner, name) in found:
            return
        found[owner, name] = None
        if _followed(function):
            for place in (*owners, *_modules_of(function)):
                for other in _names_in(function.__code__):
                    follow(place, other)

    for name in ("forward", "__call__"):
        for owner in (kind, *owners):
            follow(owner, name)
    return list(found)


def is_replaced(function: Any) -> bool:
    """Whether somebody's own stands where PyTorch or diffusers had a function of theirs."""
    while function is not None:
        module = getattr(function, "__globals__", {}).get("__name__") or type(function).__module__
        if module.partition(".")[0] not in _PACKAGES:
            return True
        function = getattr(function, "__wrapped__", None) or getattr(function, "func", None)
    return False


def _followed(function: Any) -> bool:
    where = getattr(function, "__globals__", {}).get("__name__", "")
    return where.startswith(("diffusers.", "torch.nn.modules.")) and where != "torch.nn.modules.module"


def _modules_of(function: FunctionType) -> list[Any]:
    """The modules whose functions ``function`` may name: its own, PyTorch's, and those that it imports by itself."""
    own = function.__globals__["__name__"]
    folders = own.rpartition(".")[0], own.rpartition(".")[0].rpartition(".")[0]
    imported = (sys.modules.get(f"{folder}.{name}") for folder in folders for name in _names_in(function.__code__))
    return [sys.modules[own], F, *filter(None, imported)]


@functools.lru_cache(maxsize=4096)
def _names_in(code: CodeType) -> tuple[str, ...]:
    inner = (_names_in(part) for part in code.co_consts if isinstance(part, CodeType))
    return tuple({name: None for name in chain(code.co_names, *inner) if name not in ("forward", "__call__")})


def replaced_attention_reason() -> str | None:
    """Why attention is not what PyTorch has it be, or None: some packages ask for their function to be put there."""
    stock = torch.compiler.is_compiling() or F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
    return None if stock else "somebody replaced PyTorch's scaled_dot_product_attention, which is called"


def hooks_on_all() -> tuple[Any, ...]:
    """The forward hooks that are registered on all modules; none while Dynamo traces."""
    if torch.compiler.is_compiling():
        return ()
    return *torch_module._global_forward_pre_hooks.values(), *torch_module._global_forward_hooks.values()


def is_of_a_library(module: str) -> bool:
    """Whether what the Python ``module`` defines is no code of a user, nor of a package that nobody here knows."""
    return f"{module}.".startswith(_LIBRARIES)


@functools.lru_cache(maxsize=1024)  # some libraries make a class for each module
def _methods(kind: type) -> frozenset[str]:
    """All but the forward, of which others ask by itself."""
    return frozenset(name for name in dir(kind) if name != "forward" and callable(getattr(kind, name, None)))


def readable_reason(child: Any, expected: type[nn.Module], x: Tensor, *, with_bias: bool = True) -> str | None:
    """Why ``child.weight`` and ``child.bias`` are not what ``child(x)`` would use, or None.

    Without ``with_bias`` a child that has no bias will do.
    """
    return parameters_reason(child, expected, x.device, ("weight", "bias") if with_bias else ("weight",))


@once_per_call
def parameters_reason(
    child: Any, expected: type[nn.Module], device: torch.device, needed: tuple[str, ...] = ()
) -> str | None:
    """The same of a call with input on ``device``; those of weight and bias may be missing that are not ``needed``."""
    if reason := plain_reason(child, expected):
        return reason
    for name in ("weight", "bias"):
        parameter = getattr(child, name, None)
        if parameter is None and name not in needed:
            continue
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
            return f"a {expected.__name__} has no plain {name}"
        if parameter.device != device:
            return f"a {expected.__name__} is on {parameter.device}, its input on {device}"
    return None


def foreign_reason(module: nn.Module) -> str | None:
    """Why a call of this very module may run a user's code, or None."""
    if not is_of_a_library(stock_class(module).__module__):
        return f"a {type(module).__name__} is not of PyTorch or diffusers"
    return hook_reason(module)


@once_per_call
def order_reason(module: nn.Module) -> str | None:
    """Why what ``module`` calls has to get the rows that stock code gives it, in that order, or None.

    Layers of LoRA, quantised, cast or offloaded ones treat all rows alike. A user's code may tell them apart.
    """
    for part in module.modules():
        if part is module:
            continue
        kind = stock_class(part)
        if _sees_rows(part):
            return f"somebody looks at the rows of a {kind.__name__}, which have another order in the fused block"
        if not _is_rowwise(kind):
            return f"a {kind.__name__}, which is not of PyTorch or diffusers, may tell rows apart"
        if is_of_a_library(kind.__module__) and (reason := replaced_reason(kind) or _foreign_processor_reason(part)):
            return reason
    return None


def rows_are_seen(*modules: nn.Module) -> bool:
    """Whether calls of these very modules run somebody's code that may tell rows apart."""
    return bool(hooks_on_all()) or any(_sees_rows(part) or _is_foreign(part) for part in modules)


def _is_foreign(part: nn.Module) -> bool:
    """Whether the class of this very module, or of its attention processor, is that of somebody's own code."""
    kind = stock_class(part)
    replaced = is_of_a_library(kind.__module__) and replaced_reason(kind)
    return bool(not _is_rowwise(kind) or replaced or _foreign_processor_reason(part))


def _is_rowwise(kind: type) -> bool:
    return f"{kind.__module__}.".startswith(_ROWWISE)


def _sees_rows(module: nn.Module) -> bool:
    own = vars(module)
    replaced = has_own_forward(module) and not own.keys() & _HOOKS
    if module._forward_hooks or module._forward_pre_hooks or replaced:
        return True
    offload, registry = own.get("_hf_hook"), own.get("_diffusers_hook")
    hooks = [*getattr(offload, "hooks", [offload]), *getattr(registry, "hooks", {}).values()]
    return not all(map(_treats_rows_alike, hooks))


def _treats_rows_alike(hook: Any) -> bool:
    """Whether it moves, casts or skips all rows; guidance changes some, and dropout draws a number for each."""
    if hook is None:
        return True
    of_a_library = type(hook).__module__.startswith(("accelerate.", "diffusers."))
    guides = type(hook).__name__ == "SmoothedEnergyGuidanceHook"
    return of_a_library and not guides and getattr(hook, "dropout", 1.0) == 1.0


@once_per_call
def subtree_reason(module: nn.Module) -> str | None:
    """Why running ``module`` a second time may do more than the first did (a user's code, a random number), or None."""
    if hooks_on_all():
        return "a forward hook on all modules is registered"
    for part in module.modules():
        if reason := foreign_reason(part) or replaced_reason(stock_class(part)):
            return reason
        if part.training and isinstance(part, nn.Dropout):
            return "dropout is on"
        if part.training and isinstance(part, _STATEFUL):
            return f"a {type(part).__name__} is in training mode"
        if getattr(part, "inplace", False):
            return f"a {type(part).__name__} writes to its input"
        if reason := _foreign_processor_reason(part):
            return reason
    return None


def _foreign_processor_reason(part: nn.Module) -> str | None:
    """Why the attention processor of ``part`` may run a user's code, or None."""
    processor = vars(part).get("processor")
    if processor is None:
        return None
    if not is_of_a_library(type(processor).__module__):
        return f"a processor is a {type(processor).__name__}, which is not diffusers'"
    return replaced_reason(type(processor))


@once_per_call
def random_reason(module: nn.Module) -> str | None:
    """Why ``module`` has to call all below it in stock's order, and on the same sizes, or None."""
    if torch.compiler.is_compiling():
        return None
    if any(part.training and isinstance(part, _DropoutNd) and part.p for part in module.modules()):
        return "dropout is on, and draws other random numbers in another order"
    return None


def fingerprint(module: nn.Module) -> tuple[Any, ...]:
    """What about ``module`` and all below it may pick another code path: classes, hooks, plain attributes, weights."""
    return tuple(_traits(module))


def _traits(module: nn.Module) -> Iterator[Any]:
    for part in module.modules():
        yield type(part)
        yield hook_reason(part)
        yield type(vars(part).get("processor"))
        for name, value in vars(part).items():
            if type(value) in _PLAIN_ATTRIBUTES and _is_hashable(value):
                yield name, value
        for name, weight in part._parameters.items():
            yield name
            if weight is not None and not is_lazy(weight):
                yield type(weight)
                yield weight.dtype
                yield weight.shape
                yield weight.stride() if weight.layout == torch.strided else weight.layout


def _is_hashable(value: Any) -> bool:
    return not isinstance(value, tuple) or all(type(part) in (int, float, bool, str) for part in value)
