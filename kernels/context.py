"""Context variables that have another value inside a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

__all__ = ["while_set"]

Value = TypeVar("Value")


@contextmanager
def while_set(variable: ContextVar[Value], value: Value) -> Iterator[Value]:
    """``variable`` is ``value`` inside the ``with`` block, in this thread, and is then what it was.

    So it is where Ctrl-C comes in the very moment of setting it: a token of ``set`` might not be stored any more.
    """
    before = variable.get()
    try:
        variable.set(value)
        yield value
    finally:
        variable.set(before)
