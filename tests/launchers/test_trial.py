"""How a trial of a search ends: what is told to the study and written into the run's ledger."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from sousbatch import ledger
from sousbatch.cluster.site import Site
from sousbatch.errors import EXIT_DIVERGED, EXIT_STOPPED
from sousbatch.events import Step, TrialEnded, of
from sousbatch.files import make_private_dir
from sousbatch.launchers.sweep_point import open_point
from sousbatch.launchers.trial import SearchTrial
from sousbatch.recipes.plan import read_plan
from sousbatch.recipes.search import plan_search
from sousbatch.run_folder import RunPaths

HERE = Site(
    name="here", launcher="local", cpus_per_node=4, memory_bytes=16 * 10**9, gpus_per_node=0, gpu_memory_bytes=0
)
ENDS = {
    "complete": (0, False, 0.5, 0, "complete"),
    "stopped for lagging, but at its end before that": (0, True, 0.5, 0, "complete"),
    "without the score": (0, False, None, 1, "failed"),
    "stopped for lagging": (EXIT_STOPPED, True, None, 0, "pruned"),
    "diverged": (EXIT_DIVERGED, False, None, 0, "pruned"),
    "preempted": (EXIT_STOPPED, False, None, EXIT_STOPPED, None),
    "crashed": (3, False, None, 3, "failed"),
    "crashed before it was stopped for lagging": (3, True, None, 0, "pruned"),
}


def begun(runs: Path) -> tuple[SearchTrial, RunPaths, Callable[[], SearchTrial]]:
    """Begin a trial; return it, its run, and what takes it again."""
    space = ["train.learning_rate=tag(log, interval(1e-5,1e-2))"]
    plan = plan_search("small.yaml", ["score.metrics=[cer]", "train.steps=60"], space, HERE, runs, num_trials=2)
    assert plan.sweep is not None and plan.sweep.search is not None
    paths = RunPaths(root=make_private_dir(runs / "small" / plan.run_id))
    take = partial(SearchTrial, plan, plan.sweep.search, paths, 0)
    trial = take()
    assert trial.plan is not None
    _, own, _ = open_point(trial.plan, paths, 0)
    trial.begin(own)
    return trial, own, take


@pytest.mark.parametrize(("code", "lagged", "score", "task_code", "word"), ENDS.values(), ids=ENDS)
def test_the_end_of_a_trial_is_told_once(
    project: Path, code: int, lagged: bool, score: float | None, task_code: int, word: str | None
) -> None:
    trial, own, take = begun(project / "runs")
    if score is not None:
        scores = {"score": {"split": "test", "num_rows": 5, "scores": {"model": {"cer": score}}}}
        own.metrics.write_text(json.dumps(scores))
    assert trial.end(own, code, lagged=lagged) == task_code
    ended = of(ledger.read(own.ledger_dir), TrialEnded)
    assert [(event.word, event.value) for event in ended] == ([(word, score)] if word else [])
    again = take()
    assert (again.plan is None) == (word in ("complete", "pruned"))
    assert again.plan in (None, trial.plan), "a trial that goes on has the values that it had"


def test_a_full_disk_costs_a_look_at_a_trial_and_not_its_training(
    project: Path, mount_tmpfs: Callable[[str], Path]
) -> None:
    disk = mount_tmpfs("size=16m")
    trial, own, take = begun(disk)
    with closing(ledger.open_job(own.ledger_dir, "train", 0, 1)) as job:
        for step in range(50):  # more than there is space for in the last page of the journal
            job.write(Step(step=step, values={"eval_loss": 1.0}))
    with pytest.raises(OSError, match="No space left"), (disk / "other").open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(4096))
    assert not trial.lags(own, read_plan(own.plan).stage("train"))
    (disk / "other").unlink()
    assert take().plan == trial.plan, "what the journal holds can be read"
    assert trial.end(own, 3, lagged=False) == 3


def test_two_jobs_of_one_trial_tell_its_end_once(project: Path) -> None:
    """Slurm starts a task again whose node it has given up, and the first job may still live."""
    trial, own, take = begun(project / "runs")
    other = take()
    assert trial.end(own, EXIT_DIVERGED, lagged=False) == 0
    assert other.end(own, 3, lagged=False) == 3
    assert take().plan is None, "it was told to be pruned"
