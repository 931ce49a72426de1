"""The fastest of several implementations: measured once, held against the reference, remembered on disk.

One small JSON file per question, named by the hash of its key. A file is put in place whole. Of processes that measure
at the same time the first to be done answers for all: those that chose differently would round differently. A file that
cannot be read counts as absent, and so does one that answers another question or names an implementation that does not
compete; a folder that cannot be written is no error. Both are said, once for each folder. What is read is data: a name
to look up, and figures to print.

A key holds all that an answer may depend on: the GPU, its driver, the versions of PyTorch, Triton, cuDNN and this
project, the source of the op, and what the op itself says (:func:`remembered` and :func:`drop` are for those who want
to see, or to ask again).

In a process group the first rank that has an answer publishes it, and the others take it over: ranks that chose
differently would round differently.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
import statistics
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from vidaccel import __version__
from vidaccel.config import cache_directory
from vidaccel.errors import first_line
from vidaccel.kernels.check import disagreement

if TYPE_CHECKING:
    from vidaccel.kernels.op import Op

__all__ = ["Measured", "Settled", "drop", "fastest", "gpu_milliseconds", "known", "remembered", "settle"]

logger = logging.getLogger(__name__)

HOPELESS = 1.5  # times the fastest so far, after one repetition
# What beats the favourite by less than this in a few repetitions on a cool GPU may well lose in the midst of a model.
MARGIN = 0.03
REPEATS = 5  # at most: of what takes long, as many as take about this time, and one in any case
REPEATED_MILLISECONDS = 20
HEAD_START = 2_000_000  # GPU clocks, about a millisecond: longer than it takes to launch a call
MOST_SETTLED = 4096  # answers that a process keeps, those asked for last; the others are read from disk again


class Measured(NamedTuple):
    """The outcome for one key.

    Attributes:
        winner: Name of the right implementation to run.
        milliseconds: Median time of every one that finished; of a dropped one, its only repetition.
        problems: Why others could not win.
    """

    winner: str
    milliseconds: dict[str, float]
    problems: dict[str, str]


class Settled(NamedTuple):
    """The implementation to run, and why one that should be faster does not."""

    winner: str
    reason: str


_settled: dict[str, Settled] = {}
_winners: dict[tuple[Any, ...], str] = {}  # by the op's own key, which Dynamo can follow
_warned_of: set[str] = set()
# One at a time: what runs beside a measurement spoils it, and two threads need not measure the same.
_measuring = threading.RLock()


def known(op: Op, args: tuple[Any, ...]) -> str | None:
    """What has been settled for these arguments in this process, if anything."""
    return _winners.get((op.name, *op.key(*args).values()))


def settle(op: Op, args: tuple[Any, ...], favourite: str) -> Settled | None:
    """The fastest implementation of ``op`` for these arguments, as remembered, else as measured now.

    Args:
        op: An op with a key.
        args: On the device in question.
        favourite: The implementation that the others have to beat by a margin; runs if none is right.

    Returns:
        The answer; None if it has to wait, because a graph is being captured.
    """
    key = _full_key(op, args)
    digest = _digest(key)
    with _measuring:
        if digest not in _settled:
            names = _candidates(op, args, favourite)
            measured = _load(op, key, names)
            if measured is None:
                if any(isinstance(x, Tensor) and x.is_cuda for x in args) and torch.cuda.is_current_stream_capturing():
                    return None
                measured = _save(op, key, names, _measure(op, args, names, favourite))
            measured = _agree(digest, measured)
            reason = "; ".join(f"{name}: {problem}" for name, problem in measured.problems.items())
            _settled[digest] = Settled(measured.winner, reason)
        settled = _settled[digest]
        _keep(_settled, digest, settled)
        _keep(_winners, (op.name, *op.key(*args).values()), settled.winner)
        return settled


def remembered() -> Iterator[tuple[str, Mapping[str, Any], Measured]]:
    """Every answer on disk: the op's name, the key, the outcome."""
    for path in _files("*"):
        record = _read(path)
        if record is not None:
            yield path.parent.name, record["key"], _measured(record)


def drop(op: str | None = None) -> int:
    """Forget the answers on disk and in this process, of one op or of all; how many there were on disk."""
    with _measuring:
        _settled.clear()
        _winners.clear()
    paths = _files(op or "*")
    for path in paths:
        path.unlink(missing_ok=True)
    return len(paths)


def fastest(
    candidates: Mapping[str, Callable[[], Any]],
    wrong: Callable[[str, Any], str | None],
    milliseconds: Callable[[Callable[[], object]], float],
    favourite: str,
) -> Measured:
    """Run every candidate, hold its result against ``wrong``, time it.

    Args:
        candidates: By name, the likely winner first: the others are dropped by its time.
        wrong: Takes a name and a result; what is wrong with it, or None.
        milliseconds: Time of one call.
        favourite: The candidate that the others have to beat by a margin, and the winner where none is right.
    """
    times: dict[str, float] = {}
    problems: dict[str, str] = {}
    for name, run in candidates.items():
        try:
            if problem := wrong(name, run()):
                problems[name] = problem
                continue
            times[name] = milliseconds(run)
            repeats = min(REPEATS, int(REPEATED_MILLISECONDS / times[name])) if times[name] else REPEATS
            if repeats and times[name] <= HOPELESS * min(times.values()):
                times[name] = statistics.median(milliseconds(run) for _ in range(repeats))
        except Exception as error:  # whatever one candidate does on this GPU, the others are still to choose from
            times.pop(name, None)
            problems[name] = first_line(error)
    handicap = {name: 1.0 if name == favourite else 1.0 + MARGIN for name in times}
    winner = min(times, key=lambda name: times[name] * handicap[name], default=favourite)
    return Measured(winner, times, problems)


def gpu_milliseconds(run: Callable[[], object]) -> float:
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


def _keep(answers: dict[Any, Any], key: Any, answer: Any) -> None:
    """Make ``answer`` the newest; where there are too many, forget the oldest."""
    answers.pop(key, None)
    answers[key] = answer
    if len(answers) > MOST_SETTLED:
        del answers[next(iter(answers))]


def _candidates(op: Op, args: tuple[Any, ...], favourite: str) -> list[str]:
    """The implementations that compete and serve these arguments."""
    return list(dict.fromkeys([*op.competitors(*args), favourite]))


def _measure(op: Op, args: tuple[Any, ...], names: Collection[str], favourite: str) -> Measured:
    """Time the implementations called ``names``, as far as they agree with the reference."""
    competing = {name: functools.partial(op.implementations[name].run, *args) for name in names}
    device = next(x for x in args if isinstance(x, Tensor))

    def wrong(name: str, out: Any) -> str | None:
        return None if name == "torch" else disagreement(op, args, out, op.implementations[name].fidelity)

    with torch.no_grad(), torch.cuda.device_of(device):
        measured = fastest(competing, wrong, gpu_milliseconds, favourite)
    logger.debug("%s of %s: %s", op.name, op.key(*args), measured)
    return measured


def _agree(digest: str, measured: Measured) -> Measured:
    """What the first rank of the process group to know has published, if there is one; else ``measured``."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return measured
    # a store, not a collective: ranks need not ask the same questions, nor at the same time
    store = distributed.distributed_c10d._get_default_store()
    published = store.compare_set(f"vidaccel/{digest}", "", json.dumps(measured._asdict()))
    return Measured(**json.loads(published))


def _full_key(op: Op, args: tuple[Any, ...]) -> dict[str, Any]:
    device = next(x.device for x in args if isinstance(x, Tensor))
    # among others (strides that a kernel declines, a library installed later) another one may be the fastest
    return {
        "op": op.name,
        **_machine(device),
        "source": _source(op),
        "competitors": op.competitors(*args),
        **op.key(*args),
    }


@functools.cache
def _machine(device: torch.device) -> dict[str, Any]:
    versions = {
        "vidaccel": __version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
    }
    if device.type != "cuda":
        return {"gpu": "", "driver": "", **versions}
    return {"gpu": torch.cuda.get_device_name(device), "driver": _driver(), **versions}


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return ""


@functools.cache
def _source(op: Op) -> str:
    """A hash of every file that an implementation of ``op`` may come from: the folder that the op is in."""
    folder = Path(inspect.getfile(op.reference)).parent
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return hashlib.sha256(text).hexdigest()[:16]


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:32]


def _folder() -> Path | None:
    """Where answers are kept; None for a user without a home."""
    try:
        return Path(cache_directory()).expanduser()
    except RuntimeError:
        return None


def _files(op: str) -> list[Path]:
    folder = _folder()
    return sorted(folder.glob(f"{op}/*.json")) if folder else []


def _path(op: Op, key: Mapping[str, Any]) -> Path | None:
    folder = _folder()
    return folder / op.name / f"{_digest(key)}.json" if folder else None


def _load(op: Op, key: Mapping[str, Any], names: Collection[str]) -> Measured | None:
    path = _path(op, key)
    record = _read(path) if path else None
    if record is None or record["key"] != json.loads(json.dumps(key)):
        return None
    measured = _measured(record)
    return measured if measured.winner in names else None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        _measured(record), dict(record["key"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        _warn_once(str(path.parent.parent), f"holds choices that cannot be read ({first_line(error)})")
        return None
    return record


def _warn_once(folder: str, problem: str) -> None:
    if folder in _warned_of:
        return
    _warned_of.add(folder)
    logger.warning("%s %s: what runs fastest is measured anew", folder, problem)


def _measured(record: Mapping[str, Any]) -> Measured:
    return Measured(str(record["winner"]), dict(record["milliseconds"]), dict(record["problems"]))


def _save(op: Op, key: Mapping[str, Any], names: Collection[str], measured: Measured) -> Measured:
    """Remember ``measured`` for the processes to come; what counts, which is another's answer if that came first."""
    path = _path(op, key)
    if path is None:
        _warn_once(cache_directory(), "cannot be found without a home")
        return measured
    text = json.dumps({"key": dict(key), **measured._asdict()}, indent=2)
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
            part = Path(file.name)
            file.write(text)
        try:
            path.hardlink_to(part)
        except OSError:  # something is there already, or the file system has no links
            if first := _load(op, key, names):
                return first
            part.replace(path)
    except OSError as error:
        _warn_once(str(path.parent.parent), f"cannot be written ({error.strerror})")
    finally:
        if part is not None:
            with suppress(OSError):
                part.unlink(missing_ok=True)
    return measured
