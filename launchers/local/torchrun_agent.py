"""Run torchrun: `python -m sousbatch.launchers.local.torchrun_agent ARGUMENTS`.

torchrun itself ends with 1 for every exit code of its worker. This entry point ends with the worker's own
code, which is all that the stage process learns of a job.
"""

from __future__ import annotations

import signal
import sys

from ...cluster import processes


def main(arguments: list[str]) -> int:
    """Run the agent and return the exit code of the worker that failed first, or 0."""
    processes.die_with_parent(signal.SIGKILL)
    processes.adopt_orphans()
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main(arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
