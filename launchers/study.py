"""Keep the Optuna study of a search, a journal in its run folder.

The job of every trial reads it and appends to it. Every operation reads the journal anew and holds a lock of the
kernel's, which a killed job cannot leave behind.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .. import files
from ..recipes.plan import Axis, Search
from ..recipes.search import override_of
from ..run_folder import RunPaths

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

_TASK, _RUN = "task", "run"
_MOST_DRAWS = 30  # that give values which another trial had
_NUM_STARTUP = 10  # trials with values at random, before the others teach which are good; Optuna's own number
Word = Literal["complete", "pruned", "failed"]


class Study:
    """The trials of a search, each known by the position of its task.

    Args:
        paths: the run folder of the search.
        search: what it draws from, and what is best.
        num_trials: how many tasks there are.
    """

    def __init__(self, paths: RunPaths, search: Search, num_trials: int) -> None:
        self._folder, self._search = paths.search_dir, search
        self._num_startup = min(_NUM_STARTUP, max(1, num_trials // 2))

    def take(self, task: int) -> tuple[str, ...] | None:
        """Return the overrides of a task's trial, None when it has ended.

        A trial whose job was killed is continued, and one that failed is tried once more with the same values.
        """
        with self._opened() as study:
            trials = study.get_trials(deepcopy=False)
            for trial in trials:  # drawn by a job that was killed before it noted whose the values are
                if not trial.state.is_finished() and _TASK not in trial.user_attrs:
                    study.tell(trial.number, state=_states()["failed"])
            mine = [trial for trial in trials if trial.user_attrs.get(_TASK) == task]
            if not mine:
                return self._new(study, task)
            values = mine[-1].params
            if mine[-1].state == _states()["failed"]:
                study.enqueue_trial(values)
                study.ask(self._distributions()).set_user_attr(_TASK, task)
            elif mine[-1].state.is_finished():
                return None
            return self._overrides(values)

    def note_run(self, task: int, run_id: str) -> None:
        """Note which run a task's trial is."""
        with self._opened() as study:
            if (trial := self._running(study, task)) is not None:
                trial.set_user_attr(_RUN, run_id)

    def should_stop(self, task: int, share: float, value: float) -> bool:
        """Record what a trial measured, and return whether it lags behind the others.

        It measured *value* after a *share* of its steps. Shares are compared, since the trials may have different
        numbers of steps.
        """
        with self._opened() as study:
            if (trial := self._running(study, task)) is None:
                return False
            trial.report(value, round(1000 * share))
            return trial.should_prune()

    def end(self, task: int, word: Word, value: float | None = None) -> None:
        """Tell how a task's trial ended; a complete one has a *value*.

        What another job of the task has told stays.
        """
        with self._opened() as study:
            if (trial := self._running(study, task)) is not None:
                study.tell(trial, value, state=_states()[word])

    def outdone(self) -> list[str]:
        """Return the runs of all trials that are complete or pruned, but for the best.

        Of equal ones the first is the best.
        """
        with self._opened() as study:
            ended = [trial for trial in study.get_trials(deepcopy=False) if _RUN in trial.user_attrs]
        sign, states = 1 if self._search.goal == "lowest" else -1, _states()
        complete = [trial for trial in ended if trial.state == states["complete"]]  # pruned ones may have a value, too
        best = min(complete, key=lambda trial: (sign * (trial.value or 0.0), trial.user_attrs[_TASK]), default=None)
        gone = [trial for trial in ended if trial.state in (states["complete"], states["pruned"]) and trial is not best]
        return [trial.user_attrs[_RUN] for trial in gone]

    def _new(self, study: optuna.Study, task: int) -> tuple[str, ...]:
        """Return values that no other trial had."""
        known = {
            self._overrides(trial.params) for trial in study.get_trials(deepcopy=False) if _TASK in trial.user_attrs
        }
        for number in itertools.count():
            if number == _MOST_DRAWS:  # the likely ones of a small space have been had: then the first of those left
                axes = self._search.axes
                left = (dict(zip((axis.key for axis in axes), values, strict=True)) for values in _all_values(axes))
                study.enqueue_trial(next(values for values in left if self._overrides(values) not in known))
            trial = study.ask(self._distributions())
            values = self._overrides(trial.params)
            if values not in known:
                break
            study.tell(trial, state=_states()["failed"])
        trial.set_user_attr(_TASK, task)
        return values

    def _running(self, study: optuna.Study, task: int) -> optuna.Trial | None:
        """Return a task's trial, None when it has ended.

        A node that Slurm gave up may still run the task.
        """
        import optuna

        for one in reversed(study.get_trials(deepcopy=False)):
            if one.user_attrs.get(_TASK) == task and not one.state.is_finished():
                return optuna.Trial(study, one._trial_id)  # there is no other way to go on with another process's trial
        return None

    def _overrides(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(override_of(axis, values[axis.key]) for axis in self._search.axes)

    def _distributions(self) -> dict[str, BaseDistribution]:
        return {axis.key: _distribution(axis) for axis in self._search.axes}

    @contextmanager
    def _opened(self) -> Iterator[optuna.Study]:
        import optuna
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        folder = files.make_private_dir(self._folder)
        journal = folder / "journal.log"
        with files.locked(folder / "lock"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is new in Optuna, and steps that a resumed trial reports again
            num_lines = _cut_torn_line(journal)
            journal.with_name(f"{journal.name}.lock").unlink(missing_ok=True)  # Optuna's, left by a job that was killed
            yield optuna.create_study(
                storage=optuna.storages.JournalStorage(JournalFileBackend(str(journal))),
                sampler=optuna.samplers.TPESampler(
                    n_startup_trials=self._num_startup, constant_liar=True, seed=self._search.seed + num_lines
                ),
                pruner=optuna.pruners.MedianPruner(n_startup_trials=max(2, self._num_startup // 2)),
                study_name="search",
                direction="minimize" if self._search.goal == "lowest" else "maximize",
                load_if_exists=True,
            )


def _all_values(axes: Sequence[Axis]) -> Iterator[tuple[float | str, ...]]:
    """Return all points of a space without axes of any number."""
    return itertools.product(
        *(axis.choices or range(int(axis.low), int(axis.high) + 1, axis.step or 1) for axis in axes)
    )


def _states() -> dict[Word, optuna.trial.TrialState]:
    from optuna.trial import TrialState

    return {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}


def _cut_torn_line(journal: Path) -> int:
    """Take away the last line of a journal if a kill or a full disk has cut it.

    Return how many lines there are.
    """
    try:
        with journal.open("rb+") as stream:
            text = stream.read()
            whole = text[: text.rfind(b"\n") + 1]
            if len(whole) < len(text):
                stream.truncate(len(whole))
            return whole.count(b"\n")
    except FileNotFoundError:
        return 0


def _distribution(axis: Axis) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.choices:
        return CategoricalDistribution(axis.choices)
    if axis.step is None:
        return FloatDistribution(axis.low, axis.high, log=axis.is_log)
    return IntDistribution(int(axis.low), int(axis.high), log=axis.is_log, step=axis.step)
