"""Publishing a run, as a stage and by the command: what is there afterwards, and what is not sent twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sousbatch import ledger
from sousbatch.checkpoints import commit
from sousbatch.checkpoints.consolidation.consolidate import consolidate
from sousbatch.checkpoints.consolidation.manifest import verify_manifest
from sousbatch.checkpoints.consolidation.options import ConsolidateOptions
from sousbatch.checkpoints.integrity import open_verified
from sousbatch.cli.publish import _WHAT
from sousbatch.cli.results import describe_results
from sousbatch.errors import RunError
from sousbatch.events import Ended, Kept, Published, Saved, Started, of
from sousbatch.jobs.context import run_job
from sousbatch.jobs.publication import gather
from sousbatch.jobs.publish import publish
from sousbatch.publishing.send import PUBLICATION_NAME
from sousbatch.recipes.plan import read_plan
from sousbatch.recipes.schema import Adapter
from sousbatch.recipes.schema.execution import PublishedPart
from sousbatch.run_folder import RunPaths

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(frozen: Callable[..., RunPaths], project: Path, tmp_path: Path) -> RunPaths:
    """A run with a model, merged predictions and scores, and a publish stage that is next."""
    files = f"data.splits.train=[{json.dumps(str(project / 'train.jsonl'))}]"
    paths = frozen(f"publish.url=file://{tmp_path}/published", "stages.publish={}", "train.learning_rate=0.25", files)
    paths.model("consolidate").parent.mkdir(parents=True)
    options = ConsolidateOptions(copy_from=project / "model", is_compared=False)
    consolidate(open_verified(project / "model"), paths.model("consolidate"), options)
    paths.predictions("predict").mkdir(parents=True)
    paths.predictions_file("predict").write_text('{"index": 0, "prediction": "답"}\n', encoding="utf-8")
    paths.metrics_dir.mkdir()
    scores = {"model": {"exact_match": 0.75}, "copy_input": {"exact_match": 0.0}}
    paths.stage_metrics("score").write_text(json.dumps({"split": "test", "num_rows": 5, "scores": scores}))
    with closing(ledger.open_attempt(paths.ledger_dir, "publish", 0)) as attempt:
        attempt.write(Started())
    return paths


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_stage_publishes_model_predictions_and_report(run: RunPaths, tmp_path: Path) -> None:
    target = tmp_path / "published"
    assert run_job("publish", publish, [str(run.root), "publish"]) == 0
    own = {"predictions/predict/predictions.jsonl", "metrics.json", "report.html", PUBLICATION_NAME}
    assert names_in(target) == names_in(run.model("consolidate")) | own
    verify_manifest(target)  # with the card that is there
    (event,) = of(ledger.read(run.ledger_dir), Published)
    listed = json.loads((target / PUBLICATION_NAME).read_text())
    assert (event.url, event.num_files) == (f"file://{target}", len(listed["files"]))
    assert (listed["run"], listed["model"], event.digest) == (
        run.run_id,
        *[verify_manifest(run.model("consolidate")).digest] * 2,
    )


def test_the_card_says_recipe_scores_and_digests_and_no_place_of_this_machine(run: RunPaths, tmp_path: Path) -> None:
    assert run_job("publish", publish, [str(run.root), "publish"]) == 0
    card = (tmp_path / "published" / "README.md").read_text()
    assert card.startswith(run.model("consolidate").joinpath("README.md").read_text())
    assert "| score | 5 of test | exact_match | 0.75 | 0 |" in card
    assert "\ntrain.learning_rate: 0.25\n" in card and "\nmodel.path: model\n" in card
    plan = read_plan(run.plan)
    assert all(digest in card for digest in (run.run_id, *plan.data_digests.values()))
    assert str(tmp_path) not in card


def test_the_command_sends_what_is_missing_and_says_so(run: RunPaths, sousbatch: Run, tmp_path: Path) -> None:
    target = tmp_path / "by hand"
    code, out, err = sousbatch("publish", run.run_id, str(target), "--what", "model", "predictions")
    assert code == 0, err
    num_files = len(names_in(target)) - 1
    assert out.startswith(f"{target}: {num_files} files, ") and f"{num_files} of them sent now" in out
    assert "report.html" not in names_in(target)
    (target / "config.json").unlink()
    code, out, err = sousbatch("publish", run.run_id, str(target), "--what", "model", "predictions")
    assert (code, "1 of them sent now" in out) == (0, True)
    assert [event.url for event in of(ledger.read(run.ledger_dir), Published)] == [str(target)] * 2


def test_what_is_published_names_no_folder_and_stays_the_same_while_the_run_does(
    run: RunPaths, sousbatch: Run, tmp_path: Path
) -> None:
    target, where = tmp_path / "published", str(tmp_path)
    with closing(ledger.open_job(run.ledger_dir, "train", 0, 1)) as job:
        job.write(Saved(step=1, num_bytes=5, held_bytes=5))
        job.write(Kept(step=1, message=f"{run.checkpoints('train')}/step-00000001: Permission denied"))
    run.log_dir.mkdir()
    run.log("train", 0).write_text(f"{where}: no such thing\n")
    assert run_job("publish", publish, [str(run.root), "publish"]) == 0
    before = {name: (target / name).read_bytes() for name in names_in(target)}
    named = [name for name, content in before.items() if where.encode() in content]
    assert named == []
    assert b"Permission denied" in before["report.html"] and b"train.jsonl" in before["README.md"]
    with closing(ledger.open_attempt(run.ledger_dir, "publish", 0)) as attempt:
        attempt.write(Started(host="elsewhere"))
        attempt.write(Ended(exit_code=0))
    code, out, err = sousbatch("publish", run.run_id)  # with place and parts of the recipe
    assert (code, ", 0 of them sent now" in out) == (0, True), out + err
    assert {name: (target / name).read_bytes() for name in names_in(target)} == before
    assert f"file://{target}" in describe_results(read_plan(run.plan), run)


def test_what_is_not_there_yet_or_was_changed_is_told_before_anything_is_sent(
    run: RunPaths, sousbatch: Run, tmp_path: Path
) -> None:
    target = tmp_path / "by hand"
    run.predictions_file("predict").rename(tmp_path / "away")
    code, _, err = sousbatch("publish", run.run_id, str(target))
    assert code == 1 and "the predictions file of stage 'merge' is not there yet, or was removed" in err
    with (run.model("consolidate") / "config.json").open("a") as stream:
        stream.write(" ")
    code, _, err = sousbatch("publish", run.run_id, str(target), "--what", "model")
    assert code == 1 and "config.json has" in err
    assert not target.exists()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nosuch://bucket/x", "Protocol not known: nosuch"),
        ("memory://x", "would be gone"),
        ("hf:/team/x", "is no URL, which begins with hf://; ./hf:/team/x is a folder here"),
    ],
)
def test_a_place_that_takes_nothing_is_refused(run: RunPaths, sousbatch: Run, url: str, said: str) -> None:
    code, _, err = sousbatch("publish", run.run_id, url)
    assert code == 2 and said in err


def test_an_adapter_goes_along_as_peft_loads_it(run: RunPaths, tmp_path: Path) -> None:
    plan = read_plan(run.plan)
    own = plan.stage("consolidate")
    lora = replace(own, settings=replace(own.settings, adapter=Adapter(method="lora", rank=2)))
    plan = replace(plan, stages=tuple(lora if stage == own else stage for stage in plan.stages))
    asked = partial(gather, run, plan, ["adapter"], model_stage="consolidate", stages=plan.stages, work=tmp_path)
    with pytest.raises(RunError, match="no adapter: .*leave adapter out"):
        asked()
    run.checkpoints("train").mkdir(parents=True)
    temporary = commit.begin(run.checkpoints("train"), 7, 1)
    names = [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{one}.weight" for one in "AB"]
    weights = {name: np.full((2, 8) if number == 0 else (8, 2), 0.5, np.float32) for number, name in enumerate(names)}
    save_file(weights, temporary / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (temporary / "adapter_config.json").write_text(json.dumps(config))
    commit.commit(temporary, step=7, attempt=1, metric=0.5, world_size=1, check_fence=lambda: None)
    found = asked().files
    assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/manifest.json"} < set(found)
    back = load_file(found["adapter/adapter_model.safetensors"])
    assert all(np.array_equal(back[name], weights[name]) for name in names)


def test_the_command_offers_what_the_recipe_s_key_does() -> None:
    assert _WHAT == get_args(PublishedPart)
