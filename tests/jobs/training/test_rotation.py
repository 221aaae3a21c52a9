"""What rank 0 keeps free for the rest of its run."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sousbatch import events, ledger
from sousbatch.checkpoints.capacity import reservations
from sousbatch.jobs.context import JobContext
from sousbatch.jobs.training.rotation import CheckpointRotation, SaveRequest
from sousbatch.recipes.forecast.storage import later_bytes
from sousbatch.recipes.plan import Plan, read_plan
from sousbatch.run_folder import RunPaths


def _planned(sousbatch: Callable[..., tuple[int, str, str]], folder: Path) -> Plan:
    _, out, _ = sousbatch("plan", "small.yaml", "--json")
    (folder / "plan.json").write_text(out)
    return read_plan(folder / "plan.json")


@pytest.mark.usefixtures("project")
def test_a_disk_that_fills_up_while_the_last_full_state_is_written_still_takes_the_weights(
    sousbatch: Callable[..., tuple[int, str, str]], mount_tmpfs: Callable[[str], Path], tmp_path: Path
) -> None:
    """The reserve goes only when the weights alone are to be written."""
    plan = _planned(sousbatch, tmp_path)
    plan = replace(plan, forecast=replace(plan.forecast, storage_peak_bytes=8 << 20))  # of a model with a reserve
    stage = plan.stage("train")
    assert stage.batch is not None
    runs = mount_tmpfs("size=16m")
    paths = RunPaths(root=runs / "small/1")
    paths.root.mkdir(parents=True)
    rotation = CheckpointRotation(
        JobContext(paths=paths, plan=plan, stage=stage, task=0, attempt=1, batch=stage.batch), stage.batch, None
    )
    assert rotation.admit("full", SaveRequest(step=1, state_bytes=0)) == "full"
    last = SaveRequest(step=stage.batch.steps, state_bytes=0, is_last=True)
    assert rotation.admit("full", last) == "full"
    with (runs / "ballast").open("wb") as others:
        room = os.fstatvfs(others.fileno())
        os.posix_fallocate(others.fileno(), 0, room.f_bavail * room.f_frsize)
    assert rotation.admit("weights", last) == "weights"
    room = os.statvfs(runs)
    assert room.f_bavail * room.f_frsize > 512 * 1024
    rotation.close()


@pytest.mark.parametrize("is_done", [False, True])
@pytest.mark.usefixtures("project")
def test_the_final_weights_of_a_runs_other_trainings_stay_promised_when_one_ends(
    sousbatch: Callable[..., tuple[int, str, str]], tmp_path: Path, is_done: bool
) -> None:
    plan = _planned(sousbatch, tmp_path)
    kept = plan.forecast.checkpoints["train"]
    plan = replace(plan, forecast=replace(plan.forecast, checkpoints={"train": kept, "again": kept}))
    paths, stage = RunPaths(root=tmp_path / "runs/small/1"), plan.stage("train")
    paths.root.mkdir(parents=True)
    if is_done:
        client = ledger.open_client(paths.ledger_dir)
        client.write(events.Ended(stage="again", exit_code=0))
        client.close()
    job = JobContext(paths=paths, plan=plan, stage=stage, task=0, attempt=1, batch=stage.batch)
    assert stage.batch is not None
    CheckpointRotation(job, stage.batch, None).close()
    found = reservations.read_reservation(paths)
    assert found is not None
    more = 0 if is_done else kept.least_bytes
    assert found.promised_bytes - found.held_bytes == later_bytes(plan.forecast) + more
