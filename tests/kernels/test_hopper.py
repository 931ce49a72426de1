from __future__ import annotations

import re

import pytest
import torch

from vidaccel.kernels import hopper
from vidaccel.kernels.hopper import aligned, gluon_reason, on_hopper


@pytest.mark.parametrize(
    ("hip", "capability", "expected"), [(None, (9, 0), True), (None, (10, 0), False), ("7.0", (9, 4), False)]
)
def test_hopper_is_nvidias(
    hip: str | None, capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MI300 has Hopper's capability."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert on_hopper(torch.ones(1)) is expected


@pytest.mark.parametrize(
    ("hopper_gpu", "gluon", "reason"),
    [
        (False, True, "the kernel is for Hopper GPUs"),
        (True, False, r"the kernel is written for Triton 3\.6\. or .*, this is \d"),
        (True, True, None),
    ],
)
def test_reasons(hopper_gpu: bool, gluon: bool, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "on_hopper", lambda x: hopper_gpu)
    monkeypatch.setattr(hopper, "GLUON", gluon)
    found = gluon_reason(torch.ones(1))
    assert found == reason if found is None or reason is None else re.match(reason, found)


def test_only_what_starts_elsewhere_is_copied() -> None:
    memory = torch.arange(24.0).half()
    start = next(i for i in range(8) if memory[i:].data_ptr() % 16 == 0)
    there, elsewhere = memory[start : start + 8], memory[start + 1 : start + 9]
    kept, copy = aligned(there, elsewhere)
    assert kept is there
    assert copy.data_ptr() % 16 == 0 and torch.equal(copy, elsewhere)
