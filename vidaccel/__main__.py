"""``python -m vidaccel``."""

import sys

from vidaccel.cli import main

sys.exit(main())
