"""The name by which jobs that were sent before the stage process moved start it; it then refuses their old plan."""

from __future__ import annotations

import sys

from .stage_process import main

if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
