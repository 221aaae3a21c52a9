"""What a private Slurm does to jobs that run: nodes die, limits end them, others take their place, arrays are full."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sousbatch.cluster import slurm
from sousbatch.cluster.sandbox import lifecycle
from sousbatch.cluster.slurm import JobRow
from sousbatch.errors import SlurmError
from sousbatch.launchers.slurm.launcher import job_state
from sousbatch.launchers.submission import cancel, resume
from sousbatch.recipes.plan import After, Stage
from sousbatch.recipes.schema import Resources

Start = Callable[..., Any]
CPU = Resources(device="cpu", time_min=5)


# A node dies


@pytest.mark.parametrize("noticed", ["at-once", pytest.param("after-a-time", marks=pytest.mark.faults)])
def test_a_dead_nodes_training_goes_on_elsewhere_and_its_old_step_commits_nothing_more(
    another_slurm: Start, start: Start, until: Start, noticed: str
) -> None:
    folder = another_slurm(SlurmdTimeout="5")
    desk = start(steps=10**6, every=2)
    desk.wait_until_saved(2)
    (first_rank,) = [path for path in (desk.paths.root / "ranks").iterdir()]
    node = first_rank.read_text().split()[-1]
    lifecycle.kill_node(folder, node)
    if noticed == "at-once":
        desk.slurm("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=dead")
    until(lambda: len(desk.events("attempt")) == 2, 60)
    began = desk.events("attempt")[1].time
    if noticed == "at-once":  # after a time srun has ended the old step as well
        until((desk.paths.root / "refused-1").exists)
    late = [one for one in desk.events("saved") if one.number == 1 and one.time > began + 0.05]
    assert not late, "the old step went on committing"
    newer = len([one for one in desk.events("saved") if one.number == 2])
    until(lambda: len([one for one in desk.events("saved") if one.number == 2]) > newer)
    assert (desk.paths.root / "ranks" / "2.0").read_text().split()[-1] != node
    lifecycle.start_node(folder, node)
    assert desk.states["train"].word == "running"
    (desk.paths.root / "enough").touch()
    assert desk.end() == {"train": "done"} and len(desk.events("attempt")) == 2


@pytest.mark.faults
def test_a_dead_nodes_prediction_task_is_done_elsewhere(
    another_slurm: Start, start: Start, make_stage: Callable[..., Stage], until: Start
) -> None:
    folder = another_slurm(SlurmdTimeout="5")
    predict = make_stage("predict", After(stage="train"), kind="predict", tasks=4)
    steps = "(120 if name == 'predict' else 1)"
    desk = start(predict, make_stage("next", After(stage="predict", condition="any")), steps=steps)
    until(lambda: len(desk.events("attempt", "predict")) == 4, 60)
    rows = desk.slurm("squeue", "-h", "-r", "-t", "R", "-o", "%K %N", "-j", desk.job("predict")).splitlines()
    node = rows[0].split()[1]
    lost = {int(row.split()[0]) for row in rows if row.split()[1] == node}
    lifecycle.kill_node(folder, node)
    desk.slurm("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=dead")
    assert desk.end(120) == {"train": "done", "predict": "done", "next": "done"}
    assert {event.task for event in desk.events("attempt", "predict") if event.number > 1} == lost
    assert [path.name for path in desk.paths.root.glob("refused-*")] == ["refused-1"]
    ends = {event.task for event in desk.events("ended", "predict") if event.exit_code == 0}
    assert ends == set(range(4))


# A training fails with dependants queued


def test_a_failed_training_ends_its_dependants_and_merging_reports_every_row_missing(
    slurm: object, project: Path, write_job: Callable[..., Path], sousbatch: Start, until: Start
) -> None:
    code = write_job(job="sys.exit(3)")
    assert sousbatch("submit", "small.yaml", "--detach", f"environment.code=['{code}']")[0] == 0

    def queue() -> str:
        return subprocess.run(["squeue", "-h"], capture_output=True, text=True, check=True).stdout

    until(lambda: not queue(), 60)
    sousbatch("status")
    (run,) = json.loads(sousbatch("status", "--json")[1])
    said = {name: (state["word"], state["reason"]) for name, state in run["stages"].items()}
    assert {name: word for name, (word, _) in said.items()} == {
        "train": "failed",
        "consolidate": "cancelled",
        "predict": "cancelled",
        "merge": "failed",
        "score": "cancelled",
    }
    assert "exit code 3" in said["train"][1] and "all 5 rows are missing" in said["merge"][1]
    assert "an earlier stage did not end well" in said["predict"][1]


# Preemption


@pytest.mark.faults
@pytest.mark.parametrize("how", ["scontrol", "partition"])
def test_a_site_that_does_not_requeue_by_default_requeues_our_jobs(
    another_slurm: Start, start: Start, how: str
) -> None:
    another_slurm(JobRequeue="0")
    desk = start(resources=replace(CPU, nodes=2))
    desk.wait_until_saved()
    if how == "scontrol":
        desk.slurm("scontrol", "requeue", desk.job())
    else:
        desk.slurm("sbatch", "-Q", "-p", "urgent", "--exclusive", "-N2", "-o", "/dev/null", "--wrap", "sleep 2")
    assert desk.end(90) == {"train": "done"}
    assert len(desk.events("attempt")) == 2 and desk.log().count("begins at step 0\n") == 2


@pytest.mark.faults
def test_a_job_that_must_not_be_requeued_and_is_preempted_goes_on_in_a_new_one(
    another_slurm: Start, start: Start, make_stage: Callable[..., Stage]
) -> None:
    another_slurm(JobRequeue="0", KillWait="10")
    resources = replace(CPU, nodes=2, sbatch=("--no-requeue",))
    desk = start(make_stage("next", After(stage="train")), resources=resources)
    desk.wait_until_saved()
    first = desk.job()
    desk.slurm("sbatch", "-Q", "-p", "urgent", "--exclusive", "-N2", "-o", "/dev/null", "--wrap", "sleep 2")
    assert desk.end(90) == {"train": "done", "next": "done"}
    assert desk.job() != first


# The time limit


@pytest.mark.faults
def test_a_training_longer_than_its_time_limit_goes_on_three_times(start: Start) -> None:
    desk = start(steps=1100, every=10_000, resources=replace(CPU, nodes=2, time_min=1))
    assert desk.end(420) == {"train": "done"}
    attempts = desk.events("attempt")
    assert len(attempts) >= 4
    assert {one.exit_code for one in desk.events("ended")} == {75, 0}
    assert len(desk.events("saved")) == len(attempts) - 1
    assert {one.job for one in attempts} == {desk.job()}


# Ends that a person or the site makes


def test_a_job_that_is_started_again_after_it_was_done_does_nothing(start: Start, until: Start) -> None:
    desk = start(steps=3)
    assert desk.end() == {"train": "done"}
    desk.slurm("scontrol", "requeue", desk.job())
    until(lambda: "is done already" in desk.log())
    assert desk.end() == {"train": "done"} and len(desk.events("attempt")) == 1


def test_a_job_cancelled_with_scancel_stays_cancelled_and_can_be_resumed(
    start: Start, make_stage: Callable[..., Stage], until: Start
) -> None:
    steps = "(10**6 if name == 'train' and attempt == 1 else step + 3)"
    desk = start(make_stage("next", After(stage="train")), steps=steps)
    desk.wait_until_saved()
    desk.slurm("scancel", desk.job())
    assert desk.end() == {"train": "cancelled", "next": "cancelled"}
    assert desk.slurm("squeue", "-h", "--me") == "" and len(desk.events("attempt")) == 1
    assert "sousbatch: requeued" not in desk.log() and "continued" not in desk.log()
    assert resume(desk.paths, desk.launcher).sent == ("train", "next")
    assert desk.end() == {"train": "done", "next": "done"}
    assert len(desk.events("attempt")) == 2 and desk.log().count("begins at step 0\n") == 1


@pytest.mark.parametrize("state", ["HIBERNATING", "", "running"])
def test_a_state_that_nobody_knows_is_never_final(state: str) -> None:
    said = job_state([JobRow(job_id="1", state=state)], seen_at=7)
    assert said.word == "waiting" and said.reason == f"Slurm says {state}"
    mixed = job_state([JobRow(job_id="1", task="0", state="COMPLETED"), JobRow(job_id="1", state=state)], seen_at=7)
    assert mixed.word == "waiting"


# Accounting on and off, and jobs that the queue forgets


@pytest.mark.faults
@pytest.mark.parametrize("accounting", [False, True])
def test_what_slurm_forgets_is_told_by_the_ledger_and_the_accounting(
    another_slurm: Start, start: Start, make_stage: Callable[..., Stage], until: Start, accounting: bool
) -> None:
    another_slurm(accounting=accounting, MinJobAge="2")
    desk = start(
        make_stage("next", After(stage="train")), steps=3, job="attempt == 1 and name == 'next' and sys.exit(3)"
    )
    assert desk.end() == {"train": "done", "next": "failed"}
    until(lambda: not slurm.queue(), 400)
    assert {name: state.word for name, state in desk.states.items()} == {"train": "done", "next": "failed"}
    assert desk.states["next"].reason
    assert resume(desk.paths, desk.launcher).sent == ("next",)
    assert desk.end() == {"train": "done", "next": "done"}


# Full arrays


def test_more_tasks_than_an_array_may_have_share_its_elements(
    another_slurm: Start, start: Start, make_stage: Callable[..., Stage]
) -> None:
    another_slurm(MaxArraySize="11")
    desk = start(make_stage("predict", After(stage="train"), kind="predict", tasks=14), steps=1)
    assert desk.plan.site.max_array_size == 11
    assert desk.end() == {"train": "done", "predict": "done"}
    assert sorted(event.task for event in desk.events("attempt", "predict")) == list(range(14))
    jobs = {event.job for event in desk.events("attempt", "predict")}
    assert len(jobs) == 11


def test_an_element_that_is_asked_to_stop_begins_none_of_its_other_tasks(
    another_slurm: Start, start: Start, make_stage: Callable[..., Stage], until: Start
) -> None:
    another_slurm(MaxArraySize="3")
    predict = make_stage("predict", After(stage="train"), kind="predict", tasks=6)
    desk = start(predict, steps="(100 if name == 'predict' else 1)")
    until(lambda: {event.task for event in desk.events("saved", "predict")} == {0, 1, 2}, 60)
    cancel(desk.paths, desk.launcher, save=True)
    assert desk.end() == {"train": "done", "predict": "stopped"}
    assert {event.task for event in desk.events("attempt", "predict")} == {0, 1, 2}


@pytest.mark.faults
def test_a_submit_limit_is_kept_and_a_second_run_that_does_not_fit_is_refused_in_words(
    another_slurm: Start, start: Start, make_stage: Callable[..., Stage], desk_of: Start, until: Start
) -> None:
    another_slurm(accounting=True, AccountingStorageEnforce="limits")
    # slurmdbd 22.05 reads a user's unset limits as 0 from a newer MariaDB, until the account sets them
    open_up = "account root set MaxJobs=99 MaxJobsAccrue=99 MaxSubmitJobs=99 MaxWall=9999"
    for limit in (open_up, "qos normal set MaxSubmitJobsPerUser=6"):
        subprocess.run(["sacctmgr", "-i", "modify", *limit.split()], check=True, capture_output=True)
    stages = [make_stage("predict", After(stage="train"), kind="predict", tasks=14)]
    stages.append(make_stage("next", After(stage="predict", condition="any")))
    desk = start(*stages, steps=1)
    assert desk.plan.site.max_jobs == 6
    other = replace(desk.plan, recipe=replace(desk.plan.recipe, seed=1))
    with pytest.raises(SlurmError, match="limit"):
        desk_of(other)
    assert desk.end() == {"train": "done", "predict": "done", "next": "done"}
    assert sorted(event.task for event in desk.events("attempt", "predict")) == list(range(14))
    until(lambda: desk.slurm("squeue", "--noheader") == "")  # jobs that are completing count, too
    second = desk_of(other)
    assert second.end() == {"train": "done", "predict": "done", "next": "done"}
    assert len(second.events("attempt")) == 1
