"""Give every job its run folder, stage and attempt, and end it with an exit code."""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from .. import ledger
from ..errors import (
    EXIT_DEVICE_MEMORY,
    EXIT_DIVERGED,
    EXIT_NO_ROOM,
    EXIT_STOPPED,
    SousbatchError,
    UsageError,
    is_no_room,
)
from ..events import CancelAsked, Error
from ..job_environment import JobEnvironment
from ..ledger_queries import newest_attempt
from ..recipes.fallbacks import with_fallbacks
from ..recipes.plan import Batch, Plan, Stage, read_plan
from ..recipes.schema import StageSettings
from ..redaction import redacted
from ..run_folder import RunPaths
from ..tracking.base import Trackers, start
from ..tracking.identity import Alert

# What a person is told of by an exit code; after another one the next attempt makes up for it.
_ALERTS: dict[int, Alert | None] = {
    0: "done",
    EXIT_STOPPED: None,
    EXIT_DEVICE_MEMORY: None,
    EXIT_NO_ROOM: "no_space",
    EXIT_DIVERGED: "diverged",
}


@dataclass(frozen=True, kw_only=True)
class JobContext:
    """One job: a task of a stage of a run."""

    paths: RunPaths
    plan: Plan
    stage: Stage
    task: int
    attempt: int
    batch: Batch | None
    trackers: Trackers = field(default_factory=Trackers)

    @property
    def settings(self) -> StageSettings:
        """The recipe as this stage sees it, less what the attempt gives up."""
        return with_fallbacks(self.stage.settings, self.batch.fallbacks if self.batch else ())

    def used_file(self, name: str) -> Path:
        """Return the copy of a file that the recipe names, as it was at submit."""
        used = self.plan.inputs.used_files[name]
        return self.paths.used_file(used.path, used.digest)

    def reach_functions(self, names: Iterable[str]) -> None:
        """Let the own functions among *names* be imported as they were at submit."""
        for name in names:
            if name in self.plan.inputs.used_files:  # one of the working folder
                sys.path.insert(0, str(self.used_file(name).parent))

    def open_ledger(self, rank: int = 0) -> ledger.Ledger:
        """Open the ledger file of one rank of this job."""
        return ledger.open_job(self.paths.ledger_dir, self.stage.name, self.task, self.attempt, rank)

    def check_fence(self) -> None:
        """Raise FencedError when a newer attempt has replaced this one."""
        ledger.check_fence(self.paths.ledger_dir, self.stage.name, self.task, self.attempt)

    def is_asked_to_stop(self) -> bool:
        """Say whether the stage process or a person wants the job to save and leave."""
        flag = self.paths.stop_flag(self.stage.name, self.task)
        if not flag.exists() and self.trackers.wants_stop():
            client = ledger.open_client(self.paths.ledger_dir)  # as `cancel --save`: it is not requeued
            client.write(CancelAsked(stage=self.stage.name, save=True))
            client.close()
            flag.touch()
            say("a person stopped the run where it is tracked")
        return flag.exists()

    def tell(self, kind: Alert, text: str) -> None:
        """Tell a person, where the recipe asks for it."""
        self.trackers.alert(kind, f"{self.paths.recipe_name} {self.paths.run_id}: {self.stage.name} {kind}", text)

    def tell_stalled(self) -> None:
        """Tell a person that the watchdog is about to end the attempt."""
        minutes = self.stage.resources.stall_min
        self.tell("stalled", f"no step for {minutes:g} minutes: the attempt ends; its log shows where each rank waits")

    def open_trackers(self, *, beside_others: bool = False, node: int = 0) -> Trackers:
        """Start the trackers of this task, which `run_job` ends.

        A job that is run by hand has none, and one that works *beside_others* only where the recipe wants a tracked
        run for each task.
        """
        if JobEnvironment.from_env(os.environ).attempt is None:
            return self.trackers
        task = self.task if self.stage.num_tasks > 1 else None
        start(
            self.trackers,
            self.paths.tracking_dir,
            stage=self.stage.name,
            kind=self.stage.kind,
            task=task,
            attempt=self.attempt,
            beside_others=beside_others,
            node=node,
        )
        return self.trackers


def read_context(arguments: Sequence[str]) -> JobContext:
    """Return the context of `RUN STAGE`; the environment names attempt and batch.

    A job that is run by hand joins the newest attempt.
    """
    if len(arguments) != 2:
        raise UsageError("a job is run as: python -m sousbatch.jobs.KIND RUN STAGE")
    paths = RunPaths(root=Path(arguments[0]).resolve())
    plan = read_plan(paths.plan)
    stage = plan.stage(arguments[1])
    given = JobEnvironment.from_env(os.environ)
    attempt = given.attempt or newest_attempt(ledger.read(paths.ledger_dir), stage.name, given.task)
    return JobContext(
        paths=paths,
        plan=plan,
        stage=stage,
        task=given.task,
        attempt=attempt,
        batch=_batch(stage, given),
    )


def _batch(stage: Stage, given: JobEnvironment) -> Batch | None:
    if stage.batch is None or given.micro_batch is None or given.accumulation is None:
        return stage.batch
    fallbacks = tuple(given.fallbacks.split(",")) if given.fallbacks else ()
    return replace(stage.batch, micro_batch=given.micro_batch, accumulation=given.accumulation, fallbacks=fallbacks)


@contextmanager
def importing() -> Iterator[None]:
    """Import with the garbage collector off.

    It takes a quarter of the time that torch and transformers take to import, to find 8 MB; and nothing of what is
    there afterwards is looked at again while the job works.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def say(text: str) -> None:
    """Print a line to the job's log; a log on a full disk costs no training."""
    with suppress(OSError):  # print() would keep what it could not write, and raise at the next one
        os.write(1, f"sousbatch: {text}\n".encode(errors="replace"))


def run_job(kind: str, work: Callable[[JobContext], int], arguments: Sequence[str]) -> int:
    """Do *work* for `RUN STAGE` and return the exit code for the stage process."""
    job: JobContext | None = None
    try:
        job = read_context(arguments)
        if job.stage.kind != kind:
            raise UsageError(
                f"stage {job.stage.name!r} is a {job.stage.kind} stage; run sousbatch.jobs.{job.stage.kind}"
            )
        code = work(job)
        _tell(job, code)
        job.trackers.finish(code)
        return code
    except Exception as error:  # the last frame of a process: every end needs its code and its record
        code = _exit_code(error)
        text = f"sousbatch: {error}\n" if isinstance(error, SousbatchError) else redacted(traceback.format_exc())
        with suppress(OSError):  # the log may be on the full disk that is the error
            os.write(2, text.encode())
        if job is not None:
            event = Error.of_exception(error, exit_code=code)
            _record(job, event)
            _tell(job, code, event.message)
            job.trackers.finish(code, event.message)
        return code


def _tell(job: JobContext, code: int, error: str = "") -> None:
    """Tell a person how the job ended, where the recipe asks for it."""
    is_last = job.stage.name == job.plan.stages[-1].name and job.task == job.stage.num_tasks - 1
    kind = _ALERTS.get(code, "failed") if code or is_last else None
    if kind is not None:
        job.tell(kind, error or f"all stages of {job.paths.root} are done")


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SousbatchError):
        return error.exit_code if error.exit_code in (EXIT_DEVICE_MEMORY, EXIT_NO_ROOM, EXIT_DIVERGED) else 1
    if is_no_room(error):
        return EXIT_NO_ROOM
    if type(error).__name__ == "OutOfMemoryError" or "out of memory" in str(error).lower():
        return EXIT_DEVICE_MEMORY
    return 1


def _record(job: JobContext, event: Error) -> None:
    """Leave the error where `status` finds it, if the disk has space for it."""
    with suppress(OSError):
        writer = job.open_ledger(rank=int(os.environ.get("RANK", "0")))
        writer.write(event)
        writer.close()
