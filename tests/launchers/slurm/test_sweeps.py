"""Sweeps as one array of a private Slurm: points killed, cancelled, resumed, and equal ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sousbatch import ledger
from sousbatch.cluster.slurm_site import read_site
from sousbatch.launchers.status import point_states
from sousbatch.launchers.submission import cancel, resume
from sousbatch.recipes.compose import compose
from sousbatch.recipes.search import plan_search
from sousbatch.recipes.sweep import plan_sweep

Start = Callable[..., Any]


@pytest.fixture
def sweep(slurm: object, project: Path, write_job: Callable[..., Path], desk_of: Start) -> Start:
    """Submit points of the stage `train` alone, whose job is a stand-in."""

    def submit_points(*axes: str, **job: Any) -> Any:
        code = write_job(**job)
        texts = [f"environment.code=['{code}']", "stages={train: {}}", "resources.default.time_min=5"]
        return desk_of(plan_sweep("small.yaml", texts, axes, read_site(), project.parent / "runs"))

    return submit_points


def points(desk: Any) -> list[str]:
    return [point.word for point in point_states(desk.plan, desk.paths)]


def saved_in(desk: Any, index: int) -> int:
    folder = point_states(desk.plan, desk.paths)[index].folder
    events = ledger.read(folder / "ledger") if folder else []
    return sum(event.kind == "saved" for event in events)


def starts_of(desk: Any, index: int) -> list[str]:
    """The steps at which the ranks of a point began."""
    log = point_states(desk.plan, desk.paths)[index].folder / "logs" / "train-00000.log"
    return [line.rsplit(" ", 1)[1] for line in log.read_text().splitlines() if line.startswith("rank 0 begins")]


@pytest.mark.faults
def test_a_point_that_was_killed_goes_on_when_the_sweep_is_resumed(sweep: Start, until: Start) -> None:
    desk = sweep("seed=1,2,3", steps=10**6)
    until(lambda: saved_in(desk, 1) and saved_in(desk, 0) and saved_in(desk, 2))
    desk.slurm("scancel", f"{desk.job('sweep')}_1")
    until(lambda: points(desk)[1] == "stopped")
    for point in point_states(desk.plan, desk.paths):
        (point.folder / "enough").touch()
    assert desk.end() == {"sweep": "cancelled"}
    assert points(desk) == ["done", "stopped", "done"]
    assert resume(desk.paths, desk.launcher).sent == ("sweep",)
    assert desk.end() == {"sweep": "done"} and points(desk) == ["done"] * 3
    assert starts_of(desk, 0) == ["0"] and len(starts_of(desk, 1)) == 2 and starts_of(desk, 1)[1] != "0"


@pytest.mark.faults
@pytest.mark.parametrize("save", [False, True])
def test_a_cancelled_sweep_goes_on_when_it_is_resumed(sweep: Start, until: Start, save: bool) -> None:
    desk = sweep("seed=1,2", steps=60)
    until(lambda: saved_in(desk, 0) and saved_in(desk, 1))
    cancel(desk.paths, desk.launcher, save=save)
    assert desk.end() == {"sweep": "stopped" if save else "cancelled"}
    assert points(desk) == ["stopped"] * 2
    assert resume(desk.paths, desk.launcher).sent == ("sweep",)
    assert desk.end() == {"sweep": "done"} and points(desk) == ["done"] * 2
    for index in (0, 1):
        assert len(starts_of(desk, index)) == 2 and int(starts_of(desk, index)[1]) >= 5


@pytest.mark.faults
def test_a_requeued_point_goes_on_where_it_stood(sweep: Start, until: Start) -> None:
    desk = sweep("seed=1,2", steps=40)
    until(lambda: saved_in(desk, 0) and saved_in(desk, 1))
    desk.slurm("scontrol", "requeue", f"{desk.job('sweep')}_0")
    assert desk.end() == {"sweep": "done"} and points(desk) == ["done"] * 2
    assert len(starts_of(desk, 0)) == 2 and starts_of(desk, 0)[1] != "0" and starts_of(desk, 1) == ["0"]


@pytest.mark.faults
def test_a_point_that_is_requeued_again_and_again_goes_on_while_it_saves(sweep: Start, until: Start) -> None:
    desk = sweep("seed=1,2", steps=100)
    for number in range(1, 5):
        until(lambda number=number: saved_in(desk, 0) and len(starts_of(desk, 0)) == number, 60)
        before = saved_in(desk, 0)
        until(lambda before=before: saved_in(desk, 0) > before)
        desk.slurm("scontrol", "requeue", f"{desk.job('sweep')}_0")
    assert desk.end(90) == {"sweep": "done"} and points(desk) == ["done"] * 2
    assert len(starts_of(desk, 0)) == 5


def test_two_equal_points_share_a_run_that_is_done_once(sweep: Start) -> None:
    desk = sweep("train.epochs=1,1.0,2", "train.learning_rate=1e-4,0.0001", steps=3)
    assert desk.end() == {"sweep": "done"} and points(desk) == ["done"] * 3
    runs = list(desk.paths.root.glob("*/*/plan.json"))
    assert len(runs) == 2
    assert all((run.parent / "logs" / "train-00000.log").read_text().count("rank 0 begins") == 1 for run in runs)
    assert "is the same as another one" in desk.log("sweep", 0) + desk.log("sweep", 1)


# A training whose loss is the number of runs that the search has begun: each is worse than the one before.
WORSE_AND_WORSE = """
order = root / "order"
if not order.exists():
    order.write_text(str(len(list(root.parent.glob("*/plan.json")))))
while step < 10 and not flag.exists():
    writer = ledger.open_job(root / "ledger", name, task, attempt)
    loss = float(order.read_text())
    if rank == 0:
        writer.write(events.Step(step=step, values={"loss": loss, "eval_loss": loss}))
        writer.write(events.Saved(step=step, metric=loss))
    writer.close()
    (root / "checkpoints").mkdir(exist_ok=True)
    step += 1
    place.write_text(str(step))
    time.sleep(0.5 if loss in (2, 4) else 0.02)  # what is to be killed or stopped must be seen running
sys.exit(75 if flag.exists() and rank == 0 else 0)
"""


def test_a_search_goes_on_after_a_kill_prunes_what_lags_and_keeps_the_best_alone(
    slurm: object, until: Start, project: Path, write_job: Callable[..., Path], desk_of: Start
) -> None:
    code = write_job(job=WORSE_AND_WORSE)
    texts = [f"environment.code=['{code}']", "stages={train: {}}", "resources.default.time_min=5", "train.steps=10"]
    space = ["train.learning_rate=tag(log, interval(1e-5,1e-2))"]
    plan = plan_search("small.yaml", texts, space, read_site(), project.parent / "runs", num_trials=4)
    desk = desk_of(plan)
    until(lambda: points(desk)[1] == "running" and saved_in(desk, 1))
    desk.slurm("scancel", "--signal=KILL", "--full", f"{desk.job('sweep')}_1")
    assert desk.end() == {"sweep": "cancelled"}
    found = point_states(desk.plan, desk.paths)
    assert [point.word for point in found] == ["done", "stopped", "done", "pruned"]
    assert resume(desk.paths, desk.launcher).sent == ("sweep",)
    assert desk.end() == {"sweep": "done"}
    again = point_states(desk.plan, desk.paths)
    assert [point.word for point in again] == ["done", "done", "done", "pruned"]
    assert [point.label for point in again] == [point.label for point in found], "values stay with their trial"
    assert len({point.label for point in again}) == 4 and again[0].value == 1.0
    assert starts_of(desk, 0) == ["0"] and len(starts_of(desk, 1)) == 2 and starts_of(desk, 1)[1] != "0"
    kept = [point.index for point in again if (point.folder / "checkpoints").exists()]
    assert kept == [0], "the best alone keeps its checkpoints"
    assert compose("small.yaml", [f"best={desk.paths.root}"]).train.learning_rate == float(
        again[0].label.partition("=")[2]
    )


def test_hostile_values_of_points_stay_values(sweep: Start, project: Path) -> None:
    hostile = "data.separator='a b\"c; touch x $(touch x) `touch x`','\\n\\t'"
    desk = sweep(hostile, "train.weight_decay=0,0.1", steps=1)
    assert desk.end() == {"sweep": "done"} and points(desk) == ["done"] * 4
    assert not list(project.parent.rglob("x"))
