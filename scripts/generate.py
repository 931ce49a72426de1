"""Make clips: the same command as ``vidaccel generate``."""

import sys

from vidaccel.cli import main

sys.exit(main(["generate", *sys.argv[1:]]))
