"""Join units into one complete file: `python -m sousbatch.jobs.merge RUN STAGE`.

Here the recipe's `predict.post` repairs the texts, and `predict.output` is written.
"""

from __future__ import annotations

import signal
import sys
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from ..cluster import processes
from ..errors import IncompleteError, NotFoundError
from ..events import Merged, UnitsLost
from ..ledger import open_job, read
from ..ledger_queries import done_tasks, newest_attempt
from ..predictions.export import SUFFIXES
from ..predictions.merge import Change, MergeReport, merge_units
from ..predictions.units import committed_units, read_layout, units_of_task
from ..recipes.data.output import fields_of, table_of, write_output
from ..recipes.data.post import change_of
from ..recipes.data.rows import read_rows
from ..recipes.decodings import decoded
from ..recipes.plan import Stage
from .context import JobContext, run_job
from .generation.prediction_key import prediction_key
from .showing import show_merge


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
        show_merge(job, tracker, report, source.name, decoding)
    ledger.close()
    if lost:
        _reopen(job)
        raise lost[0] if len(lost) == 1 else IncompleteError("\n".join(map(str, lost)))
    return 0


def _reopen(job: JobContext) -> None:
    """Note the predict tasks that are not done, so that a resume sends them again.

    Units may be gone, or set aside as damaged, after their task had ended well. A task that has all of its own is
    done, whatever another lacks.
    """
    assert job.stage.predict_stage is not None, "a merge stage works on a predict stage"
    events, source = read(job.paths.ledger_dir), job.plan.stage(job.stage.predict_stage)
    ways = list(decoded(source).values())
    for task in done_tasks(events, source.name):
        if all(_has_units(job, way, task) for way in ways):
            continue
        attempt = newest_attempt(events, source.name, task)
        with closing(open_job(job.paths.ledger_dir, source.name, task, attempt)) as ledger:
            ledger.write(UnitsLost())


def _has_units(job: JobContext, source: Stage, task: int) -> bool:
    """Say whether a task of *source* has all its units, in one decoding."""
    try:
        folder = job.paths.predictions(source.name) / prediction_key(job.paths, source)
        key, layout = read_layout(folder)
    except NotFoundError:
        return False
    return set(units_of_task(layout, task, source.num_tasks)) <= set(committed_units(folder, layout, key))


def _merged(job: JobContext, source: Stage, decoding: str) -> tuple[str, MergeReport]:
    """Merge one decoding of the stage *source*; return its key and the report."""
    rest, what = f"sousbatch resume {job.paths.run_id}", f" of {decoding}" if decoding else ""
    try:
        key = prediction_key(job.paths, source)
        units, merged = job.paths.predictions(source.name) / key, job.paths.predictions_file(source.name, decoding)
        report = merge_units(units, merged, change=_change(job, source), rest=rest)
    except NotFoundError as error:
        num_rows = source.splits["predict"].num_rows
        raise IncompleteError(
            f"all {num_rows} rows{what} are missing: stage {source.name!r} committed none ({error}); "
            f"they are computed by `{rest}`"
        ) from error
    print("\n  ".join([f"sousbatch: {report}", *report.writers()]), flush=True)
    if source.settings.predict.output is not None:
        print(f"sousbatch: {_write_output(job, source, decoding)}", flush=True)
    return key, report


def _change(job: JobContext, source: Stage) -> Change | None:
    """Return what `predict.post` does to rows, by the files that were frozen."""
    post, split = source.settings.predict.post, source.splits["predict"]
    if not post:
        return None
    job.reach_functions(post)
    digests = {name: one.digest for name, one in job.plan.inputs.used_files.items()}
    digests["code"] = job.plan.inputs.code_digest
    return change_of(post, split.name, digests, job.used_file, read_rows(Path(split.path)))


def _write_output(job: JobContext, source: Stage, decoding: str) -> Path:
    """Write the file of `predict.output` and return it."""
    settings, output, split = source.settings, source.settings.predict.output, source.splits["predict"]
    assert output is not None, "a stage with an output"
    facts, columns = job.plan.inputs.split_of(source.name, "predict", split.name), settings.data.columns
    table = table_of(
        fields=fields_of(settings),
        inputs=facts.columns,
        columns=output.columns,
        template=output.template,
        place=job.used_file(output.template) if output.template is not None else None,
        format=output.format,
        identity=columns.id,
        target=columns.target,
    )
    merged = job.paths.predictions_file(source.name, decoding)
    path = job.paths.submission_file(source.name, SUFFIXES[table.format], decoding)
    rows = Path(split.path)
    write_output(
        table, merged, path, lambda: islice(read_rows(rows), split.num_rows), is_part=split.num_rows < facts.num_rows
    )
    return path


def main() -> int:
    """Run this job and return its exit code."""
    processes.die_with_parent(signal.SIGKILL)
    return run_job("merge", merge, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
