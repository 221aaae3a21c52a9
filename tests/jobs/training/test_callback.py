"""What is decided at a step boundary: logging, measuring, saving, stopping."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from sousbatch.jobs.training.callback import StepCallback
from sousbatch.recipes.plan import Batch
from sousbatch.recipes.schema import Checkpoints, Model, Recipe, Train

BATCH = Batch(
    world_size=1, micro_batch=1, accumulation=1, steps=70, steps_per_epoch=10, warmup_steps=0, save_every_steps=20
)


class OneRank:
    rank = 0

    def from_first(self, numbers: list[int]) -> list[int]:
        return numbers


def callback(*, is_asked: bool = False, checkpoints: Checkpoints | None = None, **train: Any) -> StepCallback:
    recipe = Recipe(name="r", model=Model(path="m"), train=Train(**train), checkpoints=checkpoints or Checkpoints())
    job: Any = SimpleNamespace(recipe=recipe, settings=recipe, is_asked_to_stop=lambda: is_asked)
    ranks: Any = OneRank()
    watchdog: Any = SimpleNamespace(step=lambda: None)
    return StepCallback(job, BATCH, ranks, None, None, watchdog)


def after_step(step: int, **options: Any) -> str:
    """Return what is to be done after *step*, as the first letters of log, save, evaluate, stop training."""
    control, arguments = TrainerControl(), SimpleNamespace(logging_steps=10)
    callback(**options).on_step_end(arguments, TrainerState(global_step=step), control)
    does = {
        "l": control.should_log,
        "s": control.should_save,
        "e": control.should_evaluate,
        "t": control.should_training_stop,
    }
    return "".join(letter for letter, is_done in does.items() if is_done)


@pytest.mark.parametrize(
    ("step", "options", "expected"),
    [
        (7, {}, ""),
        (10, {}, "l"),
        (20, {}, "lse"),
        (20, {"eval_split": None}, "ls"),
        (70, {}, "lset"),
        (15, {"eval_every_steps": 15}, "e"),
        (15, {"eval_every_steps": 15, "eval_split": None}, ""),
        (7, {"is_asked": True}, "st"),
        (70, {"is_asked": True}, "lset"),
    ],
)
def test_a_step_is_logged_measured_and_saved_when_it_is_due(step: int, options: dict[str, Any], expected: str) -> None:
    assert after_step(step, **options) == expected


@pytest.mark.parametrize(("metric", "expected"), [("loss", "ls"), ("eval_loss", "s")])
def test_a_save_is_logged_where_the_loss_is_its_metric(metric: Any, expected: str) -> None:
    control, arguments = TrainerControl(), SimpleNamespace(logging_steps=1000)
    found = callback(checkpoints=Checkpoints(metric=metric), eval_split=None)
    found.on_step_end(arguments, TrainerState(global_step=20), control)
    assert ("l" if control.should_log else "") + ("s" if control.should_save else "") == expected


@pytest.mark.parametrize(("is_asked", "is_stopped"), [(True, True), (False, False)])
def test_a_training_that_was_asked_to_stop_says_so(is_asked: bool, is_stopped: bool) -> None:
    found = callback(is_asked=is_asked)
    found.on_step_end(SimpleNamespace(logging_steps=10), TrainerState(global_step=7), TrainerControl())
    assert found.is_stopped is is_stopped


@pytest.mark.parametrize(
    ("losses", "patience", "goal", "is_exhausted"),
    [
        ([3.0, 2.0, 1.0], 1, "lowest", False),
        ([1.0, 2.0], 1, "lowest", True),
        ([1.0, 2.0], 2, "lowest", False),
        ([3.0, 1.0, 2.0, 1.5], 2, "lowest", True),
        ([1.0, 1.0], 1, "lowest", True),
        ([1.0, 2.0, 3.0], 1, "highest", False),
        ([3.0, 2.0], 1, "highest", True),
        ([1.0, 2.0, 3.0, 4.0], None, "lowest", False),
        ([], 1, "lowest", False),
    ],
)
def test_patience_ends_a_training_that_no_longer_gets_better(
    losses: list[float], patience: int | None, goal: Any, is_exhausted: bool
) -> None:
    found, control = callback(checkpoints=Checkpoints(goal=goal), patience=patience), TrainerControl()
    state = TrainerState(log_history=[{"step": 1, "loss": 0.0}, *({"eval_loss": loss} for loss in losses)])
    found.on_evaluate(SimpleNamespace(), state, control)
    assert control.should_training_stop is is_exhausted
    assert control.should_save is is_exhausted  # also between two checkpoints
