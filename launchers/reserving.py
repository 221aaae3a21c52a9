"""What submitted runs are promised of their store, from the moment they are queued.

The jobs rewrite their run's reservation while they write; here it is made when a run is sent, and
taken back when nobody stands behind it any more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from .. import ledger
from ..checkpoints import budget
from ..checkpoints.budget import Holder, Reservation
from ..errors import SlurmError
from ..recipes.plan import Plan
from ..rundir import RunPaths
from .base import FINAL_WORDS, JobRef, Launcher
from .status import job_refs


def reserve(plan: Plan, paths: RunPaths) -> None:
    """Promise a run its forecast, less what it holds; its jobs stand behind it."""
    jobs = tuple(
        f"{ref.launcher}:{ref.job_id}" for ref in job_refs(ledger.read(paths.ledger_dir, max_steps=1)).values()
    )
    held = budget.held_bytes(paths.root)
    known = budget.read_reservation(paths)
    holder = Holder(jobs=jobs) if known is None else Holder(**vars(known.holder) | {"jobs": jobs})
    promised = max(held, plan.forecast.storage_peak_bytes)
    with budget.store_locked(paths.root.parent.parent):
        budget.publish(paths, Reservation(run=paths.run_id, promised_bytes=promised, held_bytes=held, holder=holder))


def release_dead(store: Path, launchers: Mapping[str, Launcher], own: RunPaths | None = None) -> None:
    """Leave runs below *store*, but for one's *own*, whose jobs and process are gone with what they hold, and no
    promise. Where no other run is promised anything, no launcher is asked."""
    found: dict[Path, Reservation] = {}
    for path in sorted(store.glob("*/*/reservation.json")):
        reservation = budget.read_reservation(RunPaths(root=path.parent))
        is_own = own is not None and path.parent == own.root
        if reservation is not None and reservation.holder != Holder() and not is_own:  # else it was released before
            found[path.parent] = reservation
    gone = _gone({job for reservation in found.values() for job in reservation.holder.jobs}, launchers)
    for root, reservation in found.items():
        if budget.is_dead(reservation.holder, gone.__contains__):
            held = budget.held_bytes(root)
            released = Reservation(run=reservation.run, promised_bytes=held, held_bytes=held, holder=Holder())
            with budget.store_locked(store):
                budget.publish(RunPaths(root=root), released)


def _gone(jobs: Collection[str], launchers: Mapping[str, Launcher]) -> set[str]:
    """Return those of *jobs* whose launcher knows that they have ended; while it does not answer, nobody can tell."""
    gone: set[str] = set()
    for name, launcher in launchers.items():
        ids = [job.removeprefix(f"{name}:") for job in jobs if job.startswith(f"{name}:")]
        refs = [JobRef(launcher=name, job_id=job_id) for job_id in ids]
        with suppress(SlurmError):  # also of a Slurm that is not there any more
            states = launcher.states(refs)
            gone |= {f"{name}:{ref.job_id}" for ref, state in states.items() if state.word in FINAL_WORDS}
    return gone
