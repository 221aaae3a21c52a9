"""Score merged predictions: `python -m sousbatch.jobs.score RUN STAGE`."""

from __future__ import annotations

import signal
import sys

from .. import files
from ..cluster import processes
from ..events import Scored
from ..predictions.scoring import Scoring
from ..predictions.selection import NUM_EXAMPLES, Selection, write_examples
from ..recipes.scored_rows import cases_of_stage
from .context import JobContext, run_job


def score(job: JobContext) -> int:
    """Write the stage's scores, and metrics.json over all score stages."""
    assert job.stage.predict_stage is not None, "a score stage works on the rows of a predict stage"
    split = job.stage.splits["score"]
    scoring = Scoring(job.settings.score.metrics, job.settings.score.tokenizer)
    examples = Selection(metrics=scoring.metrics, worst=NUM_EXAMPLES, best=NUM_EXAMPLES, random=NUM_EXAMPLES)
    for block in scoring.measure(cases_of_stage(job.stage, job.paths)):
        examples.add(block)
    found = scoring.scores()
    result = {"split": split.name, "num_rows": scoring.num_rows, "scores": found}
    files.make_private_dir(job.paths.metrics_dir)
    job.check_fence()
    files.write_json(job.paths.stage_metrics(job.stage.name), result)
    write_examples(job.paths.stage_examples(job.stage.name), examples)
    all_scores = {path.stem: files.read_json(path) for path in sorted(job.paths.metrics_dir.glob("*.json"))}
    files.write_json(job.paths.metrics, all_scores)
    ledger = job.open_ledger()
    ledger.write(Scored(split=split.name, num_rows=scoring.num_rows, scores=found))
    ledger.close()
    tracker = job.open_trackers()
    tracker.summary({f"{who}/{name}": value for who, scores in found.items() for name, value in scores.items()})
    tracker.finish(0)
    return 0


def main() -> int:
    """Run this job and return its exit code."""
    processes.die_with_parent(signal.SIGKILL)
    return run_job("score", score, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
