"""The clips of a job file by Ray: one worker on each GPU, or on as many CPUs as this process has threads.

Ray places the workers, hands them jobs and notices when one dies. A worker loads the model once, and gets its next job
when it has made a clip. It runs with the settings and the number of threads of the process that asks: a clip does not
depend on which worker makes it. The workers write the clips themselves, into a folder that all of them see.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import tempfile
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
import torch
from ray.exceptions import RayError
from tqdm import tqdm

from vidaccel.clips.clip_maker import ClipMaker, Setup
from vidaccel.clips.jobs import Job, LineErrors
from vidaccel.clips.outputs import is_done, recover
from vidaccel.config import adopt, variables
from vidaccel.environment import cpu_cores, device_of
from vidaccel.errors import UsageError, first_line

__all__ = ["ClipWorker", "RayEngine"]

logger = logging.getLogger(__name__)

TRIES = 3  # workers that may die of one job, or one after another before they have loaded the model
REACHED = 10  # seconds in which a cluster answers; Ray itself tries for minutes, and then ends the process
PATIENCE = 60  # seconds without any worker after which the user is told
ENDED = 10  # seconds that killed workers get to be gone
OBJECT_STORE = 80 * 2**20  # bytes, about the least that Ray takes: jobs and answers are small


@dataclass(frozen=True)
class _Order:
    """What a worker starts from.

    Attributes:
        setup: What it makes clips with.
        device: What the model is to be on.
        threads: How many PyTorch has: another number may round differently.
        settings: The ``VIDACCEL_*`` variables.
        folder: What relative paths are meant from.
        mark: A file in the output folder, by which a worker finds out that it sees the same folder.
    """

    setup: Setup
    device: torch.device
    threads: int
    settings: dict[str, str]
    folder: Path
    mark: Path


@dataclass(frozen=True)
class _Answer:
    """What a worker has to say of its start, or of a job.

    Attributes:
        printed: What is to be printed of the clip.
        overview: See :class:`ClipMaker`, as are the two times.
        warnings: What was logged meanwhile.
        error: Why there is no clip, or no worker.
        dead: Whether the worker can do no more.
    """

    printed: str = ""
    overview: str = ""
    load_seconds: float = 0.0
    patch_seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    error: UsageError | None = None
    dead: bool = False


class ClipWorker:
    """A process of Ray's with a model. It returns ordinary errors: what Ray raises means that the process is dead."""

    _maker: ClipMaker

    def start(self, order: _Order) -> _Answer:
        """Load the model."""
        answer = _answered(lambda: self._start(order))
        where = f"a worker on {socket.gethostname()}"
        return replace(answer, error=UsageError(f"{where}: {answer.error}")) if answer.error else answer

    def make(self, job: Job) -> _Answer:
        """Make the clip of ``job``."""
        return _answered(lambda: _Answer(self._maker.make(job), self._maker.overview))

    def _start(self, order: _Order) -> _Answer:
        try:
            os.chdir(order.folder)
            order.mark.stat()
        except OSError as error:
            raise UsageError(f"cannot see {error.filename}; all workers need it, in a network file system") from None
        adopt(order.settings)
        torch.set_num_threads(order.threads)
        self._maker = ClipMaker(order.setup, device_of(str(order.device)), show_progress=False)
        return _Answer(load_seconds=self._maker.load_seconds, patch_seconds=self._maker.patch_seconds)


def _answered(work: Callable[[], _Answer]) -> _Answer:
    heard = _Warnings()
    package = logging.getLogger("vidaccel")
    package.addHandler(heard)
    try:
        return replace(work(), warnings=tuple(heard.messages))
    except UsageError as error:
        return _Answer(warnings=tuple(heard.messages), error=error)
    except Exception as error:
        traceback.print_exc()  # into Ray's log of this worker
        return _Answer(warnings=tuple(heard.messages), error=UsageError(first_line(error)), dead=_gpu_is_lost())
    finally:
        package.removeHandler(heard)


def _gpu_is_lost() -> bool:
    """Whether an error on the GPU has left this process without it, as an illegal access does."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class _Warnings(logging.Handler):
    """Keeps warnings for the process that prints them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


class RayEngine:
    """The engine whose workers Ray runs: on this machine, or on the cluster at ``args.address``.

    Attributes:
        device: A GPU of each worker's own, or the CPU.

    Raises:
        UsageError: the cluster cannot be reached, or has no such device.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._threads = torch.get_num_threads()
        if args.address is not None:
            self._connect(address=_reachable(args.address))
        self.device = self._device(args.device)

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        ray.shutdown()

    def make_all(self, jobs: list[Job], setup: Setup, errors: LineErrors) -> None:
        """Make the clip of every job, and print what there is to say; what goes wrong with one goes to ``errors``.

        Raises:
            UsageError: no worker can start.
        """
        size = min(len(jobs), self._workers())
        if self._args.address is None:
            self._connect(address="local", **self._own_cluster(size))
        quiet, tally = self._args.quiet, _Tally()
        with ExitStack() as until_made:
            mark = until_made.enter_context(_mark_in(jobs[0].out.parent))
            order = _Order(setup, self.device, self._threads, variables(), Path.cwd(), mark)
            crew = until_made.enter_context(_Crew(order))
            bar = until_made.enter_context(tqdm(total=len(jobs), desc="clips", disable=quiet or len(jobs) == 1))
            for job, answer in crew.answers(jobs, size):
                tally.add(answer)
                with errors.survived(job.origin if job else ""):
                    bar.update(1 if job else 0)
                    if answer.error:
                        raise answer.error
                    if job:
                        tqdm.write(answer.printed)
        if not quiet:
            print(tally)

    def _device(self, name: str | None) -> torch.device:
        there = self._count("GPU", 1)
        if name is None:
            return torch.device("cuda" if there else "cpu")
        if name not in ("cuda", "cpu"):
            raise UsageError(f"--engine ray takes --device cuda or cpu, got {name!r}: Ray gives each worker its GPU")
        if name == "cuda" and not there:
            where = f"the Ray cluster at {self._args.address}" if self._args.address else "this machine"
            raise UsageError(f"--device cuda: {where} has no GPU; --device cpu works without")
        return torch.device(name)

    def _workers(self) -> int:
        """How many were asked for, or fit."""
        on_gpus = self.device.type == "cuda"
        fit = self._count("GPU", 1) if on_gpus else self._count("CPU", self._threads)
        wanted = self._args.workers or max(1, fit)
        if wanted > fit and self._args.address is not None:
            logger.warning("the cluster has room for %d of %d workers: the others wait for it", fit, wanted)
        elif wanted > fit and on_gpus:
            raise UsageError(f"--workers {wanted} needs as many GPUs, and this machine has {fit}")
        elif wanted > max(1, fit):
            logger.warning(
                "%d workers of %d threads each share %d cores; OMP_NUM_THREADS sets how many threads they have",
                *(wanted, self._threads, self._count("CPU", 1)),
            )
        return wanted

    def _count(self, kind: str, need: int) -> int:
        """How often the machine or the nodes of the cluster have ``need`` of GPUs or CPUs."""
        if self._args.address is not None:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        else:
            nodes = [{"GPU": torch.cuda.device_count(), "CPU": cpu_cores()}]
        return sum(int(resources.get(kind, 0) // need) for resources in nodes)

    def _own_cluster(self, size: int) -> dict[str, Any]:
        on_gpus = self.device.type == "cuda"
        return {
            "num_cpus": size if on_gpus else size * self._threads,
            "num_gpus": size if on_gpus else 0,
            "object_store_memory": OBJECT_STORE,
            "include_dashboard": False,
        }

    def _connect(self, **cluster: Any) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster of our own tells nobody about itself
        logs = self._args.ray_logs
        # the death of a worker is printed whatever log_to_driver says
        ray._private.worker._worker_logs_enabled = logs
        level = logging.INFO if logs else logging.CRITICAL
        try:
            ray.init(log_to_driver=logs, logging_level=level, **cluster)
        except Exception as error:  # of many kinds
            what = f"reach the Ray cluster at {self._args.address}" if self._args.address else "start Ray here"
            token = "; it asks for a token: set RAY_AUTH_MODE=token" if _wants_token(error) else ""
            raise UsageError(f"cannot {what}: {first_line(error)}{token}") from error


@contextmanager
def _mark_in(folder: Path) -> Iterator[Path]:
    """A file that is there as long as the block runs."""
    descriptor, name = tempfile.mkstemp(prefix=".vidaccel-", dir=folder)
    os.close(descriptor)
    try:
        yield Path(name).absolute()
    finally:
        with suppress(OSError):
            Path(name).unlink()


def _reachable(address: str) -> str:
    """``address``, if anybody listens there."""
    place = urlsplit(f"//{address}")
    try:
        if "://" not in address and place.hostname and place.port:
            socket.create_connection((place.hostname, place.port), timeout=REACHED).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot reach the Ray cluster at {address}: {reason}") from error
    return address


def _wants_token(error: Exception) -> bool:
    return "AuthenticationError" in str(error.__cause__)


class _Crew:
    """The workers. One that dies is replaced, and another gets its job."""

    def __init__(self, order: _Order) -> None:
        gpus, cpus = (1, 1) if order.device.type == "cuda" else (0, order.threads)
        self._order = order
        self._new_worker: Any = ray.remote(num_gpus=gpus, num_cpus=cpus)(ClipWorker).remote
        # by Ray's reference to the answer: the worker, and its job unless it is to start
        self._asked: dict[Any, tuple[Any, Job | None]] = {}
        self._idle: list[Any] = []
        self._deaths = Counter[Path | None]()

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, *exception: object) -> None:
        """Kill the workers, and clear away what they were writing."""
        for worker in [*self._idle, *(worker for worker, _ in self._asked.values())]:
            ray.kill(worker)
        if self._asked:
            ray.wait(list(self._asked), num_returns=len(self._asked), timeout=ENDED)  # a dead one's answer is an error
        for _, job in self._asked.values():
            if job:
                recover(job.out)

    def answers(self, jobs: list[Job], size: int) -> Iterator[tuple[Job | None, _Answer]]:
        """Start ``size`` workers; the answers to all jobs, and without a job those of workers that have started."""
        waiting = deque(jobs)
        for _ in range(size):
            self._start()
        while waiting or any(job for _, job in self._asked.values()):
            while waiting and self._idle:
                worker, job = self._idle.pop(), waiting.popleft()
                self._asked[worker.make.remote(job)] = (worker, job)
            reference = self._first_answered()
            worker, asked = self._asked.pop(reference)
            answer = _answer_in(reference)
            if not answer.dead:
                self._idle.append(worker)
                self._deaths[asked.out if asked else None] = 0
                yield asked, answer
                continue
            ray.kill(worker)  # which may still live: Ray can lose sight of a worker, and a worker of its GPU
            if told := self._after_death(asked, answer):
                yield asked, told
            elif asked:
                waiting.appendleft(asked)
            if len(waiting) > len(self._idle):
                self._start()

    def _start(self) -> None:
        worker = self._new_worker()
        self._asked[worker.start.remote(self._order)] = (worker, None)

    def _first_answered(self) -> Any:
        ready, _ = ray.wait(list(self._asked), timeout=PATIENCE)
        if not ready and not any(job for _, job in self._asked.values()):
            logger.warning("no worker has started yet: it still loads the model, or Ray has no room for it")
        return (ready or ray.wait(list(self._asked))[0])[0]

    def _after_death(self, job: Job | None, answer: _Answer) -> _Answer | None:
        """What is told of a dead worker's job, or start; None if another worker is to try."""
        if job and self._is_made(job):
            return _Answer(str(job.out))
        out = job.out if job else None
        self._deaths[out] += 1
        if self._deaths[out] < TRIES:
            return None
        what = "made this clip" if job else "loaded the model"
        return _Answer(error=UsageError(f"{TRIES} workers died while they {what}; the last one: {answer.error}"))

    def _is_made(self, job: Job) -> bool:
        """Whether a worker that is dead now had made the clip."""
        setup = self._order.setup
        try:
            recover(job.out)
            return not setup.args.overwrite and is_done(job.out, asdict(job.request) | setup.settings)
        except (UsageError, OSError):
            return False


def _answer_in(reference: Any) -> _Answer:
    try:
        return ray.get(reference)
    except RayError as error:
        reason = str(error).strip().splitlines()[-1]  # Ray says why in the end, and then guesses
        return _Answer(error=UsageError(reason.partition(" Some common causes")[0]), dead=True)


class _Tally:
    """What is said once, of all workers together."""

    def __init__(self) -> None:
        self._warned: set[str] = set()
        self._overview = ""
        self._load_seconds = self._patch_seconds = 0.0

    def add(self, answer: _Answer) -> None:
        for message in answer.warnings:
            if message not in self._warned:
                logger.warning("%s", message)
            self._warned.add(message)
        self._overview = answer.overview or self._overview
        self._load_seconds = max(self._load_seconds, answer.load_seconds)
        self._patch_seconds = max(self._patch_seconds, answer.patch_seconds)

    def __str__(self) -> str:
        times = f"load at most {self._load_seconds:.1f} s · patch at most {self._patch_seconds:.1f} s"
        return "\n".join(filter(None, [self._overview, times]))
