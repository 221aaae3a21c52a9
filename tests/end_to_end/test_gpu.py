"""On a real GPU: precisions, sharding, offloading, QLoRA, memory, faults. `make test-gpu` runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sousbatch.cluster.site import visible_gpus

pytestmark = pytest.mark.gpu
# 29 million parameters: large enough that memory is the model's and not the library's.
LARGER = (
    "model.config={hidden_size: 512, intermediate_size: 2048, num_hidden_layers: 8, num_attention_heads: 8, "
    "num_key_value_heads: 8, head_dim: 64}"
)
ON_ONE_CARD = ["resources.default.device=gpu", "resources.train.nodes=1", "resources.predict.tasks=1"]
# Writes the most that the card held, before the last step.
MEASURE = "step == 5 and open('WHERE', 'w').write(str(torch.cuda.max_memory_allocated()))"
CELLS = {
    "bfloat16, no sharding": ("bfloat16", 0, "none"),
    "float16, no sharding": ("float16", 0, "none"),
    "bfloat16, ZeRO-1": ("bfloat16", 1, "none"),
    "bfloat16, ZeRO-2, optimizer offloaded": ("bfloat16", 2, "optimizer"),
    "float16, ZeRO-2": ("float16", 2, "none"),
    "bfloat16, ZeRO-3": ("bfloat16", 3, "none"),
    "bfloat16, ZeRO-3, all offloaded": ("bfloat16", 3, "both"),
}


@pytest.fixture(scope="module", autouse=True)
def card() -> str:
    found = visible_gpus()
    if not found:
        pytest.skip("no NVIDIA GPU is visible to this process: nvidia-smi shows none")
    return found[0].name


def forecast_bytes(place) -> int:
    lines = json.loads((place.run_dir() / "plan.json").read_text())["forecast"]["device"]["train"]
    return sum(line["num_bytes"] for line in lines)


@pytest.mark.parametrize("cell", CELLS)
def test_it_trains_consolidates_and_predicts_in_the_memory_that_was_forecast(place, small, five_stages, cell):
    precision, zero, offload = CELLS[cell]
    measured = place.root / "measured"
    method = [f"train.precision={precision}", f"train.zero.stage={zero}", f"train.zero.offload={offload}"]
    hook = place.hook(MEASURE.replace("WHERE", str(measured)))
    place.run("submit", "hangul-restoration", *small, five_stages, *ON_ONE_CARD, LARGER, *method, hook)
    assert {stage["state"] for stage in place.states().values()} == {"done"}
    predictions = place.run_dir() / "predictions/predict/predictions.jsonl"
    assert len(predictions.read_text().splitlines()) == 24
    found, wanted = int(measured.read_text()), forecast_bytes(place)
    print(f"{cell}: {found / 1e9:.3f} GB of the card, {wanted / 1e9:.3f} GB forecast")
    assert found <= wanted * 1.15, "a forecast that is too low is what fills a card"


def test_qlora_trains_beside_a_consolidated_model_and_is_merged(place, small, five_stages):
    tune = "adapter: {method: qlora, rank: 4}"
    stages = (
        f"stages={{train: {{}}, consolidate: {{}}, tune: {{kind: train, of: consolidate, set: {{{tune}}}}}, "
        "merged: {kind: consolidate, of: tune}, predict: {of: merged}, merge: {}, score: {}}"
    )
    place.run("submit", "hangul-restoration", *small, stages, *ON_ONE_CARD, LARGER, "train.precision=bfloat16")
    assert {stage["state"] for stage in place.states().values()} == {"done"}
    assert list(Path(place.run_dir() / "model/merged").glob("*.safetensors"))


def test_out_of_memory_halves_the_micro_batch_and_training_goes_on(place, small, only_train):
    """The card lends a share that holds a micro batch of 2 and not one of 4."""
    limit = "if step == 0: torch.cuda.set_per_process_memory_fraction(SHARE)"
    batch = ["train.precision=bfloat16", "train.micro_batch=8", "data.max_tokens=160", "train.global_batch=8"]
    share = 1.2e9 / visible_gpus()[0].memory_bytes
    hook = place.hook(limit.replace("SHARE", repr(share)))
    larger = LARGER.replace("hidden_layers: 8", "hidden_layers: 16")
    place.run("submit", "hangul-restoration", *only_train, *ON_ONE_CARD, larger, *batch, hook)
    sizes = [event["micro_batch"] for event in place.events("attempt") if "micro_batch" in event]
    print(f"micro batches tried: {sizes}")
    assert sizes[0] == 8 and sizes == sorted(sizes, reverse=True) and place.states()["train"]["state"] == "done"


def test_a_killed_training_resumes_from_its_last_state(place, small, only_train, until):
    overrides = [*only_train, *ON_ONE_CARD, LARGER, "train.precision=bfloat16", "train.steps=40", "train.zero.stage=3"]
    client = place.start("submit", "hangul-restoration", *overrides)
    until(lambda: place.events("saved"), "a first checkpoint", client)
    place.kill_all()
    client.communicate(timeout=100)
    place.run("resume", "hangul-restoration")
    assert place.events("resumed")[-1]["step"] >= 2 and place.states()["train"]["state"] == "done"
