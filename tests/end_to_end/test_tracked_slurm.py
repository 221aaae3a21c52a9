"""A sweep on a private Slurm arrives at a stand-in for W&B as one run for each point, online and by a sync."""

from __future__ import annotations

import itertools
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from ..tracking.stand_in import StandIn
from .conftest import FIVE_STAGES, SMALL, wait_for

pytestmark = pytest.mark.faults

# One process a task: four points share two cores.
POINT = [
    *(text for text in SMALL if not text.startswith("tracking.")),
    *("train.steps=12", "train.log_every_steps=1", "checkpoints.every_steps=4"),
    *("train.zero.stage=0", "resources.train.nodes=1", "resources.predict.tasks=1"),
    *("data.generator.num_validation=8", "data.generator.num_test=6", "environment.inherit=[WANDB_API_KEY]"),
]
RATES, SEEDS = (0.001, 0.003), (1, 2)
AXES = ["--sweep", "train.learning_rate=1e-3,3e-3", "seed=1,2"]


@pytest.fixture
def server():
    found = StandIn()
    yield found
    found.close()


def _begun(place) -> list[tuple[Path, str]]:
    """The points that have made seven steps of their training, each with its element of the array."""
    found = []
    for folder in place.root.glob("runs/*/*/*/*/ledger"):
        events = [json.loads(line) for path in folder.glob("*train-*") for line in path.read_text().splitlines()]
        if max((event.get("step", 0) for event in events), default=0) >= 7:
            found += [(folder.parent, event["job"]) for event in events if event["kind"] == "attempt"]
    return found


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_sweep_of_which_a_point_is_requeued_is_one_run_for_each_point(place, slurm, server, mode):
    shell = replace(place, shell=server.variables() | {"WANDB_MODE": mode})
    slow = place.hook("is_first and step >= 6 and time.sleep(0.5)")
    client = shell.start("submit", "hangul-restoration", "--launcher", "slurm", *POINT, FIVE_STAGES, slow, *AXES)
    (requeued, element), *_ = wait_for(lambda: _begun(place), "seven steps", client, 200)
    subprocess.run(["scancel", "--batch", "--signal=USR1", element], check=True)
    said = client.communicate(timeout=400)
    assert client.returncode == 0, said
    assert len(list(requeued.glob("tracking/wandb/train-0-*"))) == 2, "two attempts"
    if mode == "offline":
        assert not server.runs
        shell.shell["WANDB_MODE"] = "online"
        assert shell.run("sync").stdout.count(": sent\n") == 4 * 4 + 1
    before = {name: len(run.rows) for name, run in server.runs.items()}
    assert "nothing is left to send" in shell.run("sync").stderr
    assert {name: len(run.rows) for name, run in server.runs.items()} == before

    points = {path.parent.name: path.parent for path in place.root.glob("runs/*/*/*/*/plan.json")}
    runs = server.runs
    assert runs.keys() == points.keys()
    config = {name: {key: one["value"] for key, one in run.config.items()} for name, run in runs.items()}
    values = [(one["train"]["learning_rate"], one["seed"]) for one in config.values()]
    assert sorted(values) == list(itertools.product(RATES, SEEDS))
    for name, run in runs.items():
        told = {f"train.learning_rate={config[name]['train']['learning_rate']}", f"seed={config[name]['seed']}"}
        assert told <= set(run.given["tags"]) and all(text in run.given["displayName"] for text in told)
        assert run.given["notes"].startswith(f"{points[name]}\n")
        assert [row["train/step"] for row in run.rows if "train/loss" in row] == list(range(1, 13))
        for value, steps in (("train/eval_loss", [4, 8, 12]), ("train/storage/held_gb", [4, 8, 12])):
            shown = [row["train/step"] for row in run.rows if value in row]
            assert sorted({*shown, *steps}) == shown, "it also saves when it is asked to stop"
        assert sorted(row["_step"] for row in run.rows) == list(range(len(run.rows)))
        assert {"merge/num_rows", "score/model/cer", "consolidate/num_bytes"} <= run.summary.keys()
        assert any("score/samples" in row for row in run.rows)
        assert run.summary["merge/num_rows"] == 6
        assert run.endings[-1]["exitcode"] == 0
        assert any(one["preempting"] for one in run.endings) == (points[name] == requeued)
    assert len({run.given["groupName"] for run in runs.values()}) == 1
    made = [one for one in server.artifacts if one["artifactTypeName"] != "run_table"]
    assert {one["artifactTypeName"] for one in made} == {"data", "model", "predictions"}
    for artifact in made:
        links = [entry["ref"] for entry in artifact["manifest"]["contents"].values()]
        assert links and all(Path(link.removeprefix("file://")).exists() for link in links)
