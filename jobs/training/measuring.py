"""Measure the answers of the model in training by a metric of its task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...predictions.rows import PredictionRow
from ...predictions.scoring import score_rows
from ...recipes.data.chat import input_of, target_of
from ...recipes.data.post import Post
from ...recipes.data.rows import Row, read_rows
from ...recipes.engines import engine_of
from ...recipes.tasks import task_of
from ..context import JobContext
from ..generation.transformers_engine import TransformersEngine
from ..tasks import runtime_of
from .collectives import Ranks


class AnswerMetric:
    """Answers the first rows of `train.eval_split`, and scores them.

    The ranks share the rows.
    """

    def __init__(self, job: JobContext, ranks: Ranks, tokenizer: Any, progress: Callable[[], None]) -> None:
        """Read the rows; *progress* is called after some of them are answered."""
        settings, split = job.settings, job.stage.splits["predict"]
        answers = replace(settings.predict, samples=1, keep_logprobs=0)  # what is not measured
        self._settings = replace(settings, predict=answers)
        self._ranks, self._tokenizer, self._progress = ranks, tokenizer, progress
        self._task = task_of(settings.task)
        self._rows: list[tuple[int, Row]] = list(enumerate(islice(read_rows(Path(split.path)), split.num_rows)))
        job.reach_functions(settings.predict.post)
        self._post = Post(settings.predict.post, split.name, job.used_file)
        (self._target,) = (column.name for column in self._task.columns(settings, "score"))

    def measure(self, model: Any) -> dict[str, float]:
        """Return {name in the logs: value}, the same on every rank.

        All ranks call it.

        Ranks that hold a part of the weights each compute together. So all have as many rows, the last one several
        times, and as many forward passes.
        """
        model.eval()
        ranks, rows = self._ranks, self._rows
        most = -(-len(rows) // ranks.size)
        mine = [rows[min(place, len(rows) - 1)] for place in range(ranks.rank, most * ranks.size, ranks.size)]
        answered: list[tuple[int, dict[str, Any]]] = []

        def answer() -> None:
            answered.extend(self._answered(model, mine))

        ranks.do("answering rows to measure them", answer)
        found = dict(pair for part in ranks.gather(answered) for pair in part)
        data = self._settings.data
        value = score_rows(
            [self._repaired(PredictionRow.from_json(found[place], position=place), row) for place, row in rows],
            [target_of(data, row, self._target) for _, row in rows],
            [input_of(data, row) for _, row in rows],
            metric=self._settings.checkpoints.metric,
            tokenizer=self._settings.score.tokenizer,
        )
        return {self._settings.metric_in_logs: value}

    def _repaired(self, found: PredictionRow, row: Row) -> PredictionRow:
        """Return a prediction as the merge would write it."""
        if not isinstance(found.prediction, str):
            return found
        try:
            return replace(found, prediction=self._post(found.prediction, found.index + 1, row))
        except UsageError:  # an own function need not take what a model says that has not learned yet
            return found

    def _answered(self, model: Any, rows: Sequence[tuple[int, Row]]) -> list[tuple[int, dict[str, Any]]]:
        states = engine_of(self._settings).model_states(self._settings, self._ranks.size, 0)
        in_step = _InStep(model, self._ranks) if states.weights.shared_by > 1 else None
        loaded: Any = in_step or model
        if self._task.generates:
            loaded = TransformersEngine(self._settings, loaded, self._tokenizer)
        answerer = runtime_of(self._task).answerer(self._settings, loaded, self._tokenizer)
        found: list[tuple[int, dict[str, Any]]] = []
        size = self._settings.predict.unit_rows
        for first in range(0, len(rows), size):
            some = rows[first : first + size]
            answers = answerer.answer(some)
            found += [(place, answer) for (place, _), answer in zip(some, answers, strict=True)]
            self._progress()
        if in_step is not None:
            in_step.finish()
        return found


class _InStep:
    """A sharded model, whose ranks compute together until all are done.

    The number of batches depends on the rows, such as on their lengths or windows; within one, `generate` keeps its
    ranks together.
    """

    def __init__(self, model: Any, ranks: Ranks) -> None:
        self._model, self._ranks, self._last = model, ranks, (model, dict[str, Any]())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **inputs: Any) -> Any:
        return self._compute(self._model, inputs)

    def generate(self, **inputs: Any) -> Any:
        """Generate as the model does, beside the other ranks."""
        return self._compute(self._model.generate, inputs)

    def _compute(self, work: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        self._ranks.largest(1.0)
        self._last = work, inputs
        return work(**inputs)

    def finish(self) -> None:
        """Compute until no rank has more to compute."""
        work, inputs = self._last
        while self._ranks.largest(0.0):
            work(**inputs)
