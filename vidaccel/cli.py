"""The ``vidaccel`` command: it knows its sub-commands by name and imports only the one that is used."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from vidaccel import __version__
from vidaccel.errors import OutputError, UsageError, error_line, shortened

__all__ = ["main"]

# Each module has `add_arguments(parser)` and `run(args) -> exit code`.
COMMANDS = {
    "generate": ("vidaccel.commands.generate", "make clips, patched, unpatched or both side by side"),
    "validate": ("vidaccel.commands.validate", "show that patched clips are the same clips"),
    "psnr": ("vidaccel.commands.psnr", "compare two clips, files or folders of frames, frame by frame"),
    "bench": ("vidaccel.commands.bench", "measure speed and memory against eager and torch.compile"),
    "env": ("vidaccel.commands.env", "print devices and versions, for bug reports and records"),
}
_BAD_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EPIPE)
FIRST_SPEAKS_SECONDS = 3.0  # torchrun looks at its processes ten times a second
INTERRUPTED = 130  # what a shell reports for a process that SIGINT ended


class _Parser(argparse.ArgumentParser):
    """Complains in one line, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own) and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal, or a file name, may be of any encoding
    try:
        args = _parser(argv).parse_args(argv)
        code: int = import_module(COMMANDS[args.command][0]).run(args)
        sys.stdout.flush()
        return code
    except UsageError as error:
        _let_the_first_rank_speak()
        print(error_line(error), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("vidaccel: interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if error.errno in _BAD_NAME and error.filename is not None:
            print(error_line(UsageError(f"{shortened(error.filename)}: {error.strerror}")), file=sys.stderr)
            return UsageError.exit_code
        if error.errno not in _NO_ROOM:
            raise
        _give_up_output()
        if error.errno != errno.EPIPE:  # the program that reads our output has ended
            problem = f"cannot write {error.filename or 'any more'}: {error.strerror}"
            print(error_line(OutputError(problem)), file=sys.stderr)
        return OutputError.exit_code


def _let_the_first_rank_speak() -> None:
    """What is wrong on all ranks is said once: torchrun ends the others as soon as the first one has said it."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(FIRST_SPEAKS_SECONDS)


def _give_up_output() -> None:
    """If standard output takes no more, drop what it still holds: Python would try again at its end, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = _Parser(prog="vidaccel", description="Makes diffusers video pipelines fast without changing the clip.")
    parser.add_argument("--version", action="version", version=f"vidaccel {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if argv[:1] == [name]:
            import_module(module).add_arguments(command)
    return parser
