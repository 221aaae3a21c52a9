"""Rotate checkpoints on rank 0.

It frees space before a save and settles older checkpoints after it. Settling (deleting, stripping to weights,
archiving) runs in a thread beside the training. Before a save only what its space still needs is done.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ... import files
from ...checkpoints import commit
from ...checkpoints.capacity import allocation, reservations
from ...checkpoints.capacity.limits import read_limits, tightest
from ...checkpoints.capacity.reservations import Reservation
from ...checkpoints.commit import Checkpoint
from ...checkpoints.retention.admission import SaveRequirements, admit, holds_reserve
from ...checkpoints.retention.decisions import RetentionDecision, decide
from ...checkpoints.retention.save_level import SaveLevel, levels_from
from ...checkpoints.rotation import STATE_NAME, WRITER_LOCK, RetentionResult, carry_out
from ...errors import FencedError, NoRoomError, no_room_named
from ...events import Event, Problem, Saved, Skipped
from ...ledger import Ledger, read
from ...ledger_queries import done_stages
from ...recipes.forecast.storage import checkpoint_of, later_bytes, weights_of, with_slack
from ...recipes.plan import Batch
from ...recipes.retention import removal_options, retention_rules
from ..context import JobContext, say

_SLACK_BYTES = 64 * 1024  # by how much two checkpoints of one run differ: loss scale, pickled counters
_PEAK_SLACK = 1.05  # what the forecast of all that a run holds may be off by
_RESERVE_SLACK_BYTES = 512 * 1024  # what others write on a full disk as soon as the reserve is released
_TRIES = 6


@dataclass(frozen=True, kw_only=True)
class SaveRequest:
    """A save that is due.

    *state_bytes* is the size that `trainer_state.json` will have: it grows with every log. After a save that
    *is_last* the stage is done; after one that *is_stop* the training ends, to be resumed later.
    """

    step: int
    state_bytes: int
    is_last: bool = False
    is_stop: bool = False


@dataclass(frozen=True, kw_only=True)
class _FreeSpace:
    """Bytes that checkpoints may take now, and how many the rest of the run needs."""

    free_bytes: int
    later_bytes: int


class CheckpointRotation:
    """The checkpoints of one attempt's stage, on rank 0."""

    def __init__(self, job: JobContext, batch: Batch, ledger: Ledger | None) -> None:
        self._job, self._batch, self._ledger = job, batch, ledger
        self.folder = job.paths.checkpoints(job.stage.name)
        self._spec, self._rules = job.settings.checkpoints, retention_rules(job.settings)
        self._options = removal_options(job.settings, job.paths, job.stage.name, job.check_fence)
        self._runs_dir = reservations.shared_runs_dir(job.paths)
        self._later_bytes = later_bytes(job.plan.forecast) + _other_weights_bytes(job)
        self._granted_bytes = 0
        self._named_problems: set[str] = set()
        self.budget_bytes = 0
        self.freed_bytes = 0  # by this attempt
        self._thread: threading.Thread | None = None
        self._lock = ExitStack()
        with suppress(OSError):  # a file system without locks; `doctor` says so
            self._lock.enter_context(files.locked(files.make_private_dir(self.folder) / WRITER_LOCK, wait=False))

    def admit(self, highest: SaveLevel, request: SaveRequest) -> SaveLevel:
        """Free space for a save and return the level that fits, not above *highest*."""
        self.wait()
        commit.sweep(self.folder)  # what a kill left must not count against the next one
        need = self._requirements(request)
        with reservations.lock_runs_dir(self._runs_dir):
            if not need.is_last:
                self._keep_reserve(need)
            for level, releases in _tries(highest, is_last=need.is_last):
                if releases:
                    allocation.keep_reserve(self.folder, 0)
                if self._free_space(level, replace(need, has_reserve=self._has_reserve())):
                    return level
        return "none"

    def _free_space(self, level: SaveLevel, need: SaveRequirements) -> bool:
        """Free space for *level* and return whether it is there, by measuring it."""
        stuck: set[Path] = set()
        wanted = need.bytes_of(level)
        for _ in range(_TRIES):
            space = self._measure_space(need)
            free = space.free_bytes
            if free >= wanted:  # a quota that no figure shows would show now
                given = allocation.probe_free_bytes(self.folder, wanted)
                free = free if given == wanted else given
            mine = [replace(one, is_pinned=one.is_pinned or one.path in stuck) for one in self._committed()]
            need = replace(need, later_bytes=space.later_bytes)
            found = admit(mine, self._rules, need, free_bytes=free, highest=level)
            if found.level != level:
                return False
            if not found.decisions:
                return True
            stuck |= {done.checkpoint.path for done in self._carry_out(found.decisions) if done.problem}
        return False

    def settle(self, saved: Checkpoint, request: SaveRequest, *, stall_s: float) -> None:
        """Record what was saved, and settle the older checkpoints beside the training."""
        self._note(
            Saved(
                step=saved.step,
                content=saved.content,
                num_bytes=saved.num_bytes,
                metric=saved.metric,
                held_bytes=allocation.measure_usage(self.folder),
                budget_bytes=self.budget_bytes,
                stall_s=stall_s,
            )
        )
        self._thread = threading.Thread(target=self._settle, args=(request,), daemon=True)
        self._thread.start()

    def _settle(self, request: SaveRequest) -> None:
        try:
            need = self._requirements(replace(request, is_stop=False))  # whether the next save stops is not known
            self._carry_out(decide(self._committed(), self._rules, weights_bytes=need.weights_bytes))
            if request.is_last:
                return
            with reservations.lock_runs_dir(self._runs_dir):
                space = self._measure_space(need)
            need = replace(need, later_bytes=space.later_bytes)
            found = admit(self._committed(), self._rules, need, free_bytes=space.free_bytes)
            if all(one.action == "strip" for one in found.decisions):  # what goes for good can wait till it must
                self._carry_out(found.decisions)
        except FencedError:  # the next save says so
            return
        except Exception as error:  # beside the training, nobody would see it
            self._note(Problem(message=str(error)))

    def wait(self) -> None:
        """Wait until what runs beside the training has ended."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Settle the last save and give back all but what the later stages write."""
        self.wait()
        with suppress(OSError, FencedError):
            self._job.check_fence()  # what looks left over may be what the next attempt writes
            commit.sweep(self.folder)
            allocation.keep_reserve(self.folder, 0)
            # the attempt that saved last may have been killed before it had settled
            self._settle(SaveRequest(step=0, state_bytes=0, is_last=True))
            self._lock.close()
            held = allocation.measure_usage(self._job.paths.root)
            self._publish(held + self._later_bytes, held)

    def record_skipped(self, step: int, reason: str) -> None:
        """Record a save that was left out."""
        self._note(Skipped(step=step, message=reason))

    def _committed(self) -> tuple[Checkpoint, ...]:
        return commit.committed(self.folder)

    def _requirements(self, request: SaveRequest) -> SaveRequirements:
        settings, model = self._job.settings, self._job.plan.inputs.model
        world_size = self._batch.world_size
        alike = [one for one in self._committed() if one.content == "full" and one.world_size == world_size]
        full = with_slack(checkpoint_of(settings, model, self._batch).num_bytes)
        if alike:
            grown = max(0, request.state_bytes - _size(alike[-1].path / STATE_NAME))
            full = allocation.measure_usage(alike[-1].path) + grown + _SLACK_BYTES
        return SaveRequirements(
            full_bytes=full,
            weights_bytes=with_slack(weights_of(settings, model).num_bytes),
            later_bytes=self._later_bytes,
            is_last=request.is_last,
            is_stop=request.is_stop,
            has_reserve=self._has_reserve(),
        )

    def _has_reserve(self) -> bool:
        return (self.folder / allocation.RESERVE_NAME).exists()

    def _keep_reserve(self, need: SaveRequirements) -> None:
        """Reserve space for the final weights, where that leaves the level unchanged."""
        space = self._measure_space(need)
        mine = sum(one.num_bytes for one in self._committed() if not one.is_pinned)
        capacity = space.free_bytes + mine + _size(self.folder / allocation.RESERVE_NAME)
        size = need.weights_bytes + _RESERVE_SLACK_BYTES
        need = replace(need, later_bytes=space.later_bytes)
        reserve = size if holds_reserve(need, self._rules, capacity_bytes=capacity, reserve_bytes=size) else 0
        with suppress(NoRoomError), no_room_named("the reserve"):
            allocation.keep_reserve(self.folder, reserve)

    def _measure_space(self, need: SaveRequirements) -> _FreeSpace:
        """Measure what is held and free, and publish it; the runs directory is locked."""
        held, run_held = allocation.measure_usage(self.folder), allocation.measure_usage(self._job.paths.root)
        limit = tightest(read_limits(self.folder))
        is_short_of_files = limit.num_files is not None and limit.num_files < self._num_files()
        spec = self._spec
        peak = int(self._job.plan.forecast.storage_peak_bytes * _PEAK_SLACK) + _SLACK_BYTES
        self._granted_bytes = reservations.grant_bytes(
            # with that much the levels do not depend on what was promised, which knows nothing of stops
            wanted_bytes=max(peak, run_held + need.full_bytes + 4 * need.weights_bytes + need.later_bytes),
            held_bytes=run_held,
            free_bytes=0 if is_short_of_files else limit.num_bytes or 0,
            store_bytes=None if spec.store_budget_gb is None else int(spec.store_budget_gb * 1e9),
            among=reservations.read_others(self._runs_dir, self._job.paths, measures=spec.store_budget_gb is not None),
            kept_bytes=min(reservations.promised_before(self._job.paths), run_held + need.final_bytes),
        )
        self._publish(self._granted_bytes, run_held)
        in_runs_dir = self._granted_bytes - run_held
        free = in_runs_dir if spec.budget_gb is None else min(in_runs_dir, int(spec.budget_gb * 1e9) - held)
        self.budget_bytes = held + free
        # what the checkpoints' own budget leaves alone is there for the rest of the run
        return _FreeSpace(free_bytes=free, later_bytes=max(0, self._later_bytes - (in_runs_dir - free)))

    def _num_files(self) -> int:
        """Return how many files the next checkpoint may have: three a rank, and a dozen."""
        return 20 + 3 * self._batch.world_size

    def _carry_out(self, decisions: Sequence[RetentionDecision]) -> list[RetentionResult]:
        """Act, and record each act; the other runs first learn that less is surely held."""
        frees = sum(decision.frees_bytes for decision in decisions)
        if frees:
            self._publish(self._granted_bytes, max(0, allocation.measure_usage(self._job.paths.root) - frees))
        found = []
        for done in carry_out(decisions, self._options):
            if done.problem and done.problem not in self._named_problems:
                self._named_problems.add(done.problem)
                say(f"warning: step {done.checkpoint.step} is kept: {done.problem}")
            if done.outcome != "kept":
                self.freed_bytes += done.checkpoint.num_bytes - done.left_bytes
            held = allocation.measure_usage(self.folder)
            self._note(done.event(held_bytes=held, budget_bytes=self.budget_bytes))
            found.append(done)
        return found

    def _publish(self, promised: int, held: int) -> None:
        known = reservations.read_reservation(self._job.paths)
        holder = reservations.this_process(known.holder.jobs if known else ())
        reservations.publish(
            self._job.paths,
            Reservation(run=self._job.paths.run_id, promised_bytes=max(promised, held), held_bytes=held, holder=holder),
        )

    def _note(self, event: Event) -> None:
        if self._ledger is not None:
            self._ledger.write(event)


def _tries(highest: SaveLevel, *, is_last: bool) -> list[tuple[SaveLevel, bool]]:
    """Return the levels to try, and whether the reserve is released before each.

    The last save keeps the reserve while a full state fits beside it: should the disk fill up while the state is
    written, the weights still have their space.
    """
    tries: list[tuple[SaveLevel, bool]] = [(level, is_last) for level in levels_from(highest)]
    return [("full", False), *tries] if is_last and highest == "full" else tries


def _other_weights_bytes(job: JobContext) -> int:
    """Return what the final weights of the run's other, unfinished trainings take."""
    events = read(job.paths.ledger_dir, max_steps=1)
    done = done_stages(events)
    checkpoints = job.plan.forecast.checkpoints
    return sum(kept.least_bytes for name, kept in checkpoints.items() if name not in done | {job.stage.name})


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
