"""The first process of a stage's task: `python -m sousbatch.launchers.stage_process RUN STAGE`.

It verifies what was frozen, opens an attempt, picks address and port, starts the ranks, turns
signals into the stop flag, reads the exit code and decides what is next. The job itself is met
by module path, arguments and exit code only.
"""

from __future__ import annotations

import getpass
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType

from .. import __version__, files, ledger
from ..checkpoints.capacity.reservations import shared_runs_dir, submitted_run
from ..cluster import processes, slurm
from ..cluster.ports import LOOPBACK, free_port
from ..errors import (
    EXIT_DEVICE_MEMORY,
    EXIT_NO_ROOM,
    EXIT_STOPPED,
    FencedError,
    SousbatchError,
    is_no_room,
    no_room_named,
)
from ..events import Ended, Error, Started
from ..job_environment import JobEnvironment
from ..ledger_queries import is_finished, rank_codes
from ..recipes.plan import Batch, Plan, Stage, read_plan
from ..run_folder import RunPaths
from .attempts import Attempt, Stop, first_batch, next_batch, read_attempts
from .base import Launcher
from .freeze import verify
from .local.launcher import LocalLauncher
from .reservations import release_dead, reserve
from .slurm.container import around
from .slurm.continuation import MAX_IDLE, continue_job, is_idle, is_stray
from .slurm.launcher import SlurmLauncher
from .slurm.script import array_size

_POLL_S = 0.1
_LOG_END_BYTES = 1 << 18  # srun's own lines are among the last of a log
_STRAGGLER_S = 30.0  # how long the other nodes may take after the first one failed


class _Task:
    """One task of a stage, in this process."""

    def __init__(self, paths: RunPaths, plan: Plan, stage: Stage, given: JobEnvironment, parent: int | None) -> None:
        self._paths, self._plan, self._stage, self._given, self._parent = paths, plan, stage, given, parent
        self._task, self._kind = given.task, stage.record
        self._flag = paths.stop_flag(stage.name, given.task)
        self._slurm_job = slurm.job_id() if plan.site.launcher == "slurm" else ""
        self._is_stopping = False
        self._running: list[subprocess.Popen[bytes]] = []
        self._number = 0

    def run(self) -> int:
        """Run attempts until there is no next one; return the last one's exit code."""
        files.make_private_dir(self._flag.parent)
        self._flag.unlink(missing_ok=True)  # left by an attempt that was killed
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        events = ledger.read(self._paths.ledger_dir, max_steps=1)
        past = read_attempts(events, self._stage.name, self._task, self._stage.batch)
        if self._slurm_job and not self._given.sweep and is_stray(events, self._stage.name, self._slurm_job):
            _say(f"job {self._slurm_job} was accepted twice, and another one does this work")
            return 0
        if self._slurm_job and past and past[-1].exit_code == 0:  # requeued, or sent twice, after it was done
            _say(f"{self._stage.name} is done already")
            return 0
        is_again = self._slurm_job in {attempt.job for attempt in past if attempt.job}
        if (
            is_again and not self._kind.looks_after_itself and is_idle(past)
        ):  # the stages of a point look for themselves
            _say(f"Slurm started this job again, but {MAX_IDLE} starts in a row committed nothing: it ends here")
            return 1
        batch = first_batch(past, self._stage.batch)
        if (
            self._kind.leaves == "checkpoints"
        ):  # its saves count what other runs are promised, and ranks ask for no jobs
            with suppress(OSError, SousbatchError):
                # not as watchers, who share an answer for half a minute
                launchers: dict[str, Launcher] = {"local": LocalLauncher(), "slurm": SlurmLauncher()}
                release_dead(shared_runs_dir(self._paths), launchers, submitted_run(self._paths))
        try:
            while True:
                attempt = self._attempt(batch)
                past.append(attempt)
                following = self._after(attempt)
                if isinstance(following, Stop):
                    _say(f"attempt {attempt.number} ended: {following.reason}")
                    if following.exit_code == EXIT_STOPPED and self._slurm_job and not self._kind.looks_after_itself:
                        _say(continue_job(self._paths, self._stage, self._slurm_job, past, self._given))
                    return following.exit_code
                _say(
                    f"attempt {attempt.number} ended with exit code {attempt.exit_code}; "
                    "the next one goes on where it stood"
                )
                batch = following
        finally:
            self._flag.unlink(missing_ok=True)  # so that a job run by hand does not stop at once

    def _after(self, attempt: Attempt) -> Batch | None | Stop:
        """Return the batch of the next attempt, or why there is none."""
        following = next_batch(attempt)
        if isinstance(following, Stop):
            return following
        if self._is_stopping:
            return Stop(exit_code=EXIT_STOPPED, reason="stopped")
        try:  # it must not fence off the attempt that has replaced this one, nor start ranks in its place
            ledger.check_fence(self._paths.ledger_dir, self._stage.name, self._task, attempt.number)
            if self._slurm_job and slurm.fate_of(self._slurm_job) != "running":
                return Stop(exit_code=1, reason="Slurm has taken the nodes away, and starts the job again where it may")
        except SousbatchError as error:
            return Stop(exit_code=1, reason=str(error))
        return following

    def _on_stop(self, number: int, _: FrameType | None) -> None:
        self._is_stopping = True
        is_flagged = self._kind.stopped_by == "flag"  # the others are short and safe to begin again
        try:
            ledger.check_fence(self._paths.ledger_dir, self._stage.name, self._task, self._number)
            self._flag.touch()
        except (OSError, FencedError):  # on a full disk the ranks cannot be asked; those of a newer attempt must not
            is_flagged = False
        if not is_flagged:
            for process in self._running:
                process.terminate()

    def _attempt(self, batch: Batch | None) -> Attempt:
        writer = ledger.open_attempt(self._paths.ledger_dir, self._stage.name, self._task)
        self._number = writer.number
        if not self._is_stopping:  # ranks that were ended because another had failed raised it
            self._flag.unlink(missing_ok=True)
        writer.write(
            Started(
                job=self._slurm_job or self._given.job,
                host=socket.gethostname(),
                pid=os.getpid(),
                version=__version__,
                python=platform.python_version(),
                micro_batch=batch.micro_batch if batch else None,
                accumulation=batch.accumulation if batch else None,
            )
        )
        _say(f"attempt {writer.number} of {self._stage.name} on {socket.gethostname()}")
        try:
            verify(self._paths, self._plan, self._stage, is_point=self._given.sweep is not None)
            if self._kind.leaves == "checkpoints":  # no training starts whose final weights are not held for it
                reserve(self._plan, self._paths)
            begins = os.fstat(1).st_size
            code = self._run_job(writer.number, batch)
            if code not in (0, EXIT_STOPPED) and self._slurm_job:
                code = _first_of(code, begins, writer, self._stage.name)
        except Exception as error:  # an attempt always ends with a record
            code = EXIT_NO_ROOM if is_no_room(error) else 1
            event = Error.of_exception(error)
            _say(event.message)
            writer.write(event)
        events = ledger.read(self._paths.ledger_dir, max_steps=1)
        code = _worst([code, *rank_codes(events, self._stage.name, self._task, writer.number)]) if code else 0
        if (
            code == 0
            and self._slurm_job
            and not self._kind.looks_after_itself
            and not is_finished(events, self._stage.name, self._task, writer.number)
        ):
            code = 1
            message = "srun ended before the ranks did: Slurm took the nodes away, or one has failed"
            writer.write(Error(message=message))
        mine = [a for a in read_attempts(events, self._stage.name, self._task, batch) if a.number == writer.number]
        progress = mine[0].progress if mine else 0
        writer.write(Ended(exit_code=code, progress=progress))
        writer.close()
        return Attempt(number=writer.number, batch=batch, exit_code=code, progress=progress)

    def _run_job(self, attempt: int, batch: Batch | None) -> int:
        commands = self._commands()
        environment = os.environ | self._environment(attempt, batch)
        self._running = []
        for node, command in enumerate(commands):
            own = processes.child_environment(environment | self._devices(node))
            self._running.append(subprocess.Popen(command, env=own, stdin=subprocess.DEVNULL))
        if self._is_stopping:
            self._on_stop(signal.SIGTERM, None)
        code = _worst(self._wait())
        processes.end_descendants(grace_s=2)
        with suppress(OSError, KeyError):  # not empty, so in use; or a user without a name
            (Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}").rmdir()  # torch makes it when imported
        return EXIT_STOPPED if self._is_stopping and code == 128 + signal.SIGTERM else code

    def _wait(self) -> list[int]:
        """Wait for all nodes; once one has failed, the others get a while and are then ended.

        When the job's own process is gone nobody holds the devices for these ranks any more:
        all is ended at once, before another job can start on them.
        """
        failed_at: float | None = None
        while None in (codes := [process.poll() for process in self._running]):
            if self._parent not in (None, os.getppid()):
                self._is_stopping = True
                processes.end_descendants(grace_s=0)
            if failed_at is None and any(codes):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > _STRAGGLER_S:
                processes.end_descendants(grace_s=5)
            time.sleep(_POLL_S)
        return [process.returncode for process in self._running]

    def _commands(self) -> list[list[str]]:
        """Return what runs the ranks: srun in a job of Slurm's, a torchrun agent a node to train here, else the job."""
        python, wanted = [sys.executable, "-u"], self._stage.resources
        if self._kind.looks_after_itself:
            return [[*python, "-m", self._kind.module, str(self._paths.root)]]
        job = [self._kind.module, str(self._paths.root), self._stage.name]
        if self._slurm_job:
            nodes, each = (wanted.nodes, wanted.devices_per_node) if self._stage.uses_devices else (1, 1)
            options, before = around(self._plan.recipe.environment, self._stage, self._paths)
            if options or before:
                python = [self._plan.recipe.environment.python or "python3", "-u"]
            rank = [*before, *python, "-m", "sousbatch.launchers.slurm.rank", *job]
            cpus = wanted.cpus_per_device
            return [slurm.srun(rank, nodes=nodes, tasks_per_node=each, cpus_per_task=cpus, options=options)]
        if not self._kind.is_distributed:
            return [[*python, "-m", *job]]
        port = free_port()
        return [
            [
                *[*python, "-m", "sousbatch.launchers.local.torchrun_agent"],
                *[f"--nnodes={wanted.nodes}", f"--node-rank={node}", f"--nproc-per-node={wanted.devices_per_node}"],
                *["--rdzv-backend=static", f"--master-addr={LOOPBACK}", f"--master-port={port}", "--max-restarts=0"],
                f"--log-dir={os.devnull}",  # else torchrun leaves a folder of empty folders in TMPDIR
                *["-m", *job],
            ]
            for node in range(wanted.nodes)
        ]

    def _environment(self, attempt: int, batch: Batch | None) -> dict[str, str]:
        given = replace(self._given, attempt=attempt, stop_flag=str(self._flag))
        if batch is not None:
            given = replace(given, micro_batch=batch.micro_batch, accumulation=batch.accumulation)
        if not self._slurm_job:
            return given.to_env()
        address = slurm.node_address(slurm.first_node())
        return given.to_env() | {"MASTER_ADDR": address, "MASTER_PORT": str(free_port(""))}

    def _devices(self, node: int) -> dict[str, str]:
        """Return what makes the processes of a node see their own devices only."""
        if self._stage.resources.device == "cpu":
            return {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        if self._slurm_job:
            return {}  # Slurm has chosen them, and shows each node its own
        granted = os.environ.get("CUDA_VISIBLE_DEVICES") if self._given.devices is None else self._given.devices
        each = self._stage.resources.devices_per_node
        first, names = node * each, granted.split(",") if granted else []
        if granted is None:  # run by hand, where all devices are visible
            names = [str(number) for number in range(first + each)]
        return {"CUDA_VISIBLE_DEVICES": ",".join(names[first : first + each])}


def _worst(codes: Sequence[int]) -> int:
    """Return the one code that explains an attempt: what a rank said wins over how others died of it."""
    for telling in (EXIT_NO_ROOM, EXIT_DEVICE_MEMORY):
        if telling in codes:
            return telling
    others = [code for code in codes if code not in (0, EXIT_STOPPED)]
    if others:
        return others[0] if others[0] > 0 else 128 - others[0]
    return EXIT_STOPPED if EXIT_STOPPED in codes else 0


def _first_of(code: int, begins: int, writer: ledger.Ledger, stage: str) -> int:
    """Return the exit code of the rank that failed first, from what srun wrote to the log from byte *begins* on."""
    try:
        with open("/proc/self/fd/1", "rb") as log:
            log.seek(max(begins, os.fstat(1).st_size - _LOG_END_BYTES))
            told, own = slurm.first_failure(log.read().decode(errors="replace"))
    except OSError:  # not a log that can be read again
        return code
    if told.endswith("Out Of Memory"):
        message = f"{told.removesuffix(': Out Of Memory')} took more host memory than the job has"
        writer.write(Error(message=f"{message}; raise resources.{stage}.memory_gb"))
    return own or code


def _say(text: str) -> None:
    with suppress(OSError):  # the log may lie on a full disk, and Python would keep what it could not print
        os.write(1, f"sousbatch: {text}\n".encode(errors="replace"))


def _tasks(plan: Plan, stage: str, given: JobEnvironment) -> range:
    """Return the tasks of this process: one, or those that an element of a Slurm array shares out to itself."""
    first, count = given.task, plan.stage(stage).num_tasks
    is_shared = plan.site.launcher == "slurm" and slurm.job_id() and given.sweep is None
    return range(first, count, array_size(count, len(plan.stages), plan.site) if is_shared else count)


def main(run: str, stage: str) -> int:
    """Run this task of *stage* of the run in folder *run*; return its exit code."""
    parent = os.getppid() if processes.die_with_parent(signal.SIGTERM) else None
    processes.adopt_orphans()
    paths = RunPaths(root=Path(run))
    try:
        with no_room_named(f"the ledger of {paths.root}"):
            plan, given = read_plan(paths.plan), JobEnvironment.from_env(os.environ)
            codes = []
            for task in _tasks(plan, stage, given):
                codes.append(_Task(paths, plan, plan.stage(stage), replace(given, task=task), parent).run())
                if codes[-1] == EXIT_STOPPED:  # whoever wanted it meant all that this process has to do
                    break
            return _worst(codes)
    except SousbatchError as error:
        _say(str(error))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
