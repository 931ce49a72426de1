"""A convolution by the algorithm of cuDNN's that is measured fastest, for images that do not fill the GPU.

cuDNN picks an algorithm by heuristics, or, with ``torch.backends.cudnn.benchmark``, by trying all of them out, anew in
every process. For large images that changes nothing, and the heuristics are right; for small ones, as ModelScope's, it
takes some percent off the whole model. So the first call of such a shape tries, once, and holds the result against that
of the heuristics; whether trying pays is remembered on disk (``tuning_cache``), and no later process tries in vain.

PyTorch keeps the algorithm that it has once used for a convolution, whatever the flag says later, but keeps it by
whether TF32 is allowed, too, which means nothing to 16-bit numbers. Turning that round is what asks cuDNN again.

Channels-last memory. Fidelity: math-exact.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vidaccel.config import tuning_enabled
from vidaccel.kernels import tuning_cache
from vidaccel.kernels.dispatch import Choice, record_choice

__all__ = ["HEURISTICS", "TRIED", "convolve"]

logger = logging.getLogger(__name__)

OP = "convolution"
HEURISTICS, TRIED = "heuristics", "tried"
MEASURED_FLOPS = 1e9  # a smaller one takes too little of a model's time
MOST_MEASURED = 2**24  # numbers in x; larger images fill a GPU, and trying takes long
UNITS_IN_LAST_PLACE = 8  # that two correct results may be apart, relative L2


class _Arguments(NamedTuple):
    """One call."""

    x: Tensor
    weight: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def _by_heuristics(arguments: _Arguments) -> Tensor:
    x, weight, stride, padding, dilation, groups = arguments
    convolution: Any = F.conv2d if x.ndim == 4 else F.conv3d
    return convolution(x, weight, None, stride, padding, dilation, groups)


def _by_trying(arguments: _Arguments) -> Tensor:
    x, weight, stride, padding, dilation, groups = arguments
    tf32 = not torch.backends.cudnn.allow_tf32
    return torch.cudnn_convolution(x, weight, padding, stride, dilation, groups, True, False, tf32)


_RUNS = {HEURISTICS: _by_heuristics, TRIED: _by_trying}

# What runs for a shape.
_chosen: dict[tuple[Any, ...], str] = {}


def _why_not_tried(arguments: _Arguments) -> str | None:
    x, weight = arguments.x, arguments.weight
    cudnn = torch.backends.cudnn
    if not x.is_cuda or torch.version.hip is not None or not cudnn.enabled or cudnn.benchmark or cudnn.deterministic:
        return "it is not for us to choose"
    if x.dtype.itemsize != 2 or weight.dtype != x.dtype or torch.is_autocast_enabled("cuda"):
        return "the numbers are not of 16 bits"
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return "it has no backward pass"
    memory_format = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    if not x.is_contiguous(memory_format=memory_format) or not weight.is_contiguous(memory_format=memory_format):
        return "cuDNN would convert between memory orders"
    return None


def _is_small(arguments: _Arguments) -> bool:
    """Whether a GPU may be far from full, but busy long enough for it to matter."""
    x, weight, stride = arguments[:3]
    flops = 2 * x.numel() // x.shape[1] * weight.numel() // math.prod(stride)
    return x.numel() <= MOST_MEASURED and flops >= MEASURED_FLOPS


def _choose(arguments: _Arguments) -> str:
    """The way to run these: as measured, now or on another day, where that is worth it."""
    if not _is_small(arguments) or _why_not_tried(arguments) or not tuning_enabled():
        return HEURISTICS
    x, weight, *geometry = arguments
    shape = (x.device.index, x.dtype, x.shape, weight.shape, *geometry)
    if shape not in _chosen:
        key, measure = _cache_key(arguments), functools.partial(_measure, arguments)
        measured = tuning_cache.settled(OP, key, _RUNS, measure, x)
        if measured is None:
            return HEURISTICS
        _chosen[shape] = measured.winner or HEURISTICS
    return _chosen[shape]


def _cache_key(arguments: _Arguments) -> dict[str, Any]:
    x, weight, stride, padding, dilation, groups = arguments
    return {
        "device": torch.cuda.get_device_name(x.device),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "dtype": str(x.dtype),
        "shape": list(x.shape),
        "weight": list(weight.shape),
        "geometry": [list(stride), list(padding), list(dilation), groups],
    }


def _measure(arguments: _Arguments) -> tuning_cache.Measured | None:
    """Time both ways, and hold them against each other."""
    with torch.no_grad(), torch.cuda.device_of(arguments.x):
        expected = _by_heuristics(arguments)
        runs = {name: functools.partial(run, arguments) for name, run in _RUNS.items()}
        why_wrong = functools.partial(_why_wrong, expected)
        measured = tuning_cache.fastest(runs, why_wrong, tuning_cache.cuda_milliseconds, favourite=HEURISTICS)
    logger.debug("%s of %s: %s", OP, tuple(arguments.x.shape), measured)
    return measured


def _why_wrong(expected: Tensor, out: Tensor) -> str | None:
    if out.stride() != expected.stride():
        return "its result lies otherwise in memory"
    apart = float(torch.linalg.vector_norm(out - expected, dtype=torch.float32))
    most = UNITS_IN_LAST_PLACE * torch.finfo(out.dtype).eps
    if not apart <= most * float(torch.linalg.vector_norm(expected, dtype=torch.float32)):
        return "its result is not that of the heuristics"
    return None


def convolve(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """``F.conv2d`` or ``F.conv3d`` without a bias.

    Args:
        x: ``[N, C_in, *spatial]``, 4-D or 5-D, any float dtype; channels-last to be tried.
        weight: ``[C, C_in / groups, *kernel]``, as ``x``.
        stride: As of an ``nn.Conv2d`` or ``nn.Conv3d``, and so are the others.
        padding: Zeros on either side.
        dilation: Between the taps.
        groups: Of channels.

    Returns:
        ``[N, C, *spatial]``.
    """
    arguments = _Arguments(x, weight, stride, padding, dilation, groups)
    if torch.compiler.is_compiling() or _choose(arguments) == HEURISTICS:
        return _by_heuristics(arguments)
    record_choice(Choice(OP, TRIED))
    return _by_trying(arguments)
