"""The door of one rank that srun starts: `python -m sousbatch.launchers.rank MODULE RUN STAGE`.

Slurm tells a rank who it is in variables of its own; torch and its kin read others.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path
from types import FrameType

from ..cluster.processes import PARENT_VARIABLE

_NAMES = {
    "RANK": "SLURM_PROCID",
    "LOCAL_RANK": "SLURM_LOCALID",
    "WORLD_SIZE": "SLURM_NTASKS",
    "LOCAL_WORLD_SIZE": "SLURM_NTASKS_PER_NODE",
}


def main(module: str) -> None:
    """Run the job *module* as this rank; a SIGTERM raises the stop flag that all ranks look at.

    Before it ends a preempted job Slurm sends SIGTERM to the ranks, not to the batch shell.
    """
    os.environ |= {name: os.environ[source] for name, source in _NAMES.items()}
    os.environ.pop(PARENT_VARIABLE, None)  # slurmstepd, not the stage process, is this process's parent
    flag = Path(os.environ["SOUSBATCH_STOP_FLAG"])

    def ask_to_stop(_: int, __: FrameType | None) -> None:
        flag.touch()

    signal.signal(signal.SIGTERM, ask_to_stop)
    sys.argv = sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1])
