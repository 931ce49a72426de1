"""What surrounds the kernels, without them: which tensors are copied on the way through a model."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vidaccel.kernels import (
    add_layer_norm,
    alpha_blend,
    conv_epilogue,
    geglu,
    group_norm_silu,
    temporal_attention,
    upsample_conv,
)

__all__ = ["Copies", "hollow_out"]

_COPIES = ("clone", "copy_", "_to_copy", "cat", "constant_pad_nd", "upsample_nearest2d")


class Copies(TorchDispatchMode):
    """Notes every full-size tensor that is copied or padded, and every convolution that sees another memory order.

    ``joined`` are the concatenations that keep channels innermost, which a UNet's skip connections are.
    """

    def __init__(self, smallest: int) -> None:
        super().__init__()
        self.smallest = smallest
        self.found: list[str] = []
        self.joined: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        if name == "convolution" and args[0].numel() >= self.smallest:
            ordered = _is_channels_last(args[0], out)
            self.found += [] if ordered else [f"{name} {tuple(args[0].shape)} of another memory order"]
        if name in _COPIES and out.numel() >= self.smallest:
            joins = name == "cat" and _is_channels_last(out, *args[0])
            (self.joined if joins else self.found).append(f"{name} {tuple(out.shape)} at {_our_line()}")
        return out


def _is_channels_last(*images: Tensor) -> bool:
    return all(x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) for x in images)


def _our_line() -> str:
    frames = [frame for frame in traceback.extract_stack() if "vidaccel" in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "stock code"


class _NoKernel:
    """Stands for a Triton kernel: launches nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def hollow_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What surrounds the kernels runs as on a GPU, the kernels do not: for memory and its order, fast."""
    for module, kernels in (
        (add_layer_norm, ("_add_layer_norm_kernel",)),
        (alpha_blend, ("_alpha_blend_kernel",)),
        (conv_epilogue, ("_conv_epilogue_kernel",)),
        (geglu, ("_geglu_kernel",)),
        (group_norm_silu, ("_chunk_stats_kernel", "_group_stats_kernel", "_apply_kernel")),
        (temporal_attention, ("_temporal_attention_kernel",)),
        (upsample_conv, ("_interleave_kernel",)),
    ):
        for kernel in kernels:
            monkeypatch.setattr(module, kernel, _NoKernel())
    # the 3-D convolution of a CPU answers in its own memory order, whatever it is given; all here keep the shape
    monkeypatch.setattr(nn.Conv3d, "_conv_forward", lambda conv, x, weight, bias: torch.empty_like(x))
