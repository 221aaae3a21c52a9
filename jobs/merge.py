"""Join units into one complete file: `python -m sousbatch.jobs.merge RUN STAGE`."""

from __future__ import annotations

import signal
import sys
from typing import Any

from ..cluster import processes
from ..errors import IncompleteError, NotFoundError
from ..events import Merged
from ..predictions.merge import merge_units
from .context import JobContext, run_job
from .generation.prediction_key import prediction_key


def merge(job: JobContext) -> int:
    """Write predictions.jsonl beside the units, or raise with the missing rows named."""
    assert job.stage.predict_stage is not None, "a merge stage works on a predict stage"
    source = job.plan.stage(job.stage.predict_stage)
    folder = job.paths.predictions(source.name)
    try:
        key = prediction_key(job.paths, source)
        rest = f"sousbatch resume {job.paths.run_id}"
        report = merge_units(folder / key, job.paths.predictions_file(source.name), rest=rest)
    except NotFoundError as error:
        num_rows = source.splits["predict"].num_rows
        raise IncompleteError(
            f"all {num_rows} rows are missing: stage {source.name!r} committed none ({error}); "
            f"they are computed by `sousbatch resume {job.paths.run_id}`"
        ) from error
    print("\n  ".join([f"sousbatch: {report}", *report.writers()]), flush=True)
    ledger = job.open_ledger()
    facts: dict[str, Any] = {"num_rows": report.num_rows, "num_bytes": report.num_bytes, "sha256": report.sha256}
    ledger.write(Merged(key=key, **facts))
    ledger.close()
    tracker = job.open_trackers()
    tracker.summary(facts)
    tracker.finish(0)
    return 0


def main() -> int:
    """Run this job and return its exit code."""
    processes.die_with_parent(signal.SIGKILL)
    return run_job("merge", merge, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
