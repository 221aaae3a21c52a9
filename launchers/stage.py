"""Start the stage process by its old name, for jobs that were queued before.

The stage process then refuses their older plan in one clear line.
"""

from __future__ import annotations

import sys

from .stage_process import main

if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
