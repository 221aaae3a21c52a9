"""What rank 0 does about checkpoints besides writing them: admit the next one, settle the older ones.

Settling (deleting, thinning, archiving) runs in a thread beside the training; before a save only
what is still needed for its room.
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
class _Room:
    """Bytes that the checkpoints may take now, and how many of these the rest of the run needs."""

    free_bytes: int
    later_bytes: int


class Keeping:
    """The checkpoints of one attempt's stage, on rank 0."""

    def __init__(self, job: JobContext, batch: Batch, ledger: Ledger | None) -> None:
        self._job, self._batch, self._ledger = job, batch, ledger
        self.folder = job.paths.checkpoints(job.stage.name)
        self._spec, self._rules = job.settings.checkpoints, retention_rules(job.settings)
        self._options = removal_options(job.settings, job.paths, job.stage.name, job.check_fence)
        self._store = reservations.shared_runs_dir(job.paths)
        self._later_bytes = later_bytes(job.plan.forecast) + _other_weights_bytes(job)
        self._granted_bytes = 0
        self._told: set[str] = set()
        self.budget_bytes = 0
        self._thread: threading.Thread | None = None
        self._lock = ExitStack()
        with suppress(OSError):  # a store without locks; `doctor` says so
            self._lock.enter_context(files.locked(files.make_private_dir(self.folder) / WRITER_LOCK, wait=False))

    def admit(self, highest: SaveLevel, *, state_bytes: int, is_last: bool, is_stop: bool) -> SaveLevel:
        """Make room for the next checkpoint and return what of it fits, not above *highest*.

        *state_bytes* is the size that `trainer_state.json` will have: it grows with every log.
        """
        self.wait()
        commit.sweep(self.folder)  # what a kill left must not count against the next one
        need = self._need(state_bytes, is_last=is_last)
        with reservations.lock_runs_dir(self._store):
            self._keep_reserve(need)
            need = replace(need, is_stop=is_stop, has_reserve=self._has_reserve())
            for level in levels_from(highest):
                if self._clear(level, need):
                    return level
        return "none"

    def _clear(self, level: SaveLevel, need: SaveRequirements) -> bool:
        """Make room for *level* and say whether it is there; what was freed is measured, not believed."""
        stuck: set[Path] = set()
        wanted = need.bytes_of(level)
        for _ in range(_TRIES):
            room = self._room(need)
            free = room.free_bytes
            if free >= wanted:  # a quota that no figure shows would show now
                given = allocation.probe_free_bytes(self.folder, wanted)
                free = free if given == wanted else given
            mine = [replace(one, is_pinned=one.is_pinned or one.path in stuck) for one in self._mine()]
            need = replace(need, later_bytes=room.later_bytes)
            found = admit(mine, self._rules, need, free_bytes=free, highest=level)
            if found.level != level:
                return False
            if not found.decisions:
                return True
            stuck |= {done.checkpoint.path for done in self._carry_out(found.decisions) if done.problem}
        return False

    def settle(self, saved: Checkpoint, *, state_bytes: int, is_last: bool, stall_s: float) -> None:
        """Record what was saved; then, beside the training, do what the policies say and the next save will need."""
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
        self._thread = threading.Thread(target=self._settle, args=(state_bytes, is_last), daemon=True)
        self._thread.start()

    def _settle(self, state_bytes: int, is_last: bool) -> None:
        try:
            need = self._need(state_bytes, is_last=is_last)
            self._carry_out(decide(self._mine(), self._rules, weights_bytes=need.weights_bytes))
            if is_last:
                return
            with reservations.lock_runs_dir(self._store):
                room = self._room(need)
            need = replace(need, later_bytes=room.later_bytes)
            found = admit(self._mine(), self._rules, need, free_bytes=room.free_bytes)
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
        """End: what should go has gone, the reserve too, and only what the later stages write is promised."""
        self.wait()
        with suppress(OSError, FencedError):
            self._job.check_fence()  # what looks left over may be what the next attempt writes
            commit.sweep(self.folder)
            allocation.keep_reserve(self.folder, 0)
            self._settle(0, True)  # the attempt that saved last may have been killed before
            self._lock.close()
            held = allocation.measure_usage(self._job.paths.root)
            self._publish(held + self._later_bytes, held)

    def skipped(self, step: int, reason: str) -> None:
        """Record a save that was left out."""
        self._note(Skipped(step=step, message=reason))

    def _mine(self) -> tuple[Checkpoint, ...]:
        return commit.committed(self.folder)

    def _need(self, state_bytes: int, *, is_last: bool) -> SaveRequirements:
        settings, model = self._job.settings, self._job.plan.inputs.model
        world_size = self._batch.world_size
        alike = [one for one in self._mine() if one.content == "full" and one.world_size == world_size]
        full = with_slack(checkpoint_of(settings, model, self._batch).num_bytes)
        if alike:
            grown = max(0, state_bytes - _size(alike[-1].path / STATE_NAME))
            full = allocation.measure_usage(alike[-1].path) + grown + _SLACK_BYTES
        return SaveRequirements(
            full_bytes=full,
            weights_bytes=with_slack(weights_of(settings, model).num_bytes),
            later_bytes=self._later_bytes,
            is_last=is_last,
            has_reserve=self._has_reserve(),
        )

    def _has_reserve(self) -> bool:
        return (self.folder / allocation.RESERVE_NAME).exists()

    def _keep_reserve(self, need: SaveRequirements) -> None:
        """Hold room for the weights at the end, where that costs no level; release it for the last save."""
        reserve = 0
        if not need.is_last:
            room = self._room(need)
            mine = sum(one.num_bytes for one in self._mine() if not one.is_pinned)
            capacity = room.free_bytes + mine + _size(self.folder / allocation.RESERVE_NAME)
            size = need.weights_bytes + _RESERVE_SLACK_BYTES
            need = replace(need, later_bytes=room.later_bytes)
            reserve = size if holds_reserve(need, self._rules, capacity_bytes=capacity, reserve_bytes=size) else 0
        with suppress(NoRoomError), no_room_named("the reserve"):
            allocation.keep_reserve(self.folder, reserve)

    def _room(self, need: SaveRequirements) -> _Room:
        """Look at what is held and free, and let the other runs know; the store is locked."""
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
            among=reservations.read_others(self._store, self._job.paths, measures=spec.store_budget_gb is not None),
            kept_bytes=min(reservations.promised_before(self._job.paths), run_held + need.final_bytes),
        )
        self._publish(self._granted_bytes, run_held)
        in_store = self._granted_bytes - run_held
        free = in_store if spec.budget_gb is None else min(in_store, int(spec.budget_gb * 1e9) - held)
        self.budget_bytes = held + free
        # what the checkpoints' own budget leaves alone in the store is there for the rest of the run
        return _Room(free_bytes=free, later_bytes=max(0, self._later_bytes - (in_store - free)))

    def _num_files(self) -> int:
        """Return how many files the next checkpoint may have: three of each rank, and about a dozen."""
        return 20 + 3 * self._batch.world_size

    def _carry_out(self, decisions: Sequence[RetentionDecision]) -> list[RetentionResult]:
        """Act, and record each act; the other runs first learn that less is surely held."""
        frees = sum(decision.frees_bytes for decision in decisions)
        if frees:
            self._publish(self._granted_bytes, max(0, allocation.measure_usage(self._job.paths.root) - frees))
        found = []
        for done in carry_out(decisions, self._options):
            if done.problem and done.problem not in self._told:
                self._told.add(done.problem)
                say(f"warning: step {done.checkpoint.step} is kept: {done.problem}")
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


def _other_weights_bytes(job: JobContext) -> int:
    """Return what the final weights of the run's other trainings take that have not ended."""
    events = read(job.paths.ledger_dir, max_steps=1)
    done = done_stages(events)
    planned = job.plan.forecast.checkpoints
    return sum(one.least_bytes for name, one in planned.items() if name not in done | {job.stage.name})


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
