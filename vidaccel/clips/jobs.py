"""Which clips to make: one, several with consecutive seeds, or one for each line of a job file.

A job file is UTF-8, and has one image path or prompt a line, or one JSON object with the command's options as keys
(``{"image": "cat.png", "seed": 3, "out": "cat.mp4"}``); blank lines and lines that begin with # are passed over. Or it
is one JSON array of such objects and texts. The command's own options are the defaults of every job.

It may come from somebody else. So ``out`` has to lie in the output folder, which is the folder of ``--out``, and is
meant from the current folder or else from that one.
"""

from __future__ import annotations

import codecs
import json
import logging
import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vidaccel.clips.clip_request import RANDOM_SEED, ClipRequest
from vidaccel.errors import OutputError, UsageError, error_line, first_line

__all__ = ["Job", "LineErrors", "jobs_from_file", "numbered_jobs", "output_path"]

logger = logging.getLogger(__name__)

_KEYS = [option.name for option in fields(ClipRequest)] + ["out"]
_PART_OF_JSON = re.compile(rf'[][{{}},]+$|\[\s*["{{[]|"({"|".join(_KEYS)})"\s*:')
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_OTHER_ENCODINGS = {
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),  # before UTF-16, whose mark begins like it
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}


@dataclass(frozen=True)
class Job:
    """One clip to make; ``origin`` says where it was asked for, if errors have to say so."""

    request: ClipRequest
    out: Path
    origin: str = ""


class LineErrors:
    """Keeps what goes wrong with one clip from ending the others: it is said and counted."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def survived(self, origin: str) -> Iterator[None]:
        """Let the block end with an error, unless all clips have it in common: there is no ``origin``, and the clip
        could be made."""
        try:
            yield
        except Exception as error:
            if isinstance(error, BrokenPipeError) or not (origin or isinstance(error, OutputError)):
                raise
            logger.debug("%s", origin, exc_info=error)
            self.count += 1
            reason = error if isinstance(error, UsageError) else first_line(error)
            tqdm.write(error_line(UsageError(f"{origin}: {reason}" if origin else reason)), file=sys.stderr)


def output_path(text: str) -> Path:
    """Where ``text`` says that a clip goes.

    Raises:
        UsageError: it is a URL.
    """
    if _URL.match(text):
        raise UsageError(f"out {text!r} is a URL, and clips are written to files: mount it, and name the folder")
    return Path(text)


def numbered_jobs(request: ClipRequest, out: Path, count: int) -> list[Job]:
    """``count`` clips with consecutive seeds; a single one keeps its name."""
    if count < 1:
        raise UsageError(f"num-clips must be at least 1, got {count}")
    if count == 1:
        return [Job(request, out)]
    return [Job(_with_seed_plus(request, i), _numbered(out, i)) for i in range(count)]


def jobs_from_file(
    path: Path,
    request: ClipRequest,
    out: Path,
    pipeline_takes: Collection[str],
    errors: LineErrors,
    allow_outside: bool = False,
) -> list[Job]:
    """A job for every entry of the file that is in order; the others go to ``errors``.

    Args:
        path: The job file.
        request: Gives what an entry leaves open; the seed counts up from one to the next.
        out: Named as for :func:`numbered_jobs`, where an entry has no ``out`` of its own.
        pipeline_takes: Parameters of the pipeline's call: they tell an image path from a prompt.
        errors: Takes what is wrong with single entries.
        allow_outside: Whether ``out`` may be anywhere; it is then meant from the current folder.

    Raises:
        UsageError: the file cannot be read or holds no job.
    """
    entries = _entries(path)
    if not entries:
        raise UsageError(f"the job file {path} holds no job")
    jobs: list[Job] = []
    for i, (origin, entry) in enumerate(entries):
        with errors.survived(origin):
            values = _values(entry, pipeline_takes)
            own_out = values.pop("out", None)
            filled = ClipRequest(**values).filled_from(asdict(_with_seed_plus(request, i)))
            place = _own_place(own_out, out.parent if out.suffix else out, allow_outside) if own_out else None
            jobs.append(Job(filled, place or _numbered(out, i), origin))
    return jobs


def _entries(path: Path) -> list[tuple[str, Any]]:
    """Where each entry stands, and what: a line, or a value of a JSON array."""
    text = _text(path)
    if text.lstrip()[:1] in ("[", "{"):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            if _PART_OF_JSON.match(text.lstrip()):
                raise UsageError(f"the job file {path} begins like a JSON array, but is none: {error}") from error
            values = None  # it has lines, then
        if isinstance(values, list):
            return [(f"{path} entry {number}", value) for number, value in enumerate(values, 1)]
        if isinstance(values, dict):
            return [(f"{path} line 1", values)]
    # Only \n ends a line: str.splitlines would also split at characters that a prompt may hold.
    lines = [line.strip().lstrip("\ufeff") for line in text.split("\n")]
    return [(f"{path} line {n}", line) for n, line in enumerate(lines, 1) if line and not line.startswith("#")]


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
        for encoding, marks in _OTHER_ENCODINGS.items():
            if content.startswith(marks):
                raise UsageError(f"cannot read the job file {path}: it is {encoding}; save it as UTF-8")
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        byte = f"0x{content[error.start]:02x}"
        raise UsageError(f"cannot read the job file {path}: line {line} is not UTF-8 (byte {byte})") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the job file {path}: {getattr(error, 'strerror', None) or error}") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UsageError(f"cannot read the job file {path}: line {line} has null bytes, as in UTF-16; save it as UTF-8")
    return text


def _values(entry: Any, pipeline_takes: Collection[str]) -> dict[str, Any]:
    if isinstance(entry, str) and not entry.startswith("{"):
        if _PART_OF_JSON.match(entry):
            raise UsageError(f"{entry[:40]!r} looks like a part of JSON; a JSON object stands in one line")
        is_image = "image" in pipeline_takes and ("prompt" not in pipeline_takes or _is_file(entry))
        return {"image" if is_image else "prompt": entry}
    try:
        values = json.loads(entry) if isinstance(entry, str) else entry
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"a job is a text or a JSON object, got {json.dumps(values)[:40]}")
    if unknown := [key for key in values if key not in _KEYS]:
        raise UsageError(f"unknown key {unknown[0]!r}; known are {', '.join(_KEYS)}")
    if not isinstance(values.get("out", ""), str):
        raise UsageError(f"out must be text, got {values['out']!r}")
    return {name: RANDOM_SEED if (name, value) == ("seed", "random") else value for name, value in values.items()}


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # no file can have this name: it is a prompt
        return False


def _own_place(text: str, folder: Path, allow_outside: bool) -> Path:
    path = output_path(text)
    if allow_outside:
        return path
    try:
        for place in (path, folder / path):
            if place.resolve().is_relative_to(folder.resolve()):
                return place
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise UsageError(f"cannot write {text}: {getattr(error, 'strerror', None) or error}") from error
    raise UsageError(f"out {text!r} is outside of the output folder {folder}; --allow-outside permits it")


def _with_seed_plus(request: ClipRequest, i: int) -> ClipRequest:
    if request.seed == RANDOM_SEED:
        return request
    return replace(request, seed=(request.seed or 0) + i)


def _numbered(out: Path, i: int) -> Path:
    """``clip.mp4`` -> ``clip-0003.mp4``; a name without a suffix is a folder of such clips."""
    return out.with_name(f"{out.stem}-{i:04d}{out.suffix}") if out.suffix else out / f"clip-{i:04d}.mp4"
