"""What is decided at a step boundary: logging, measuring, saving, stopping."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from sousbatch.errors import DivergedError
from sousbatch.jobs.training.callback import StepCallback
from sousbatch.recipes.plan import Batch
from sousbatch.recipes.schema import Checkpoints, Model, Recipe, Train
from sousbatch.run_folder import RunPaths

BATCH = Batch(
    world_size=1, micro_batch=1, accumulation=1, steps=70, steps_per_epoch=10, warmup_steps=0, save_every_steps=20
)


class OneRank:
    rank = 0

    def from_first(self, numbers: list[int]) -> list[int]:
        return numbers


def callback(*, is_asked: bool = False, checkpoints: Checkpoints | None = None, **train: Any) -> StepCallback:
    recipe = Recipe(name="r", model=Model(path="m"), train=Train(**train), checkpoints=checkpoints or Checkpoints())
    job: Any = SimpleNamespace(
        recipe=recipe,
        settings=recipe,
        is_asked_to_stop=lambda: is_asked,
        paths=RunPaths(root=Path("/no/such/run")),
        stage=SimpleNamespace(name="train"),
    )
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
        (15, {}, ""),
        (70, {}, "lset"),
        (15, {"eval_every_steps": 15}, "le"),
        (15, {"eval_every_steps": 15, "eval_split": None}, ""),
        (7, {"is_asked": True}, "lst"),
        (70, {"is_asked": True}, "lset"),
    ],
)
def test_a_step_is_logged_measured_and_saved_when_it_is_due(step: int, options: dict[str, Any], expected: str) -> None:
    assert after_step(step, **options) == expected


@pytest.mark.parametrize("metric", ["loss", "eval_loss"])
def test_a_loss_is_looked_at_before_every_save(metric: Any) -> None:
    control, arguments = TrainerControl(), SimpleNamespace(logging_steps=1000)
    found = callback(checkpoints=Checkpoints(metric=metric), eval_split=None)
    found.on_step_end(arguments, TrainerState(global_step=20), control)
    assert control.should_log and control.should_save


def logged(values: dict[str, float], losses: list[float], *, fp16: bool = False, **train: Any) -> None:
    state = TrainerState(global_step=40, log_history=[{"step": at, "loss": loss} for at, loss in enumerate(losses)])
    callback(**train).on_log(SimpleNamespace(fp16=fp16), state, TrainerControl(), logs=values)


@pytest.mark.parametrize("values", [{"loss": math.nan}, {"loss": math.inf}, {"loss": 1.0, "grad_norm": math.nan}])
def test_a_loss_or_gradient_that_is_no_number_ends_the_training(values: dict[str, float]) -> None:
    with pytest.raises(DivergedError, match=r"diverged at step 40.*; there is no checkpoint yet") as raised:
        logged(values, [])
    assert "consolidate" not in f"{raised.value} {raised.value.advice}"


@pytest.mark.parametrize(("before", "is_suspect"), [([], True), ([math.nan], True), ([3.0], False)])
def test_the_weights_are_suspected_where_no_loss_was_ever_a_number(before: list[float], is_suspect: bool) -> None:
    with pytest.raises(DivergedError) as raised:
        logged({"loss": math.nan}, before)
    assert ("model.path may hold NaN" in str(raised.value)) is is_suspect


def test_an_infinite_gradient_is_nothing_unusual_where_gradients_are_scaled() -> None:
    logged({"loss": 1.0, "grad_norm": math.inf}, [], fp16=True)


@pytest.mark.parametrize(
    ("losses", "train", "is_over"),
    [
        ([5.0, 4.0, 3.0, 2.0, 2.0, 2.0, 2.0], {}, False),
        ([5.0, 4.0, 3.0, 2.0, 2.0, 9.0, 2.0], {}, False),  # one step that went wrong
        ([5.0, 4.0, 3.0, 2.0, 2.0, 2.0, 9.0, 9.0, 9.0], {}, True),
        ([5.0, 4.0, 3.0, 2.0, 2.0, 2.0, 9.0, 9.0, 9.0], {"max_loss_rise": None}, False),
        ([5.0, 4.0, 3.0, 2.0, 2.0, 2.0, 9.0, 9.0, 9.0], {"max_loss_rise": 5.0}, False),
        ([5.0, 4.0, 3.0, 0.01, 0.01, 0.01, 0.5, 0.5, 0.5], {}, False),  # many times nearly nothing
        ([9.0, 9.0, 9.0], {}, False),
    ],
)
def test_a_loss_far_above_its_best_ends_the_training(losses: list[float], train: Any, is_over: bool) -> None:
    with pytest.raises(DivergedError, match="its loss rose from") if is_over else nullcontext():
        logged({"loss": losses[-1]}, losses, **train)


@pytest.mark.parametrize(
    ("metric", "goal", "values", "is_exhausted"),
    [
        ("exact_match", None, [0.1, 0.2], False),
        ("exact_match", None, [0.2, 0.1], True),
        ("cer", None, [0.1, 0.2], True),
        ("exact_match", "lowest", [0.1, 0.2], True),
    ],
)
def test_patience_follows_a_metric_in_its_own_direction(
    metric: str, goal: Any, values: list[float], is_exhausted: bool
) -> None:
    found, control = callback(checkpoints=Checkpoints(metric=metric, goal=goal), patience=1), TrainerControl()
    history = [{"eval_loss": 1.0, f"eval_{metric}": value} for value in values]
    found.on_evaluate(SimpleNamespace(), TrainerState(log_history=history), control)
    assert control.should_training_stop is is_exhausted


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
