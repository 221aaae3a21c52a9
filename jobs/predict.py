"""Predict the rows of one task's units.

Run as `python -m sousbatch.jobs.predict RUN STAGE`.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from ..cluster import processes
from ..errors import EXIT_STOPPED, RunError
from ..events import PredictionStarted, UnitCommitted
from ..ledger import Ledger
from ..predictions.rows import ID, PredictionRow
from ..predictions.units import Layout, committed_units, open_layout, units_of_task, write_unit
from ..recipes.data.rows import Row, read_rows
from .context import JobContext, run_job
from .generation.prediction_key import dtype_of, prediction_key
from .tasks import load_answerer
from .watchdog import Watchdog


def predict(job: JobContext) -> int:
    """Answer and commit every unit of this task that is not committed.

    Return 0, or 75 when asked to stop.
    """
    num_rows = job.stage.splits["predict"].num_rows
    key = prediction_key(job.paths, job.stage)
    folder = job.paths.predictions(job.stage.name) / key
    layout = open_layout(folder, key, num_rows, job.settings.predict.unit_rows)
    done = committed_units(folder, layout, key)
    missing = [number for number in units_of_task(layout, job.task, job.stage.num_tasks) if number not in done]
    ledger = job.open_ledger()
    ledger.write(PredictionStarted(key=key, num_rows=num_rows, unit_rows=layout.unit_rows, num_committed=len(done)))
    code = _answer(job, key, folder, layout, missing, ledger) if missing else 0
    ledger.close()
    return code


def _answer(job: JobContext, key: str, folder: Path, layout: Layout, missing: list[int], ledger: Ledger) -> int:
    model_dir = job.stage.model.dir_in(job.paths)
    device = "cpu" if job.stage.resources.device == "cpu" else "cuda"
    dtype = dtype_of(job.stage, model_dir)
    answerer = load_answerer(job.settings, model_dir, job.stage.model.tokenizer_dir_in(job.paths), device, dtype)
    tracker, watchdog, code = job.open_trackers(), Watchdog(job.stage.resources.stall_min), 0
    for count, (number, rows) in enumerate(_units(job, layout, missing), 1):
        if job.is_asked_to_stop():
            code = EXIT_STOPPED
            break
        answers = answerer.answer(rows)
        column = job.settings.data.columns.id
        lines = [
            PredictionRow.from_json({**answer, **({ID: row[column]} if column else {})}, position=index)
            for (index, row), answer in zip(rows, answers, strict=True)
        ]
        job.check_fence()
        unit = write_unit(folder, layout, number, lines, key, job.attempt, job.task)
        ledger.write(UnitCommitted(unit=number, num_rows=unit.num_rows))
        print(f"sousbatch: unit {number} is committed, {count} of {len(missing)} of this task", flush=True)
        tracker.log(count, {"rows": unit.num_rows})
        watchdog.step()
    watchdog.close()
    tracker.finish(code)
    return code


def _units(job: JobContext, layout: Layout, wanted: list[int]) -> Iterator[tuple[int, list[tuple[int, Row]]]]:
    """Yield (unit number, its rows with their input positions).

    The file is read once.
    """
    rows = enumerate(read_rows(Path(job.stage.splits["predict"].path)))
    for number in sorted(wanted):
        place = layout.rows_of(number)
        found = list(islice((item for item in rows if item[0] >= place.start), len(place)))
        if len(found) != len(place):
            raise RunError(f"unit {number} needs rows {place.start} to {place.stop - 1}; the file ends before that")
        yield number, found


def main() -> int:
    """Run this task and return its exit code."""
    processes.die_with_parent(signal.SIGKILL)
    return run_job("predict", predict, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
