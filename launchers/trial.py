"""Run a trial of a search.

It takes its values from the study, is watched, and what came of it is told.
"""

from __future__ import annotations

import math
from contextlib import suppress

from .. import files, ledger
from ..errors import EXIT_DIVERGED, EXIT_STOPPED
from ..events import CancelAsked, Step, Trial, TrialEnded, of
from ..recipes.plan import Plan, Search, Stage
from ..recipes.search import with_values
from ..run_folder import RunPaths, run_paths
from .history import read_history
from .registry import launcher_named
from .study import Study, Word


class SearchTrial:
    """A trial of the search that runs in the folder *paths*.

    *plan* is that of the search, with the trial's values; None when the trial has ended.
    """

    def __init__(self, sweep: Plan, search: Search, paths: RunPaths, task: int) -> None:
        self._search, self._paths, self._task, self._recipe_name = search, paths, task, sweep.recipe.name
        self._study = Study(paths, search, sweep.stages[0].num_tasks)
        self._values = self._study.take(task)
        self._reader: ledger.LedgerReader | None = None
        self._told = {100}  # at the end there is nothing to prune
        self.plan = with_values(sweep, task, self._values) if self._values is not None else None

    def begin(self, own: RunPaths) -> None:
        """Note that the trial is the run *own*."""
        self._study.note_run(self._task, own.run_id)
        if not of(ledger.read(own.ledger_dir, max_steps=1), Trial):
            pairs = (text.partition("=") for text in self._values or ())
            _write(own, Trial(values={key: value for key, _, value in pairs}))

    def give_up(self) -> None:
        """Tell the study that the trial has no run of its own, or none that could begin."""
        self._study.end(self._task, "failed")

    def lags(self, own: RunPaths, stage: Stage) -> bool:
        """Tell the study what a training has measured since the last look.

        Return whether it lags behind the others. What is measured is `checkpoints.metric`, whatever the search is for:
        it stands for a score until there is one.
        """
        if stage.batch is None or not stage.settings.is_measured:
            return False
        name, sign = stage.settings.metric_in_logs, 1 if stage.settings.goal == self._search.goal else -1
        is_behind = False
        self._reader = self._reader or ledger.LedgerReader(own.ledger_dir)
        for event in of(self._reader.poll(), Step):
            value = event.values.get(name)
            percent = 100 * event.step // stage.steps
            if value is None or not math.isfinite(value) or event.stage != stage.name or percent in self._told:
                continue
            self._told.add(percent)  # a study takes no thousands of values: each is a line that all trials read
            with suppress(OSError):  # a full disk costs a look, and not the training
                is_behind = self._study.should_stop(self._task, event.step / stage.steps, sign * value)
        return is_behind

    def prune(self, own: RunPaths, stage: Stage) -> None:
        """Note that a training that is about to be stopped is not to go on later."""
        _write(own, CancelAsked(stage=stage.name, save=False))

    def end(self, own: RunPaths, code: int, *, lagged: bool) -> int:
        """Tell the study how the trial's run ended; return the exit code of its task.

        A trial that lagged behind or diverged is pruned, which is a result. One that was stopped goes on later. Of the
        trials that are complete or pruned the best alone keeps its checkpoints and models.
        """
        word: Word = "failed"
        value = self._value(own) if code == 0 else None
        if value is not None:  # of one that lagged, too, where it came to its end before it was stopped
            word = "complete"
        elif code == EXIT_DIVERGED or (lagged and code != 0):
            word = "pruned"
        elif code == EXIT_STOPPED:
            return code
        _write(own, TrialEnded(word=word, value=value))
        self._study.end(self._task, word, value)
        if code == 0 and word == "failed":
            print(f"sousbatch: the run {own.root} has no {self._search.metric}, which the search is for", flush=True)
        if word == "failed":
            return code or 1
        self.tidy()
        return 0

    def tidy(self) -> None:
        """Leave checkpoints and models to the best trial alone."""
        for run_id in self._study.outdone():
            _keep_records(run_paths(self._paths.root, self._recipe_name, run_id))

    def _value(self, own: RunPaths) -> float | None:
        """Return what the search is for, as the run has it; None where it has none."""
        row = read_history([own], launcher_named)[0]
        if self._search.is_measured:
            return row.best
        metric = self._search.metric
        return next((value for key, value in row.scores.items() if metric in (key, key.rpartition("/")[2])), None)


def _keep_records(own: RunPaths) -> None:
    """Remove the checkpoints, units and models of a run.

    Its scores, predictions and ledger stay.
    """
    for folder in (own.checkpoints_dir, own.model_dir, *own.unit_dirs()):
        files.remove_tree(folder)
    own.reservation.unlink(missing_ok=True)  # it needs no more space


def _write(own: RunPaths, event: CancelAsked | Trial | TrialEnded) -> None:
    client = ledger.open_client(own.ledger_dir)
    client.write(event)
    client.close()
