"""The only place that runs Slurm's commands.

One function runs them, with a time limit and patience. Rows are asked for with format strings, never as JSON, whose
shape changes between versions (torchx#1101). What the rows mean for a run is in `launchers/slurm/launcher.py`.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import NoSlurmError, SlurmError, UnreachableError
from .environment import slurm_client, without_leaks

TIMEOUT_S = 30.0
# What Slurm's commands say when the controller is busy, restarting or out of reach: asking again may help.
_TRANSIENT = re.compile(
    r"unable to contact slurm|socket timed out|connection (refused|reset|timed out)|communication (connection )?failure"
    r"|temporarily unable|transport endpoint|zero bytes were transmitted|unable to establish controller machine"
    r"|slurm backup controller in standby|resource temporarily unavailable|i/o error"
    r"|unexpected message received|protocol authentication error|munge (en|de)code failed|host name lookup failure"
    r"|rejected request, retry|rate limit",
    re.IGNORECASE,
)
# No slurm.conf or an empty one, and no server to fetch one from: the name service has answered that it knows none.
_NOT_CONFIGURED = re.compile(r"could not establish a configuration source|s_p_parse_file: file .* is empty", re.I)
_NO_ERROR = re.compile(r"_add_delay: |^$")  # the library holds its own calls back under a rate limit (23.02 on)
# How squeue and sacct print an exit status, by version; the value is that of wait(2).
_EXIT_STATUS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], int]], ...] = (
    (re.compile(r"(\d+):(\d+)"), lambda found: int(found[1]) << 8 | int(found[2])),  # CODE:SIGNAL, squeue since 23.02
    (re.compile(r"(\d+)"), lambda found: int(found[1])),  # the bare status, squeue up to 22.05
)
_FIELDS = ("ArrayJobID", "ArrayTaskID", "State", "exit_code", "StartTime", "Reason", "Comment")
_FORMAT = ",".join(f"{name}:|" for name in _FIELDS)


@dataclass(frozen=True, kw_only=True)
class JobRow:
    """A job, or the waiting rest of an array, as Slurm reports it.

    *exit_status* is that of wait(2); None when Slurm's word for it, *exit_text*, was not understood.
    """

    job_id: str
    task: str = ""
    state: str
    exit_status: int | None = 0
    exit_text: str = ""
    reason: str = ""
    start: str = ""
    comment: str = ""


def call(
    command: Sequence[str],
    *,
    patience_s: float = 0,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    text: str | None = None,
    keeps: Collection[int] = (),
    reads_errors: bool = False,
    answer: str | None = None,
) -> str:
    """Run one of Slurm's commands and return what it printed.

    With *reads_errors* return what it wrote to stderr. The command is run again for *patience_s* seconds while the
    controller does not answer. It keeps the descriptors *keeps* open, also when this process dies. Its output is taken
    with any exit code where the text *answer* is in it.

    Raises:
        NoSlurmError: no Slurm is configured here.
        UnreachableError: the controller did not answer; whether it acted is unknown.
        SlurmError: Slurm refused; the message is its own.
    """
    environment = {**(environment or without_leaks(os.environ)), **slurm_client(os.environ)}
    if not environment.get("SLURM_CONF"):  # Slurm's commands would wait a minute for a file without a name
        environment.pop("SLURM_CONF", None)
    _check_conf(environment.get("SLURM_CONF"))
    deadline, pause = time.monotonic() + patience_s, 0.5
    while True:
        try:
            done = _call_once(command, environment, folder, text, keeps)
            if done.returncode and not (answer and answer in done.stdout):
                raise _error_of(command[0], done)
            return done.stderr if reads_errors else done.stdout
        except UnreachableError:
            if time.monotonic() + pause > deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 8.0)


def _call_once(
    command: Sequence[str],
    environment: Mapping[str, str],
    folder: Path | None,
    text: str | None,
    keeps: Collection[int],
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            input=text,
            stdin=subprocess.DEVNULL if text is None else None,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
            env=dict(environment),
            cwd=folder,
            pass_fds=tuple(keeps),
        )
    except subprocess.TimeoutExpired as error:
        # such as "Slurm job queue full, sleeping and retrying", which sbatch would keep doing
        said = _complaints(error.stderr.decode(errors="replace") if isinstance(error.stderr, bytes) else "")
        words = f", and said: {said}" if said else ""
        raise UnreachableError(f"{command[0]} got no answer in {TIMEOUT_S:.0f} s{words}") from error
    except FileNotFoundError as error:
        raise NoSlurmError(f"{command[0]} is not on this machine's PATH") from error
    except OSError as error:
        raise SlurmError(f"{command[0]} cannot be run: {error.strerror}") from error


def _check_conf(conf: str | None) -> None:
    if conf and not os.path.isfile(conf):  # Slurm's commands would wait a minute for it
        what = "is no file" if os.path.exists(conf) else "does not exist"
        raise SlurmError(f"SLURM_CONF names {conf}, which {what}; unset it, or start the sandbox it belongs to")


def _complaints(text: str) -> str:
    """Return what a command said on stderr, in one line.

    Its own name and the library's notes are left out.
    """
    lines = [re.sub(r"^\w+: (error: |fatal: )?", "", line).strip() for line in text.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if not _NO_ERROR.match(line)))


def _error_of(name: str, done: subprocess.CompletedProcess[str]) -> SlurmError:
    said = _complaints(done.stderr) or f"exit code {done.returncode}"
    if _TRANSIENT.search(said):
        return UnreachableError(f"{name}: {said}")
    return (NoSlurmError if _NOT_CONFIGURED.search(said) else SlurmError)(f"{name}: {said}")


def parse_exit_status(text: str) -> int | None:
    """Return the status of wait(2) that squeue or sacct printed.

    Every version's form is read; another form gives None.
    """
    found = ((pattern.fullmatch(text.strip()), value) for pattern, value in _EXIT_STATUS)
    return next((value(match) for match, value in found if match), None)


def submit(
    text: str, options: Sequence[str], *, folder: Path, environment: Mapping[str, str], lock: int | None = None
) -> str:
    """Send a batch script and return the job's id.

    It is never sent twice, since Slurm may have accepted it. *folder* is the job's working folder, which relative log
    paths start from. *lock* is the descriptor of a lock that holds as long as sbatch lives, even if this process is
    killed.
    """
    keeps = () if lock is None else (lock,)
    said = call(["sbatch", "--parsable", *options], folder=folder, environment=environment, text=text, keeps=keeps)
    return said.strip().partition(";")[0]  # the cluster's name may follow


def test(text: str, *, folder: Path, environment: Mapping[str, str]) -> str:
    """Ask whether Slurm would take a batch script, without sending it.

    Return when and where it would start.
    """
    said = call(["sbatch", "--test-only"], folder=folder, environment=environment, text=text, reads_errors=True)
    # other lines may follow, such as "Preempts: 19"; 24.11 and 26.05 write a stray "a" behind the time
    found = re.search(r"to start at (\S+)(?: a)? (using .*)", said)
    return f"would start at {found[1]} {found[2]}" if found else ""


def queue(*, patience_s: float = 0) -> list[JobRow]:
    """Return this user's jobs, and those that ended a short time ago.

    The latter are those that ended less than Slurm's MinJobAge ago. It is one call, however many jobs there are. The
    waiting rest of an array is one row.
    """
    command = ["squeue", f"--user={os.getuid()}", "--states=all", "--noheader", f"--Format={_FORMAT}"]
    text = call(command, patience_s=patience_s)
    rows = []
    for line in text.splitlines():
        values = line.split("|", len(_FIELDS) - 1)
        if len(values) < len(_FIELDS):
            continue
        job_id, task, state, status, start, reason, comment = values
        rows.append(
            JobRow(
                job_id=job_id,
                task=task if task.isdigit() else "",
                state=state,
                exit_status=parse_exit_status(status),
                exit_text=status,
                reason=reason,
                start=start if start[:1].isdigit() else "",
                comment=comment.removesuffix("|"),
            )
        )
    return rows


def ended(job_ids: Collection[str]) -> list[JobRow]:
    """Return what the accounting knows of jobs that the queue has forgotten.

    Return nothing where there is no accounting.
    """
    from submitit.slurm.slurm import SlurmInfoWatcher

    command = ["sacct", "--parsable2", "--format=JobID,State,ExitCode", f"--jobs={','.join(sorted(job_ids))}"]
    try:
        found = SlurmInfoWatcher().read_info(call(command))
    except SlurmError:  # storage disabled, or the daemon is down: the ledger and the queue have to do
        return []
    rows = []
    for name, values in found.items():
        job_id, _, task = name.partition("_")
        status = values["ExitCode"]
        rows.append(
            JobRow(
                job_id=job_id,
                task=task,
                state=values["State"].split()[0],
                exit_status=parse_exit_status(status),
                exit_text=status,
            )
        )
    return rows


def cancel(job_ids: Collection[str], *options: str) -> None:
    """Cancel jobs, or with `--signal` send them a signal.

    Jobs that have ended or are unknown are passed over.
    """
    if job_ids:
        try:
            call(["scancel", *options, *job_ids], patience_s=60)
        except UnreachableError:
            raise
        except SlurmError as error:
            if not re.search(r"invalid job id|already complet", str(error), re.IGNORECASE):
                raise


def requeue(job_id: str) -> None:
    """Put a job back into the queue; `ARRAY_TASK` for one task of an array.

    Raises:
        SlurmError: this job or site refuses it.
    """
    call(["scontrol", "requeue", job_id], patience_s=60)


def forbid_requeue(job_id: str) -> None:
    """Keep Slurm from starting a job again, as it does with what it has preempted."""
    command = ["squeue", "--states=all", "--noheader", "--Format=Requeue:|", f"--jobs={job_id}"]
    if call(command, patience_s=60).strip().strip("|") == "0":
        return  # and one that is ending can no longer be changed
    call(["scontrol", "update", f"JobId={job_id}", "Requeue=0"], patience_s=60)


def fate_of(job_id: str) -> Literal["running", "preempted", "gone"]:
    """Say what became of this process's job.

    The job runs, is being preempted, or ended or started again elsewhere. A preempted job runs on through its
    GraceTime. A PreemptTime before the start is one of an earlier start.
    """
    fields = "StateCompact:|,RestartCnt:|,PreemptTime:|,StartTime:|"
    try:
        found = call(["squeue", "--states=all", "--noheader", f"--Format={fields}", f"--jobs={job_id}"], patience_s=60)
    except UnreachableError:
        raise
    except SlurmError:  # Invalid job id
        return "gone"
    state, restarts, preempted, started, *_ = [*found.split("\n")[0].split("|"), "", "", "", ""]
    if restarts != os.environ.get("SLURM_RESTART_COUNT", "0"):
        return "gone"
    if preempted[:1].isdigit() and preempted >= started:  # both in ISO 8601: SLURM_TIME_FORMAT is not handed on
        return "preempted"
    return "running" if state == "R" else "gone"


def node_address(node: str) -> str:
    """Return the address at which other nodes reach *node*.

    Its name alone need not resolve.
    """
    found = re.search(r"\bNodeAddr=(\S+)", call(["scontrol", "--oneliner", "show", "node", node], patience_s=60))
    return found[1] if found else node


def job_id() -> str:
    """Return the id of this process's job, or '' outside a job.

    For a task of an array it is `ARRAY_TASK`.
    """
    from submitit.slurm.slurm import SlurmJobEnvironment

    return SlurmJobEnvironment().job_id if "SLURM_JOB_ID" in os.environ else ""


def first_node() -> str:
    """Return the name of the first node of this process's job."""
    from submitit.slurm.slurm import SlurmJobEnvironment

    return str(SlurmJobEnvironment().hostnames[0])


def first_failure(text: str) -> tuple[str, int | None]:
    """Return srun's line in *text* on the first task that failed, and its exit code.

    Such a line is `n1: task 0: Killed`. srun's own exit code is the highest of all tasks, those that it ended after the
    first included, and 1 for a task that the kernel killed because host memory was short. The code is None where srun
    does not say it; nothing found is ('', None).
    """
    found = re.search(r"^srun: error: (\S+: tasks? [\d,-]+: (.+))$", text, re.MULTILINE)
    if found is None:
        return "", None
    code = re.fullmatch(r"Exited with exit code (\d+)", found[2])
    names = {signal.strsignal(number): 128 + number for number in (signal.SIGKILL, signal.SIGTERM)}
    word = "Killed" if found[2] == "Out Of Memory" else found[2]
    return found[1], int(code[1]) if code else names.get(word)


def is_over_its_time(text: str) -> bool:
    """Return whether Slurm says in *text* that the time limit ended the job."""
    return re.search(r"^slurmstepd\S*: error: \*\*\* .* DUE TO TIME LIMIT \*\*\*$", text, re.MULTILINE) is not None


def srun(
    command: Sequence[str], *, nodes: int, tasks_per_node: int, cpus_per_task: int, options: Sequence[str] = ()
) -> list[str]:
    """Return the command that runs *command* once a rank in this job.

    The first rank that fails ends all. Of several ranks each line of the log begins with the rank that wrote it.

    Each count is said again: srun does not take cpus-per-task from sbatch since Slurm 22.05, and a leaked
    SLURM_CPU_BIND once pinned eight ranks to four cores (goodfire-ai/spd#955).
    """
    return [
        *["srun", f"--nodes={nodes}", f"--ntasks={nodes * tasks_per_node}", f"--ntasks-per-node={tasks_per_node}"],
        *[f"--cpus-per-task={cpus_per_task}", "--mpi=none", "--kill-on-bad-exit=1", "--export=ALL"],
        *["--label"] * (nodes * tasks_per_node > 1),
        *options,
        *command,
    ]
