"""Context variables are what they were after a ``with`` block, wherever that ends."""

from __future__ import annotations

import sys
from contextvars import ContextVar
from types import FrameType
from typing import Any

import pytest

from vidaccel.kernels import context
from vidaccel.kernels.context import while_set

VARIABLE = ContextVar("variable", default=0)


def interrupting(step: int) -> Any:
    """A trace that lets Ctrl-C come before this step of the interpreter in the code of ``while_set``."""
    steps = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal steps
        if frame.f_code.co_filename != context.__file__:
            return None
        frame.f_trace_opcodes = True
        steps += event == "opcode"
        if steps == step and event == "opcode":
            raise KeyboardInterrupt
        return trace

    return trace


def test_an_interrupt_leaves_no_value_behind() -> None:
    before, step, interrupted = sys.gettrace(), 0, True
    while interrupted:
        step, interrupted = step + 1, False
        try:
            sys.settrace(interrupting(step))
            with while_set(VARIABLE, 1) as value:
                assert value == VARIABLE.get() == 1
                sys.settrace(None)  # the last moments are those of putting it back
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.settrace(before)
        assert VARIABLE.get() == 0, step
    assert step > 5


def test_an_error_inside_leaves_no_value_behind() -> None:
    with while_set(VARIABLE, 1):
        with pytest.raises(ValueError), while_set(VARIABLE, 2):
            raise ValueError
        assert VARIABLE.get() == 1
    assert VARIABLE.get() == 0
