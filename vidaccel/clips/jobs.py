"""Which clips to make: one, several with consecutive seeds, or one for each line of a job file.

A job file has one image path or prompt a line, or one JSON object with the command's options as keys
(``{"image": "cat.png", "seed": 3, "out": "cat.mp4"}``); blank lines and lines that begin with # are passed over. The
command's own options are the defaults of every line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vidaccel.clips.clip_request import ClipRequest
from vidaccel.errors import UsageError, error_line

__all__ = ["Job", "LineErrors", "jobs_from_file", "numbered_jobs"]

_KEYS = [option.name for option in fields(ClipRequest)] + ["out"]


@dataclass(frozen=True)
class Job:
    """One clip to make; ``origin`` says where it was asked for, if errors have to say so."""

    request: ClipRequest
    out: Path
    origin: str = ""


class LineErrors:
    """Keeps what is wrong with one line of a job file from ending the other jobs: it is said and counted."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def survived(self, origin: str) -> Iterator[None]:
        """Let the block end with a ``UsageError``, unless it is about the command line (no ``origin``)."""
        try:
            yield
        except UsageError as error:
            if not origin:
                raise
            self.count += 1
            tqdm.write(error_line(UsageError(f"{origin}: {error}")), file=sys.stderr)


def numbered_jobs(request: ClipRequest, out: Path, count: int) -> list[Job]:
    """``count`` clips with consecutive seeds; a single one keeps its name."""
    if count < 1:
        raise UsageError(f"num-clips must be at least 1, got {count}")
    if count == 1:
        return [Job(request, out)]
    return [Job(_with_seed_plus(request, i), _numbered(out, i)) for i in range(count)]


def jobs_from_file(
    path: Path, request: ClipRequest, out: Path, pipeline_takes: Collection[str], errors: LineErrors
) -> list[Job]:
    """A job for every line of the file that is in order; the others go to ``errors``.

    Args:
        path: The job file.
        request: Gives what a line leaves open; the seed counts up from line to line.
        out: Named as for :func:`numbered_jobs`, where a line has no ``out`` of its own.
        pipeline_takes: Parameters of the pipeline's call: they tell an image path from a prompt.

    Raises:
        UsageError: the file cannot be read or holds no job.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the job file {path}: {getattr(error, 'strerror', None) or error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line and not line.startswith("#")]
    if not numbered:
        raise UsageError(f"the job file {path} holds no job")

    jobs: list[Job] = []
    for i, (number, line) in enumerate(numbered):
        origin = f"{path} line {number}"
        with errors.survived(origin):
            values = _values(line, pipeline_takes)
            own_out = values.pop("out", None)
            filled = ClipRequest(**values).filled_from(asdict(_with_seed_plus(request, i)))
            jobs.append(Job(filled, Path(own_out) if own_out else _numbered(out, i), origin))
    return jobs


def _values(line: str, pipeline_takes: Collection[str]) -> dict[str, Any]:
    if not line.startswith("{"):
        is_image = "image" in pipeline_takes and ("prompt" not in pipeline_takes or Path(line).is_file())
        return {"image" if is_image else "prompt": line}
    try:
        values = json.loads(line)
    except ValueError as error:
        raise UsageError(f"not JSON: {error}") from error
    if unknown := [key for key in values if key not in _KEYS]:
        raise UsageError(f"unknown key {unknown[0]!r}; known are {', '.join(_KEYS)}")
    if not isinstance(values.get("out", ""), str):
        raise UsageError(f"out must be text, got {values['out']!r}")
    return values


def _with_seed_plus(request: ClipRequest, i: int) -> ClipRequest:
    return replace(request, seed=(request.seed or 0) + i)


def _numbered(out: Path, i: int) -> Path:
    """``clip.mp4`` -> ``clip-0003.mp4``; a name without a suffix is a folder of such clips."""
    return out.with_name(f"{out.stem}-{i:04d}{out.suffix}") if out.suffix else out / f"clip-{i:04d}.mp4"
