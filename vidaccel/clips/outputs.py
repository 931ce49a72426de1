"""Where clips go: what can be written there, what is done already, and files that appear whole or not at all."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vidaccel.clips.video import FRAME_PATTERN, SUFFIXES
from vidaccel.errors import UsageError

__all__ = [
    "aside",
    "check_output",
    "check_record",
    "comparison_path",
    "discard",
    "is_done",
    "json_text",
    "record_path",
    "write_json",
]


def record_path(out: Path) -> Path:
    """The JSON beside a clip: ``clip.mp4`` -> ``clip.mp4.json``."""
    return out.with_name(f"{out.name}.json")


def comparison_path(out: Path) -> Path:
    """The side-by-side clip beside a clip: ``clip.mp4`` -> ``clip.compare.mp4``."""
    return out.with_name(f"{out.stem}.compare{out.suffix}")


def check_output(out: Path) -> None:
    """Make the folder of ``out`` and try to write there.

    Raises:
        UsageError: nobody can write such a file, or nobody can write it there.
    """
    if out.suffix.lower() not in ("", *SUFFIXES):
        formats = ", ".join(SUFFIXES)
        raise UsageError(f"{out}: cannot write {out.suffix}; use {formats}, or no suffix for a folder of PNG frames")
    if out.suffix and out.is_dir():
        raise UsageError(f"{out} is a folder")
    if not out.suffix and out.exists() and (not out.is_dir() or len(list(out.iterdir())) > len(_frames_in(out))):
        raise UsageError(f"{out} is not a folder of PNG frames, and would be replaced by one")
    _make_writable(out.parent)


def check_record(path: Path) -> None:
    """Make the folder of a JSON record and try to write there.

    Raises:
        UsageError: nobody can write it.
    """
    _make_writable(path.parent)
    if path.is_dir():
        raise UsageError(f"{path} is a folder")


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"cannot write into {folder}: {error.strerror}") from error


def is_done(out: Path, arguments: Mapping[str, Any]) -> bool:
    """Whether ``out`` is there and its record says that it was made with these ``arguments``.

    Raises:
        UsageError: it is there, but was made with others, or nobody knows how.
    """
    if not out.exists() or (out.is_dir() and not _frames_in(out)):
        return False
    try:
        recorded = json.loads(record_path(out).read_text())["arguments"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{out} exists without a record of how it was made; --overwrite replaces it") from None
    changed = [name for name in {**recorded, **arguments} if recorded.get(name) != arguments.get(name)]
    if changed:
        details = ", ".join(f"{name} {recorded.get(name)!r}, now {arguments.get(name)!r}" for name in changed)
        raise UsageError(f"{out} was made with other arguments ({details}); --overwrite replaces it")
    return True


def _frames_in(folder: Path) -> list[Path]:
    return list(folder.glob(FRAME_PATTERN))


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A path to write to, renamed to ``path`` when the block ends well and removed when it does not."""
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    discard(part)  # of a run that was killed
    try:
        yield part
        part.replace(path)
    finally:
        discard(part)


def discard(path: Path) -> None:
    """Remove a file or folder if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, record: Any) -> None:
    """Write aside, then rename: a reader of ``path`` sees the old record or the new one, never half of one."""
    with aside(path) as part:
        part.write_text(json_text(record) + "\n")


def json_text(record: Any) -> str:
    """Strict JSON; infinities and NaN, which it has no numbers for, become the strings that Python's float() reads."""
    return json.dumps(_plain(record), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
