"""What the bench knows of an op: its cases, the ways to compute it, and what it has to move and to multiply."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

__all__ = ["Arguments", "Case", "Op", "Outputs", "Provider", "as_they_are", "channels_first", "passes"]

Arguments = tuple[Any, ...]  # tensors, and perhaps a module
Outputs = Tensor | tuple[Tensor, ...]


class Case(NamedTuple):
    """Arguments of an op: random tensors of these shapes (from 4-D on in channels-last memory), then these scalars."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    scalars: tuple[Any, ...] = ()


def as_they_are(*arguments: Any) -> Arguments:
    """The arguments without the scalars."""
    return tuple(x for x in arguments if isinstance(x, Tensor | nn.Module))


class Provider(NamedTuple):
    """One way to compute an op.

    Attributes:
        run: Called with the arguments and the scalars of a case.
        prepare: Puts the arguments as this way likes them best, before the clock runs.
        compiled: Whether ``run`` goes through torch.compile.
        one_stage: Whether ``run``, a kernel of ours, goes without prefetch: to see what the prefetch is worth.
        cudnn_benchmark: Whether cuDNN tries its algorithms out.
        problem: Called as ``run`` is, tells why it is not to be tried here, or None.
    """

    run: Callable[..., Outputs]
    prepare: Callable[..., Arguments] = as_they_are
    compiled: bool = False
    one_stage: bool = False
    cudnn_benchmark: bool = False
    problem: Callable[..., str | None] | None = None


class Op(NamedTuple):
    """An op as the bench sees it.

    Attributes:
        cases: At the models' sizes, the one that tells most first.
        tiny: For a dry run.
        reference: Its specification, run in float64.
        providers: By variant; ``eager`` is what stock diffusers runs.
        numbers: How many numbers of a case's dtype our algorithm reads and writes.
        flops: What it multiplies and adds on the tensor cores, if anything.
        build: Makes of a case's random tensors what the op takes.
    """

    cases: tuple[Case, ...]
    tiny: Case
    reference: Callable[..., Outputs]
    providers: Mapping[str, Provider]
    numbers: Callable[[Case], float]
    flops: Callable[[Case], float] | None = None
    build: Callable[..., Arguments] = as_they_are


def passes(count: float) -> Callable[[Case], float]:
    """``count`` times what the first tensor has."""
    return lambda case: count * math.prod(case.shapes[0])


def channels_first(*arguments: Any) -> Arguments:
    """Every image in the memory order of stock code."""
    return tuple(x.contiguous() if isinstance(x, Tensor) else x for x in as_they_are(*arguments))
