"""Ways of training beside the demo's: each trains, and is consolidated to a model that loads."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["train.zero.stage=0"], id="without DeepSpeed"),
        pytest.param(
            ["train.zero.stage=2", "train.precision=bfloat16", "model.freeze=[layers:0-0]"],
            id="ZeRO-2, bfloat16, frozen layer",
        ),
    ],
)
def test_it_trains_and_consolidates(place, only_train, overrides):
    place.run("submit", "hangul-restoration", *only_train, *overrides)
    model = load(place.run_dir() / "model/consolidate")
    assert str(model.dtype) == "torch.float16"
    assert sum(parameter.numel() for parameter in model.parameters()) == 349_952
    assert place.events("saved")[-1]["step"] == 6
    _check_that_the_next_attempt_tells_of_the_model(place)


def _check_that_the_next_attempt_tells_of_the_model(place):
    """As after a kill between the model's appearing and the record of it."""
    run = place.run_dir()
    (told,) = place.events("model")
    for number in (0, 1):
        if number == 0:
            (run / "ledger" / told["file"]).unlink()
        subprocess.run([sys.executable, "-P", "-m", "sousbatch.jobs.consolidate", run, "consolidate"], check=True)
        assert [event["digest"] for event in place.events("model")] == [told["digest"]]


def test_an_adapter_is_trained_on_an_earlier_stages_model_and_merged_into_it(place, small):
    """Chained training: the second stage starts from the first one's model."""
    import torch

    adapter = "set: {adapter: {method: lora, rank: 4}}"
    stages = (
        f"stages={{train: {{}}, consolidate: {{}}, tune: {{kind: train, of: consolidate, {adapter}}}, "
        f"merged: {{kind: consolidate, of: tune, {adapter}}}, predict: {{of: merged}}, merge: {{}}}}"
    )
    place.run("submit", "hangul-restoration", *small, stages, "train.steps=4")
    run = place.run_dir()
    base, merged = load(run / "model/consolidate"), load(run / "model/merged")
    changed = {name for name, weight in merged.state_dict().items() if not torch.equal(weight, base.state_dict()[name])}
    assert changed and all("proj" in name for name in changed)
    sizes = {
        path.name: json.loads((path / "checkpoint.json").read_text()) for path in run.glob("checkpoints/tune/step-*")
    }
    assert sizes, place.logs()
    assert len((run / "predictions/predict/predictions.jsonl").read_text().splitlines()) == 24
