"""Show that patched clips are the same clips: the same command as ``vidaccel validate``."""

import sys

from vidaccel.cli import main

sys.exit(main(["validate", *sys.argv[1:]]))
