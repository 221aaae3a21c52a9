"""Define the contract of a launcher: verbs over plain values, no ledger."""

from __future__ import annotations

import math
import shlex
import signal
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from ..cluster.site import Site
from ..errors import EXIT_DEVICE_MEMORY, EXIT_DIVERGED, EXIT_NO_ROOM
from ..events import Event
from ..job_environment import JobEnvironment
from ..recipes.plan import After, Plan, Stage
from ..recipes.schema import Resources
from ..run_folder import RunPaths
from .attempts import Attempt, Stop

StateWord = Literal["waiting", "running", "stopping", "done", "stopped", "failed", "cancelled", "lost", "unknown"]
# "unknown" is not final: what cannot be asked may well run, and nothing may be sent in its place.
FINAL_WORDS: frozenset[StateWord] = frozenset({"done", "stopped", "failed", "cancelled", "lost"})


@dataclass(frozen=True, kw_only=True)
class Request:
    """The exact text that is sent for a stage, and what goes with it.

    Job ids of earlier stages are added when it is sent.
    """

    stage: str
    text: str
    num_tasks: int
    after: tuple[After, ...]
    resources: Resources
    uses_devices: bool
    log_dir: str
    inherit: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class JobRef:
    """A job as its launcher knows it."""

    launcher: str
    job_id: str


@dataclass(frozen=True, kw_only=True)
class JobState:
    """The state of a job as a launcher knows it, without the run's own ledger.

    *seen_at* is when it looked, in seconds since the epoch.
    """

    word: StateWord
    reason: str = ""
    seen_at: float = math.inf


_LONGEST_NOTICE_S = 600  # writing a checkpoint seldom takes longer
_MEANINGS = {
    EXIT_NO_ROOM: "found no space left on the disk",
    EXIT_DEVICE_MEMORY: "ran out of device memory",
    EXIT_DIVERGED: "stopped because the training diverged",
}


def how_ended(code: int) -> str:
    """Return in words how a process ended.

    After signal N a shell's exit code is 128 + N, and Python's -N.
    """
    if code in _MEANINGS:
        return _MEANINGS[code]
    number = -code if code < 0 else code - 128
    if not 0 < number < 65:
        return f"ended with exit code {code}"
    return f"was killed by signal {number}" + (" (often: no host memory left)" if number == signal.SIGKILL else "")


@dataclass(frozen=True, kw_only=True)
class RankCommand:
    """The command that starts the ranks of a node.

    *variables* come beside the job's own.
    """

    words: tuple[str, ...]
    variables: dict[str, str]


def notice_s(time_min: float) -> float:
    """Return how many seconds before its time limit a job is asked to save and stop.

    A tenth of its time, a minute at least and ten at most, but never more than half of it.
    """
    return min(max(60, time_min * 6), _LONGEST_NOTICE_S, time_min * 30)


class Placement(Protocol):
    """The placement of a stage process, as its launcher sees it inside the job.

    *job_id* may be empty.
    """

    job_id: str

    def tasks(self, plan: Plan, stage: Stage) -> range:
        """Return the tasks of *stage* that this process works on, one after another."""

    def refusal(self, stage: Stage, events: Sequence[Event], past: Sequence[Attempt]) -> Stop | None:
        """Return why this process must not start.

        *past* has the earlier attempts of its task.
        """

    def commands(self, plan: Plan, paths: RunPaths, stage: Stage) -> list[RankCommand]:
        """Return what starts the ranks of one task."""

    def explain(self, stage: Stage, code: int, log: str, *, is_finished: bool) -> tuple[int, str]:
        """Return the exit code of the ranks, and an error that their records lack.

        *log* is what they printed, *is_finished* says that rank 0 recorded its end.
        """

    def why_lost(self) -> str:
        """Return why no further attempt may start here, or the empty string."""

    def continue_later(self, paths: RunPaths, stage: Stage, past: Sequence[Attempt]) -> str:
        """Let a stage that saved and stopped resume later; return what was done."""


class Launcher(Protocol):
    """Sends requests and answers for the jobs. It never touches a run's ledger.

    It is made with `max_age_s=`: for a caller that only looks, its answers may be so old. It is *host-bound* where its
    jobs run on the machine that sends them: only that machine knows them, and Ctrl-C there stops them, too. One that
    *keeps the environment* writes a job's variables to a disk that others read, so that secrets are left out.
    """

    name: str
    is_host_bound: bool
    keeps_environment: bool

    def is_here(self) -> bool:
        """Return whether its jobs can be asked about from this machine."""

    def read_site(self) -> Site:
        """Return what its machines offer."""

    def objections(self, requests: Sequence[Request], plan: Plan, runs: Path) -> tuple[list[str], list[str]]:
        """Return why it would refuse requests, and when it would start them."""

    def placement(self, given: JobEnvironment) -> Placement:
        """Return where the stage process that calls this runs."""

    def forget(self, beginning: str) -> None:
        """Remove what is kept of ended jobs outside of the run folder.

        The jobs are those whose keys begin with *beginning*.
        """

    def prepare(self, plan: Plan, paths: RunPaths) -> tuple[Request, ...]:
        """Return the requests of all stages in order. Pure."""

    def send(self, request: Request, key: str, after: Mapping[str, JobRef]) -> JobRef:
        """Start the job of *request* under the unique *key*.

        *after* has the jobs that it waits for.
        """

    def find(self, keys: Collection[str]) -> dict[str, JobRef]:
        """Return the jobs that were accepted under *keys*, however `send` ended.

        A key that ends with a point stands for all that begin with it.
        """

    def states(self, refs: Collection[JobRef]) -> dict[JobRef, JobState]:
        """Return the state of each job; one that is unknown is lost."""

    def cancel(self, refs: Collection[JobRef], *, save: bool) -> None:
        """End the jobs: with *save* the ranks first agree, save and leave."""


def script(plan: Plan, paths: RunPaths, stage: Stage, header: Sequence[str] = ()) -> str:
    """Return the shell text that runs one task of *stage*, below *header*."""
    environment = plan.recipe.environment
    code = [str(paths.code(folder)) for folder in environment.code]
    variables = {
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(stage.resources.cpus_per_device),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    variables |= environment.variables
    lines = ["#!/bin/bash", *header, f"# sousbatch {plan.version}: run {paths.run_id!r}, stage {stage.name}"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(variables.items())]
    if code:
        lines.append(f"export PYTHONPATH={shlex.quote(':'.join(code))}${{PYTHONPATH:+:$PYTHONPATH}}")
    lines += environment.setup
    python = sys.executable if environment.container else environment.python or sys.executable
    command = [python, "-m", "sousbatch.launchers.stage_process", str(paths.root), stage.name]
    return "\n".join([*lines, f"exec {shlex.join(command)}", ""])
