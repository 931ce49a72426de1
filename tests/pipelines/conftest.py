"""What holds for every test of a pipeline."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_kernels(plain_pytorch: None) -> None:
    """Tests of the kernels in a model take the variable back."""
