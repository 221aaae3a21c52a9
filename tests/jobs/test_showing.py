"""What jobs show beside their steps: samples, the lives of checkpoints, and how whole a merge is."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from sousbatch import ledger
from sousbatch.events import Removed, Saved
from sousbatch.jobs.context import JobContext, run_job
from sousbatch.jobs.score import score
from sousbatch.jobs.showing import show_checkpoints, show_inputs, show_merge
from sousbatch.predictions.merge import MergeReport
from sousbatch.recipes.plan import read_plan
from sousbatch.run_folder import RunPaths

TOY = """
import json

class Toy:
    def start(self, identity): self.path = identity.folder / "shown"
    def log(self, step, values): pass
    def summary(self, values): self._add("summary", values)
    def table(self, name, columns, rows): self._add(name, [columns, *rows])
    def artifact(self, artifact): self._add(artifact.name, [artifact.digest, str(artifact.path), artifact.is_made])
    def alert(self, title, text): self._add("alert", [title, text])
    def finish(self, exit_code): pass
    def _add(self, name, value):
        with self.path.open("a") as stream: print(json.dumps([name, value]), file=stream)
"""


@pytest.fixture
def run(frozen: Callable[..., RunPaths], third_party: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    """A run that a toy shows, and that tells of its end and of failures."""
    third_party("sousbatch.trackers", "toy = toy_module:Toy", TOY)
    keys = ("tracking.trackers=[toy]", "tracking.alerts=[done,failed]", "score.metrics=[exact_match]")
    paths = frozen(*keys)
    monkeypatch.setenv("SOUSBATCH_ATTEMPT", "1")
    return paths


def shown(run: RunPaths) -> dict[str, object]:
    lines = (run.tracking_dir / "shown").read_text().splitlines()
    return dict(json.loads(line) for line in lines)


def test_a_score_shows_rows_before_and_after_post_processing_and_tells_that_all_is_done(run: RunPaths) -> None:
    ledger.open_attempt(run.ledger_dir, "score", 0).close()
    plan = read_plan(run.plan)
    rows = [{"index": one, "prediction": "b" * 3000, "raw_prediction": "a"} for one in range(4)]
    num_rows = plan.stage("predict").splits["predict"].num_rows
    rows += [{"index": one, "prediction": "b"} for one in range(4, num_rows)]
    path = run.predictions_file("predict")
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_job("score", score, [str(run.root), "score"]) == 0
    found = shown(run)
    columns, *samples = found["samples"]
    assert columns == ["why", "index", "input", "target", "prediction", "before_post", "exact_match"]
    first = next(row for row in samples if row[1] == 0)
    assert first[4:] == ["b" * 2000, "a", 0.0] and {row[0] for row in samples} == {"worst", "best", "random"}
    assert found["alert"] == [f"small {run.run_id}: score done", f"all stages of {run.root} are done"]


def test_a_failure_is_told_with_its_reason(run: RunPaths) -> None:
    def work(job: JobContext) -> int:
        job.open_trackers()
        raise RuntimeError("the data is gone")

    ledger.open_attempt(run.ledger_dir, "train", 0).close()
    assert run_job("train", work, [str(run.root), "train"]) == 1
    assert shown(run)["alert"] == [f"small {run.run_id}: train failed", "RuntimeError: the data is gone"]


def test_a_job_that_stalls_tells_so_before_its_end(run: RunPaths) -> None:
    def work(job: JobContext) -> int:
        job.open_trackers().alerts = ("stalled",)
        job.tell_stalled()
        return 0

    ledger.open_attempt(run.ledger_dir, "train", 0).close()
    assert run_job("train", work, [str(run.root), "train"]) == 0
    title, text = shown(run)["alert"]
    assert title == f"small {run.run_id}: train stalled"
    assert text == "no step for 30 minutes: the attempt ends; its log shows where each rank waits"


def test_checkpoints_inputs_and_merges_are_shown(run: RunPaths) -> None:
    def work(job: JobContext) -> int:
        trackers = job.open_trackers()
        writer = job.open_ledger()
        writer.write(Saved(step=2, content="full", num_bytes=10**9, held_bytes=10**9, metric=0.5, stall_s=1.5))
        writer.write(Removed(step=2, content="full", num_bytes=10**9, held_bytes=0, reason="not the last"))
        writer.close()
        show_inputs(job, trackers)
        show_checkpoints(job, trackers)
        gaps = {"missing": (range(3, 5),), "conflicts": (range(1),), "num_duplicates": 7}
        report = MergeReport(num_rows=9, num_written=7, num_bytes=1, sha256="d", **gaps)
        show_merge(job, trackers, report, "predict", "greedy")
        return 0

    ledger.open_attempt(run.ledger_dir, "train", 0).close()
    assert run_job("train", work, [str(run.root), "train"]) == 0
    found = shown(run)
    assert found["checkpoints"] == [
        ["attempt", "step", "event", "content", "gigabytes", "metric", "stall_s", "held_gb", "budget_gb", "reason"],
        [1, 2, "saved", "full", 1.0, 0.5, 1.5, 1.0, None, None],
        [1, 2, "removed", "full", 1.0, None, None, 0.0, None, "not the last"],
    ]
    split = read_plan(run.plan).stage("train").splits["train"]
    assert found[f"small-data-{split.name}"] == [split.digest, split.path, False]
    assert found["small-predictions-predict-greedy"] == ["d", str(run.predictions_file("predict", "greedy")), True]
    counts = found["summary"]
    assert isinstance(counts, dict)
    assert (counts["greedy/num_missing"], counts["greedy/num_conflicts"], counts["greedy/num_duplicates"]) == (2, 1, 7)
