"""Decide at each step what happens next: log, measure, save, stop.

All ranks decide the same.
"""

from __future__ import annotations

import math
import time
from typing import Any, NoReturn

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...checkpoints import commit
from ...errors import DivergedError
from ...events import Diverged, Step
from ...ledger import Ledger
from ...recipes.plan import Batch
from ...tracking.base import Trackers
from ..context import JobContext, say
from ..watchdog import Watchdog
from . import guard
from .collectives import Ranks
from .throughput import Throughput

_CHECK_EVERY_S = 1.0


class StepCallback(TrainerCallback):
    """Decides after each step, and writes the ledger and the tracker on rank 0."""

    def __init__(
        self,
        job: JobContext,
        batch: Batch,
        ranks: Ranks,
        ledger: Ledger | None,
        tracker: Trackers | None,
        watchdog: Watchdog,
    ) -> None:
        self._job, self._batch, self._ranks, self._watchdog = job, batch, ranks, watchdog
        self.ledger, self._tracker = ledger, tracker
        self.throughput = Throughput(batch.world_size, batch.world_size * batch.micro_batch * batch.accumulation)
        self._next_check, self._checked_at, self._checked_step = 0, time.monotonic(), 0
        self.is_stopped = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._checked_at, self._checked_step, self._next_check = (
            time.monotonic(),
            state.global_step,
            state.global_step + 1,
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.throughput.begin_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._watchdog.step()
        self.throughput.end_step()
        step, train = state.global_step, self._job.settings.train
        is_due = (
            step % self._batch.save_every_steps == 0
            or step in self._job.settings.checkpoints.keep_steps
            or step >= self._batch.steps
        )
        control.should_save = is_due
        control.should_evaluate = bool(train.eval_split) and (
            is_due or (train.eval_every_steps is not None and step % train.eval_every_steps == 0)
        )
        control.should_training_stop = step >= self._batch.steps
        if step >= self._next_check and self._is_asked(step) and step < self._batch.steps:
            self.is_stopped = True
            control.should_save, control.should_training_stop = True, True
        # nothing is saved or measured of a training that has diverged: its loss is looked at before
        control.should_log = step % args.logging_steps == 0 or control.should_save or control.should_evaluate

    def _is_asked(self, step: int) -> bool:
        """Ask rank 0 whether to stop, about once a second, at a step that all ranks know."""
        elapsed, steps = time.monotonic() - self._checked_at, step - self._checked_step
        pause = max(1, int(_CHECK_EVERY_S * steps / max(elapsed, 1e-6)))
        stop, pause = self._ranks.from_first([int(self._job.is_asked_to_stop()), pause])
        self._checked_at, self._checked_step, self._next_check = time.monotonic(), step, step + pause
        return bool(stop)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._watchdog.step()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        patience = self._job.settings.train.patience
        name, sign = self._job.settings.metric_in_logs, 1 if self._job.settings.goal == "lowest" else -1
        found = [sign * entry[name] for entry in state.log_history if name in entry]
        if patience is not None and found and len(found) - 1 - found.index(min(found)) >= patience:
            control.should_training_stop = True
            control.should_save = True  # what was learned since the last save, where this is none

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        values = {
            name: value
            for name, value in (logs or {}).items()
            if isinstance(value, (int, float)) and name != "total_flos"
        }
        if self._ranks.rank == 0 and values.keys() & {"loss", "eval_loss"}:
            names = ("loss", "eval_loss", "learning_rate", self._job.settings.metric_in_logs)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if name in names)
            say(f"step {state.global_step} of {self._batch.steps}: {shown}")
        problem = self._problem(values, state, args)
        if self.ledger is not None:  # rank 0 has it, with or without a tracker
            values = values | self.throughput.values()
            self.ledger.write(Step(step=state.global_step, values=values))
        if self._tracker is not None:
            self._tracker.log(state.global_step, values)
        if problem is not None:
            self._diverge(state.global_step, problem)

    def _problem(self, values: dict[str, float], state: TrainerState, args: TrainingArguments) -> str | None:
        """Return why the training has diverged by what was logged, on all ranks alike."""
        if "loss" not in values:
            return None
        train = self._job.settings.train
        found = guard.not_finite(values, is_scaled=bool(args.fp16))
        if found is not None and not any(math.isfinite(one["loss"]) for one in state.log_history if "loss" in one):
            found += ", and none was a number before: the weights of model.path may hold NaN"  # no rate helps then
        if found is None and train.max_loss_rise is not None:
            found = guard.rising(state.log_history, train.max_loss_rise, train.log_every_steps)
        return found

    def check_answers(self, step: int, answers: guard.Answers, loss: float) -> None:
        """End the training when its answers have become filler; every rank calls it."""
        if answers.is_text and self._job.settings.train.max_loss_rise is not None:
            has = [self._ranks.largest(len(tokens)) for tokens in (answers.chosen, answers.wanted)]
            if answers.became_filler(loss, is_varied=has[0] > 1 or has[1] <= 1):
                self._diverge(step, "its answers to train.eval_split have become one token in all places")

    def _diverge(self, step: int, problem: str) -> NoReturn:
        sign = -1 if self._job.settings.checkpoints.goal == "highest" else 1
        saved = commit.committed(self._job.paths.checkpoints(self._job.stage.name))
        measured = [(sign * one.metric, one.step) for one in saved if one.metric is not None]
        good = min(measured)[1] if measured else saved[-1].step if saved else None
        kept = (
            "there is no checkpoint yet"
            if good is None
            else f"the checkpoint of step {good} is kept, and `checkpoints consolidate` makes a model of it"
        )
        message = f"the training diverged at step {step}: {problem}; {kept}"
        if self.ledger is not None:
            self.ledger.write(Diverged(step=step, message=message))
        raise DivergedError(message)
