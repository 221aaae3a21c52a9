"""Stages as real jobs of a private Slurm: requeued, preempted, continued, cancelled. The jobs are small stand-ins."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from sousbatch.launchers.slurm.rank import identity
from sousbatch.launchers.submission import cancel, resume
from sousbatch.recipes.plan import After, Stage
from sousbatch.recipes.schema import Resources

Start = Callable[..., Any]
TWO_NODES = Resources(device="cpu", nodes=2, time_min=5)
# However busy the machine is, the first attempt does not end before something befalls it.
UNTIL_INTERRUPTED = "(10**6 if name == 'train' and attempt == 1 else step + 3)"


def test_ranks_of_two_nodes_know_their_places(start: Start) -> None:
    desk = start(steps=1, resources=replace(TWO_NODES, devices_per_node=2))
    assert desk.end() == {"train": "done"}
    said = sorted(path.read_text() for path in (desk.paths.root / "ranks").iterdir())
    assert said == ["0 0 4 n1", "1 1 4 n1", "2 0 4 n2", "3 1 4 n2"]


def test_a_requeued_job_goes_on_where_it_stood_in_the_same_log(start: Start) -> None:
    desk = start(steps=UNTIL_INTERRUPTED, resources=TWO_NODES)
    desk.wait_until_saved()
    desk.slurm("scontrol", "requeue", desk.job())
    assert desk.end() == {"train": "done"}
    attempts = desk.events("attempt")
    assert [one.number for one in attempts] == [1, 2]
    assert {one.job for one in attempts} == {desk.job()}
    assert "rank 0 begins at step 0\n" in desk.log() and desk.log().count("rank 0 begins") == 2


def test_the_warning_before_the_time_limit_saves_and_requeues(start: Start) -> None:
    desk = start(steps=UNTIL_INTERRUPTED, every=1000, resources=TWO_NODES)
    desk.wait_until_begun()
    desk.slurm("scancel", "--batch", "--signal=USR1", desk.job())  # as Slurm does for --signal=B:USR1@T
    assert desk.end() == {"train": "done"}
    assert len(desk.events("attempt")) == 2 and len(desk.events("saved")) == 1
    assert "requeued" in desk.log()


def test_a_rank_that_fails_costs_an_attempt_of_the_same_job_and_asks_nobody_to_stop(start: Start) -> None:
    """srun ends the other rank by SIGTERM, which must not be taken for Slurm's wish to have the nodes back."""
    fails = "if attempt == 1 and rank == 1:\n    while not place.exists():\n        time.sleep(0.05)\n    sys.exit(76)"
    desk = start(steps=UNTIL_INTERRUPTED, job=fails, resources=TWO_NODES)
    assert desk.end() == {"train": "done"}
    assert [event.micro_batch for event in desk.events("attempt")] == [4, 2]
    assert "requeued" not in desk.log()


def test_a_job_that_may_not_be_requeued_is_continued_by_a_new_one_and_its_dependants_follow(
    start: Start, make_stage: Callable[..., Stage]
) -> None:
    desk = start(make_stage("after", After(stage="train"), resources=TWO_NODES), steps=UNTIL_INTERRUPTED)
    desk.wait_until_saved()
    first = desk.job()
    desk.slurm("scontrol", "update", f"JobId={first}", "Requeue=0")
    desk.slurm("scancel", "--batch", "--signal=USR1", first)
    assert desk.end() == {"train": "done", "after": "done"}
    assert desk.job() != first
    assert "continued by a new job" in desk.log()
    assert len(desk.events("attempt")) == 2 and len(desk.events("attempt", "after")) == 1


@pytest.mark.parametrize("mode", ["CANCEL", "REQUEUE"])
def test_preempted_jobs_save_and_go_on_and_so_does_what_waits_for_them(
    start: Start, make_stage: Callable[..., Stage], mode: str
) -> None:
    """`strict` has a time of grace, in which ranks get SIGTERM: since 24.05 a job requeued in it ends as preempted."""
    if "SOUSBATCH_TEST_SANDBOX" in os.environ:
        pytest.skip("only Slurm's administrator may change a partition")
    setting = ["scontrol", "update", "PartitionName=strict"]
    subprocess.run([*setting, f"PreemptMode={mode}", "GraceTime=120"], check=True)  # also on a busy machine
    desks = [
        start(
            make_stage("next", After(stage="train")),
            steps=UNTIL_INTERRUPTED,
            every=every,
            code=name,
            resources=replace(TWO_NODES, partition=name),
        )
        for name, every in (("main", 5), ("strict", 1000))
    ]
    try:
        desks[0].wait_until_saved()
        desks[1].wait_until_begun()
        desks[0].slurm("sbatch", "-Q", "-p", "urgent", "--exclusive", "-N2", "-o", "/dev/null", "--wrap", "true")
        for desk in desks:
            assert desk.end(240) == {"train": "done", "next": "done"}
            assert len(desk.events("attempt")) == 2 and len(desk.events("attempt", "next")) == 1
            assert "rank 0 begins at step 0\n" in desk.log() and desk.log().count("rank 0 begins") == 2
    finally:
        subprocess.run([*setting, "PreemptMode=CANCEL", "GraceTime=20"], check=True)


def test_the_rank_that_failed_first_is_what_the_job_ended_of(start: Start) -> None:
    """srun ends the others, and its own exit code is the highest: theirs."""
    desk = start(job="rank == 1 and sys.exit(3); time.sleep(1000)", resources=TWO_NODES)
    assert desk.end() == {"train": "failed"}
    assert [one.exit_code for one in desk.events("ended")] == [3]
    assert "exit code 3" in desk.states["train"].reason


def test_cancelling_with_save_stays_cancelled_until_it_is_resumed(start: Start) -> None:
    desk = start(steps=UNTIL_INTERRUPTED, every=1000, resources=TWO_NODES)
    desk.wait_until_begun()
    cancel(desk.paths, desk.launcher, save=True)
    assert desk.end() == {"train": "stopped"}
    assert len(desk.events("saved")) == 1 and "cancelled; `sousbatch resume" in desk.log()
    assert resume(desk.paths, desk.launcher).sent == ("train",)
    assert desk.end() == {"train": "done"}


@pytest.mark.faults
def test_a_job_that_saves_nothing_new_leaves_the_queue(start: Start) -> None:
    desk = start(job="time.sleep(1000)", resources=TWO_NODES)
    for number in (1, 2, 3):
        desk.wait_until_begun(number)
        desk.slurm("scontrol", "requeue", desk.job())
    assert desk.end() == {"train": "failed"}
    assert "committed nothing" in desk.log() and desk.log().count("rank 0 begins") == 3


@pytest.mark.parametrize("devices, local_rank", [(None, "1"), ("0,1", "1"), ("1", "0"), ("", "1")])
def test_a_rank_that_sees_one_device_alone_takes_it(devices: str | None, local_rank: str) -> None:
    slurm = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2"}
    shown = slurm if devices is None else slurm | {"CUDA_VISIBLE_DEVICES": devices}
    found = identity(shown)
    assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"]) == ("3", local_rank, "4")
