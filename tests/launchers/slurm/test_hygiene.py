"""What reaches a job on a private Slurm: what was frozen, hostile names as they are, nothing leaked, no secret."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sousbatch.cluster import slurm
from sousbatch.launchers.submission import submit
from sousbatch.recipes.plan import Stage
from sousbatch.recipes.schema import Environment, Resources

Start = Callable[..., Any]
CPU = Resources(device="cpu", time_min=5)
HOSTILE = "a b'c\"d\ne; touch x $(touch x) `touch x` *"
SECRET, NOTE = "sesame-42 'open; touch x", "two words; $(touch x) 'quoted'"
LEAKS = {
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
    "SLURM_CPU_BIND_TYPE": "mask_cpu:",
    "SLURM_JOB_ID": "4711",
    "SLURM_JOBID": "4711",
    "SLURM_NTASKS": "7",
    "SLURM_MEM_PER_CPU": "1",
    "SBATCH_PARTITION": "none-such",
    "SBATCH_ARRAY_INX": "0-5",
    "SRUN_CPUS_PER_TASK": "3",
    "SQUEUE_FORMAT": "%i",
    "SACCT_FORMAT": "JobID",
}


def test_a_run_in_a_hostile_folder_with_hostile_code_runs(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_stage: Callable[..., Stage]
) -> None:
    monkeypatch.chdir(tmp_path)
    predict = make_stage("predict", kind="predict", tasks=2)
    desk = start(predict, runs=tmp_path / HOSTILE / "-rf", code=f"code {HOSTILE}", steps=1)
    assert desk.end() == {"train": "done", "predict": "done"}
    assert not list(tmp_path.rglob("x"))


def test_what_leaked_from_another_job_does_not_reach_a_rank(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LEAKS.items():
        monkeypatch.setenv(name, value)
    job = (
        "print('LEAKED' if set(os.environ.items()) & set(" + repr(LEAKS) + ".items()) else 'clean',"
        " len(os.sched_getaffinity(0)), os.environ['WORLD_SIZE'])"
    )
    desk = start(steps=1, job=job, resources=replace(CPU, devices_per_node=2))
    assert desk.end() == {"train": "done"}
    assert desk.log().count(f"clean {len(os.sched_getaffinity(0))} 2\n") == 2 and "LEAKED" not in desk.log()


def test_a_queued_run_runs_the_recipe_and_code_that_were_submitted(
    start: Start, write_job: Callable[..., Path], tmp_path: Path
) -> None:
    desk = start(steps=1, job="print('as submitted')", resources=replace(CPU, sbatch=("--hold",)))
    assert desk.states["train"].word == "waiting" and "scontrol release" in desk.states["train"].reason
    write_job(steps=1, job="print('edited')")
    other = replace(desk.plan, recipe=replace(desk.plan.recipe, seed=1))
    with pytest.raises(Exception, match="edited"):
        submit(other, desk.launcher, tmp_path / "runs")
    desk.slurm("scontrol", "release", desk.job())
    assert desk.end() == {"train": "done"}
    assert "as submitted\n" in desk.log() and "edited" not in desk.log()


def test_a_queued_run_whose_frozen_code_was_changed_refuses_to_start(start: Start) -> None:
    desk = start(steps=1, resources=replace(CPU, sbatch=("--hold",)))
    (frozen,) = desk.paths.root.rglob("job.py")
    frozen.write_text("print('tampered')")
    desk.slurm("scontrol", "release", desk.job())
    assert desk.end() == {"train": "failed"}
    assert "was changed after submission" in desk.states["train"].reason and "tampered" not in desk.log()


@pytest.mark.parametrize("accounting", [False, pytest.param(True, marks=pytest.mark.faults)])
def test_secrets_and_spaced_values_reach_ranks_and_are_written_nowhere(
    another_slurm: Start, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accounting: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = another_slurm(accounting=accounting)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", f"{SECRET} not named")
    environment = Environment(inherit=("HF_TOKEN",), variables={"NOTE": NOTE, "lower_case": NOTE})
    job = (
        (
            f"assert os.environ['HF_TOKEN'] == {SECRET!r}.replace('-42', '-' + '42')\n"
            f"assert os.environ['NOTE'] == os.environ['lower_case'] == {NOTE!r}\n"
            "assert 'WANDB_API_KEY' not in os.environ"
        )
        .replace("'sesame-42", "'sesame-' '42")
        .replace('"sesame-42', '"sesame-" "42')
    )
    desk = start(steps=10**6, environment=environment, job=job)
    desk.wait_until_saved()
    said = [desk.slurm("scontrol", "show", "job", desk.job()), desk.slurm("squeue", "-O", "Command:999,Comment:999")]
    (desk.paths.root / "enough").touch()
    assert desk.end() == {"train": "done"}
    if accounting:
        deadline = time.monotonic() + 30  # the database may hear of the job later than its end is known
        while desk.job() not in (told := desk.slurm("sacct", "-P", "-a", "-o", "JobID,JobName,SubmitLine,Comment")):
            assert time.monotonic() < deadline, told
            time.sleep(0.2)
        said.append(told)
    assert not any("sesame" in text for text in said)
    files = [path for place in (tmp_path, folder / "log") for path in place.rglob("*") if path.is_file()]
    found = [path for path in files if b"sesame-42" in path.read_bytes()]
    assert not found and not list(tmp_path.rglob("x"))


def test_a_shell_that_names_another_user_sees_its_own_jobs(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = start(steps=1)
    monkeypatch.setenv("LOGNAME", "nobody")  # as some `sudo` and `su` leave it
    monkeypatch.setenv("USER", "nobody")
    assert any(desk.plan.run_id in row.comment for row in slurm.queue())
    assert desk.end() == {"train": "done"}
