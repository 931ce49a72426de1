"""In place of a GPU that captures CUDA graphs: what ``CudaCapture`` asks of one, on a CPU, but the capture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vidaccel.patching.cuda_capture import CudaCapture

__all__ = ["CpuCapture"]


class CpuCapture(CudaCapture):
    """A subclass says how to ``capture``, and what takes how long."""

    device_type = "cpu"

    @staticmethod
    def unavailable_reason() -> None:
        return None

    def capturing(self) -> bool:
        return False

    def follow_last_stream(self, device: torch.device) -> None:
        pass

    def milliseconds(self, run: Callable[[], Any], device: torch.device) -> float:
        run()
        return 1.0

    def queueing_milliseconds(self, run: Callable[[], Any], device: torch.device) -> tuple[Any, float, float]:
        return run(), 1.0, 1.0

    def wait(self) -> None:
        pass

    def give_back_memory(self) -> None:
        pass
