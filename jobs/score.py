"""Score merged predictions: `python -m sousbatch.jobs.score RUN STAGE`."""

from __future__ import annotations

import signal
import sys
from typing import Any

from .. import files
from ..cluster import processes
from ..events import Scored
from ..predictions.scoring import Scoring
from ..predictions.selection import NUM_EXAMPLES, Selection, write_examples
from ..recipes.decodings import decodings_of
from ..recipes.scored_rows import cases_of_stage
from .context import JobContext, run_job
from .showing import show_samples


def score(job: JobContext) -> int:
    """Write the stage's scores, and metrics.json over all score stages.

    Each decoding has scores of its own.
    """
    assert job.stage.predict_stage is not None, "a score stage works on the rows of a predict stage"
    ledger, tracker = job.open_ledger(), job.open_trackers()
    files.make_private_dir(job.paths.metrics_dir)
    for decoding in decodings_of(job.settings):
        result = _scored(job, decoding)
        job.check_fence()
        files.write_json(job.paths.stage_metrics(job.stage.name, decoding), result)
        ledger.write(Scored(decoding=decoding, **result))
        prefix = f"{decoding}/" if decoding else ""
        scores = ((who, name, value) for who, found in result["scores"].items() for name, value in found.items())
        tracker.summary({f"{prefix}{who}/{name}": value for who, name, value in scores})
    all_scores = {path.stem: files.read_json(path) for path in sorted(job.paths.metrics_dir.glob("*.json"))}
    files.write_json(job.paths.metrics, all_scores)
    ledger.close()
    return 0


def _scored(job: JobContext, decoding: str) -> dict[str, Any]:
    """Return the split, the number of rows and the scores of one decoding."""
    split, spec = job.stage.splits["score"], job.settings.score
    scoring = Scoring(spec.metrics, spec.tokenizer)
    examples = Selection(metrics=scoring.metrics, worst=NUM_EXAMPLES, best=NUM_EXAMPLES, random=NUM_EXAMPLES)
    shown = Selection(metrics=scoring.metrics, worst=200, best=200, random=600)
    for block in scoring.measure(cases_of_stage(job.stage, job.paths, decoding)):
        examples.add(block)
        if job.trackers:
            shown.add(block)
    show_samples(job.trackers, shown, decoding)
    result = {"split": split.name, "num_rows": scoring.num_rows, "scores": scoring.scores()}
    job.check_fence()
    write_examples(job.paths.stage_examples(job.stage.name, decoding), examples)
    return result


def main() -> int:
    """Run this job and return its exit code."""
    processes.die_with_parent(signal.SIGKILL)
    return run_job("score", score, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
