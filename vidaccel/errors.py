"""The error that is the user's to mend, and how it is said."""

from __future__ import annotations

__all__ = ["UsageError", "error_line"]


class UsageError(Exception):
    """Something asked for cannot be done as asked.

    The command line prints :func:`error_line` and exits with code 2.
    """


def error_line(error: UsageError) -> str:
    """The one line that a command says it in."""
    return f"vidaccel: error: {' '.join(str(error).split())}"
