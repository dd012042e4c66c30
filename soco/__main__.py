"""``python -m soco``, as launchers of several processes want it."""

import sys

from soco.cli import main

sys.exit(main())
