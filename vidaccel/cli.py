"""The ``vidaccel`` command: it knows its sub-commands by name and imports only the one that is used."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from vidaccel import __version__
from vidaccel.errors import UsageError, error_line

__all__ = ["main"]

# Each module has `add_arguments(parser)` and `run(args) -> exit code`.
COMMANDS = {
    "generate": ("vidaccel.commands.generate", "make clips, patched, unpatched or both side by side"),
    "validate": ("vidaccel.commands.validate", "show that patched clips are the same clips"),
    "bench": ("vidaccel.commands.bench", "measure speed and memory against eager and torch.compile"),
    "env": ("vidaccel.commands.env", "print devices and versions, for bug reports and records"),
}
INTERRUPTED = 130  # what a shell reports for a process that SIGINT ended


class _Parser(argparse.ArgumentParser):
    """Complains in one line, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own) and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parser(argv).parse_args(argv)
        return import_module(COMMANDS[args.command][0]).run(args)
    except UsageError as error:
        print(error_line(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vidaccel: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = _Parser(prog="vidaccel", description="Makes diffusers video pipelines fast without changing the clip.")
    parser.add_argument("--version", action="version", version=f"vidaccel {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if argv[:1] == [name]:
            import_module(module).add_arguments(command)
    return parser
