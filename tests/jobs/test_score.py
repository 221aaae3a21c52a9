"""The score job measures with any metric and shows its scores with any tracker, those of other packages too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

import pytest

from sousbatch import ledger
from sousbatch.jobs.context import run_job
from sousbatch.jobs.score import score
from sousbatch.predictions.selection import read_examples
from sousbatch.recipes.plan import read_plan
from sousbatch.run_folder import RunPaths

TOYS = """
import json
from sousbatch.predictions.metrics import Metric

def length(answers):
    return {"toy_length": [len(text) for text, _ in answers.texts]}

LENGTH = Metric(score=length, better="lower", needs=())

class Show:
    def start(self, identity): self.path = identity.folder / identity.id
    def log(self, step, values): raise AssertionError("a score has no steps")
    def summary(self, values): self.path.write_text(json.dumps(values))
    def finish(self, exit_code): self.path.rename(f"{self.path}-ended-{exit_code}")
"""


@pytest.fixture
def run(frozen: Callable[..., RunPaths], third_party: Callable[..., None]) -> RunPaths:
    """A run whose predictions are merged: each is two characters long."""
    third_party("sousbatch.metrics", "toy = toy_module:LENGTH", TOYS)
    third_party("sousbatch.trackers", "toy = toy_module:Show", TOYS)
    paths = frozen("score.metrics=[toy]", "tracking.trackers=[toy]")
    paths.predictions("predict").mkdir(parents=True)
    num_rows = read_plan(paths.plan).stage("predict").splits["predict"].num_rows
    rows = [json.dumps({"index": number, "prediction": "답답"}) + "\n" for number in range(num_rows)]
    paths.predictions_file("predict").write_text("".join(rows))
    return paths


@pytest.mark.parametrize("is_by_hand", [False, True])
def test_scores_are_written_and_shown_but_for_a_job_run_by_hand(
    run: RunPaths, monkeypatch: pytest.MonkeyPatch, sousbatch: Callable[..., tuple[int, str, str]], is_by_hand: bool
) -> None:
    if not is_by_hand:
        ledger.open_attempt(run.ledger_dir, "score", 0).close()
        monkeypatch.setenv("SOUSBATCH_ATTEMPT", "1")
    assert run_job("score", score, [str(run.root), "score"]) == 0
    scores = json.loads(run.metrics.read_text())["score"]["scores"]
    assert scores["model"] == {"toy_length": 2.0} and scores["copy_input"].keys() == {"toy_length"}
    shown = {path.name: json.loads(path.read_text()) for path in run.tracking_dir.glob(f"{run.run_id}*")}
    examples = read_examples(run.stage_examples("score"))
    assert [len(examples[why]) for why in ("worst", "best", "random")] == [5, 5, 5]
    code, out, _ = sousbatch("predictions", "score", str(run.root), "--json")
    assert (code, json.loads(out)) == (0, scores)
    code, out, _ = sousbatch("predictions", "show", str(run.root), "--row", "1", "--json")
    (row,) = json.loads(out)["row"]
    assert (code, row["index"], row["prediction"], row["scores"]) == (0, 1, "답답", {"toy_length": 2.0})
    out_file = str(run.root / "joined.jsonl")
    other = run.root / "other.jsonl"
    shutil.copyfile(run.predictions_file("predict"), other)
    code, out, _ = sousbatch("predictions", "ensemble", str(run.root), str(other), "--out", out_file)
    assert (code, out.endswith(" rows of 2 models, by risk\n")) == (0, True)
    values = {f"{who}/toy_length": value["toy_length"] for who, value in scores.items()}
    assert shown == ({} if is_by_hand else {f"{run.run_id}-ended-0": values})
