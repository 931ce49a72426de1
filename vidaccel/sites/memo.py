"""What is found out once per call of a model, and stands until the model changes.

Whether a child may be bypassed, a weight read, a block fused: each is one question about modules, and the answer cannot
change while a call is under way. So whoever runs a call (``patching/model_call.py``) holds a :class:`Memo` for as long
as the model is what it was, and functions marked :func:`once_per_call` look their answers up there. Where nobody
holds one, as in a block that is called alone, every question is asked anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vidaccel.kernels.context import while_set
from vidaccel.kernels.op import when_failing

__all__ = [
    "BY_VALUE",
    "Memo",
    "Way",
    "generation",
    "held",
    "holding",
    "memo_of_call",
    "once_in_call",
    "once_per_call",
    "plans_changed",
    "preparations",
    "signature",
    "version",
    "watched",
    "watching",
]

Preparation = Callable[["Memo", tuple[Any, ...], dict[str, Any]], None]
# Takes the kind of a host, the host, its sites, and the arguments of a call; returns what the call is to return.
Way = Callable[[Any, Any, Any, tuple[Any, ...], dict[str, Any]], Any]
Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")

_generation = 0


class Memo(dict[Hashable, Any]):
    """Answers by question; and what is known of the very call that is under way.

    Attributes:
        text: What ``blocks/unet/text_context.py`` knows of this call, or None.
        of_call: What blocks have made of this call's tensors (rotary tables in another order, the lengths behind a
            mask), for the blocks behind them.
        flops: Of those ops of this call whose events were heard, as all are where its blocks meet such a call first.
        ops: How many those are.
        postpone: What each check of this call was counted by; called, it makes that check due again.
        of_model: Whether it is the library's code of a whole model that calls the blocks, and nobody else's.
        hooked: Whether somebody's code in a layer of the model may look at what nobody else needs (padding).
        way: What runs each call of a block under this call, for those who compare the two ways. None: as planned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.of_model = False
        self.text: Any = None
        self.of_call: dict[Hashable, Any] = {}
        self.flops = self.ops = 0
        self.postpone: list[Callable[[], None]] = []
        self.hooked = False
        self.way: Way | None = None


# By model: what is called at the start of each of its calls, with the memo and the call's arguments.
_preparations: WeakKeyDictionary[nn.Module, list[Preparation]] = WeakKeyDictionary()


def preparations(model: nn.Module) -> list[Preparation]:
    """What is called at the start of each call of ``model``, with the memo and the arguments; a list to add to."""
    return _preparations.setdefault(model, [])


_memo: ContextVar[Memo | None] = ContextVar("memo", default=None)
_watch: ContextVar[Way | None] = ContextVar("watch", default=None)


def held() -> Memo | None:
    """The memo of the call that is under way in this thread, or None."""
    return _memo.get()


def holding(memo: Memo) -> AbstractContextManager[object]:
    """Let ``memo`` be what :func:`held` returns inside the ``with`` block."""
    return while_set(_memo, memo)


def watching(way: Way) -> AbstractContextManager[object]:
    """Let every call of a patched model inside the ``with`` block, in this thread, take ``way`` through its blocks.

    No CUDA graph serves such a call.
    """
    return while_set(_watch, way)


def watched() -> Way | None:
    """The way that :func:`watching` asks for in this context, or None."""
    return _watch.get()


def once_per_call(ask: Callable[Arguments, Answer]) -> Callable[Arguments, Answer]:
    """Decorator of a question about modules whose answer stands as long as the memo does; arguments are hashable."""

    @functools.wraps(ask)
    def answer(*args: Any) -> Any:
        if torch.compiler.is_compiling() or (memo := _memo.get()) is None:
            return ask(*args)  # type: ignore[call-arg]
        question = (ask, *args)
        try:
            return memo[question]
        except KeyError:
            memo[question] = found = ask(*args)  # type: ignore[call-arg]
            return found

    return cast(Callable[Arguments, Answer], answer)


def memo_of_call(tensor: Tensor) -> Memo | None:
    """The memo to keep in what was made of ``tensor``, by its :func:`version`, or None: nothing may be kept."""
    if torch.compiler.is_compiling() or (memo := _memo.get()) is None:  # Dynamo cannot trace the second
        return None
    # nobody can tell when a hook writes to an inference tensor
    return None if memo.hooked and tensor.is_inference() else memo


def version(tensor: Tensor) -> int:
    """A number that grows whenever somebody writes to ``tensor``, as hooks on layers may; those of inference do not."""
    return 0 if tensor.is_inference() else tensor._version


def once_in_call(name: str, tensor: Tensor, make: Callable[[], Answer]) -> Answer:
    """What ``make`` returns, made once in a call of a model for each ``tensor``, which the call keeps alive.

    ``make`` calls no op: that an op was wrong may show behind it only, and its block then runs once more.
    """
    if (memo := memo_of_call(tensor)) is None:
        return make()
    # the tensor is kept with the answer: its id is nobody else's for as long
    question = name, id(tensor), version(tensor)
    found = memo.of_call.get(question)
    if found is None:
        found = memo.of_call[question] = tensor, make()
    answer: Answer = found[1]
    return answer


def generation() -> int:
    """A number that grows whenever a site is switched, fails, is put in place or taken away."""
    return _generation


def plans_changed() -> None:
    """Tell every model's call that what stood until now stands no more."""
    global _generation
    _generation += 1
    if (memo := _memo.get()) is not None:
        memo.clear()


when_failing.append(plans_changed)  # so that reports hear of it


def signature(values: Any) -> tuple[Any, ...]:
    """Everything about the arguments of a call that may pick another code path."""
    return tuple([_described(value) for value in values])


BY_VALUE = frozenset([int, float, bool, str, type(None), torch.dtype])  # told apart by their values


def _described(value: Any) -> Any:
    kind = type(value)
    if kind in BY_VALUE:
        return value
    if isinstance(value, Tensor):
        return kind, value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, tuple | list):
        return kind, signature(value)
    if isinstance(value, dict):
        return kind, tuple(value), signature(value.values())
    return kind
