"""The error that is the user's to mend, and how errors are said in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["OutputError", "UsageError", "did_you_mean", "error_line", "first_line", "nearest", "shortened"]


class UsageError(Exception):
    """Something asked for cannot be done as asked.

    The command line prints :func:`error_line` and exits with :attr:`exit_code`.
    """

    exit_code = 2


class OutputError(UsageError):
    """What was made cannot be written where it should go, though all looked well before."""

    exit_code = 1


def error_line(error: UsageError) -> str:
    """The one line that a command says it in."""
    return f"vidaccel: error: {' '.join(str(error).split())}"


def shortened(name: object) -> str:
    """A name for a message: the middle of a long one is left out."""
    text = str(name)
    return text if len(text) <= 80 else f"{text[:40]}...{text[-20:]}"


def first_line(error: BaseException) -> str:
    """A library's error in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def nearest(word: str, words: Iterable[str]) -> str:
    """What an error about an unknown ``word`` ends with: the nearest of the right ``words``, or all of them."""
    words = sorted(set(words))
    return did_you_mean(word, words) or f"; there are {', '.join(words)}"


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """The nearest of the right ``words`` as the end of an error, or nothing if none is near."""
    matches = difflib.get_close_matches(word, list(words), n=3, cutoff=0.5)
    alike = [difflib.SequenceMatcher(a=match, b=word).ratio() for match in matches]
    near = [match for match, ratio in zip(matches, alike, strict=True) if ratio > alike[0] - 0.1]
    return f"; did you mean {' or '.join(near)}?" if near else ""
