"""What submitted runs are promised of their store, from the moment they are queued.

The jobs rewrite their run's reservation while they write; here it is made when a run is sent, and
taken back when nobody stands behind it any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .. import ledger
from ..checkpoints import budget
from ..checkpoints.budget import Holder, Reservation
from ..errors import UnreachableError
from ..recipes.plan import Plan
from ..rundir import RunPaths
from .base import FINAL_WORDS, JobRef, Launcher
from .status import job_refs


def reserve(plan: Plan, paths: RunPaths) -> None:
    """Promise a run its forecast, less what it holds; its jobs stand behind it."""
    jobs = tuple(f"{ref.launcher}:{ref.job_id}" for ref in job_refs(ledger.read(paths.ledger_dir)).values())
    held = budget.held_bytes(paths.root)
    known = budget.read_reservation(paths)
    holder = Holder(jobs=jobs) if known is None else Holder(**vars(known.holder) | {"jobs": jobs})
    promised = max(held, plan.forecast.storage_peak_bytes)
    with budget.store_locked(paths.root.parent.parent):
        budget.publish(paths, Reservation(run=paths.run_id, promised_bytes=promised, held_bytes=held, holder=holder))


def release_dead(store: Path, launchers: Mapping[str, Launcher]) -> None:
    """Leave runs below *store* whose jobs and process are gone with what they hold, and no promise."""
    for path in sorted(store.glob("*/*/reservation.json")):
        paths = RunPaths(root=path.parent)
        found = budget.read_reservation(paths)
        if found is not None and budget.is_dead(found.holder, lambda job: _is_gone(job, launchers)):
            held = budget.held_bytes(paths.root)
            with budget.store_locked(store):
                budget.publish(paths, Reservation(run=found.run, promised_bytes=held, held_bytes=held, holder=Holder()))


def _is_gone(job: str, launchers: Mapping[str, Launcher]) -> bool:
    """Say whether the launcher of *job* knows that it has ended; while it does not answer, nobody can tell."""
    name, _, job_id = job.partition(":")
    ref = JobRef(launcher=name, job_id=job_id)
    try:
        return name in launchers and launchers[name].states([ref])[ref].word in FINAL_WORDS
    except UnreachableError:
        return False
