"""The bytes that a run may hold, shared with the other runs of its folder.

Each run has one reservation file, written by rename: what it may come to hold, what it surely holds, and who stands
behind it. A grant is what the runs directory can still take once the others' are counted. What a run was promised
before anything was sent, its final weights at least, every later grant leaves it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from ... import files
from ...run_folder import RunPaths, reserved_runs
from ...user_folders import state_dir
from . import allocation


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The jobs and the process that stand behind a reservation.

    Jobs are named as their launcher names them; the process is one of a host's boot. *state* is the state folder, on
    *host*, that knows of local jobs: seen from another one, all of them look lost.
    """

    jobs: tuple[str, ...] = ()
    host: str = ""
    state: str = ""
    boot_id: str = ""
    pid: int = 0
    started: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """The bytes that a run may come to hold, and those that it surely holds.

    The latter are never more than there really are. A sweep's is shared out among its *num_points*, each of which has
    one of its own from its start on.
    """

    run: str
    promised_bytes: int
    held_bytes: int
    holder: Holder
    num_points: int = 0


def this_process(jobs: Sequence[str] = ()) -> Holder:
    """Return this process as a holder."""
    pid = os.getpid()
    return replace(these_jobs(jobs), pid=pid, started=_started(pid))


def these_jobs(jobs: Sequence[str]) -> Holder:
    """Return *jobs* that were sent from here as a holder, without a process."""
    return Holder(jobs=tuple(jobs), host=socket.gethostname(), state=str(state_dir()), boot_id=_boot_id())


def is_from_here(holder: Holder) -> bool:
    """Say whether this machine's launcher knows of a holder's local jobs.

    The launcher is taken with this state folder.
    """
    return not holder.state or (holder.host, holder.state) == (socket.gethostname(), str(state_dir()))


def has_restarted(holder: Holder) -> bool:
    """Say whether a holder's machine is this one and has restarted since.

    No local job lives through that.
    """
    return holder.host == socket.gethostname() and holder.boot_id != _boot_id()


def _started(pid: int) -> float:
    """Return when a process began, in seconds from the boot.

    The time of day may have been set since.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except OSError:  # no such process, or no /proc
        return psutil.Process(pid).create_time()


def _boot_id() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def is_dead(holder: Holder, is_job_gone: Callable[[str], bool]) -> bool:
    """Say whether nobody stands behind a reservation any more.

    A reservation lives while one of its jobs does, or its process; of a process on another host only its
    jobs can show it.
    """
    if any(not is_job_gone(job) for job in holder.jobs):
        return False
    if holder.pid == 0 or holder.host != socket.gethostname():
        return bool(holder.jobs) or holder.pid == 0
    if holder.boot_id != _boot_id():
        return True
    try:  # a process of the same number may be another one
        is_zombie = psutil.Process(holder.pid).status() == psutil.STATUS_ZOMBIE
        return is_zombie or abs(_started(holder.pid) - holder.started) > 1
    except psutil.NoSuchProcess:
        return True


def publish(paths: RunPaths, reservation: Reservation) -> None:
    """Write a run's reservation; it goes with the run's folder."""
    files.write_json(paths.reservation, asdict(reservation))


def read_reservation(paths: RunPaths) -> Reservation | None:
    """Return a run's reservation; None where there is none, or none that can be read."""
    try:
        values = files.read_json(paths.reservation)
        holder = Holder(**values["holder"] | {"jobs": tuple(values["holder"]["jobs"])})
        return Reservation(**values | {"holder": holder})
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def submitted_run(paths: RunPaths) -> RunPaths:
    """Return the run that was submitted: of a sweep's point the sweep, else *paths*."""
    above = RunPaths(root=paths.runs_dir)
    return above if above.plan.is_file() else paths


def shared_runs_dir(paths: RunPaths) -> Path:
    """Return the folder of all runs that share the runs directory of *paths*."""
    return submitted_run(paths).runs_dir


def promised_before(paths: RunPaths) -> int:
    """Return what the other runs leave to *paths* already.

    It is the run's own promise, or its share of its sweep's.
    """
    own, sweep = read_reservation(paths), submitted_run(paths)
    if own is None and sweep != paths and (whole := read_reservation(sweep)) is not None and whole.num_points:
        return 0 if _is_unheld(whole) else whole.promised_bytes // whole.num_points
    return 0 if own is None or (_is_unheld(own) and sweep == paths) else own.promised_bytes


def _is_unheld(reservation: Reservation) -> bool:
    """Say whether the other runs count only what the run holds.

    Of jobs nobody is asked here, so they count as living.
    """
    return is_dead(reservation.holder, lambda job: False)


def read_others(
    store: Path,
    own: RunPaths | None,
    *,
    measures: bool,
    looks: bool = False,
    dead: Collection[Path] = (),
) -> tuple[Reservation, ...]:
    """Return the reservations of the other runs below *store*.

    A dead one promises only what it holds. The run folders of *dead* are those whose jobs have all ended; jobs are not
    asked about here.

    What dead ones hold is *measured* where it counts, for a limit to what all runs hold together: that walks through
    their folders. With *looks* the folders of the others are walked through, too, for what they have not published.
    """
    found: list[Reservation] = []
    for paths in reserved_runs(store):
        reservation = read_reservation(paths) if own is None or paths.root != own.root else None
        if reservation is None:
            continue
        if paths.root in dead or _is_unheld(reservation):
            held = allocation.measure_usage(paths.root) if measures else reservation.held_bytes
            reservation = replace(reservation, promised_bytes=held, held_bytes=held)
        elif reservation.num_points:
            found += _points(paths, reservation, own)
            continue
        elif looks:
            reservation = replace(
                reservation, held_bytes=max(reservation.held_bytes, allocation.measure_usage(paths.root))
            )
        found.append(reservation)
    return tuple(found)


def _points(sweep: RunPaths, whole: Reservation, own: RunPaths | None) -> Iterator[Reservation]:
    """Yield what the points of a *sweep* that have begun are promised.

    The point's *own* is left out; the shares of the other points follow. A point lives as long as its sweep: between
    two of its stages nobody else stands behind it.
    """
    begun = {point.root: read_reservation(point) for point in reserved_runs(sweep.root)}
    if own is not None and submitted_run(own) == sweep:
        begun[own.root] = None  # counted as begun
    num_waiting = max(0, whole.num_points - len(begun))
    yield replace(whole, promised_bytes=num_waiting * whole.promised_bytes // whole.num_points, held_bytes=0)
    yield from (reservation for reservation in begun.values() if reservation is not None)


def grant_bytes(
    *,
    wanted_bytes: int,
    held_bytes: int,
    free_bytes: int,
    store_bytes: int | None,
    among: Sequence[Reservation],
    kept_bytes: int = 0,
) -> int:
    """Return how much a run may come to hold of the *wanted_bytes*.

    It is never less than the run holds, or than *kept_bytes*. *free_bytes* is what the disk can take now: what the
    others may yet write is not free. *store_bytes* is the most that all runs may hold together, None for no such limit.
    *kept_bytes* is what the run was promised before and cannot do without: all others have left that alone since. What
    another run has written and not published yet would else count twice, since it is neither free nor held.
    """
    promised = sum(max(0, one.promised_bytes - one.held_bytes) for one in among)
    most = held_bytes + free_bytes - promised
    if store_bytes is not None:
        most = min(most, store_bytes - sum(max(one.promised_bytes, one.held_bytes) for one in among))
    return max(held_bytes, min(kept_bytes, held_bytes + free_bytes), min(wanted_bytes, most))


@contextmanager
def lock_runs_dir(store: Path) -> Iterator[None]:
    """Hold the lock under which grants are given.

    Where a file system knows no locks, `doctor` says so.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            stack.enter_context(files.locked(store / ".lock"))
        yield
