"""The study of a search: shared by many processes, continued after kills, and never the same values twice."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from sousbatch.launchers.study import Study
from sousbatch.recipes.plan import Axis, Search
from sousbatch.run_folder import RunPaths

RATE = Axis(key="train.learning_rate", low=1e-5, high=1e-1, is_log=True)
KINDS = Axis(key="adapter", choices=("a", "b"))
SEEDS = Axis(key="seed", low=1, high=3, step=1)

WORKER = """
import math, sys
from pathlib import Path
from sousbatch.launchers.study import Study
from sousbatch.recipes.plan import Axis, Search
from sousbatch.run_folder import RunPaths

rate = Axis(key="train.learning_rate", low=1e-5, high=1e-1, is_log=True)
paths = RunPaths(root=Path(sys.argv[1]))
search = Search(axes=(rate,), seed=7, goal="lowest", metric="eval_loss", is_measured=True)
study = Study(paths, search, int(sys.argv[2]))
for task in map(int, sys.argv[3:]):
    values = study.take(task)
    if values is None:
        continue
    print(task, values[0], flush=True)
    study.note_run(task, f"run-{task}")
    loss = abs(math.log10(float(values[0].partition("=")[2])) + 3)
    study.should_stop(task, 0.5, loss)
    study.end(task, "complete", loss)
"""


def study_of(folder: Path, *axes: Axis, num_trials: int = 10, goal: str = "lowest") -> Study:
    search = Search(axes=axes or (RATE,), seed=7, goal=goal, metric="eval_loss", is_measured=True)
    return Study(RunPaths(root=folder), search, num_trials)


def started(folder: Path, tasks: range, num_trials: int) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", WORKER, str(folder), str(num_trials), *map(str, tasks)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("num_trials", [24, pytest.param(100, marks=pytest.mark.faults)])
def test_eight_processes_share_a_study_and_kills_lose_and_double_no_trial(tmp_path: Path, num_trials: int) -> None:
    """Each process has every eighth task; each of the first four is killed at a random moment and started again."""
    draw = random.Random(3)
    shares = [range(first, num_trials, 8) for first in range(8)]
    said: dict[int, set[str]] = {}
    running = [started(tmp_path, share, num_trials) for share in shares]
    for number in range(4):
        time.sleep(draw.uniform(0.2, 1.0))
        running[number].send_signal(signal.SIGKILL)
        running.append(started(tmp_path, shares[number], num_trials))
    for process in running:
        text, _ = process.communicate(timeout=300)
        assert process.returncode in (0, -signal.SIGKILL)
        for line in text.splitlines():
            said.setdefault(int(line.split()[0]), set()).add(line.split()[1])
    assert sorted(said) == list(range(num_trials))
    assert all(len(values) == 1 for values in said.values()), "a killed trial goes on with the values that it had"
    assert len(set.union(*said.values())) == num_trials
    assert [study_of(tmp_path).take(task) for task in range(num_trials)] == [None] * num_trials
    ended = Counter(json.loads(line)["op_code"] for line in (tmp_path / "search/journal.log").read_text().splitlines())
    assert ended[6] >= num_trials  # Optuna's SET_TRIAL_STATE_VALUES, one for each end
    assert len(study_of(tmp_path).outdone()) == num_trials - 1


def test_a_trial_that_failed_is_tried_again_with_its_values_and_one_that_ended_is_not(tmp_path: Path) -> None:
    first = study_of(tmp_path).take(0)
    study_of(tmp_path).end(0, "failed")
    assert study_of(tmp_path).take(0) == first
    study_of(tmp_path).end(0, "pruned")
    assert study_of(tmp_path).take(0) is None
    assert study_of(tmp_path).take(1) not in (None, first)


def test_a_small_space_is_tried_to_its_last_values(tmp_path: Path) -> None:
    found = [study_of(tmp_path, SEEDS, KINDS).take(task) for task in range(6)]
    assert sorted(filter(None, found)) == [(f"seed={seed}", f"adapter={kind}") for seed in (1, 2, 3) for kind in "ab"]


@pytest.mark.parametrize("tear", ['{"op_code":4,"worker_id":"x', '{"op_code"'])
def test_a_line_that_a_full_disk_cut_costs_no_other(tmp_path: Path, tear: str) -> None:
    before = study_of(tmp_path).take(0)
    with (tmp_path / "search/journal.log").open("a") as journal:
        journal.write(tear)
    assert study_of(tmp_path).take(0) == before
    assert study_of(tmp_path).take(1) is not None
    assert study_of(tmp_path).take(0) == before


@pytest.mark.parametrize(("goal", "sign"), [("lowest", 1), ("highest", -1)])
def test_a_trial_that_lags_behind_is_seen_by_its_share_of_the_steps(tmp_path: Path, goal: str, sign: int) -> None:
    for task in range(3):
        study = study_of(tmp_path, num_trials=4, goal=goal)
        study.take(task)
        study.note_run(task, f"run-{task}")
        assert [study.should_stop(task, share, sign * task) for share in (0.25, 0.5)] == [False, False] or task == 2
        study.end(task, "complete", sign * task)
    study = study_of(tmp_path, num_trials=4, goal=goal)
    study.take(3)
    assert study.should_stop(3, 0.5, sign * 9)
    study.end(3, "pruned")
    assert sorted(study.outdone()) == ["run-1", "run-2"], "a trial without a run has nothing to remove"
