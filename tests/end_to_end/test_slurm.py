"""The demo recipe on a private Slurm of two nodes with two simulated GPUs each: real jobs, ranks and DeepSpeed."""

from __future__ import annotations

import json
import subprocess

import pytest

from .conftest import FIVE_STAGES, TRACKED, wait_for

# Ranks compute on the CPU, and hold the simulated GPUs that a real cluster would give them.
GPUS = 'resources.default.sbatch=["--gres=gpu:2"]'


def _slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=180).stdout


# A model of several files, so that an array consolidates it.
IN_PARTS = ("consolidate.max_shard_gb=0.0002", "resources.consolidate.tasks=3")


def _check_whole_chain(place):
    """Training is warned, as before a time limit, and goes on; the other stages wait for its end."""
    published = place.root / "published"
    stages = [FIVE_STAGES, "stages.publish={}", f"publish.url={published}"]
    steps = ["train.steps=30", "checkpoints.every_steps=30", place.hook("is_first and step >= 12 and time.sleep(1)")]
    client = place.start(
        "submit", "hangul-restoration", "--launcher", "slurm", *TRACKED, *steps, *stages, GPUS, *IN_PARTS
    )
    wait_for(lambda: any(event["step"] >= 1 for event in place.events("step")), "a step", client)
    (job,) = {event["job"] for event in place.events("attempt")}
    _slurm("scancel", "--batch", "--signal=USR1", job)
    shown, said = client.communicate(timeout=400)
    assert client.returncode == 0, said + place.logs()
    first, *_ = place.events("saved")
    (resumed,) = place.events("resumed")
    assert 0 < first["step"] < 30 and resumed["step"] == first["step"]
    run = place.run_dir()
    tracked = [path.stem for path in run.glob("tracking/wandb/train-0-*/wandb/offline-run-*/run-*.wandb")]
    assert len(tracked) == 2 and len(set(tracked)) == 1, "two attempts, one W&B run"
    lines = (run / "predictions/predict/predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == list(range(24))
    assert str(run / "model/consolidate") in shown and "copying the input" in shown
    assert {state["state"] for state in place.states().values()} == {"done"}
    begun = {event["file"].rpartition(".")[0].rpartition(".")[0] for event in place.events("attempt")}
    assert len(begun) == 9, "one job a stage, two tasks of predict, three of consolidate"
    assert [path.name for path in sorted((run / "model/consolidate").glob("*.safetensors"))] == [
        f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)
    ]
    sent = {one["name"] for one in json.loads((published / "publication.json").read_text())["files"]}
    assert {"predictions/predict/predictions.jsonl", "metrics.json", "report.html", "config.json"} <= sent
    (model,) = place.events("model")
    assert model["digest"] == json.loads((run / "model/consolidate/manifest.json").read_text())["digest"]
    assert _slurm("squeue", "--me", "--noheader", "--states=PENDING,RUNNING") == ""
    script = (run / "requests/train.sh").read_text()
    assert "#SBATCH --nodes=2\n" in script and "#SBATCH --gres=gpu:2\n" in script


def test_the_demo_warned_while_it_trains_runs_through_all_stages(place, slurm):
    _check_whole_chain(place)


@pytest.mark.faults
def test_the_demo_runs_through_all_stages_with_accounting(place, slurm_accounting):
    _check_whole_chain(place)


def test_a_plan_says_when_slurm_would_start_each_stage_and_why_it_would_not(place, slurm):
    shown = place.run("plan", "hangul-restoration", "--launcher", "slurm").stdout
    assert all(f"{stage} would start at " in shown for stage in ("train", "consolidate", "predict", "merge", "score"))
    refused = place.run(
        "plan", "hangul-restoration", "--launcher", "slurm", 'resources.train.sbatch=["--gres=gpu:9"]', code=2
    )
    assert refused.stderr.startswith("sousbatch: stage 'train': sbatch: ") and "not available" in refused.stderr
    assert _slurm("squeue", "--me", "--noheader") == ""


def test_no_slurm_is_named_and_the_sandbox_offered(place):
    refused = place.run("plan", "hangul-restoration", "--launcher", "slurm", code=2)
    assert "no Slurm is configured here" in refused.stderr and "sousbatch sandbox start" in refused.stderr
