"""The learning rate over time."""

from __future__ import annotations

import pytest
import torch

from sousbatch.jobs.training.schedule import factor
from sousbatch.recipes.schema import Schedule


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(name="constant"), {0: 1.0, 50: 1.0, 99: 1.0}),
        (Schedule(name="linear"), {0: 1.0, 50: 0.5, 100: 0.0}),
        (Schedule(name="linear", min_ratio=0.1), {0: 1.0, 50: 0.55, 100: 0.1}),
        (Schedule(name="cosine"), {0: 1.0, 50: 0.5, 100: 0.0}),
        # system 001 of the sources: T_0 = 202, T_mult = 2 restarts at 202, 606 and 1414
        (
            Schedule(name="cosine_restarts", period_steps=202, period_factor=2.0),
            {101: 0.5, 202: 1.0, 404: 0.5, 606: 1.0, 1414: 1.0},
        ),
        (Schedule(name="step", period_steps=10, decay=0.5), {9: 1.0, 10: 0.5, 25: 0.25}),
        # system 000: cosine with a period of 2 epochs, down to a tenth
        (Schedule(name="cosine_restarts", period_epochs=2, min_ratio=0.1), {0: 1.0, 50: 0.55, 100: 1.0}),
    ],
)
def test_the_rate_has_the_shape_that_was_asked_for(schedule, expected):
    at = factor(
        schedule, steps=100 if schedule.name in ("linear", "cosine") else 2000, warmup_steps=0, steps_per_epoch=50
    )
    assert {step: pytest.approx(at(step)) for step in expected} == expected


@pytest.mark.parametrize("period", [{"period_steps": 25}, {"period_epochs": 0.5}])
def test_a_cosine_with_a_period_is_that_of_torch_which_climbs_back(period):
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=25, eta_min=0.1)
    ours = factor(Schedule(name="cosine", min_ratio=0.1, **period), steps=100, warmup_steps=0, steps_per_epoch=50)
    for step in range(120):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0]), step
        optimizer.step()
        theirs.step()


def test_the_warm_up_rises_to_the_highest_rate_and_never_starts_at_zero():
    at = factor(Schedule(name="linear"), steps=110, warmup_steps=10)
    assert [at(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert at(10) == 1.0 and at(60) == pytest.approx(0.5)


def test_a_run_that_goes_past_its_last_step_stays_at_the_lowest_rate():
    at = factor(Schedule(name="cosine", min_ratio=0.1), steps=100, warmup_steps=0)
    assert at(150) == pytest.approx(0.1)
