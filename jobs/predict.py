"""Predict the rows of one task's units.

Run as `python -m sousbatch.jobs.predict RUN STAGE`.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ..cluster import processes
from ..errors import EXIT_STOPPED, RunError
from ..events import PredictionStarted, UnitCommitted
from ..ledger import Ledger
from ..predictions.rows import ID, PredictionRow
from ..predictions.units import Layout, committed_units, open_layout, units_of_task, write_unit
from ..recipes.data.rows import Row, read_rows
from ..recipes.decodings import decoded
from .context import JobContext, run_job
from .generation.prediction_key import dtype_of, prediction_key
from .tasks import load_model
from .watchdog import Watchdog


@dataclass(frozen=True, kw_only=True)
class _Work:
    """The units of this task that one decoding lacks; *job* has its settings."""

    job: JobContext
    decoding: str
    key: str
    folder: Path
    layout: Layout
    missing: list[int]


def predict(job: JobContext) -> int:
    """Answer and commit every unit of this task that is not committed.

    Return 0, or 75 when asked to stop.
    """
    ledger = job.open_ledger()
    works = [_open(replace(job, stage=stage), name, ledger) for name, stage in decoded(job.stage).items()]
    works = [work for work in works if work.missing]
    code = _answer(job, works, ledger) if works else 0
    ledger.close()
    return code


def _open(job: JobContext, decoding: str, ledger: Ledger) -> _Work:
    num_rows = job.stage.splits["predict"].num_rows
    key = prediction_key(job.paths, job.stage)
    folder = job.paths.predictions(job.stage.name) / key
    layout = open_layout(folder, key, num_rows, job.settings.predict.unit_rows)
    done = committed_units(folder, layout, key)
    missing = [number for number in units_of_task(layout, job.task, job.stage.num_tasks) if number not in done]
    ledger.write(
        PredictionStarted(
            key=key, decoding=decoding, num_rows=num_rows, unit_rows=layout.unit_rows, num_committed=len(done)
        )
    )
    return _Work(job=job, decoding=decoding, key=key, folder=folder, layout=layout, missing=missing)


def _answer(job: JobContext, works: Sequence[_Work], ledger: Ledger) -> int:
    """Answer the missing units of each decoding in turn, with one loaded model."""
    model_dir = job.stage.model.dir_in(job.paths)
    device = "cpu" if job.stage.resources.device == "cpu" else "cuda"
    dtype = dtype_of(job.stage, model_dir)
    tokenizer_dir, num_devices = job.stage.model.tokenizer_dir_in(job.paths), job.stage.resources.devices_per_node
    settings = job.settings
    if job.stage.model.made_by is not None:  # its config has them, and what training made of them
        settings = replace(settings, model=replace(settings.model, config={}))
    loaded = load_model(settings, model_dir, tokenizer_dir, device, dtype, num_devices)
    tracker = job.open_trackers(beside_others=True)
    watchdog = Watchdog(job.stage.resources.stall_min, tell=job.tell_stalled)
    code = count = 0
    total = sum(len(work.missing) for work in works)
    for work in works:
        if code:
            break
        answerer = loaded.answerer(work.job.settings)
        for number, rows in _units(job, work.layout, work.missing):
            if job.is_asked_to_stop():
                code = EXIT_STOPPED
                break
            lines = _lines(job, rows, answerer.answer(rows))
            job.check_fence()
            unit = write_unit(work.folder, work.layout, number, lines, work.key, job.attempt, job.task)
            ledger.write(UnitCommitted(unit=number, num_rows=unit.num_rows, decoding=work.decoding))
            count += 1
            of = f" of {work.decoding}" if work.decoding else ""
            print(f"sousbatch: unit {number}{of} is committed, {count} of {total} of this task", flush=True)
            tracker.log(count, {"rows": unit.num_rows})
            watchdog.step()
    watchdog.close()
    return code


def _lines(
    job: JobContext, rows: Sequence[tuple[int, Row]], answers: Sequence[Mapping[str, Any]]
) -> list[PredictionRow]:
    column = job.settings.data.columns.id
    return [
        PredictionRow.from_json({**answer, **({ID: row[column]} if column else {})}, position=index)
        for (index, row), answer in zip(rows, answers, strict=True)
    ]


def _units(job: JobContext, layout: Layout, wanted: list[int]) -> Iterator[tuple[int, list[tuple[int, Row]]]]:
    """Yield (unit number, its rows with their input positions).

    The file is read once.

    Raises:
        RunError: the file has changed since its first row was read.
    """
    path = Path(job.stage.splits["predict"].path)
    before, rows = _state(path), enumerate(read_rows(path))
    for number in sorted(wanted):
        place = layout.rows_of(number)
        found = list(islice((item for item in rows if item[0] >= place.start), len(place)))
        if len(found) != len(place):
            raise RunError(f"unit {number} needs rows {place.start} to {place.stop - 1}; the file ends before that")
        if _state(path) != before:
            raise RunError(
                f"{path} was changed while its rows were answered; put back what was submitted and resume, or submit "
                "again"
            )
        yield number, found


def _state(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def main() -> int:
    """Run this task and return its exit code."""
    processes.die_with_parent(signal.SIGKILL)
    return run_job("predict", predict, sys.argv[1:])


if __name__ == "__main__":
    processes.leave(main())
