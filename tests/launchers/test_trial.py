"""How a trial of a search ends: what is told to the study and written into the run's ledger."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sousbatch import ledger
from sousbatch.cluster.site import Site
from sousbatch.errors import EXIT_DIVERGED, EXIT_STOPPED
from sousbatch.events import TrialEnded, of
from sousbatch.files import make_private_dir
from sousbatch.launchers.sweep_point import open_point
from sousbatch.launchers.trial import SearchTrial
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


@pytest.mark.parametrize(("code", "lagged", "score", "task_code", "word"), ENDS.values(), ids=ENDS)
def test_the_end_of_a_trial_is_told_once(
    project: Path, code: int, lagged: bool, score: float | None, task_code: int, word: str | None
) -> None:
    space = ["train.learning_rate=tag(log, interval(1e-5,1e-2))"]
    plan = plan_search("small.yaml", ["score.metrics=[cer]"], space, HERE, project / "runs", num_trials=2)
    assert plan.sweep is not None and plan.sweep.search is not None
    paths = RunPaths(root=make_private_dir(project / "runs/small" / plan.run_id))
    trial = SearchTrial(plan, plan.sweep.search, paths, 0)
    assert trial.plan is not None
    _, own, _ = open_point(trial.plan, paths, 0)
    trial.begin(own)
    if score is not None:
        scores = {"score": {"split": "test", "num_rows": 5, "scores": {"model": {"cer": score}}}}
        own.metrics.write_text(json.dumps(scores))
    assert trial.end(own, code, lagged=lagged) == task_code
    ended = of(ledger.read(own.ledger_dir), TrialEnded)
    assert [(event.word, event.value) for event in ended] == ([(word, score)] if word else [])
    again = SearchTrial(plan, plan.sweep.search, paths, 0)
    assert (again.plan is None) == (word in ("complete", "pruned"))
    assert again.plan in (None, trial.plan), "a trial that goes on has the values that it had"
