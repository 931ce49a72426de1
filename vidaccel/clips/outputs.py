"""Where clips go: what can be written there, what is done already, and files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vidaccel.clips.clip_request import RANDOM_SEED
from vidaccel.clips.encoding import SUFFIXES, frames_in, unwritable_reason
from vidaccel.errors import UsageError, shortened

__all__ = [
    "Claims",
    "aside",
    "check_output",
    "check_record",
    "comparison_path",
    "discard",
    "fingerprint",
    "in_words",
    "is_done",
    "json_text",
    "record_path",
    "recover",
    "write_json",
]

_PROBE = 2**16  # bytes: what a disk that is as good as full does not take


def record_path(out: Path) -> Path:
    """The JSON beside a clip: ``clip.mp4`` -> ``clip.mp4.json``."""
    return out.with_name(f"{out.name}.json")


def comparison_path(out: Path) -> Path:
    """The side-by-side clip beside a clip: ``clip.mp4`` -> ``clip.compare.mp4``."""
    return out.with_name(f"{out.stem}.compare{out.suffix}")


def check_output(out: Path, fps: float, compare: bool = False) -> None:
    """Make the folder of ``out`` and try to write there.

    Raises:
        UsageError: nobody can write such a file, or nobody can write it there.
    """
    try:
        if reason := _name_reason(out, compare):
            raise UsageError(f"{out} {reason}")
        if reason := unwritable_reason(out.suffix, fps):
            raise UsageError(f"{out}: {reason}")
        _make_writable(out.parent)
        for path in _files_of(out, compare):
            if path.is_dir() and (path != out or out.suffix):
                raise UsageError(f"{path} is a folder")
        if not out.suffix and out.exists():
            _check_folder_of_frames(out)
        if not out.exists() and record_path(out).exists() and _record_of(out) is None:
            raise UsageError(f"{record_path(out)} is not the record of a clip, and would be replaced by one")
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UsageError(f"cannot write {out}: {in_words(error)}") from error


def _name_reason(out: Path, compare: bool) -> str | None:
    """Why ``out`` cannot be the name of a clip, or None."""
    if out.name in ("", ".."):
        return "is a folder, and names no clip"
    if "\0" in str(out):
        return "has a null byte in it"
    if out.name.lower() in SUFFIXES:
        return "has no name before its suffix"
    return _length_reason(_files_of(out, compare))


def _length_reason(paths: Iterable[Path]) -> str | None:
    """Why names of ``paths``, which are written under others first, are too long, or None."""
    longest = max(paths, key=lambda path: len(os.fsencode(path.name)))
    there = next(folder for folder in longest.absolute().parents if folder.is_dir())
    most, length = os.pathconf(there, "PC_NAME_MAX"), len(os.fsencode(_sibling(longest, "part").name))
    if 0 < most < length:
        return f"is too long a name: with what is written beside it, it takes {length} bytes, and {most} are allowed"
    return None


def _check_folder_of_frames(out: Path) -> None:
    here = Path.cwd()
    if out.is_dir() and (out.resolve() in (here, *here.parents) or out.is_mount()):
        raise UsageError(f"{out} is a folder in use, and would be replaced by one of PNG frames")
    if not out.is_dir() or _others_in(out):
        raise UsageError(f"{out} is not a folder of PNG frames, and would be replaced by one")


class Claims:
    """Which files are spoken for, so that no job writes over what an earlier one makes."""

    def __init__(self) -> None:
        self._names: dict[tuple[Any, str], list[Path]] = {}
        self._folders: set[Any] = set()

    def add(self, out: Path, compare: bool = False) -> None:
        """Claim ``out``, whose folder must be there, and what is written beside it, whatever they are called by others.

        Raises:
            UsageError: an earlier job has claimed one of them, or a folder of frames that it would be in.
        """
        files = _files_of(out, compare)
        inside = out.parent.resolve()
        taken = any(self._holds(path) for path in (*files, inside, *inside.parents))
        if taken or (out.is_dir() and _identity(out) in self._folders):
            raise UsageError(f"an earlier job writes {out} already")
        for path in files:
            self._names.setdefault((_identity(path.parent), _folded(path.name)), []).append(path)
        self._folders |= {_identity(folder) for folder in (inside, *inside.parents)}

    def _holds(self, path: Path) -> bool:
        alike = self._names.get((_identity(path.parent), _folded(path.name)), ())
        return any(path.name == other.name or _same_name(path.parent, path.name, other.name) for other in alike)


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _folded(name: str) -> str:
    """The same for all names that some file system takes for one."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def _same_name(folder: Path, name: str, other: str) -> bool:
    """Whether the file system of ``folder`` takes two names for one."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        (Path(place) / name).touch()
        return (Path(place) / other).exists()


def check_record(path: Path) -> None:
    """Make the folder of a JSON record, if only that one is missing, and try to write there.

    Raises:
        UsageError: nobody can write it.
    """
    try:
        if path.name and (reason := _length_reason([path])):
            raise UsageError(f"{shortened(path)} {reason}")
        _make_writable(path.parent, levels=1)
        if path.is_dir():
            raise UsageError(f"{path} is a folder")
        if path.exists() and not path.is_file():  # as /dev/stdout, in whose place a file would be put
            raise UsageError(f"{path} is a device or a pipe, not a file")
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write {shortened(path)}: {in_words(error)}") from error


def _make_writable(folder: Path, levels: int | None = None) -> None:
    """Make ``folder``, and at most ``levels`` folders in all, but none at the root of a disk; try to write there."""
    whole = folder.absolute()
    try:
        missing = [path for path in (whole, *whole.parents) if not path.exists()]
        if missing and missing[-1].parent == Path(whole.anchor):
            raise UsageError(f"cannot write into {folder}: {missing[-1]} is not there, and is not made at the root")
        if levels is not None and len(missing) > levels:
            raise UsageError(f"cannot write into {folder}: {missing[1]} is not there")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(_PROBE))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write into {folder}: {in_words(error)}") from error


def in_words(error: Exception) -> str:
    """What the system says of an error, without numbers and names."""
    return getattr(error, "strerror", None) or str(error)


def is_done(out: Path, arguments: Mapping[str, Any]) -> bool:
    """Whether ``out`` is there, and its record says that it was made with these ``arguments``.

    A random seed stands for any.

    Raises:
        UsageError: it is there, but was made with others, nobody knows how, or it is no longer what was written.
    """
    if not out.exists() or (out.is_dir() and not frames_in(out)):
        return False
    record = _record_of(out)
    if record is None:
        raise UsageError(f"{out} exists without a record of how it was made; --overwrite replaces it")
    recorded, written, compared = record["arguments"], record.get("output"), bool(record.get("comparison"))
    changed = [
        name
        for name in {**recorded, **arguments}
        if not _same_argument(name, recorded.get(name), arguments.get(name), record_path(out))
    ]
    if changed:
        details = ", ".join(f"{name} {recorded.get(name)!r}, now {arguments.get(name)!r}" for name in changed)
        raise UsageError(f"{out} was made with other arguments ({details}); --overwrite replaces it")
    whole = not compared or comparison_path(out).exists()
    if not whole or (written is not None and written != fingerprint(out)):  # older records have no such entry
        raise UsageError(f"{out} is not what its record tells of, but changed or cut short; --overwrite replaces it")
    return True


def _record_of(out: Path) -> dict[str, Any] | None:
    """The record beside ``out``, or None if there is none, or something else."""
    try:
        record = json.loads(record_path(out).read_text(encoding="utf-8"))
        return record if isinstance(record["arguments"], dict) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _same_argument(name: str, recorded: Any, now: Any, record: Path) -> bool:
    if recorded == now or (name == "seed" and now == RANDOM_SEED):
        return True
    if name not in ("model", "image") or not (isinstance(recorded, str) and isinstance(now, str)):
        return False
    # a relative path may be meant from here, or from where the command ran then: somewhere above its record
    bases = (Path.cwd(), *record.absolute().parents)
    return Path(now).exists() and any((base / recorded).resolve() == Path(now).resolve() for base in bases)


def fingerprint(out: Path) -> dict[str, Any]:
    """What tells whether a clip is still as it was written."""
    files = frames_in(out) if out.is_dir() else [out]
    digest, size = hashlib.sha256(), 0
    for file in files:
        content = file.read_bytes()
        digest.update(content)
        size += len(content)
    return {"files": len(files), "bytes": size, "sha256": digest.hexdigest()}


def recover(out: Path) -> None:
    """Finish what a killed run has left of ``out`` if its record is there already, else clear it away.

    The record appears once everything is written, and before all else: a clip in waiting that it tells of is whole.
    """
    part, old, record = _sibling(out, "part"), _sibling(out, "old"), _record_of(out)
    if record is not None and part.exists() and record.get("output") == fingerprint(part):
        compared = _sibling(comparison_path(out), "part")
        if record.get("comparison"):
            if compared.exists():
                compared.replace(comparison_path(out))
        elif out.exists():
            discard(comparison_path(out))  # of the clip that is replaced
        _put(part, out)
    elif old.exists() and not out.exists():
        old.rename(out)
    if old.exists():
        _clear(old, out)
    for path in _files_of(out, compare=True):
        if os.path.lexists(left := _sibling(path, "part")):  # its name may be too long to be asked for otherwise
            discard(left)


def _files_of(out: Path, compare: bool) -> list[Path]:
    return [out, record_path(out), *([comparison_path(out)] if compare else [])]


def _others_in(folder: Path) -> list[Path]:
    """What of a folder is neither a frame nor one of the files that a desktop leaves behind."""
    frames = set(frames_in(folder))
    return [path for path in folder.iterdir() if path not in frames and not _left_by_a_desktop(path)]


def _left_by_a_desktop(path: Path) -> bool:
    return path.name.startswith(".") or path.name.lower() in ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r")


def _sibling(path: Path, role: str) -> Path:
    return path.with_name(f".{path.stem}.{role}{path.suffix}")


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A path to write to, renamed to ``path`` when the block ends well and removed when it does not."""
    part = _sibling(path, "part")
    discard(part)  # of a run that was killed
    try:
        yield part
        _put(part, path)
    finally:
        discard(part)


def _put(part: Path, path: Path) -> None:
    if part.is_dir():
        _replace_folder(path, part)
    else:
        with part.open("rb") as file:  # a disk that is full may say so only now
            os.fsync(file.fileno())
        part.replace(path)


def _replace_folder(path: Path, part: Path) -> None:
    """Put a new folder of frames in the place of the one that may be there, and keep what else is in that."""
    old = _sibling(path, "old")
    if path.exists():
        if others := _others_in(path):
            raise OSError(f"{others[0].name} has come into it meanwhile")
        discard(old)
        path.rename(old)
    try:
        part.replace(path)
    except BaseException:
        if old.exists():
            old.rename(path)
        raise
    if old.exists():
        _clear(old, path)


def _clear(old: Path, path: Path) -> None:
    """Remove a folder of frames, but for what is no frame, which goes to the one that has replaced it."""
    for entry in set(old.iterdir()) - set(frames_in(old)):
        entry.rename(path / entry.name)
    discard(old)


def discard(path: Path) -> None:
    """Remove a file or folder if it is there."""
    if path.is_dir() and not path.is_symlink():
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
