"""Measure speed and memory: the same command as ``vidaccel bench``."""

import sys

from vidaccel.cli import main

sys.exit(main(["bench", *sys.argv[1:]]))
