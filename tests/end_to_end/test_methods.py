"""Ways of training beside the demo's: each trains, and is consolidated to a model that loads."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from .conftest import KILL_A_RANK

pytestmark = pytest.mark.xdist_group("methods")
OUT_OF_MEMORY = "if is_first: raise torch.OutOfMemoryError('CUDA out of memory (played by a test)')"


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def without_deepspeed(shared_place, small):
    """A training of which a rank is killed, and one of an adapter, with DeepSpeed, that starts from its model."""
    place = shared_place()
    adapter = "adapter: {method: lora, rank: 4}"
    stages = (
        f"stages={{train: {{}}, consolidate: {{}}, "
        f"tune: {{kind: train, of: consolidate, set: {{{adapter}, train: {{zero: {{stage: 3}}}}}}}}, "
        f"merged: {{kind: consolidate, of: tune}}, predict: {{of: merged}}, merge: {{}}}}"
    )
    place.run("submit", "hangul-restoration", *small, stages, "train.zero.stage=0", place.hook(KILL_A_RANK))
    return place


@pytest.fixture(scope="module")
def zero_2(shared_place, only_train):
    """A training in bfloat16 with a frozen layer, whose first attempt runs out of device memory."""
    place = shared_place()
    method = ["train.zero.stage=2", "train.precision=bfloat16", "model.freeze=[layers:0-0]"]
    place.run("submit", "hangul-restoration", *only_train, *method, place.hook(OUT_OF_MEMORY))
    return place


@pytest.mark.parametrize("method", ["without_deepspeed", "zero_2"])
def test_it_trains_and_consolidates(request, method):
    place = request.getfixturevalue(method)
    model = load(place.run_dir() / "model/consolidate")
    assert str(model.dtype) == "torch.float16"
    assert sum(parameter.numel() for parameter in model.parameters()) == 349_952
    assert [event["step"] for event in place.events("saved") if ".train-" in event["file"]][-1] == 6


def test_a_killed_rank_costs_an_attempt_without_deepspeed_too(without_deepspeed):
    attempts = [event["file"] for event in without_deepspeed.events("attempt") if ".train-" in event["file"]]
    assert len(attempts) == 2
    assert without_deepspeed.events("resumed")[0]["step"] >= 2


def test_out_of_device_memory_halves_the_micro_batch_and_keeps_the_global_one(zero_2):
    attempts = [event for event in zero_2.events("attempt") if "micro_batch" in event]
    assert [(event["micro_batch"], event["accumulation"]) for event in attempts] == [(4, 1), (2, 2)]


def test_the_next_attempt_tells_of_the_model(zero_2):
    """As after a kill between the model's appearing and the record of it."""
    run = zero_2.run_dir()
    (said,) = zero_2.events("model")
    (run / "ledger" / said["file"]).unlink()
    for _ in range(2):
        subprocess.run([sys.executable, "-P", "-m", "sousbatch.jobs.consolidate", run, "consolidate"], check=True)
        assert [event["digest"] for event in zero_2.events("model")] == [said["digest"]]


def test_an_adapter_is_trained_on_an_earlier_stages_model_and_merged_into_it(without_deepspeed):
    """Chained training: the second stage starts from the first one's model."""
    import torch

    place = without_deepspeed
    run = place.run_dir()
    base, merged = load(run / "model/consolidate"), load(run / "model/merged")
    changed = {name for name, weight in merged.state_dict().items() if not torch.equal(weight, base.state_dict()[name])}
    assert changed and all("proj" in name for name in changed)
    sizes = {
        path.name: json.loads((path / "checkpoint.json").read_text()) for path in run.glob("checkpoints/tune/step-*")
    }
    assert sizes, place.logs()
    assert len((run / "predictions/predict/predictions.jsonl").read_text().splitlines()) == 24
