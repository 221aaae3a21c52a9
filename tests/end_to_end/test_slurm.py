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


def _check_whole_chain(place, small):
    published = place.root / "published"
    stages = [FIVE_STAGES, "stages.publish={}", f"publish.url={published}"]
    done = place.run("submit", "hangul-restoration", "--launcher", "slurm", *small, *stages, GPUS, *IN_PARTS)
    run = place.run_dir()
    lines = (run / "predictions/predict/predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == list(range(24))
    assert str(run / "model/consolidate") in done.stdout and "copying the input" in done.stdout
    assert {state["state"] for state in place.states().values()} == {"done"}
    starts = {(event["file"].split(".")[1], event["host"]) for event in place.events("attempt")}
    assert len(starts) == 9, "one job a stage, two tasks of predict, three of consolidate"
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


def test_the_demo_runs_through_all_stages(place, small, slurm):
    _check_whole_chain(place, small)


@pytest.mark.faults
def test_the_demo_runs_through_all_stages_with_accounting(place, small, slurm_accounting):
    _check_whole_chain(place, small)


def test_a_real_training_that_is_warned_goes_on_with_the_same_wandb_run(place, slurm):
    steps = [*TRACKED, "train.steps=30", "checkpoints.every_steps=30", "stages={train: {}}"]
    slow = place.hook("is_first and step >= 12 and time.sleep(1)")  # so that the warning comes before the end
    client = place.start("submit", "hangul-restoration", "--launcher", "slurm", *steps, slow)
    wait_for(lambda: any(event["step"] >= 1 for event in place.events("step")), "a step", client)
    (job,) = {event["job"] for event in place.events("attempt")}
    _slurm("scancel", "--batch", "--signal=USR1", job)
    _, said = client.communicate(timeout=300)
    assert client.returncode == 0, said + place.logs()
    first, *_ = place.events("saved")
    (resumed,) = place.events("resumed")
    assert 0 < first["step"] < 30 and resumed["step"] == first["step"]
    tracked = [path.stem for path in place.run_dir().glob("tracking/wandb/*/wandb/offline-run-*/run-*.wandb")]
    assert len(tracked) == 2 and len(set(tracked)) == 1, "two attempts, one W&B run"


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
