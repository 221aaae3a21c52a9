"""Find what `predictions score` and `predictions show` read.

They read files of predictions beside a data file, and the merged predictions of runs.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

from ..errors import NotFoundError, UsageError
from ..predictions.measure import Case
from ..predictions.metrics import DEFAULT_METRICS
from ..predictions.metrics.tokenizers import Tokenizer
from ..predictions.rows import ID, NO_ID, PREDICTION, missing, predictions_of
from ..predictions.scoring import Scoring, paired
from ..recipes.data.rows import read_rows
from ..run_folder import RunPaths
from ..run_index import find_run
from .parser import RUN_HELP, Parser, positive_count


@dataclass(frozen=True, kw_only=True)
class Source:
    """Predictions to score or show.

    *name* is shown in tables; *data* holds the rows that are answered. *metrics* and *tokenizer* are those of the run.
    Without *data* there is nothing to measure the predictions against.
    """

    name: str
    predictions: Path
    data: Path | None
    cases: Callable[[], Iterator[Case]]
    metrics: tuple[str, ...] = DEFAULT_METRICS
    tokenizer: Tokenizer = "words"


def add_source_arguments(parser: Parser) -> None:
    """Add the arguments that say what is read, and how it is measured."""
    parser.add_argument(
        "paths", nargs="+", metavar="FILE|RUN", help=f"merged predictions (.jsonl), or a run: {RUN_HELP}"
    )
    parser.add_argument("--data", metavar="FILE", help="the rows that were predicted; a run knows its own")
    parser.add_argument(
        "--target", default="target", metavar="COLUMN", help="column of the right answers in --data (default target)"
    )
    parser.add_argument(
        "--input", metavar="COLUMN", help="column of the inputs in --data, for the copying baseline (default input)"
    )
    parser.add_argument(
        "--field", default=PREDICTION, metavar="FIELD", help=f"field of the prediction (default {PREDICTION})"
    )
    parser.add_argument(
        "--tokenizer", choices=get_args(Tokenizer), help="units of ROUGE and BLEU (default words, or the run's)"
    )
    parser.add_argument(
        "--metric",
        action="append",
        metavar="NAME",
        help="what is measured, given once for each: a metric's name, or module:NAME of your own code (default "
        f"{', '.join(DEFAULT_METRICS)}, or the run's)",
    )
    parser.add_argument(
        "--workers", type=positive_count, metavar="N", help="processes that measure (default: one for each core)"
    )


def find_sources(arguments: Namespace) -> list[Source]:
    """Return what the arguments name, in their order.

    Of a sweep it is every point, of a run every score stage.

    Raises:
        NotFoundError: there is no such file or run.
        UsageError: a run measured nothing, and no --data is given.
    """
    sys.path.append(os.getcwd())  # where own metrics may be
    found: list[Source] = []
    for name in arguments.paths:
        found += [_of_file(Path(name), arguments)] if Path(name).is_file() else _of_run(name, arguments)
    named = [one.name for one in found]
    return [replace(one, name=str(one.predictions)) if named.count(one.name) > 1 else one for one in found]


def scoring_of(source: Source, arguments: Namespace) -> Scoring:
    """Return what scores *source* as the arguments, or its run, say."""
    metrics = arguments.metric or source.metrics
    return Scoring(metrics, arguments.tokenizer or source.tokenizer, workers=arguments.workers)


def _of_file(path: Path, arguments: Namespace) -> Source:
    data = Path(arguments.data) if arguments.data is not None else None
    if data is not None and not data.is_file():
        raise NotFoundError(f"{arguments.data!r} does not exist")
    if data is None:
        return Source(name=path.name, predictions=path, data=None, cases=lambda: _bare(path, arguments.field))
    return Source(name=path.name, predictions=path, data=data, cases=lambda: _beside(path, data, arguments))


def _bare(path: Path, field: str) -> Iterator[Case]:
    for row in predictions_of(read_rows(path), path, field=field):
        yield Case(row=row, target=None, input=None)


def _beside(path: Path, data: Path, arguments: Namespace) -> Iterator[Case]:
    predictions = predictions_of(read_rows(path), path, field=arguments.field)
    has_input, first = False, dict[str, object]()
    for number, (prediction, row) in enumerate(paired(predictions, read_rows(data)), 1):
        if ID in row and prediction.id is not NO_ID and str(prediction.id) not in map(str, row.values()):
            raise UsageError(
                f"row {number} of {path} answers the id {prediction.id!r}, and row {number} of {data} has "
                f"{row[ID]!r}: these are not the rows that were predicted, or they are in another order"
            )
        if problem := missing(row, arguments.target):
            raise UsageError(f"row {number} of {data} has {problem}")
        first = first or dict(row)
        has_input = has_input or arguments.input is None or arguments.input in row
        yield Case(row=prediction, target=row[arguments.target], input=row.get(arguments.input or "input"))
    if not has_input and first:
        raise UsageError(
            f"no row of {data} has {arguments.input!r}, which --input names; they have: {', '.join(first)}"
        )


def _of_run(name: str, arguments: Namespace) -> list[Source]:
    from ..recipes.plan import read_plan

    if Path(name).suffix in (".jsonl", ".csv", ".json") and not Path(name).exists():
        raise NotFoundError(f"{name!r} does not exist")
    paths = find_run(name, newest=True)
    plan = read_plan(paths.plan)
    if plan.sweep is None:
        return _of_stages(paths, paths.run_id, arguments)
    from ..launchers.status import point_states

    found = [
        source
        for point in point_states(plan, paths)
        if point.folder is not None
        for source in _of_stages(RunPaths(root=point.folder), point.label or str(point.index), arguments)
    ]
    if not found:
        raise NotFoundError(f"no point of sweep {paths.run_id} has merged predictions yet")
    return found


def _of_stages(paths: RunPaths, name: str, arguments: Namespace) -> list[Source]:
    from ..recipes.decodings import decodings_of
    from ..recipes.plan import read_plan
    from ..recipes.scored_rows import cases_of_stage

    plan, found = read_plan(paths.plan), []
    stages = plan.stages
    sys.path += [str(paths.code(folder)) for folder in plan.recipe.environment.code]  # with the run's own metrics
    for stage in stages:
        if "score" not in stage.splits or stage.predict_stage is None:
            continue
        for decoding in decodings_of(stage.settings):
            found.append(
                Source(
                    name=" ".join(filter(None, (name, stage.name, decoding))),
                    predictions=paths.predictions_file(stage.predict_stage, decoding),
                    data=Path(stage.splits["score"].path),
                    cases=partial(cases_of_stage, stage, paths, decoding),
                    metrics=stage.settings.score.metrics,
                    tokenizer=stage.settings.score.tokenizer,
                )
            )
    if arguments.data is not None or not found:
        if arguments.data is None and arguments.needs_target:
            raise UsageError(f"run {name} has no score stage; name the rows that it predicted with --data FILE")
        merged = [paths.predictions_file(one.name, way) for one in stages for way in decodings_of(one.settings)]
        found = [replace(_of_file(path, arguments), name=name) for path in merged if path.is_file()]
        if not found:
            raise NotFoundError(f"run {name} has no merged predictions yet")
    return [replace(found[0], name=name)] if len(found) == 1 else found
