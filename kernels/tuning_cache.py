"""The fastest of several implementations, measured once and remembered on disk.

One small JSON file per question, named by the hash of its key: concurrent processes never overwrite one another's
answers, and a file is put in place whole. A file that cannot be read, or answers another question, counts as absent; a
folder that cannot be written is no error.
"""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
import tempfile
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vidaccel.config import cache_directory
from vidaccel.errors import first_line

__all__ = ["Measured", "cuda_milliseconds", "fastest", "load", "save", "settled"]

logger = logging.getLogger(__name__)

HOPELESS = 1.5  # times the fastest so far, after one repetition
# What beats the favourite by less than this in a few repetitions on a cool GPU may well lose in the midst of a model.
MARGIN = 0.03
REPEATS = 5
HEAD_START = 2_000_000  # GPU clocks, about a millisecond: longer than it takes to launch a call

Key = Mapping[str, Any]


class Measured(NamedTuple):
    """The outcome for one key.

    Attributes:
        winner: Name of the right candidate to run; empty if none was right.
        milliseconds: Median time of every candidate that finished; of a dropped one, its only repetition.
        problems: Why others could not win.
    """

    winner: str
    milliseconds: dict[str, float]
    problems: dict[str, str]


def load(topic: str, key: Key) -> Measured | None:
    """What an earlier call of :func:`save` left for ``key``, or None."""
    try:
        record = json.loads(_path(topic, key).read_text())
        if record["key"] != dict(key):
            return None
        return Measured(str(record["winner"]), dict(record["milliseconds"]), dict(record["problems"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save(topic: str, key: Key, measured: Measured) -> None:
    """Remember ``measured`` for ``key``, here and for the processes to come."""
    path = _path(topic, key)
    text = json.dumps({"key": dict(key), **measured._asdict()}, indent=2)
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
            part = Path(file.name)
            file.write(text)
        part.replace(path)
    except OSError as error:
        logger.debug("cannot remember a measurement in %s: %s", path.parent, error)
        if part is not None:
            part.unlink(missing_ok=True)


def settled(
    topic: str, key: Key, names: Container[str], measure: Callable[[], Measured | None], x: torch.Tensor
) -> Measured | None:
    """What was remembered for ``key``; else what ``measure`` finds now, remembered from then on.

    Args:
        topic: Name of the op.
        key: The question.
        names: Candidates; an answer that is none of them is forgotten.
        measure: Gives the outcome, or None if no candidate is right, which is not remembered.
        x: A tensor on the device in question.

    Returns:
        The outcome, without a winner if there is none; None if it has to wait, because a graph is being captured.
    """
    measured = load(topic, key)
    if measured is not None and measured.winner in names:
        return measured
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    measured = measure()
    if measured is None:
        return Measured("", {}, {})
    save(topic, key, measured)
    return measured


def _path(topic: str, key: Key) -> Path:
    digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
    return Path(cache_directory()).expanduser() / topic / f"{digest[:32]}.json"


def fastest(
    candidates: Mapping[str, Callable[[], torch.Tensor]],
    why_wrong: Callable[[torch.Tensor], str | None],
    milliseconds: Callable[[Callable[[], object]], float],
    favourite: str = "",
) -> Measured | None:
    """Run every candidate, hold its result against ``why_wrong``, time it; None if none is right.

    Args:
        candidates: By name, the likely winner first: the others are dropped by its time.
        why_wrong: What is wrong with a result, or None.
        milliseconds: Time of one call.
        favourite: The candidate that the others have to beat by a margin.
    """
    times: dict[str, float] = {}
    problems: dict[str, str] = {}
    for name, run in candidates.items():
        try:
            if problem := why_wrong(run()):
                problems[name] = problem
                continue
            times[name] = milliseconds(run)
            if times[name] <= HOPELESS * min(times.values()):
                times[name] = statistics.median(milliseconds(run) for _ in range(REPEATS))
        except Exception as error:  # whatever one candidate does on this GPU, the others are still to choose from
            times.pop(name, None)
            problems[name] = first_line(error)
    if not times:
        return None
    handicap = {name: 1.0 if name == favourite else 1.0 + MARGIN for name in times}
    return Measured(min(times, key=lambda name: times[name] * handicap[name]), times, problems)


def cuda_milliseconds(run: Callable[[], object]) -> float:
    """GPU time of one call on the current stream; waits for it.

    The GPU is kept waiting until the call is queued. Otherwise what takes Python longer to launch than the GPU to run
    would be judged by that, and a model whose launches a CUDA graph has recorded would run the slower kernel.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    torch.cuda._sleep(HEAD_START)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
