"""The whole chain, once: every stage really ran, and left what it should."""

from __future__ import annotations

import json
import stat

import pytest

from .conftest import TRACKED

pytestmark = pytest.mark.xdist_group("finished")


def test_submit_prints_where_model_predictions_and_scores_lie(finished):
    place, done = finished
    run = place.run_dir()
    assert str(run / "model/consolidate") in done.stdout
    assert str(run / "predictions/predict/predictions.jsonl") in done.stdout
    assert str(run / "metrics.json") in done.stdout
    assert "copying the input" in done.stdout


def test_no_stage_leaves_anything_in_the_temporary_folder(finished):
    place, _ = finished
    assert list((place.root / "tmp").iterdir()) == []


def test_every_row_is_predicted_once_and_in_order(finished):
    place, _ = finished
    lines = (place.run_dir() / "predictions/predict/predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["index"] for row in rows] == list(range(24))
    assert [row["id"] for row in rows] == [f"test-{number:06d}" for number in range(24)]


def test_the_other_split_is_predicted_and_scored_too(finished):
    place, _ = finished
    metrics = json.loads((place.run_dir() / "metrics.json").read_text())
    assert {result["split"] for result in metrics.values()} == {"test", "test_other_mix"}
    assert all({"model", "copy_input"} == set(result["scores"]) for result in metrics.values())


def test_the_model_is_half_precision_and_loads_with_its_tokenizer(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, _ = finished
    folder = place.run_dir() / "model/consolidate"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert str(model.dtype) == "torch.float16"
    assert sum(parameter.numel() for parameter in model.parameters()) == 349_952
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<eos>"


def test_the_model_is_bit_for_bit_what_deepspeed_makes_of_the_checkpoint(finished):
    import torch
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    from safetensors.torch import load_file

    place, _ = finished
    run = place.run_dir()
    step = json.loads((run / "model/consolidate/manifest.json").read_text())["step"]
    expected = get_fp32_state_dict_from_zero_checkpoint(str(run / f"checkpoints/train/step-{step:08d}"))
    found = load_file(run / "model/consolidate/model.safetensors")
    assert all(torch.equal(found[name], tensor.half()) for name, tensor in expected.items() if name in found)
    assert set(found) <= set(expected) and len(found) == 20


def test_rotation_keeps_the_last_and_the_best(finished):
    place, _ = finished
    kept = {path.name for path in (place.run_dir() / "checkpoints/train").glob("step-*")}
    saved = place.events("saved")
    best = min(saved, key=lambda event: event["metric"])
    assert kept == {f"step-{step:08d}" for step in (6, best["step"])}
    assert {event["step"] for event in place.events("removed")} == {2, 4, 6} - {6, best["step"]}


def test_the_ledger_has_losses_of_every_log_step_and_the_last(finished):
    place, _ = finished
    assert [event["step"] for event in place.events("step") if "loss" in event][-1] == 6


def test_wandb_has_one_run_over_all_stages_with_the_whole_recipe(finished):
    place, _ = finished
    run = place.run_dir()
    files = sorted((run / "tracking/wandb").glob("*/wandb/offline-run-*/run-*.wandb"))
    assert {path.stem for path in files} == {f"run-{run.name}"}
    text = b"".join(path.read_bytes() for path in files)
    for said in ("train/loss", "score/model/character_accuracy", "consolidate/num_bytes", "learning_rate", "made_of"):
        assert said.encode() in text, said
    assert f"hangul-restoration-{run.name}".encode() in text  # the group
    assert b"train.steps=6" in text  # what sets it apart from the library's recipe


def test_each_value_of_a_dashboard_is_one_that_the_run_logged(finished):
    """What W&B measures itself has no rows yet after so short a run."""
    from sousbatch.tracking.wandb_files import read_records

    place, _ = finished
    shown = json.loads(place.run("dashboards", "show", place.run_dir().name, "--json").stdout)
    logged = {"_runtime"}
    for path in (place.run_dir() / "tracking/wandb").glob("*/wandb/offline-run-*/run-*.wandb"):
        for record in read_records(path):
            updates = (record.history.item, record.summary.update)
            logged |= {item.key or item.nested_key[0] for items in updates for item in items}
            for item in (*record.run.config.update, *record.config.update):
                value = json.loads(item.value_json)
                inner = value if isinstance(value, dict) else ()
                logged |= {f"config:{item.key}", *(f"config:{item.key}.{key}" for key in inner)}
    panels = [panel for section in shown["sections"] for panel in section["panels"]]
    values = {value for panel in panels for value in (*panel["values"], panel["over"]) if value}
    assert {value for value in values - logged if not value.startswith("system/")} == set()
    assert shown["filter"] in logged and len(values) > 60


def test_run_folders_are_private(finished):
    place, _ = finished
    assert stat.S_IMODE(place.run_dir().stat().st_mode) == 0o700


def test_submitting_again_says_that_it_is_done_and_does_nothing(finished):
    place, _ = finished
    before = len(place.events("attempt"))
    done = place.run("submit", "hangul-restoration", *TRACKED)
    assert "done already" in done.stderr and "--again" in done.stderr
    assert len(place.events("attempt")) == before


def test_each_job_can_be_run_alone_from_its_run_folder(finished):
    import subprocess
    import sys

    place, _ = finished
    run = place.run_dir()
    before = (run / "predictions/predict/predictions.jsonl").read_bytes()
    tracked = sorted((run / "tracking/wandb").iterdir())
    for kind in ("consolidate", "predict", "merge", "score"):
        command = [sys.executable, "-P", "-m", f"sousbatch.jobs.{kind}", str(run), kind]
        done = subprocess.run(command, env=place.environment, cwd=place.root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (run / "predictions/predict/predictions.jsonl").read_bytes() == before
    assert sorted((run / "tracking/wandb").iterdir()) == tracked


def test_status_and_logs_are_right_from_any_folder(finished):
    place, _ = finished
    run_id = place.run_dir().name
    assert "done" in place.run("status").stdout
    assert "step 6 of 6" in place.run("logs", run_id[:6], "train").stdout


def test_checkpoints_of_a_run_are_listed_and_whole(finished):
    place, _ = finished
    run_id = place.run_dir().name
    assert "committed" in place.run("checkpoints", "list", run_id).stdout
    assert "intact" in place.run("checkpoints", "verify", run_id).stdout


def test_predictions_score_agrees_with_the_score_stage(finished):
    place, _ = finished
    run = place.run_dir()
    plan = json.loads((run / "plan.json").read_text())
    data = plan["inputs"]["splits"]["test"]["path"]
    predictions = str(run / "predictions/predict/predictions.jsonl")
    scores = json.loads(place.run("predictions", "score", predictions, "--data", data, "--json").stdout)
    assert scores == json.loads((run / "metrics.json").read_text())["score"]["scores"]


def test_no_process_is_left(finished):
    place, _ = finished
    assert place.processes() == []


def test_nothing_was_compiled(finished):
    """DeepSpeed's just-in-time extensions are never built, though there may be a compiler."""
    place, _ = finished
    assert not (place.root / "extensions").exists()
