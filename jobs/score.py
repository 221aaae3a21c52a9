"""Score merged predictions: `python -m sousbatch.jobs.score RUN STAGE`."""

from __future__ import annotations

import signal
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from .. import files
from ..cluster import processes
from ..errors import NotFoundError
from ..events import Scored
from ..predictions.rows import PredictionRow, predictions_of
from ..predictions.scoring import score_with_baseline
from ..recipes.data.chat import input_of, target_of
from ..recipes.data.rows import read_rows
from ..recipes.decodings import decodings_of
from ..recipes.tasks import task_of
from .context import JobContext, run_job


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
    tracker.finish(0)
    return 0


def _scored(job: JobContext, decoding: str) -> dict[str, Any]:
    """Return the split, the number of rows and the scores of one decoding."""
    assert job.stage.predict_stage is not None, "a score stage works on the rows of a predict stage"
    split, data = job.stage.splits["score"], job.settings.data
    (target,) = (column.name for column in task_of(job.settings.task).columns(job.settings, "score"))
    predictions = _predictions(job.paths.predictions_file(job.stage.predict_stage, decoding))
    rows = list(islice(read_rows(Path(split.path)), len(predictions)))
    found = score_with_baseline(
        predictions,
        [target_of(data, row, target) for row in rows],
        [input_of(data, row) for row in rows],
        metrics=job.settings.score.metrics,
        tokenizer=job.settings.score.tokenizer,
    )
    return {"split": split.name, "num_rows": len(rows), "scores": found}


def _predictions(path: Path) -> list[PredictionRow]:
    try:
        return predictions_of(read_rows(path), path)
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} does not exist: the merge stage has not completed it") from error


def main() -> int:
    """Run this job and return its exit code."""
    processes.die_with_parent(signal.SIGKILL)
    return run_job("score", score, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
