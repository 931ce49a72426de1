"""What surrounds the kernels, without them: which tensors are copied on the way through a model."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from block_checks import OfPyTorch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from vidaccel.kernels.launch import Launch

__all__ = ["Copies", "Held", "hollow_out"]

_COPIES = ("clone", "copy_", "_to_copy", "cat", "constant_pad_nd", "upsample_nearest2d")


class Copies(TorchDispatchMode):
    """Notes every full-size tensor that is copied or padded, and every convolution that sees another memory order."""

    def __init__(self, smallest: int) -> None:
        super().__init__()
        self.smallest = smallest
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        if name == "convolution" and args[0].numel() >= self.smallest:
            ordered = _is_channels_last(args[0], out)
            self.found += [] if ordered else [f"{name} {tuple(args[0].shape)} of another memory order"]
        if name in _COPIES and out.numel() >= self.smallest:
            self.found.append(f"{name} {tuple(out.shape)} at {_our_line()}")
        return out


class Held(TorchDispatchMode):
    """The most bytes that the images made inside hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[StorageWeakRef, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.ndim >= 4:
            storage = out.untyped_storage()
            self.storages[StorageWeakRef(storage)] = storage.nbytes()
            self.storages = {ref: size for ref, size in self.storages.items() if not ref.expired()}
            self.most = max(self.most, sum(self.storages.values()))
        return out


def _is_channels_last(*images: Tensor) -> bool:
    return all(x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) for x in images)


def _our_line() -> str:
    frames = [frame for frame in traceback.extract_stack() if "vidaccel" in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "stock code"


def hollow_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What surrounds kernels and 3-D convolutions runs as on a GPU, these do not: for memory and its order, fast."""
    monkeypatch.setattr(Launch, "__call__", lambda launch, *tensors: None)
    # that of a CPU answers in its own memory order, whatever it is given
    monkeypatch.setattr(torch.nn.functional, "conv3d", OfPyTorch(_hollow_conv3d))


def _hollow_conv3d(
    x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: tuple[int, ...] = (0, 0, 0), *_: Any
) -> Tensor:
    """Stands for ``F.conv3d``, and does nothing but leave memory in the order that a GPU's leaves it in."""
    strides = (stride,) * 3 if isinstance(stride, int) else stride
    found = zip(x.shape[2:], padding, weight.shape[2:], strides, strict=True)
    sides = [(size + 2 * edge - taps) // step + 1 for size, edge, taps, step in found]
    return torch.empty(len(x), *sides, len(weight)).permute(0, 4, 1, 2, 3)
