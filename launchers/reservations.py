"""Promise submitted runs their disk space before anything of them is sent.

The jobs rewrite their run's reservation while they write; here it is made when a run is sent, made sure of
when a training starts, and taken back when nothing holds it any more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from .. import ledger
from ..checkpoints import commit
from ..checkpoints.capacity import allocation, reservations
from ..checkpoints.capacity.limits import Limit, read_limits, tightest
from ..checkpoints.capacity.reservations import Holder, Reservation
from ..checkpoints.retention.decisions import make_room
from ..errors import NoRoomError, SlurmError, UsageError
from ..ledger_queries import done_stages
from ..recipes.forecast.storage import later_bytes
from ..recipes.plan import Plan
from ..recipes.retention import retention_rules
from ..run_folder import RunPaths, reserved_runs
from .base import FINAL_WORDS, JobRef, Launcher
from .status import job_refs

LauncherOf = Callable[[str], Launcher]


def reserve(plan: Plan, paths: RunPaths, launcher_of: LauncherOf | None = None) -> None:
    """Promise a run the disk space of its forecast, or what the others leave.

    It is never less than its final weights.

    This process holds the promise, beside the jobs that did before. Where it does not fit, the launchers are
    asked which of the other runs are gone.

    Raises:
        NoRoomError: the others' promises leave no space for the final weights and what follows them.
    """
    reason = _promise(plan, paths)
    if reason and launcher_of:
        release_dead(reservations.shared_runs_dir(paths), launcher_of, reservations.submitted_run(paths))
        reason = _promise(plan, paths, looks=True)
    if reason:
        raise NoRoomError(reason)


def _promise(plan: Plan, paths: RunPaths, *, looks: bool = False) -> str:
    """Publish what a run is promised; return why it cannot, or "".

    What the others have written since they last published it is neither free nor held; who *looks* counts it as held.
    """
    runs_dir, budget_gb = reservations.shared_runs_dir(paths), plan.recipe.checkpoints.store_budget_gb
    with reservations.lock_runs_dir(runs_dir):
        held, known = allocation.measure_usage(paths.root), reservations.read_reservation(paths)
        wanted = _least_bytes(plan, paths, held)
        among = reservations.read_others(runs_dir, paths, measures=budget_gb is not None, looks=looks)
        limit = tightest(read_limits(paths.root))
        granted = reservations.grant_bytes(
            wanted_bytes=max(wanted, plan.forecast.storage_peak_bytes),
            held_bytes=held,
            free_bytes=limit.num_bytes or 0,
            store_bytes=None if budget_gb is None else int(budget_gb * 1e9),
            among=among,
            kept_bytes=reservations.promised_before(paths),
        )
        if granted < wanted:
            return _refusal(plan, paths, wanted - held, limit, among)
        mine = Reservation(
            run=paths.run_id,
            promised_bytes=granted,
            held_bytes=held,
            holder=reservations.this_process(known.holder.jobs if known else ()),
            num_points=len(plan.sweep.points) if plan.sweep else 0,
        )
        reservations.publish(paths, mine)
    return ""


def _least_bytes(plan: Plan, paths: RunPaths, held_bytes: int) -> int:
    """Return what a run must come to hold for its final weights and what follows."""
    if plan.sweep is not None:
        return max(held_bytes, plan.forecast.storage_peak_bytes)
    events = ledger.read(paths.ledger_dir)
    done = done_stages(events)
    training = [name for name in plan.forecast.checkpoints if name not in done]
    if not training:
        return held_bytes
    written = held_bytes - sum(allocation.measure_usage(path) for path in (paths.checkpoints_dir, paths.code_dir))
    later = max(0, later_bytes(plan.forecast) - written)
    return held_bytes + later + sum(_missing_bytes(plan, paths, name) for name in training)


def _missing_bytes(plan: Plan, paths: RunPaths, stage: str) -> int:
    """Return what must be free for the final weights of *stage*.

    It is nothing where deleting its older checkpoints frees enough.
    """
    folder, weights = paths.checkpoints(stage), plan.forecast.checkpoints[stage].least_bytes
    if (folder / allocation.RESERVE_NAME).exists():
        return 0
    rules = retention_rules(plan.stage(stage).settings)
    mine = commit.committed(folder)
    return 0 if make_room(mine, rules, need_bytes=weights, free_bytes=0, weights_bytes=weights).is_enough else weights


def _refusal(plan: Plan, paths: RunPaths, missing_bytes: int, limit: Limit, among: Sequence[Reservation]) -> str:
    """Return what does not fit, whose promises take the space, and what helps."""
    budget_gb = plan.recipe.checkpoints.store_budget_gb
    taken = [max(one.promised_bytes, one.held_bytes) for one in among]
    largest = sorted(zip(taken, among, strict=True), key=lambda one: -one[0])
    names = [f"{one.run} ({_gb(num_bytes)})" for num_bytes, one in largest[:3] if num_bytes]
    more = f" and {len(largest) - 3} more" if len(largest) > 3 else ""
    where, way = f"the {_gb(limit.num_bytes or 0)} of {limit.source}", "free some space"
    if budget_gb is not None:
        where, way = f"checkpoints.store_budget_gb={budget_gb:g}", "raise checkpoints.store_budget_gb"
    what = "what its points write" if plan.sweep else "its final weights and what follows them"
    beside = (
        f" beside what is promised to {', '.join(names)}{more}; wait until one of these has ended, " if names else "; "
    )
    help_ = "`sousbatch cancel` or `sousbatch clean` one, or " if names else ""
    return (
        f"no space for run {paths.run_id}: {what} take {_gb(missing_bytes)} more, which {where} cannot hold"
        f"{beside}{help_}{way}"
    )


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB"


def hold_by_jobs(paths: RunPaths) -> None:
    """Let the jobs in the ledger hold a run's promise instead of this process."""
    with reservations.lock_runs_dir(reservations.shared_runs_dir(paths)):
        known, jobs = reservations.read_reservation(paths), _jobs(paths)
        if known is not None and jobs:
            is_own = replace(known.holder, jobs=()) == reservations.this_process()
            holder = reservations.these_jobs(jobs) if is_own else replace(known.holder, jobs=jobs)
            reservations.publish(paths, replace(known, holder=holder))


def dead_runs(runs_dir: Path, launcher_of: LauncherOf, own: RunPaths | None = None) -> dict[Path, Reservation]:
    """Return the reservations below *runs_dir* whose jobs and process have ended.

    The caller's *own* is not among them.

    Nothing is written. Those that were released before are left out; where there are no others, no launcher is asked.
    """
    found: dict[Path, Reservation] = {}
    for paths in reserved_runs(runs_dir):
        reservation = reservations.read_reservation(paths)
        is_own = own is not None and paths.root == own.root
        if reservation is not None and reservation.holder != Holder() and not is_own:  # else it was released before
            found[paths.root] = reservation
    behind = {root: _behind(RunPaths(root=root), one.holder) for root, one in found.items()}
    known: set[str] = set()
    for one in behind.values():
        is_here = reservations.is_from_here(one)
        known |= {job for job in one.jobs if is_here or not _is_host_bound(job, launcher_of)}
    gone = _gone(known, launcher_of)
    for root, holder in behind.items():
        if not reservations.is_from_here(holder):
            gone |= _ended(RunPaths(root=root), holder, launcher_of)
    return {root: one for root, one in found.items() if reservations.is_dead(behind[root], gone.__contains__)}


def release_dead(runs_dir: Path, launcher_of: LauncherOf, own: RunPaths | None = None) -> None:
    """Let the dead runs below *runs_dir* promise no more than they hold."""
    for root, reservation in dead_runs(runs_dir, launcher_of, own).items():
        paths, held = RunPaths(root=root), allocation.measure_usage(root)
        released = Reservation(run=reservation.run, promised_bytes=held, held_bytes=held, holder=Holder())
        with reservations.lock_runs_dir(runs_dir):
            if reservations.read_reservation(paths) == reservation:  # else somebody came back meanwhile
                reservations.publish(paths, released)


def _behind(paths: RunPaths, holder: Holder) -> Holder:
    """Return *holder*, with the ledger's jobs where its process named none.

    A process that was killed could not name them.
    """
    if holder.jobs or not reservations.is_dead(holder, lambda job: False):
        return holder
    return replace(holder, jobs=_jobs(paths))


def _is_host_bound(job: str, launcher_of: LauncherOf) -> bool:
    """Return whether only the machine that sent a job knows it."""
    try:
        return launcher_of(job.partition(":")[0]).is_host_bound
    except UsageError:  # a launcher that is not installed here
        return False


def _ended(paths: RunPaths, holder: Holder, launcher_of: LauncherOf) -> set[str]:
    """Return the jobs of another machine that have ended.

    Its restart or the ledger shows it.
    """
    if reservations.has_restarted(holder):
        return {job for job in holder.jobs if _is_host_bound(job, launcher_of)}
    events = ledger.read(paths.ledger_dir)
    done = done_stages(events)
    return {f"{ref.launcher}:{ref.job_id}" for stage, ref in job_refs(events).items() if stage in done}


def _jobs(paths: RunPaths) -> tuple[str, ...]:
    return tuple(
        f"{ref.launcher}:{ref.job_id}" for ref in job_refs(ledger.read(paths.ledger_dir, max_steps=1)).values()
    )


def _gone(jobs: Collection[str], launcher_of: LauncherOf) -> set[str]:
    """Return those of *jobs* whose launcher knows that they have ended.

    A launcher that does not answer knows of none.
    """
    gone: set[str] = set()
    asked: dict[str, list[JobRef]] = {}
    for job in jobs:
        name, _, job_id = job.partition(":")
        asked.setdefault(name, []).append(JobRef(launcher=name, job_id=job_id))
    for name, refs in asked.items():
        with suppress(SlurmError, UsageError):  # also of a Slurm, or a launcher, that is not there any more
            states = launcher_of(name).states(refs)
            gone |= {f"{name}:{ref.job_id}" for ref, state in states.items() if state.word in FINAL_WORDS}
    return gone
