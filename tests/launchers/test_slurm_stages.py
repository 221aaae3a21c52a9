"""Stages as real jobs of a private Slurm: requeued, preempted, continued, cancelled. The jobs are small stand-ins."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sousbatch import ledger
from sousbatch.cluster.slurmsite import read_site
from sousbatch.launchers.slurm import SlurmLauncher
from sousbatch.launchers.status import StageState, is_final, job_refs, run_states
from sousbatch.launchers.submission import cancel, resume, submit
from sousbatch.ledger import Event
from sousbatch.recipes.plan import After, Batch, Plan, Stage
from sousbatch.recipes.schema import Environment, Resources, StageSpec

BATCH = Batch(
    world_size=2, micro_batch=4, accumulation=1, steps=10, steps_per_epoch=10, warmup_steps=0, save_every_steps=5
)
TWO_NODES = Resources(device="cpu", nodes=2, time_min=5)

# Python imports it at every start, from the run's own code folder: it runs `job.py` in place of a job.
HOOK = """
import os, runpy
_run_module = runpy.run_module
def run_module(name, *args, **kwargs):
    if name in ("sousbatch.jobs.train", "sousbatch.jobs.predict"):
        return runpy.run_path(os.path.join(os.path.dirname(__file__), "job.py"), run_name="__main__")
    return _run_module(name, *args, **kwargs)
runpy.run_module = run_module
"""
# A step takes 0.1 s; all ranks look at the flag at each, and rank 0 saves and leaves with 75.
JOB = """
import os, pathlib, sys, time
from sousbatch import ledger
root, name, rank = pathlib.Path(sys.argv[1]), sys.argv[2], int(os.environ["RANK"])
attempt, task = int(os.environ["SOUSBATCH_ATTEMPT"]), int(os.environ["SOUSBATCH_TASK"])
flag, place = pathlib.Path(os.environ["SOUSBATCH_STOP_FLAG"]), root / f"step-{name}-{task}"
(root / "ranks").mkdir(exist_ok=True)
facts = [os.environ[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURMD_NODENAME")]
(root / "ranks" / f"{attempt}.{rank}").write_text(" ".join(facts))
step = int(place.read_text()) if place.exists() else 0
print(f"rank {rank} begins at step {step}", flush=True)
INSTEAD
def save():
    if rank == 0:
        ledger.check_fence(root / "ledger", name, task, attempt)
        place.write_text(str(step))
        writer = ledger.open_job(root / "ledger", name, task, attempt)
        writer.write("saved", step=step)
        writer.close()
while step < STEPS:
    time.sleep(0.1)
    step += 1
    if flag.exists():
        save()
        sys.exit(75 if rank == 0 else 0)
    if step % EVERY == 0:
        save()
"""


class Desk:
    """A run on the private Slurm, and what a person or the site does to it."""

    def __init__(self, plan: Plan, runs: Path, until: Callable[..., Any]) -> None:
        self.launcher, self.until = SlurmLauncher(), until
        self.plan, self.paths = plan, submit(plan, self.launcher, runs).paths

    @property
    def states(self) -> dict[str, StageState]:
        return run_states(self.plan, self.paths, self.launcher)

    def job(self, stage: str = "train") -> str:
        return job_refs(ledger.read(self.paths.ledger_dir))[stage].job_id

    def events(self, kind: str, stage: str = "train") -> list[Event]:
        return [one for one in ledger.read(self.paths.ledger_dir) if one.kind == kind and one.stage == stage]

    def log(self, stage: str = "train", task: int = 0) -> str:
        path = self.paths.log(stage, task)
        return path.read_text() if path.exists() else ""

    def wait_until_saved(self, times: int = 1) -> None:
        self.until(lambda: len(self.events("saved")) >= times)

    def end(self, timeout_s: float = 60) -> dict[str, str]:
        self.until(lambda: is_final(self.states), timeout_s)
        return {name: state.word for name, state in self.states.items()}


def slurm_command(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=30).stdout


@pytest.fixture
def start(
    slurm: object, tmp_path: Path, make_plan: Callable[..., Plan], until: Callable[..., Any]
) -> Callable[..., Desk]:
    def _start(
        *stages: Stage, steps: int = 60, every: int = 5, job: str = "", resources: Resources = TWO_NODES
    ) -> Desk:
        code = tmp_path / "standin"
        code.mkdir()
        (code / "sitecustomize.py").write_text(HOOK)
        text = JOB.replace("STEPS", str(steps)).replace("EVERY", str(every)).replace("INSTEAD", job)
        (code / "job.py").write_text(text)
        train = Stage(name="train", kind="train", of=None, resources=resources, num_tasks=1, after=(), batch=BATCH)
        specs = {stage.name: StageSpec(kind=stage.kind) for stage in (train, *stages)}
        plan = make_plan([train, *stages], Environment(code=(str(code),)), site=read_site())
        plan = replace(plan, recipe=replace(plan.recipe, stages=specs))
        return Desk(plan, tmp_path / "runs", until)

    return _start


def test_ranks_of_two_nodes_know_their_places(start: Callable[..., Desk]) -> None:
    desk = start(steps=1, resources=replace(TWO_NODES, devices_per_node=2))
    assert desk.end() == {"train": "done"}
    told = sorted(path.read_text() for path in (desk.paths.root / "ranks").iterdir())
    assert told == ["0 0 4 n1", "1 1 4 n1", "2 0 4 n2", "3 1 4 n2"]


def test_a_requeued_job_goes_on_where_it_stood_in_the_same_log(start: Callable[..., Desk]) -> None:
    desk = start()
    desk.wait_until_saved()
    slurm_command("scontrol", "requeue", desk.job())
    assert desk.end() == {"train": "done"}
    attempts = desk.events("attempt")
    assert [one.number for one in attempts] == [1, 2]
    assert {one.data["job"] for one in attempts} == {desk.job()}
    assert "rank 0 begins at step 0\n" in desk.log() and desk.log().count("rank 0 begins") == 2


def test_the_warning_before_the_time_limit_saves_and_requeues(start: Callable[..., Desk]) -> None:
    desk = start(every=1000)
    desk.until(lambda: "begins" in desk.log())
    slurm_command("scancel", "--batch", "--signal=USR1", desk.job())  # as Slurm does for --signal=B:USR1@T
    assert desk.end() == {"train": "done"}
    assert len(desk.events("attempt")) == 2 and len(desk.events("saved")) == 1
    assert "requeued" in desk.log()


def test_a_job_that_may_not_be_requeued_is_continued_by_a_new_one_and_its_dependants_follow(
    start: Callable[..., Desk],
) -> None:
    merge = Stage(name="after", kind="train", of=None, resources=TWO_NODES, num_tasks=1, after=(After(stage="train"),))
    desk = start(replace(merge, batch=BATCH))
    desk.wait_until_saved()
    first = desk.job()
    slurm_command("scontrol", "update", f"JobId={first}", "Requeue=0")
    slurm_command("scancel", "--batch", "--signal=USR1", first)
    assert desk.end() == {"train": "done", "after": "done"}
    assert desk.job() != first
    assert "continued by a new job" in desk.log()
    assert len(desk.events("attempt")) == 2 and len(desk.events("attempt", "after")) == 1


@pytest.mark.parametrize("partition", ["main", "strict"])
def test_a_preempted_job_saves_and_goes_on(start: Callable[..., Desk], partition: str) -> None:
    """`main` requeues what it preempts; `strict` cancels it after a time of grace in which ranks get SIGTERM."""
    desk = start(every=1000 if partition == "strict" else 5, resources=replace(TWO_NODES, partition=partition))
    desk.until(lambda: "begins" in desk.log())
    if partition == "main":
        desk.wait_until_saved()
    slurm_command("sbatch", "-Q", "-p", "urgent", "--exclusive", "-N2", "-o", "/dev/null", "--wrap", "sleep 2")
    assert desk.end(90) == {"train": "done"}
    assert len(desk.events("attempt")) == 2
    assert "rank 0 begins at step 0\n" in desk.log() and desk.log().count("rank 0 begins") == 2


def test_cancelling_with_save_stays_cancelled_until_it_is_resumed(start: Callable[..., Desk]) -> None:
    desk = start(every=1000)
    desk.until(lambda: "begins" in desk.log())
    cancel(desk.paths, desk.launcher, save=True)
    assert desk.end() == {"train": "stopped"}
    assert len(desk.events("saved")) == 1 and "cancelled; `sousbatch resume" in desk.log()
    assert resume(desk.paths, desk.launcher).sent == ("train",)
    assert desk.end() == {"train": "done"}


@pytest.mark.faults
def test_a_job_that_saves_nothing_new_leaves_the_queue(start: Callable[..., Desk]) -> None:
    desk = start(job="time.sleep(1000)")
    for number in (1, 2, 3):
        desk.until(lambda number=number: desk.log().count("rank 0 begins") == number)
        slurm_command("scontrol", "requeue", desk.job())
    assert desk.end() == {"train": "failed"}
    assert "committed nothing" in desk.log() and desk.log().count("rank 0 begins") == 3
