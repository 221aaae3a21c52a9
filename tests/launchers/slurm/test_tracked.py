"""What a private Slurm requeues again and again arrives at a stand-in for W&B as one run. Its jobs are stand-ins, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sousbatch.recipes.schema import Environment, Resources

from ...tracking.stand_in import StandIn

Start = Callable[..., Any]
pytestmark = pytest.mark.faults

# Shows each step, and saves each fifth one; on its even attempts it is not asked whether it wants to end, but killed.
TRACKED = """
from sousbatch.jobs.context import read_context
trackers = read_context(sys.argv[1:]).open_trackers() if rank == 0 else None
while step < STEPS and not (root / "enough").exists():
    time.sleep(0.05)
    step += 1
    if trackers:
        trackers.log(step, {"loss": 1 / step})
    if flag.exists() and attempt % 2:
        save()
        if trackers:
            trackers.finish(75)
        sys.exit(75 if rank == 0 else 0)
    if step % 5 == 0:
        save()
if trackers:
    trackers.finish(0)
sys.exit(0)
"""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    found = StandIn()
    for name, value in (found.variables() | {"WANDB_MODE": "online"}).items():
        monkeypatch.setenv(name, value)
    yield found
    found.close()


@pytest.fixture
def tracked(start: Start) -> Start:
    def begin(num_nodes: int = 1) -> Any:
        environment = Environment(inherit=("WANDB_API_KEY",))
        job = TRACKED.replace("STEPS", "10**6")
        return start(resources=Resources(device="cpu", nodes=num_nodes, time_min=5), environment=environment, job=job)

    return begin


def steps_of(server: StandIn) -> list[int]:
    (run,) = server.runs.values()
    return [row["train/step"] for row in run.rows]


def test_ten_requeues_are_one_run_with_each_step_once(tracked: Start, server: StandIn, until: Start) -> None:
    desk = tracked()
    for number in range(1, 11):
        until(lambda number=number: len(desk.events("attempt")) == number)
        before = len(desk.events("saved"))
        until(lambda before=before: len(desk.events("saved")) > before + 1)
        desk.slurm("scontrol", "requeue", desk.job())
    until(lambda: len(desk.events("attempt")) == 11)
    (desk.paths.root / "enough").touch()
    assert desk.end() == {"train": "done"}
    found = steps_of(server)
    assert found == list(range(1, len(found) + 1))
