"""Tests of one kind that many families share: one in ``make test``, the others in ``make slow-test``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

__all__ = ["first_is_quick"]


def first_is_quick(values: Sequence[Any]) -> list[Any]:
    """Parameters: the first value, and the others marked slow."""
    first, *others = values
    return [first, *(pytest.param(value, marks=pytest.mark.slow) for value in others)]
