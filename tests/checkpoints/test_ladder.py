"""Whole trainings on a budget, as sums: whatever the budget and the metric, the plan's rung holds to the end."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from sousbatch.checkpoints.admission import Need, Rung, admit, holds_reserve
from sousbatch.checkpoints.commit import Checkpoint
from sousbatch.checkpoints.retention import Policy, Verdict, decide

FULL, WEIGHTS, NUM_SAVES = 100, 17, 14


@dataclass
class Training:
    """The checkpoints of a training that saves and settles as rank 0 does, within *budget* bytes."""

    budget: int
    policy: Policy = field(default_factory=Policy)
    mine: list[Checkpoint] = field(default_factory=list)
    reserve: int = 0

    @property
    def free(self) -> int:
        return self.budget - self.reserve - sum(one.num_bytes for one in self.mine)

    def save(self, step: int, metric: float, *, is_last: bool) -> Rung:
        need = Need(full_bytes=FULL, weights_bytes=WEIGHTS, is_last=is_last)
        self.reserve, capacity = 0, self.free + sum(one.num_bytes for one in self.mine if not one.is_pinned)
        if not is_last and holds_reserve(need, self.policy, capacity_bytes=capacity, reserve_bytes=WEIGHTS):
            self.reserve = min(WEIGHTS, self.free)  # really allocated, so only what is free can be
        need = replace(need, has_reserve=self.reserve == WEIGHTS)
        found = admit(self.mine, self.policy, need, free_bytes=self.free)
        self.carry_out(found.verdicts)
        if found.rung != "none":
            content = "weights" if found.rung == "weights" else "full"
            path, size = Path(f"step-{step}-{content}"), need.bytes_of(found.rung)
            self.mine.append(Checkpoint(path=path, step=step, num_bytes=size, metric=metric, content=content))
        assert self.free >= 0, "above the budget"
        self.carry_out(decide(self.mine, self.policy, weights_bytes=WEIGHTS))
        if not is_last:
            found_next = admit(self.mine, self.policy, need, free_bytes=self.free)
            if all(verdict.action == "thin" for verdict in found_next.verdicts):
                self.carry_out(found_next.verdicts)
        return found.rung

    def carry_out(self, verdicts: tuple[Verdict, ...]) -> None:
        for verdict in verdicts:
            one = verdict.checkpoint
            if verdict.action == "thin":
                assert self.free >= WEIGHTS, "the copy is written before the full one goes"
                self.mine[self.mine.index(one)] = replace(one, content="weights", num_bytes=WEIGHTS)
            elif verdict.action in ("delete", "archive"):
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
def test_on_every_budget_a_training_ends_with_its_weights_and_its_rung_holds(
    kind: str, seed: int, keep_best: int
) -> None:
    best = min(keep_best, 1)
    for budget in range(WEIGHTS + seed % 5, 6 * FULL, 5):
        training = Training(budget=budget, policy=Policy(keep_best=keep_best))
        values = metrics(kind, seed)
        rungs = [training.save(step, value, is_last=step == NUM_SAVES - 1) for step, value in enumerate(values)]
        assert rungs[-1] != "none", f"the weights at the end are lost on {budget}"
        if budget >= 2 * FULL + best * WEIGHTS:
            assert rungs == ["full"] * NUM_SAVES, f"a full state fits each time on {budget}"
        elif budget >= (2 + best) * WEIGHTS:
            assert "none" not in rungs, f"weights fit each time on {budget}"
        if budget >= (2 + best) * WEIGHTS and best:
            saved = [value for value, rung in zip(values, rungs, strict=True) if rung != "none"]
            assert min(saved) in {one.metric for one in training.mine}, f"the best is lost on {budget}"


@pytest.mark.parametrize("policy", [Policy(thins=True), Policy(keep_every_steps=3), Policy(keep_last=3, keep_best=2)])
def test_other_policies_lose_no_final_weights_either(policy: Policy) -> None:
    for budget in range(WEIGHTS, 8 * FULL, 3):
        training = Training(budget=budget, policy=policy)
        values = metrics("wanders", budget)
        rungs = [training.save(step, value, is_last=step == NUM_SAVES - 1) for step, value in enumerate(values)]
        assert rungs[-1] != "none", f"the weights at the end are lost on {budget}"
        assert "none" not in rungs or budget < 3 * WEIGHTS


def test_a_pin_in_the_middle_costs_rungs_and_never_the_end() -> None:
    for budget in range(2 * FULL, 5 * FULL, 3):
        training = Training(budget=budget)
        for step, value in enumerate(metrics("overfits", 0)):
            rung = training.save(step, value, is_last=step == NUM_SAVES - 1)
            if step == 4:
                training.mine[-1] = replace(training.mine[-1], is_pinned=True)
        assert rung != "none" or budget < 2 * FULL + 2 * WEIGHTS
