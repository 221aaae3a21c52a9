"""Show in trackers what jobs made beside their steps: tables, files and counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import ledger
from ..events import CheckpointEvent, ModelWritten, of
from ..predictions.merge import MergeReport
from ..predictions.selection import Selection
from ..tracking.base import Artifact, Trackers
from .context import JobContext

_MOST_LETTERS = 2000  # of a text in a table


def show_inputs(job: JobContext, trackers: Trackers) -> None:
    """Show the data that a training reads."""
    for split in {split.name: split for split in job.stage.splits.values()}.values():
        facts = {"rows": split.num_rows}
        name = f"{job.paths.recipe_name}-data-{split.name}"
        trackers.artifact(
            Artifact(name=name, kind="data", path=Path(split.path), digest=split.digest, is_made=False, facts=facts)
        )


def show_checkpoints(job: JobContext, trackers: Trackers) -> None:
    """Show the life of each checkpoint: what was saved, and what became of it."""
    columns = "attempt step event content gigabytes metric stall_s held_gb budget_gb reason".split()
    rows = []
    for event in of(ledger.read(job.paths.ledger_dir, max_steps=1), CheckpointEvent):
        if event.stage == job.stage.name:
            sizes = [_gigabytes(size) for size in (event.num_bytes, event.held_bytes, event.budget_bytes)]
            said = (getattr(event, "stall_s", None), *sizes[1:], getattr(event, "reason", None))
            rows.append((event.number, event.step, event.kind, event.content, sizes[0], event.metric, *said))
    if rows:
        trackers.table("checkpoints", columns, rows)


def show_model(job: JobContext, trackers: Trackers, written: ModelWritten) -> None:
    """Show the model that a stage made."""
    name, folder = f"{job.paths.recipe_name}-model-{job.stage.name}", job.paths.model(job.stage.name)
    facts = written.data()
    trackers.artifact(
        Artifact(name=name, kind="model", path=folder, digest=written.digest or "", is_made=True, facts=facts)
    )


def show_merge(job: JobContext, trackers: Trackers, report: MergeReport, source: str, decoding: str) -> None:
    """Show the merged predictions of a stage and how whole their parts were."""
    counts = {
        "num_rows": report.num_rows,
        "num_bytes": report.num_bytes,
        "sha256": report.sha256,
        "num_missing": sum(map(len, report.missing)),
        "num_conflicts": sum(map(len, report.conflicts)),
        **{name: getattr(report, name) for name in ("num_duplicates", "num_padding", "num_incomplete", "num_corrupt")},
    }
    trackers.summary({f"{decoding}/{name}" if decoding else name: value for name, value in counts.items()})
    path = job.paths.predictions_file(source, decoding)
    name = "-".join(filter(None, (job.paths.recipe_name, "predictions", source, decoding)))
    facts = {"rows": report.num_rows, "key": report.key}
    trackers.artifact(
        Artifact(name=name, kind="predictions", path=path, digest=report.sha256, is_made=True, facts=facts)
    )


def show_samples(trackers: Trackers, selection: Selection, decoding: str) -> None:
    """Show rows with their scores, before and after post-processing."""
    rows, scores = [], list[str]()
    for why, chosen in selection.chosen().items():
        for shown in chosen:
            row = shown.to_json()
            scores = scores or list(row["scores"])
            texts = (row["input"], row["target"], row["prediction"], row.get("raw_prediction"))
            rows.append((why, row["index"], *map(_cut, texts), *(row["scores"].get(name) for name in scores)))
    if rows:
        columns = ("why", "index", "input", "target", "prediction", "before_post", *scores)
        trackers.table(f"{decoding}/samples" if decoding else "samples", columns, rows)


def _cut(value: Any) -> str | None:
    return None if value is None else str(value)[:_MOST_LETTERS]


def _gigabytes(size: float | None) -> float | None:
    return None if size is None else size / 1e9
