"""Measure speed and memory: the same command as ``vidaccel bench``."""

import sys

from vidaccel.cli import main

if __name__ == "__main__":  # which the processes that it starts are not
    sys.exit(main(["bench", *sys.argv[1:]]))
