"""What is promised to runs that wait: `plan` sees it, and it goes with the jobs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

import pytest

from sousbatch import ledger
from sousbatch.checkpoints import budget
from sousbatch.launchers import reserving
from sousbatch.launchers.base import JobRef, JobState, StateWord
from sousbatch.recipes.inputs import room_of
from sousbatch.recipes.plan import Plan, read_plan
from sousbatch.recipes.storage import later_bytes
from sousbatch.rundir import RunPaths

Run = Callable[..., tuple[int, str, str]]


class Launcher:
    """Answers for jobs with one word."""

    name = "local"

    def __init__(self, word: StateWord) -> None:
        self.word = word
        self.asked: list[Collection[JobRef]] = []

    def states(self, refs: Collection[JobRef]) -> dict[JobRef, JobState]:
        self.asked.append(refs)
        return {ref: JobState(word=self.word) for ref in refs}


@pytest.fixture
def queued(sousbatch: Run, project: Path, tmp_path: Path) -> tuple[Plan, RunPaths]:
    """A run whose jobs wait."""
    code, out, err = sousbatch("plan", "small.yaml", "--json", "--runs", str(tmp_path / "runs"))
    assert code == 0, err
    paths = RunPaths(root=tmp_path / "runs" / "small" / json.loads(out)["recipe"]["name"])
    paths.root.mkdir(parents=True)
    paths.plan.write_text(out)
    client = ledger.open_client(paths.ledger_dir)
    client.write("sent", stage="train", key="k", launcher="local", job_id="k")
    client.close()
    plan = read_plan(paths.plan)
    reserving.reserve(plan, paths)
    return plan, paths


def test_what_waits_is_promised_its_forecast(queued: tuple[Plan, RunPaths], tmp_path: Path) -> None:
    plan, paths = queued
    found = budget.read_reservation(paths)
    assert found is not None and found.holder.jobs == ("local:k",)
    assert found.promised_bytes == max(plan.forecast.storage_peak_bytes, found.held_bytes)
    room = room_of(tmp_path / "runs")
    assert (room.num_runs, room.promised_bytes) == (1, found.promised_bytes - found.held_bytes)


def test_a_second_run_is_planned_into_what_the_first_one_leaves(
    queued: tuple[Plan, RunPaths], sousbatch: Run, tmp_path: Path
) -> None:
    plan, paths = queued
    ladder, held = plan.forecast.ladders["train"], budget.held_bytes(paths.root)
    peak = later_bytes(plan.forecast) + ladder.full_bytes
    runs = ["--runs", str(tmp_path / "runs")]
    for store, rung in ((2 * peak, "full"), (2 * peak - 1000, "thinned best")):
        budget.publish(
            paths, budget.Reservation(run="r", promised_bytes=peak, held_bytes=held, holder=budget.this_process())
        )
        _, out, _ = sousbatch("plan", "small.yaml", f"checkpoints.store_budget_gb={store / 1e9}", "--json", *runs)
        assert json.loads(out)["forecast"]["ladders"]["train"]["rung"] == rung
    code, _, err = sousbatch("plan", "small.yaml", f"checkpoints.store_budget_gb={1.1 * peak / 1e9}", *runs)
    assert code == 2 and "checkpoints.store_budget_gb" in err


@pytest.mark.parametrize("word", ["waiting", "running", "cancelled", "lost", "done"])
def test_a_promise_goes_with_its_jobs(queued: tuple[Plan, RunPaths], word: StateWord, tmp_path: Path) -> None:
    _, paths = queued
    reserving.release_dead(tmp_path / "runs", {"local": Launcher(word)})  # type: ignore[arg-type]
    found = budget.read_reservation(paths)
    assert found is not None
    assert (found.promised_bytes > found.held_bytes) == (word in ("waiting", "running"))


def test_another_launchers_jobs_are_left_alone(queued: tuple[Plan, RunPaths], tmp_path: Path) -> None:
    _, paths = queued
    launcher = Launcher("lost")
    reserving.release_dead(tmp_path / "runs", {"slurm": launcher})  # type: ignore[arg-type]
    found = budget.read_reservation(paths)
    assert found is not None and found.promised_bytes > found.held_bytes


def test_many_dead_runs_cost_one_question_and_are_measured_once(
    queued: tuple[Plan, RunPaths], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, paths = queued
    for number in range(20):
        shutil.copytree(paths.root, paths.root.with_name(f"run-{number}"))
    launcher, measured = Launcher("done"), []
    monkeypatch.setattr(budget, "held_bytes", lambda folder: measured.append(folder) or 7)
    for _ in range(2):
        reserving.release_dead(tmp_path / "runs", {"local": launcher})  # type: ignore[arg-type]
    assert [len(refs) for refs in launcher.asked] == [1, 0], "all have the same job"
    assert len(measured) == 21
    assert room_of(tmp_path / "runs").promised_bytes == 0
