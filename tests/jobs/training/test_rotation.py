"""What rank 0 keeps free for the rest of its run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sousbatch import events, ledger
from sousbatch.checkpoints.capacity import reservations
from sousbatch.jobs.context import JobContext
from sousbatch.jobs.training.rotation import CheckpointRotation
from sousbatch.recipes.forecast.storage import later_bytes
from sousbatch.recipes.plan import read_plan
from sousbatch.run_folder import RunPaths


@pytest.mark.parametrize("is_done", [False, True])
def test_the_final_weights_of_a_runs_other_trainings_stay_promised_when_one_ends(
    sousbatch: Callable[..., tuple[int, str, str]], project: Path, tmp_path: Path, is_done: bool
) -> None:
    _, out, _ = sousbatch("plan", "small.yaml", "--json")
    (tmp_path / "plan.json").write_text(out)
    plan = read_plan(tmp_path / "plan.json")
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
