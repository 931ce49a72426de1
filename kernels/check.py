"""Is what an implementation returned right? It is held against the op's reference, on the very tensors of the call.

One norm over a whole tensor lets a thousand wrong pixels through. So an output is seen as frames of rows of channels,
and judged by its worst row, its worst channel of a frame, and by what a whole frame is scaled by (two right results
differ by roundings, which have no common sign). Where that is more than roundings explain, float64 decides: the error
may be twice the reference's own, plus what the reference's result moves by when its inputs are off in the last places
of float32. An overflow in the reference is not held against anybody; a value that is not finite elsewhere is.

The reference works part by part, so that a check takes little memory beside the call that it belongs to; float64 gets
smaller parts than the first look. The host waits for the GPU once in a check, or once for several (:class:`Verdicts`).
Of an op whose reference takes as long as the op, a sample may do (``sampling.py``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vidaccel.kernels import settings
from vidaccel.kernels.context import while_set
from vidaccel.kernels.screen import frames_of, limits, screen

if TYPE_CHECKING:
    from vidaccel.kernels.op import Op

__all__ = [
    "LOSSY",
    "MOST_ELEMENTS",
    "PICTURES",
    "Distance",
    "Part",
    "Problem",
    "Verdicts",
    "cuts",
    "disagreement",
    "distance",
    "heads_apart",
    "heads_of",
    "in_float64",
    "is_changed",
    "lean",
    "near",
    "perturbing",
    "pictures_apart",
    "piece_of",
    "pieces",
    "row_parts",
]

MOST_ELEMENTS = 2**25  # of a part: half a GiB, with everything that is made of it
PICTURES = 2  # times as many of pictures, at first sight: fewer launches, and fewer cuts between channels
CHAIN, CHAIN_GAIN = 16.0, 16.0  # of a dozen ops, whose roundings are the same but for their order
LOSSY = 16  # times the tolerance of math-exact
PERTURBATION = 2.0**-22
# float32 sums in another order; with TF32, numbers are cut to 10 bits before they are multiplied
_MEASURES = ("the worst row", "the worst channel of a frame", "the scale of a frame")  # of _distances
FP32_EPS, TF32_EPS, FP64_EPS = 2.0**-20, 2.0**-10, 2.0**-49

_for_float64: ContextVar[bool] = ContextVar("for_float64", default=False)


class Distance(NamedTuple):
    """How far a result is from what it should be, by the measure that is nearest to, or furthest above, its budget."""

    what: str
    error: float
    budget: float

    @property
    def ratio(self) -> float:
        """``error / budget``: 1 is as far as a right result may be."""
        if math.isnan(self.error):
            return math.inf
        return self.error / self.budget if self.budget else math.inf if self.error else 0.0

    def __str__(self) -> str:
        return f"{self.what} is off by {self.error:.1e}, which may be {self.budget:.1e}"


class Problem(str):
    """What is wrong, in one line; and, where it was measured, by how much."""

    distance: Distance | None

    def __new__(cls, text: str, distance: Distance | None = None) -> Problem:
        problem = super().__new__(cls, text)
        problem.distance = distance
        return problem


Fail = Callable[[str], None]  # takes the reason


def _nobody(reason: str) -> None:
    """Where no block is at fault."""


def _all(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs


class Part(NamedTuple):
    """A part of a call.

    Attributes:
        args: The arguments that the reference computes it from.
        of: Takes the outputs of the whole call; the tensors that are judged of this part.
        of_reference: The same for what the reference returns for ``args``.
    """

    args: tuple[Any, ...]
    of: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
    of_reference: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = _all


def cuts(length: int, elements: int, times: int = 1) -> Iterator[slice]:
    """``length`` items of ``elements`` numbers each, cut evenly so that none but a single item has too many numbers.

    ``times``: as many as of rows may a part have, unless it is for float64.
    """
    most = max(_most(times) // max(elements, 1), 1)
    step = math.ceil(length / math.ceil(length / most)) if length else 1
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def lean(x: Tensor) -> int:
    """``times`` of :func:`cuts` where a reference makes little of other dtypes beside a result like ``x``."""
    return 8 // x.itemsize


def _most(times: int) -> int:
    return MOST_ELEMENTS if _for_float64.get() else times * MOST_ELEMENTS


def _parts_for_float64() -> AbstractContextManager[object]:
    """Inside the ``with`` block, in this thread, cut parts that leave room for copies in float64."""
    return while_set(_for_float64, True)


def pieces(shape: Sequence[int], *dims: int) -> Iterator[tuple[slice, ...]]:
    """Indices that cut pictures of ``shape`` along ``dims``, the first of them first: none has too many numbers."""
    yield from _pieces(tuple(slice(0, size) for size in shape), dims, math.prod(shape))


def _pieces(index: tuple[slice, ...], dims: Sequence[int], elements: int) -> Iterator[tuple[slice, ...]]:
    if elements <= _most(PICTURES) or not dims:
        yield index
        return
    dim, *inner = dims
    length = index[dim].stop
    for part in cuts(length, elements // length, PICTURES):
        piece = (*index[:dim], part, *index[dim + 1 :])
        yield from _pieces(piece, inner, elements // length * (part.stop - part.start))


def piece_of(index: tuple[slice, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """For an op whose outputs have the shape that :func:`pieces` has cut."""
    return tuple(out[index] for out in outputs)


def row_parts(
    x: Tensor, elements: int | None = None, times: int = 1
) -> Iterator[tuple[Tensor, Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]]]:
    """For an op that works row by row on ``x`` ``[..., S, C]``: some of its rows, and where they lie in the outputs.

    They are ``[frames, rows, C]``: each frame is to be right by its own scale.

    Args:
        x: The rows.
        elements: Numbers that are made of one. None: C.
        times: As of :func:`cuts`.
    """
    x = _as_frames(x)
    frames, rows, channels = x.shape
    elements = channels if elements is None else elements
    for some in cuts(frames, rows * elements, times):
        for part in cuts(rows, (some.stop - some.start) * elements, times):
            yield x[some, part], functools.partial(_rows_of, some, part)


def _rows_of(frames: slice, rows: slice, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(_as_frames(out)[frames, rows] for out in outputs)


def _as_frames(x: Tensor) -> Tensor:
    """``x`` ``[..., S, C]`` as ``[F, S, C]``, also where one of them is 0; fewer dimensions are one frame."""
    if x.ndim < 3:
        return x.reshape(1, *x.shape) if x.ndim == 2 else x.reshape(1, 1, -1)
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def heads_apart(heads: int, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """``[B, S, H*D]`` as ``[B*H, S, D]``: each head of each sample is to be right by its own scale."""
    return tuple(out.unflatten(2, (heads, -1)).transpose(1, 2).flatten(0, 1) for out in outputs)


def heads_of(index: tuple[slice, ...], heads: int, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same of a piece of them, in which there are so many ``heads``."""
    return heads_apart(heads, piece_of(index, outputs))


def pictures_apart(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """``[B, F, H, W, C]`` as ``[B*F, H*W, C]``: each picture is to be right by its own scale."""
    return tuple(out.flatten(2, 3).flatten(0, 1) for out in outputs)


class Verdicts:
    """First looks of several checks, which the host has not waited for: the GPU works while the host goes on.

    Whoever asks for all of them at once has to be able to do again what was checked, one check after the other.
    """

    def __init__(self) -> None:
        self._suspects: list[tuple[Tensor, Fail]] = []
        self._fail: Fail = _nobody

    @contextmanager
    def about(self, fail: Fail) -> Iterator[None]:
        """Inside the ``with`` block, ``fail`` is what lets the block fail whose ops are checked."""
        outer, self._fail = self._fail, fail
        try:
            yield
        finally:
            self._fail = outer

    def add(self, suspects: Tensor) -> None:
        """Of one check: for each of its parts, in how many frames something needs a second look."""
        self._suspects.append((suspects, self._fail))

    def doubted(self) -> list[Fail]:
        """What lets the blocks fail in which something needs a second look, in the order of the checks.

        The host waits for each GPU once.
        """
        by_device: dict[torch.device, list[Tensor]] = {}
        for suspects, _ in self._suspects:
            by_device.setdefault(suspects.device, []).append(suspects.sum()[None])
        counts = {device: iter(torch.cat(sums).tolist()) for device, sums in by_device.items()}
        return [fail for suspects, fail in self._suspects if next(counts[suspects.device])]


def disagreement(
    op: Op,
    args: tuple[Any, ...],
    out: Any,
    fidelity: str,
    sample: Iterable[Part] | None = None,
    verdicts: Verdicts | None = None,
    given: Sequence[tuple[Tensor, Tensor]] = (),
) -> Problem | None:
    """One line on why ``out`` is not what ``op`` means by ``args``, or None if it is.

    Args:
        op: The op.
        args: Those of the call.
        out: What it has returned.
        fidelity: The class of the implementation that ran.
        sample: The parts that are looked at. None: all.
        verdicts: What is to be told of the first look, in place of waiting for it. None: this waits, and looks again at
            what needs that.
        given: Copies of arguments that the op was given, and those: it is to leave them as they are.
    """
    outputs = _tuple(out)
    parts = list(sample or (op.parts(*args) if op.parts else [Part(args, _all)]))
    exact = fidelity == "bit-exact"
    with torch.no_grad():
        suspects = torch.zeros(len(parts) + 1, dtype=torch.int32, device=outputs[0].device)
        for copy, x in given:
            suspects[-1] += is_changed(copy, x)
        for at, part in enumerate(parts):
            mine, expected = part.of(outputs), _referred(op, part, part.args)
            if problem := _shapes_differ(mine, expected):
                return problem
            allowed = limits(_eps(*expected) * (LOSSY if fidelity == "lossy" else 1), op.screen)
            for x, y in zip(mine, expected, strict=True):
                if exact:
                    suspects[at] += _bits_differ(x, y)
                elif x.numel():
                    screen(x, y, allowed, suspects, at)
        if verdicts is not None:
            verdicts.add(suspects)
            return None
        *frames_of_parts, changed = suspects.tolist()  # waits for the GPU
        if changed:
            return Problem("changes its arguments")
        doubtful = [part for part, frames in zip(parts, frames_of_parts, strict=True) if frames]
        if doubtful and exact:
            return Problem("differs from the reference in some bits, and is declared bit-exact")
        if doubtful and sample is None and not _for_float64.get():
            with _parts_for_float64():
                return disagreement(op, args, out, fidelity)
        problems = (_second_look(op, part, part.of(outputs), fidelity) for part in doubtful)
        return next(filter(None, problems), None)


def near(out: Tensor, expected: Tensor, gold: Tensor | None = None, moved: Tensor | None = None) -> str | None:
    """Why ``out`` is not what a chain of ops with the roundings of ``expected`` gives (:func:`distance`), or None."""
    if problem := _shapes_differ((out,), (expected,)):
        return problem
    found = distance(out, expected, gold, moved)
    if found.ratio <= 1:
        return None
    return f"the block differs from the original by {found.error:.1e}, which may be {found.budget:.1e}"


def distance(
    out: Tensor, expected: Tensor, gold: Tensor | None = None, moved: Tensor | None = None, chain: float = CHAIN
) -> Distance:
    """How far ``out`` is from ``expected``, of the same shape and dtype, and how far a chain of ops may be.

    The chain may add up roundings of ``chain`` units in the last place, in a row or a channel. With ``gold``, the chain
    in a higher precision, the distance is to that, and may also be twice that of ``expected``; with ``moved``, that
    chain of slightly other numbers, twice what it has moved by.
    """
    if out.numel() == 0 or not out.is_floating_point():
        return Distance("a value", 0.0 if torch.equal(out, expected) else math.inf, 1.0)
    right = expected if gold is None else gold
    *apart, lost = (float(x) for x in _distances(out, right, expected))
    if lost:
        return Distance("a value that is not finite", math.inf, 1.0)
    others = [x for x in (None if gold is None else expected, moved) if x is not None]
    slack = [[2 * float(x) for x in _distances(other, right, expected)[:3]] for other in others]
    eps = max(_eps(expected), _autocast_eps(expected))
    units = (chain, chain, chain / CHAIN_GAIN)
    found = (
        Distance(what, error, unit * eps + sum(more))
        for what, error, unit, *more in zip(_MEASURES, apart, units, *slack, strict=True)
    )
    return max(found, key=lambda one: one.ratio)


def _tuple(out: Any) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)


def _shapes_differ(mine: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> Problem | None:
    for x, y in zip(mine, expected, strict=True):
        if x.shape != y.shape or x.dtype != y.dtype:
            return Problem(f"returned {_describe(x)} where the reference returned {_describe(y)}")
    return None


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"


def is_changed(copy: Tensor, x: Tensor) -> Tensor:
    """Whether a copy of ``x`` holds other bits by now, a bool on the device."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(x.element_size(), x.dtype)
    return (copy.view(bits) != x.view(bits)).any()


def _bits_differ(x: Tensor, y: Tensor) -> Tensor:
    """Whether they do, a bool on the device."""
    return ((x != y) & ~(x.isnan() & y.isnan())).any()


def _referred(op: Op, part: Part, args: Iterable[Any]) -> tuple[Tensor, ...]:
    return part.of_reference(_tuple(op.reference(*args)))


def _second_look(op: Op, part: Part, mine: tuple[Tensor, ...], fidelity: str) -> Problem | None:
    expected = _referred(op, part, part.args)
    if not any(bool(x.isfinite().any()) for x in expected):  # as of a model that has overflowed: nothing to go by
        return None
    gold = _referred(op, part, map(in_float64, part.args))
    moved = _referred(op, part, map(perturbing(), part.args))
    eps = _eps(*expected)
    problems = (_judge(*tensors, eps, fidelity) for tensors in zip(mine, expected, gold, moved, strict=True))
    return next(filter(None, problems), None)


def in_float64(x: Any) -> Any:
    """``x``, if it is a tensor of floats."""
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def perturbing() -> Callable[[Any], Any]:
    """What turns tensors into float64 ones, every number of them off by up to ``PERTURBATION`` of itself."""
    generators: dict[torch.device, torch.Generator] = {}

    def perturbed(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        if x.device not in generators:
            generators[x.device] = torch.Generator(x.device).manual_seed(0)
        noise = torch.rand(x.shape, dtype=torch.float64, device=x.device, generator=generators[x.device])
        return x.double() * (1 + PERTURBATION * (2 * noise - 1))

    return perturbed


def _judge(out: Tensor, expected: Tensor, gold: Tensor, moved: Tensor, eps: float, fidelity: str) -> Problem | None:
    """What is wrong with ``out``, or None; ``moved`` is the gold of slightly other inputs."""
    if out.numel() == 0:
        return None
    *mine, lost = _distances(out, gold, expected)
    *own, _ = _distances(expected, gold, expected)
    *moves, _ = _distances(moved, gold, expected)
    slack = LOSSY if fidelity == "lossy" else 1
    if bool(lost):
        return Problem("is not finite where the reference is", Distance("a value that is not finite", math.inf, 1.0))
    of_scale = 1 + 1 / math.sqrt(frames_of(out)[0].numel())  # roundings of several numbers have no common sign
    for what, error, by_reference, by_inputs, units in zip(_MEASURES, mine, own, moves, (2, 2, of_scale), strict=True):
        allowed = slack * (2 * float(by_reference) + 2 * float(by_inputs) + units * eps)
        if not float(error) <= allowed:
            found = Distance(what, float(error), allowed)
            return Problem(f"{found} (of {_describe(out)})", found)
    return None


def _distances(x: Tensor, y: Tensor, finite_in: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How far ``x`` is from ``y``: worst row, worst channel of a frame, scale of a frame; and whether it lost values.

    All relative to ``y``, where it and ``finite_in`` are finite; rows and channels that are small beside their frame,
    to that.
    """
    dtype = torch.float64 if torch.float64 in (x.dtype, y.dtype) or y.dtype == torch.float32 else torch.float32
    x, y = frames_of(x), frames_of(y)
    finite = frames_of(finite_in).isfinite() & y.isfinite()
    lost = (finite & ~x.isfinite()).any()
    y = torch.where(finite, y, 0).to(dtype)
    largest = y.abs().amax((1, 2), keepdim=True)
    scale = torch.where(largest > 0, 1 / largest, 1.0).nan_to_num(1.0, 1.0, 1.0)
    y = y * scale
    difference = torch.where(finite, x, 0).to(dtype).mul_(scale).sub_(y)
    norm = torch.linalg.vector_norm(y, dim=(1, 2))  # [frames]
    floor = torch.finfo(dtype).tiny
    rows, columns = (_worst(difference, y, norm, dim) for dim in (2, 1))
    gain = ((difference * y).sum((1, 2)) / (norm * norm).clamp_min(floor)).abs().amax()
    return rows, columns, gain, lost


def _worst(difference: Tensor, y: Tensor, norm: Tensor, dim: int) -> Tensor:
    """The largest norm of ``difference`` along ``dim``, relative to that of ``y``, or to that of y's mean one."""
    size = torch.linalg.vector_norm(y, dim=dim)
    mean = (norm / math.sqrt(size.shape[1]))[:, None]
    error = torch.linalg.vector_norm(difference, dim=dim)
    # a difference where there is nothing at all counts as infinitely large
    return torch.where(error > 0, error / torch.maximum(size, mean), 0.0).amax()


def _eps(*outputs: Tensor) -> float:
    """A unit in the last place; where sums are longer than a number is, what another order of them may change.

    Of several outputs, the coarsest: float32 statistics of a rounded tensor move with its roundings.
    """
    return max(map(_unit, outputs))


def _autocast_eps(x: Tensor) -> float:
    """What autocast rounds to on the way to a result of any dtype; 0 without it."""
    kind = x.device.type
    return torch.finfo(torch.get_autocast_dtype(kind)).eps if torch.is_autocast_enabled(kind) else 0.0


def _unit(x: Tensor) -> float:
    if x.dtype == torch.float64:
        return FP64_EPS
    if x.dtype != torch.float32:
        return torch.finfo(x.dtype).eps
    tf32 = x.is_cuda and (settings.tf32_products() or settings.tf32_convolutions())
    return TF32_EPS if tf32 else FP32_EPS
