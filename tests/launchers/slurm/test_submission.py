"""Submission to a private Slurm that times out, is down, or is submitted to by clients that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sousbatch import ledger
from sousbatch.cluster import slurm
from sousbatch.cluster.sandbox import lifecycle
from sousbatch.errors import SlurmError, UnreachableError, UsageError
from sousbatch.launchers.overview import many_states
from sousbatch.launchers.registry import choose_site
from sousbatch.launchers.slurm import launcher as launcher
from sousbatch.launchers.slurm.launcher import SlurmLauncher
from sousbatch.launchers.submission import submit
from sousbatch.recipes.plan import After, Plan, Stage
from sousbatch.run_folder import RunPaths

Start = Callable[..., Any]
TIME_OUT = 'echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2; exit 1'

# Stands in for sbatch only where a real one does not fail on demand: its so-manieth call does *what*.
SBATCH = """#!/bin/bash
echo call >> {place}/calls
if [ "$(wc -l < {place}/calls)" -le {times} ]; then {what}; fi
exec {sbatch} "$@"
"""

# Kills itself at the so-manieth moment: before and after each event of the ledger, and each sbatch.
CLIENT = """
import os, signal, sys
from pathlib import Path
from sousbatch import ledger
from sousbatch.cluster import slurm
from sousbatch.launchers.slurm.launcher import SlurmLauncher
from sousbatch.launchers.submission import submit
from sousbatch.recipes.plan import read_plan

moments = int(sys.argv[3])
def moment():
    global moments
    moments -= 1
    if moments == 0:
        os.kill(os.getpid(), signal.SIGKILL)
def deadly(function):
    def watched(*args, **kwargs):
        moment()
        value = function(*args, **kwargs)
        moment()
        return value
    return watched
ledger.Ledger.write, slurm.submit = deadly(ledger.Ledger.write), deadly(slurm.submit)
submit(read_plan(Path(sys.argv[1])), SlurmLauncher(), Path(sys.argv[2]))
"""
FROZEN, INTENT, SENT, RECORDED, NEXT_SENT = 2, 4, 6, 8, 12


@pytest.fixture
def sbatch_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def put(what: str, times: int = 1) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        real = subprocess.run(["which", "sbatch"], capture_output=True, text=True, check=True).stdout.strip()
        stand_in = folder / "sbatch"
        stand_in.write_text(SBATCH.format(place=folder, times=times, what=what.replace("sbatch", real), sbatch=real))
        stand_in.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    return put


def jobs_of(plan: Plan) -> list[str]:
    """The stages of a run that Slurm has jobs of, each as often as it has one."""
    return sorted(row.comment.split(".")[2] for row in slurm.queue() if plan.run_id in row.comment)


# A time-out of sbatch


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(f'sbatch "$@" >/dev/null; {TIME_OUT}', id="accepts-and-times-out"),
        pytest.param(TIME_OUT, id="times-out", marks=pytest.mark.faults),
        pytest.param(
            f'(sleep 1; sbatch "$@" >/dev/null) & cat >/dev/null; {TIME_OUT}',
            id="accepts-late",
            marks=pytest.mark.faults,
        ),
    ],
)
def test_a_job_that_sbatch_gave_up_on_is_there_once(start: Start, sbatch_does: Callable[..., None], what: str) -> None:
    sbatch_does(what)
    desk = start(steps=1)
    assert jobs_of(desk.plan) == ["train"]
    assert desk.end() == {"train": "done"} and len(desk.events("attempt")) == 1


def test_an_sbatch_that_accepts_and_never_returns_is_given_up_and_its_job_adopted(
    start: Start, sbatch_does: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "TIMEOUT_S", 1.5)
    sbatch_does('sbatch "$@" >/dev/null; exec sleep 600')
    desk = start(steps=1)
    assert jobs_of(desk.plan) == ["train"]
    assert desk.end() == {"train": "done"} and len(desk.events("attempt")) == 1


def test_a_submission_that_never_gets_an_answer_is_taken_up_by_the_next(
    standin_plan: Callable[..., Plan],
    desk_of: Start,
    sbatch_does: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launcher, "PATIENCE_S", 0)
    sbatch_does(TIME_OUT)
    plan = standin_plan(steps=1)
    with pytest.raises(UnreachableError, match="Socket timed out"):
        submit(plan, SlurmLauncher(), tmp_path / "runs")
    assert jobs_of(plan) == []
    assert desk_of(plan).end() == {"train": "done"} and jobs_of(plan) == ["train"]


def test_a_refusal_between_two_stages_leaves_one_job_and_the_next_submission_sends_the_rest(
    standin_plan: Callable[..., Plan],
    make_stage: Callable[..., Stage],
    desk_of: Start,
    tmp_path: Path,
    sbatch_does: Callable[..., None],
) -> None:
    refusal = 'echo "sbatch: error: AssocMaxSubmitJobLimit" >&2; exit 1'
    sbatch_does(f'case "$*" in *after*) {refusal};; esac', times=2)
    plan = standin_plan(make_stage("next", After(stage="train")), steps=1)
    with pytest.raises(SlurmError, match="AssocMaxSubmitJobLimit"):
        submit(plan, SlurmLauncher(), tmp_path / "runs")
    assert jobs_of(plan) == ["train"]
    assert desk_of(plan).end() == {"train": "done", "next": "done"} and jobs_of(plan) == ["next", "train"]


# kill -9 of the client


@pytest.mark.parametrize(
    "moments",
    [
        pytest.param(INTENT, id="before-sbatch", marks=pytest.mark.faults),
        pytest.param(SENT, id="between-intent-and-record"),
        pytest.param(RECORDED, id="between-record-and-next-stage"),
        pytest.param(NEXT_SENT, id="before-the-last-record", marks=pytest.mark.faults),
        *[pytest.param(each, marks=pytest.mark.faults) for each in (1, FROZEN, 3, 5, 7, 9, 10, 11, 13, 14)],
    ],
)
def test_a_client_killed_anywhere_leaves_no_job_twice_and_none_lost(
    standin_plan: Callable[..., Plan], make_stage: Callable[..., Stage], desk_of: Start, tmp_path: Path, moments: int
) -> None:
    plan = standin_plan(make_stage("next", After(stage="train")), steps=3)
    assert kill_client(plan, tmp_path, moments) == -signal.SIGKILL
    try:
        desk = desk_of(plan)
    except UsageError:
        pytest.fail("nothing of it had ended")
    assert jobs_of(plan) == ["next", "train"]
    assert desk.end() == {"train": "done", "next": "done"}
    assert [len(desk.events("attempt", stage)) for stage in ("train", "next")] == [1, 1]


def client_of(plan: Plan, place: Path, moments: int = 0) -> subprocess.Popen[bytes]:
    (place / "plan.json").write_text(plan.to_json())
    words = [sys.executable, "-c", CLIENT, str(place / "plan.json"), str(place / "runs"), str(moments)]
    return subprocess.Popen(words)


def kill_client(plan: Plan, place: Path, moments: int) -> int:
    return client_of(plan, place, moments).wait(timeout=180)


def test_an_sbatch_that_outlives_its_killed_client_is_waited_for(
    standin_plan: Callable[..., Plan], desk_of: Start, sbatch_does: Callable[..., None], tmp_path: Path, until: Start
) -> None:
    sbatch_does('sleep 2; sbatch "$@"; touch "$0.over"; exit')
    plan = standin_plan(steps=1)
    client = client_of(plan, tmp_path)
    until((tmp_path / "bin" / "calls").exists)
    client.kill()
    client.wait()
    desk = desk_of(plan)
    assert desk.end() == {"train": "done"}
    until((tmp_path / "bin" / "sbatch.over").exists)
    assert jobs_of(plan) == ["train"]


# slurmctld is down


@pytest.mark.parametrize("down_s", [2, pytest.param(20, marks=pytest.mark.faults)])
def test_a_controller_that_is_down_while_submitting_delays_and_neither_doubles_nor_loses(
    another_slurm: Start,
    standin_plan: Callable[..., Plan],
    make_stage: Callable[..., Stage],
    desk_of: Start,
    down_s: float,
) -> None:
    folder = another_slurm()
    plan = standin_plan(make_stage("next", After(stage="train")), steps=1)
    lifecycle.stop_controller(folder)
    waker = threading.Timer(down_s, lifecycle.start_controller, [folder])
    waker.start()
    began = time.monotonic()
    assert choose_site(None).launcher == "slurm", "it must not run on the login node instead"
    desk = desk_of(plan)
    assert time.monotonic() - began >= down_s
    waker.join()
    assert jobs_of(plan) == ["next", "train"]
    assert desk.end() == {"train": "done", "next": "done"}


@pytest.mark.faults
def test_a_controller_that_is_down_while_watching_makes_nothing_lost(
    another_slurm: Start, start: Start, make_stage: Callable[..., Stage]
) -> None:
    folder = another_slurm()
    desk = start(make_stage("next", After(stage="train")), steps=200)
    desk.wait_until_begun()
    lifecycle.stop_controller(folder)
    deadline, words = time.monotonic() + 20, set()
    watching = SlurmLauncher(max_age_s=0.5)
    while time.monotonic() < deadline:
        ((_, _, states),) = many_states([desk.paths], lambda _: watching)
        words.add((states["train"].word, states["next"].word))
    lifecycle.start_controller(folder)
    assert ("unknown", "unknown") in words and words <= {("running", "waiting"), ("unknown", "unknown")}
    assert desk.end() == {"train": "done", "next": "done"}
    assert len(desk.events("attempt")) == len(desk.events("attempt", "next")) == 1


def test_a_doubtful_job_does_not_keep_a_watcher_waiting(
    another_slurm: Start, standin_plan: Callable[..., Plan], tmp_path: Path
) -> None:
    folder = another_slurm()
    plan = standin_plan(steps=40)
    assert kill_client(plan, tmp_path, SENT) == -signal.SIGKILL
    paths = RunPaths(root=tmp_path / "runs" / plan.recipe.name / plan.run_id)
    assert [event.kind for event in ledger.read(paths.ledger_dir) if event.role == "client"] == ["frozen", "intent"]
    lifecycle.stop_controller(folder)
    began = time.monotonic()
    ((_, _, states),) = many_states([paths], lambda _: SlurmLauncher(max_age_s=30))
    assert time.monotonic() - began < 30  # an ordinary user's squeue tries twice, each for 9 s
    assert states["train"].word == "unknown" and "it is unknown now" in states["train"].reason
