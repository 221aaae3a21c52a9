"""What is promised to runs that wait: `plan` sees it, and it goes with the jobs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sousbatch import events, ledger
from sousbatch.checkpoints.capacity import allocation, reservations
from sousbatch.errors import NoRoomError, PlanError, UsageError
from sousbatch.launchers import reservations as reserving
from sousbatch.launchers import submission
from sousbatch.launchers.base import JobRef, JobState, StateWord
from sousbatch.launchers.local.launcher import LocalLauncher
from sousbatch.recipes.forecast.storage import later_bytes
from sousbatch.recipes.inspect.inputs import measure_disk_space
from sousbatch.recipes.plan import Plan, read_plan
from sousbatch.run_folder import RunPaths
from sousbatch.run_index import known_runs

Run = Callable[..., tuple[int, str, str]]


class Launcher:
    """Answers for jobs with one word."""

    name = "local"
    is_host_bound = True

    def __init__(self, word: StateWord) -> None:
        self.word = word
        self.asked: list[Collection[JobRef]] = []

    def states(self, refs: Collection[JobRef]) -> dict[JobRef, JobState]:
        self.asked.append(refs)
        return {ref: JobState(word=self.word) for ref in refs}


def only(name: str = "", launcher: Any = None) -> Callable[[str], Any]:
    """Know one launcher, or none."""

    def find(asked: str) -> Any:
        if asked != name:
            raise UsageError(f"no launcher {asked}")
        return launcher

    return find


@pytest.fixture
def queued(sousbatch: Run, project: Path, tmp_path: Path) -> tuple[Plan, RunPaths]:
    """A run whose jobs wait."""
    code, out, err = sousbatch("plan", "small.yaml", "--json", "--runs", str(tmp_path / "runs"))
    assert code == 0, err
    paths = RunPaths(root=tmp_path / "runs" / "small" / json.loads(out)["recipe"]["name"])
    paths.root.mkdir(parents=True)
    paths.plan.write_text(out)
    client = ledger.open_client(paths.ledger_dir)
    client.write(events.Sent(stage="train", key="k", launcher="local", job_id="k"))
    client.close()
    plan = read_plan(paths.plan)
    reserving.reserve(plan, paths)
    reserving.hold_by_jobs(paths)
    return plan, paths


def test_what_waits_is_promised_its_forecast(queued: tuple[Plan, RunPaths], tmp_path: Path) -> None:
    plan, paths = queued
    found = reservations.read_reservation(paths)
    assert found is not None and found.holder.jobs == ("local:k",)
    assert found.promised_bytes == max(plan.forecast.storage_peak_bytes, found.held_bytes)
    room = measure_disk_space(tmp_path / "runs")
    assert (room.num_runs, room.promised_bytes) == (1, found.promised_bytes - found.held_bytes)


def test_a_second_run_is_planned_into_what_the_first_one_leaves(
    queued: tuple[Plan, RunPaths], sousbatch: Run, tmp_path: Path
) -> None:
    plan, paths = queued
    kept, held = plan.forecast.checkpoints["train"], allocation.measure_usage(paths.root)
    peak = later_bytes(plan.forecast) + kept.full_bytes
    runs = ["--runs", str(tmp_path / "runs")]
    for store, keeps_all in ((2 * peak, True), (2 * peak - 1000, False)):
        reservations.publish(
            paths,
            reservations.Reservation(run="r", promised_bytes=peak, held_bytes=held, holder=reservations.this_process()),
        )
        _, out, _ = sousbatch("plan", "small.yaml", f"checkpoints.store_budget_gb={store / 1e9}", "--json", *runs)
        assert json.loads(out)["forecast"]["checkpoints"]["train"]["keeps_all"] is keeps_all
    code, _, err = sousbatch("plan", "small.yaml", f"checkpoints.store_budget_gb={1.1 * peak / 1e9}", *runs)
    assert code == 2 and "checkpoints.store_budget_gb" in err


def test_a_plan_counts_a_dead_run_as_released_and_changes_no_file(
    queued: tuple[Plan, RunPaths], sousbatch: Run, tmp_path: Path
) -> None:
    _, paths = queued  # this machine knows no such job, so the run is dead
    made = reservations.read_reservation(paths)
    assert made is not None and made.promised_bytes > made.held_bytes
    files = [path for name in ("runs", "state") for path in (tmp_path / name).rglob("*") if path.is_file()]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    _, out, _ = sousbatch("plan", "small.yaml", "--json", "--runs", str(tmp_path / "runs"))
    room = json.loads(out)["inputs"]["disk_space"]
    assert (room["num_runs"], room["promised_bytes"]) == (0, 0)
    files = [path for name in ("runs", "state") for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize("word", ["waiting", "running", "cancelled", "lost", "done"])
def test_a_promise_goes_with_its_jobs(queued: tuple[Plan, RunPaths], word: StateWord, tmp_path: Path) -> None:
    _, paths = queued
    reserving.release_dead(tmp_path / "runs", only("local", Launcher(word)))
    found = reservations.read_reservation(paths)
    assert found is not None
    assert (found.promised_bytes > found.held_bytes) == (word in ("waiting", "running"))


def test_another_launchers_jobs_are_left_alone(queued: tuple[Plan, RunPaths], tmp_path: Path) -> None:
    _, paths = queued
    launcher = Launcher("lost")
    reserving.release_dead(tmp_path / "runs", only("slurm", launcher))
    found = reservations.read_reservation(paths)
    assert found is not None and found.promised_bytes > found.held_bytes


def test_jobs_of_another_state_folder_are_not_lost_because_this_one_does_not_know_them(
    queued: tuple[Plan, RunPaths], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, paths = queued
    made = reservations.read_reservation(paths)
    assert made is not None and made.promised_bytes > made.held_bytes
    monkeypatch.setenv("SOUSBATCH_STATE", str(tmp_path / "another state"))
    reserving.release_dead(tmp_path / "runs", only("local", LocalLauncher()))
    assert reservations.read_reservation(paths) == made
    client = ledger.open_client(paths.ledger_dir)
    client.write(events.Ended(stage="train", exit_code=0))  # all that was sent
    client.close()
    reserving.release_dead(tmp_path / "runs", only("local", LocalLauncher()))
    found = reservations.read_reservation(paths)
    assert found is not None and found.promised_bytes == found.held_bytes


def test_many_dead_runs_cost_one_question_and_are_measured_once(
    queued: tuple[Plan, RunPaths], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, paths = queued
    for number in range(20):
        shutil.copytree(paths.root, paths.root.with_name(f"run-{number}"))
    launcher, measured = Launcher("done"), []
    monkeypatch.setattr(allocation, "measure_usage", lambda folder: measured.append(folder) or 7)
    for _ in range(2):
        reserving.release_dead(tmp_path / "runs", only("local", launcher))
    assert [len(refs) for refs in launcher.asked] == [1], "all have the same job"
    assert len(measured) == 21
    assert measure_disk_space(tmp_path / "runs").promised_bytes == 0


def on_budget(plan: Plan, num_bytes: float) -> Plan:
    """Return *plan* as it was made when the store, of *num_bytes* in all, had no other run."""
    spec = replace(plan.recipe.checkpoints, store_budget_gb=num_bytes / 1e9)
    return replace(plan, recipe=replace(plan.recipe, checkpoints=spec))


def folder_of(store: Path, name: str) -> RunPaths:
    paths = RunPaths(root=store / "small" / name)
    paths.root.mkdir(parents=True)
    return paths


def test_of_runs_submitted_at_once_each_that_starts_is_promised_its_final_weights(
    queued: tuple[Plan, RunPaths], tmp_path: Path
) -> None:
    """All three were planned "full" into an empty store; it holds two, and the third one's weights."""
    peak = queued[0].forecast.storage_peak_bytes
    least = later_bytes(queued[0].forecast) + queued[0].forecast.checkpoints["train"].least_bytes
    plan = on_budget(queued[0], 2 * peak + least + 100_000)
    first, second, third, fourth = (folder_of(tmp_path / "store", name) for name in ("a", "b", "c", "d"))
    for paths in (first, second, third):
        reserving.reserve(plan, paths)
    promised = [
        found.promised_bytes for paths in (first, second, third) if (found := reservations.read_reservation(paths))
    ]
    assert promised[:2] == [peak, peak] and least <= promised[2] < peak and sum(promised) <= 2 * peak + least + 100_000
    with pytest.raises(NoRoomError, match=r"final weights.*store_budget_gb=.* promised to a \(.*b \(.*clean") as error:
        reserving.reserve(plan, fourth)
    assert "\n" not in str(error.value) and reservations.read_reservation(fourth) is None
    reserving.reserve(plan, third)  # its training starts: what it was promised stands


def test_a_run_whose_final_weights_are_not_held_is_refused_before_anything_is_sent(
    queued: tuple[Plan, RunPaths], tmp_path: Path
) -> None:
    plan, other = on_budget(queued[0], queued[0].forecast.storage_peak_bytes), folder_of(tmp_path / "store", "other")
    full = reservations.Reservation(run="other", promised_bytes=10**9, held_bytes=0, holder=reservations.this_process())
    reservations.publish(other, full)
    with pytest.raises(PlanError, match="promised to other"):
        submission.submit(plan, LocalLauncher(), tmp_path / "store")
    assert not (tmp_path / "store" / plan.recipe.name / plan.run_id).exists() and not known_runs()


def test_a_run_that_is_resumed_needs_its_room_once_more(queued: tuple[Plan, RunPaths], tmp_path: Path) -> None:
    plan, paths = on_budget(queued[0], queued[0].forecast.storage_peak_bytes), folder_of(tmp_path / "store", "mine")
    reserving.reserve(plan, paths)
    reserving.release_dead(tmp_path / "store", only())
    assert reservations.promised_before(paths) == plan.forecast.storage_peak_bytes, "this process stands behind it"
    reservations.publish(
        paths, reservations.Reservation(run="mine", promised_bytes=0, held_bytes=0, holder=reservations.Holder())
    )
    reservations.publish(
        folder_of(tmp_path / "store", "other"),
        reservations.Reservation(run="other", promised_bytes=10**9, held_bytes=0, holder=reservations.this_process()),
    )
    with pytest.raises(NoRoomError, match="promised to other"):
        reserving.reserve(plan, paths)
    client = ledger.open_client(paths.ledger_dir)
    client.write(events.Ended(stage="train", exit_code=0))
    client.close()
    reserving.reserve(plan, paths)  # what follows the training loses no weights


def test_a_promise_whose_client_was_killed_lives_with_the_jobs_of_the_ledger(
    queued: tuple[Plan, RunPaths], tmp_path: Path
) -> None:
    _, paths = queued
    made = reservations.read_reservation(paths)
    assert made is not None
    killed = replace(reservations.this_process(), boot_id="another boot")
    for word, is_kept in (("waiting", True), ("lost", False)):
        reservations.publish(paths, replace(made, holder=killed))
        reserving.release_dead(tmp_path / "runs", only("local", Launcher(word)))
        found = reservations.read_reservation(paths)
        assert found is not None and (found.promised_bytes == made.promised_bytes) == is_kept


def test_the_points_of_a_sweep_share_its_promise_with_nobody_else(
    queued: tuple[Plan, RunPaths], tmp_path: Path
) -> None:
    plan, store = on_budget(queued[0], 10**9), tmp_path / "store"
    peak = plan.forecast.storage_peak_bytes
    sweep, other = folder_of(store, "sweep"), folder_of(store, "other")
    sweep.plan.write_text("{}")
    reservations.publish(
        sweep,
        reservations.Reservation(
            run="sweep",
            promised_bytes=3 * peak,
            held_bytes=0,
            holder=reservations.Holder(jobs=("local:s",)),
            num_points=3,
        ),
    )
    point = folder_of(sweep.root, "point")
    assert reservations.shared_runs_dir(point) == store and reservations.promised_before(point) == peak
    tight = on_budget(queued[0], 3 * peak)  # nothing is left beside the sweep
    reserving.reserve(tight, point)
    with pytest.raises(NoRoomError, match="promised to sweep"):
        reserving.reserve(tight, other)
    for seen_by, expected in ((other, [2 * peak, peak]), (point, [2 * peak])):
        among = reservations.read_others(store, seen_by, measures=False)
        assert [one.promised_bytes for one in among] == expected
