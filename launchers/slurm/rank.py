"""Run a rank: `python -m sousbatch.launchers.slurm.rank MODULE RUN STAGE`.

Slurm gives a rank its number in variables of its own; torch and libraries like it read others.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType

from ... import ledger
from ...cluster.processes import PARENT_VARIABLE
from ...errors import FencedError
from ...events import Finished
from ...job_environment import JobEnvironment
from ...run_folder import RunPaths

_NAMES = {
    "RANK": "SLURM_PROCID",
    "LOCAL_RANK": "SLURM_LOCALID",
    "WORLD_SIZE": "SLURM_NTASKS",
    "LOCAL_WORLD_SIZE": "SLURM_NTASKS_PER_NODE",
}


def identity(environment: Mapping[str, str]) -> dict[str, str]:
    """Return torch's variables of this rank.

    A rank that is shown a single device, as by --gpus-per-task, uses it.

    Shown otherwise a rank sees all devices of its node and takes the one of its LOCAL_RANK.
    """
    found = {name: environment[source] for name, source in _NAMES.items()}
    devices = environment.get("CUDA_VISIBLE_DEVICES", "")
    return found | ({"LOCAL_RANK": "0"} if devices and "," not in devices else {})


def main(module: str, run: str, stage: str) -> None:
    """Run the job *module* as this rank.

    A SIGTERM raises the stop flag that all ranks look at.

    Before it ends a preempted job Slurm sends SIGTERM to the ranks, not to the batch shell. Rank 0
    writes down that it came to its end: srun exits with 0 also when it lost a node.
    """
    os.environ |= identity(os.environ)
    os.environ.pop(PARENT_VARIABLE, None)  # slurmstepd, not the stage process, is this process's parent
    given, folder = JobEnvironment.from_env(os.environ), RunPaths(root=Path(run)).ledger_dir
    assert given.attempt is not None and given.stop_flag is not None, "the stage process gives both on Slurm"
    flag, task, attempt = Path(given.stop_flag), given.task, given.attempt

    def ask_to_stop(_: int, __: FrameType | None) -> None:
        with suppress(FencedError):  # a rank that outlived its node's failure must not stop its successors
            ledger.check_fence(folder, stage, task, attempt)
            flag.touch()

    signal.signal(signal.SIGTERM, ask_to_stop)
    sys.argv = sys.argv[1:]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
    if os.environ["RANK"] == "0":
        writer = ledger.open_job(folder, stage, task, attempt)
        writer.write(Finished())
        writer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
