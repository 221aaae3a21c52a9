"""Whole trainings on a budget, as sums: the plan's level holds to the end for any budget and metric.

Also of several runs on one store, in every order in which they can come.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from sousbatch.checkpoints.capacity.reservations import Holder, Reservation, grant_bytes
from sousbatch.checkpoints.commit import Checkpoint
from sousbatch.checkpoints.retention.admission import SaveRequirements, admit, holds_reserve
from sousbatch.checkpoints.retention.decisions import RetentionDecision, decide, make_room
from sousbatch.checkpoints.retention.policies import RetentionRules, standard_rules
from sousbatch.checkpoints.retention.save_level import SaveLevel

FULL, WEIGHTS, NUM_SAVES = 100, 17, 14
LATER, PEAK = 9, 2 * FULL + WEIGHTS + 9  # what follows the training, and the forecast of a run that is planned "full"


@dataclass
class Training:
    """The checkpoints of a training that saves and settles as rank 0 does, within *budget* bytes."""

    budget: int
    rules: RetentionRules = field(default_factory=standard_rules)
    mine: list[Checkpoint] = field(default_factory=list)
    reserve: int = 0
    later: int = 0

    @property
    def held(self) -> int:
        return self.reserve + sum(one.num_bytes for one in self.mine)

    @property
    def free(self) -> int:
        return self.budget - self.held

    def save(self, step: int, metric: float, *, is_last: bool) -> SaveLevel:
        need = SaveRequirements(full_bytes=FULL, weights_bytes=WEIGHTS, later_bytes=self.later, is_last=is_last)
        self.reserve, capacity = 0, self.free + sum(one.num_bytes for one in self.mine if not one.is_pinned)
        if not is_last and holds_reserve(need, self.rules, capacity_bytes=capacity, reserve_bytes=WEIGHTS):
            self.reserve = min(WEIGHTS, self.free)  # really allocated, so only what is free can be
        need = replace(need, has_reserve=self.reserve == WEIGHTS)
        found = admit(self.mine, self.rules, need, free_bytes=self.free)
        self.carry_out(found.decisions)
        if found.level != "none":
            content = "weights" if found.level == "weights" else "full"
            path, size = Path(f"step-{step}-{content}"), need.bytes_of(found.level)
            self.mine.append(Checkpoint(path=path, step=step, num_bytes=size, metric=metric, content=content))
        assert self.free >= 0, "above the budget"
        self.carry_out(decide(self.mine, self.rules, weights_bytes=WEIGHTS))
        if not is_last:
            found_next = admit(self.mine, self.rules, need, free_bytes=self.free)
            if all(decision.action == "strip" for decision in found_next.decisions):
                self.carry_out(found_next.decisions)
        return found.level

    def carry_out(self, decisions: tuple[RetentionDecision, ...]) -> None:
        for decision in decisions:
            one = decision.checkpoint
            if decision.action == "strip":
                assert self.free >= WEIGHTS, "the copy is written before the full one goes"
                self.mine[self.mine.index(one)] = replace(one, content="weights", num_bytes=WEIGHTS)
            elif decision.action in ("delete", "archive"):
                self.mine.remove(one)


def metrics(kind: str, seed: int) -> list[float]:
    numbers = list(range(NUM_SAVES))
    if kind == "improves":
        return [float(-number) for number in numbers]
    if kind == "overfits":
        return [float(abs(number - 1)) for number in numbers]
    return [random.Random(seed).random() for _ in numbers]


KINDS = [(kind, seed) for kind in ("improves", "overfits", "wanders") for seed in range(5)]


@pytest.mark.parametrize(("kind", "seed"), KINDS)
@pytest.mark.parametrize("keep_best", [0, 1, 3])
def test_on_every_budget_a_training_ends_with_its_weights_and_its_level_holds(
    kind: str, seed: int, keep_best: int
) -> None:
    best = min(keep_best, 1)
    for budget in range(WEIGHTS + seed % 5, 6 * FULL, 5):
        training = Training(budget=budget, rules=standard_rules(keep_best=keep_best))
        values = metrics(kind, seed)
        levels = [training.save(step, value, is_last=step == NUM_SAVES - 1) for step, value in enumerate(values)]
        assert levels[-1] != "none", f"the weights at the end are lost on {budget}"
        if budget >= 2 * FULL + best * WEIGHTS:
            assert levels == ["full"] * NUM_SAVES, f"a full state fits each time on {budget}"
        elif budget >= (2 + best) * WEIGHTS:
            assert "none" not in levels, f"weights fit each time on {budget}"
        if budget >= (2 + best) * WEIGHTS and best:
            saved = [value for value, level in zip(values, levels, strict=True) if level != "none"]
            assert min(saved) in {one.metric for one in training.mine}, f"the best is lost on {budget}"


@pytest.mark.parametrize(
    "rules",
    [standard_rules(strips=True), standard_rules(keep_every_steps=3), standard_rules(keep_last=3, keep_best=2)],
)
def test_other_policies_lose_no_final_weights_either(rules: RetentionRules) -> None:
    for budget in range(WEIGHTS, 8 * FULL, 3):
        training = Training(budget=budget, rules=rules)
        values = metrics("wanders", budget)
        levels = [training.save(step, value, is_last=step == NUM_SAVES - 1) for step, value in enumerate(values)]
        assert levels[-1] != "none", f"the weights at the end are lost on {budget}"
        assert "none" not in levels or budget < 3 * WEIGHTS


def test_a_pin_in_the_middle_costs_levels_and_never_the_end() -> None:
    for budget in range(2 * FULL, 5 * FULL, 3):
        training = Training(budget=budget)
        for step, value in enumerate(metrics("overfits", 0)):
            level = training.save(step, value, is_last=step == NUM_SAVES - 1)
            if step == 4:
                training.mine[-1] = replace(training.mine[-1], is_pinned=True)
        assert level != "none" or budget < 2 * FULL + 2 * WEIGHTS


@dataclass
class Run:
    """A run that shares a store: what it published, and how many of its saves are done; -1 before it is submitted."""

    training: Training = field(default_factory=lambda: Training(budget=0, later=LATER))
    promised: int = 0
    published: int = 0
    num_saved: int = -1
    state: str = "planned"
    written: int = 0

    @property
    def held(self) -> int:
        return self.training.held + self.written

    def key(self) -> tuple[object, ...]:
        mine = tuple((one.step, one.num_bytes) for one in self.training.mine)
        return (self.state, self.num_saved, self.promised, self.published, self.training.reserve, self.written, mine)


@dataclass
class Store:
    """Runs that share *size* bytes: a budget of the store, or (*is_disk*) what is free on a disk."""

    size: int
    runs: list[Run]
    num_saves: int
    is_disk: bool = False

    def granted(self, run: Run, wanted: int, kept: int) -> int:
        """Do what a submission and a save do under the store's lock, up to the grant."""
        among = [
            Reservation(run="", promised_bytes=one.promised, held_bytes=one.published, holder=Holder())
            for one in self.runs
            if one is not run
        ]
        run.published = run.held
        return grant_bytes(
            wanted_bytes=wanted,
            held_bytes=run.held,
            free_bytes=self.size - sum(one.held for one in self.runs) if self.is_disk else 10**6,
            store_bytes=None if self.is_disk else self.size,
            among=among,
            kept_bytes=kept,
        )

    def start(self, run: Run) -> None:
        """Submit, or resume: the promise holds the final weights, or nothing starts."""
        mine, rules = run.training.mine, run.training.rules
        clearing = make_room(mine, rules, need_bytes=WEIGHTS, free_bytes=0, weights_bytes=WEIGHTS)
        least = run.held + LATER + (0 if run.training.reserve or clearing.is_enough else WEIGHTS)
        granted = self.granted(run, max(PEAK, least), run.promised)
        run.state = "runs" if granted >= least else "refused"
        if run.state == "runs":
            run.promised, run.num_saved = granted, max(0, run.num_saved)

    def save(self, run: Run) -> None:
        training = run.training
        is_last = run.num_saved == self.num_saves - 1
        training.reserve = 0
        kept = min(run.promised, run.held + WEIGHTS + LATER)
        run.promised = self.granted(run, max(PEAK, run.held + FULL + 4 * WEIGHTS + LATER), kept)
        training.budget = run.promised
        level = training.save(run.num_saved, float(abs(run.num_saved - 1)), is_last=is_last)
        assert level != "none" or not is_last, "the final weights are lost"
        run.num_saved += 1
        if is_last:
            run.state = "trained"

    def end(self, run: Run) -> None:
        """Write what follows the training; all that is left is what the run holds."""
        run.written = LATER
        run.promised = run.published = run.held
        run.state = "done"

    def kill(self, run: Run) -> None:
        run.promised = run.published = run.held
        run.state = "killed"

    def step(self, run: Run) -> None:
        {"planned": self.start, "killed": self.start, "runs": self.save, "trained": self.end}[run.state](run)
        assert sum(one.held for one in self.runs) <= self.size, "the store is overfull"

    def can_go_on(self) -> Iterator[int]:
        return (number for number, run in enumerate(self.runs) if run.state not in ("done", "refused"))


LEAST = WEIGHTS + LATER
BUDGETS = [(LEAST - 1, 0), (LEAST, 1), (130, 1), (2 * PEAK, 2), (2 * PEAK + LEAST - 1, 2), (3 * PEAK - 1, 3)]


@pytest.mark.parametrize(
    ("size", "num_done", "is_disk"), [(*one, False) for one in BUDGETS] + [(PEAK + LEAST, 1, True), (2 * PEAK, 2, True)]
)
def test_three_runs_on_one_store_lose_no_final_weights_in_any_order(size: int, num_done: int, is_disk: bool) -> None:
    """Each step of each run after every step of every other; orders that lead to the same state are walked once.

    At least *num_done* runs end well in each order, and those that do not were refused before they began.
    """
    seen, ends = set[object](), set[tuple[str, ...]]()
    waiting = [Store(size=size, runs=[Run() for _ in range(3)], num_saves=3, is_disk=is_disk)]
    while waiting:
        store = waiting.pop()
        numbers = list(store.can_go_on())
        if not numbers:
            ends.add(tuple(sorted(run.state for run in store.runs)))
        for number in numbers:
            after = replace(store, runs=[*store.runs])
            after.runs[number] = copy.deepcopy(store.runs[number])
            after.step(after.runs[number])
            key = tuple(sorted((run.key() for run in after.runs), key=repr))
            if key not in seen:
                seen.add(key)
                waiting.append(after)
    assert min(end.count("done") for end in ends) == num_done, ends


@pytest.mark.parametrize("is_disk", [False, True])
def test_eight_runs_that_are_killed_and_resumed_lose_no_final_weights(is_disk: bool) -> None:
    for seed in range(60):
        chance = random.Random(seed)
        size = chance.randrange(WEIGHTS + LATER, 9 * PEAK)
        store = Store(size=size, runs=[Run() for _ in range(8)], num_saves=5, is_disk=is_disk)
        while numbers := list(store.can_go_on()):
            run = store.runs[chance.choice(numbers)]
            if run.state == "runs" and chance.random() < 0.15:
                store.kill(run)
            else:
                store.step(run)
        assert any(run.state == "done" for run in store.runs)
