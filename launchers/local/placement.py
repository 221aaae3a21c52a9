"""Start ranks on this machine as child processes, on the granted devices."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ...cluster.ports import LOOPBACK, free_port
from ...events import Event
from ...job_environment import JobEnvironment
from ...recipes.plan import Plan, Stage
from ...run_folder import RunPaths
from ..attempts import Attempt, Stop
from ..base import RankCommand


class LocalPlacement:
    """A job of this machine, or a stage process that a person started by hand."""

    def __init__(self, given: JobEnvironment) -> None:
        self.job_id = given.job or ""
        self._given = given

    def tasks(self, plan: Plan, stage: Stage) -> range:
        """Return the tasks of this process: one."""
        return range(self._given.task, min(self._given.task + 1, stage.num_tasks))

    def refusal(self, stage: Stage, events: Sequence[Event], past: Sequence[Attempt]) -> Stop | None:
        """Return nothing: a key is accepted once here, so no job starts twice."""
        return None

    def commands(self, plan: Plan, paths: RunPaths, stage: Stage) -> list[RankCommand]:
        """Return a torchrun agent for each simulated node, or the job itself."""
        python, wanted, kind = (sys.executable, "-u"), stage.resources, stage.record
        words: list[tuple[str, ...]]
        if kind.looks_after_itself:
            words = [(*python, "-m", kind.module, str(paths.root))]
        elif kind.is_distributed:
            port = free_port()
            words = [
                (
                    *(*python, "-m", "sousbatch.launchers.local.torchrun_agent"),
                    *(f"--nnodes={wanted.nodes}", f"--node-rank={node}", f"--nproc-per-node={wanted.devices_per_node}"),
                    *("--rdzv-backend=static", f"--master-addr={LOOPBACK}", f"--master-port={port}"),
                    *("--max-restarts=0", f"--log-dir={os.devnull}"),  # torchrun would leave empty folders in TMPDIR
                    *("-m", kind.module, str(paths.root), stage.name),
                )
                for node in range(wanted.nodes)
            ]
        else:
            words = [(*python, "-m", kind.module, str(paths.root), stage.name)]
        return [RankCommand(words=each, variables=self.devices(stage, node)) for node, each in enumerate(words)]

    def devices(self, stage: Stage, node: int) -> dict[str, str]:
        """Return what makes the ranks of a simulated node see their own devices only."""
        if stage.resources.device == "cpu":
            return {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        granted = os.environ.get("CUDA_VISIBLE_DEVICES") if self._given.devices is None else self._given.devices
        each = stage.resources.devices_per_node
        first, names = node * each, granted.split(",") if granted else []
        if granted is None:  # run by hand, where all devices are visible
            names = [str(number) for number in range(first + each)]
        return {"CUDA_VISIBLE_DEVICES": ",".join(names[first : first + each])}

    def why_lost(self) -> str:
        """Return why no further attempt may start here, or the empty string."""
        return ""

    def explain(self, stage: Stage, code: int, log: str, *, is_finished: bool) -> tuple[int, str]:
        """Return the exit code as it is: here it says how the ranks ended."""
        return code, ""

    def continue_later(self, paths: RunPaths, stage: Stage, past: Sequence[Attempt]) -> str:
        """Return that nothing was done: a person stopped the stage."""
        return ""
