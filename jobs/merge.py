"""Join units into one complete file: `python -m sousbatch.jobs.merge RUN STAGE`."""

from __future__ import annotations

import signal
import sys
from typing import Any

from ..cluster import processes
from ..errors import IncompleteError, NotFoundError
from ..events import Merged
from ..predictions.merge import MergeReport, merge_units
from ..recipes.decodings import decoded
from ..recipes.plan import Stage
from .context import JobContext, run_job
from .generation.prediction_key import prediction_key


def merge(job: JobContext) -> int:
    """Write predictions.jsonl beside the units, or name the missing rows.

    Each decoding has a file of its own.
    """
    assert job.stage.predict_stage is not None, "a merge stage works on a predict stage"
    ledger, tracker = job.open_ledger(), job.open_trackers()
    lost = list[IncompleteError]()
    for decoding, source in decoded(job.plan.stage(job.stage.predict_stage)).items():
        try:
            key, report = _merged(job, source, decoding)
        except IncompleteError as error:  # the others are complete, and are to be had
            lost.append(error)
            continue
        facts: dict[str, Any] = {"num_rows": report.num_rows, "num_bytes": report.num_bytes, "sha256": report.sha256}
        ledger.write(Merged(key=key, decoding=decoding, **facts))
        tracker.summary({f"{decoding}/{name}" if decoding else name: value for name, value in facts.items()})
    ledger.close()
    tracker.finish(1 if lost else 0)
    if lost:
        raise lost[0] if len(lost) == 1 else IncompleteError("\n".join(map(str, lost)))
    return 0


def _merged(job: JobContext, source: Stage, decoding: str) -> tuple[str, MergeReport]:
    """Merge one decoding of the stage *source*; return its key and the report."""
    rest, what = f"sousbatch resume {job.paths.run_id}", f" of {decoding}" if decoding else ""
    try:
        key = prediction_key(job.paths, source)
        units, merged = job.paths.predictions(source.name) / key, job.paths.predictions_file(source.name, decoding)
        report = merge_units(units, merged, rest=rest)
    except NotFoundError as error:
        num_rows = source.splits["predict"].num_rows
        raise IncompleteError(
            f"all {num_rows} rows{what} are missing: stage {source.name!r} committed none ({error}); "
            f"they are computed by `{rest}`"
        ) from error
    print("\n  ".join([f"sousbatch: {report}", *report.writers()]), flush=True)
    return key, report


def main() -> int:
    """Run this job and return its exit code."""
    processes.die_with_parent(signal.SIGKILL)
    return run_job("merge", merge, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
