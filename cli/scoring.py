"""`sousbatch predictions score`: measure files and runs."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from argparse import Namespace
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import files
from ..errors import UsageError
from ..predictions.rows import ID, INDEX, NO_ID
from ..predictions.scoring import BASELINE, BEFORE_POST, MODEL, WHO, headlines, label
from .parser import Parser, count, define, positive_count
from .prediction_sources import Source, add_source_arguments, find_sources, scoring_of
from .results import format_score, format_scores
from .tables import format_table

if TYPE_CHECKING:
    from ..predictions.bootstrap import Comparison, Sample
    from ..predictions.selection import Selection

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The scores of one source, by who answered, and what was asked for besides."""

    source: Source
    num_rows: int
    lower_is_better: frozenset[str]
    scores: Mapping[str, Mapping[str, float]]
    intervals: Mapping[str, Interval]
    sample: Sample | None
    targets: str  # a digest of them all
    selection: Selection


def define_score(score: Parser) -> None:
    """Define `predictions score`."""
    define(
        score,
        _score,
        "predictions score predictions.jsonl --data test.jsonl --target summary",
        "predictions score 3f2a 91cc --intervals --compare",
        "predictions score predictions.jsonl --data test.jsonl --target summary --metric my_metrics:LENGTH --worst 5",
    )
    add_source_arguments(score)
    score.add_argument("--intervals", action="store_true", help="also the 95 %% interval of each score, by bootstrap")
    score.add_argument(
        "--compare", action="store_true", help="also the difference of each to the first one, by paired bootstrap"
    )
    score.add_argument(
        "--draws", type=positive_count, default=1000, metavar="N", help="draws of the bootstrap (default 1000)"
    )
    score.add_argument("--seed", type=count, default=0, metavar="N", help="seed of the draws (default 0)")
    score.add_argument("--rows", metavar="FILE", help="write the scores of each row (.jsonl)")
    score.add_argument(
        "--worst", type=count, default=0, metavar="N", help="also show so many rows with the worst score"
    )
    form = score.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON")
    form.add_argument("--csv", action="store_true", help="as CSV, one line for each score")
    score.set_defaults(needs_target=True)


def _score(arguments: Namespace) -> int:
    sources = find_sources(arguments)
    _check(arguments, sources)
    found = [_scored(source, arguments) for source in sources]
    compared = _compare(found, arguments) if arguments.compare else {}
    if arguments.json:
        print(json.dumps(_plain(found, compared), indent=1, ensure_ascii=False))
    elif arguments.csv:
        _print_csv(found)
    else:
        print(_format(found, compared))
    return 0


def _check(arguments: Namespace, sources: list[Source]) -> None:
    bare = [source for source in sources if source.data is None]
    if bare:
        raise UsageError(f"{bare[0].predictions} is a file; name the rows that it answers with --data FILE")
    if arguments.compare and len(sources) < 2:
        raise UsageError("--compare needs two files or runs, and one is named")
    if arguments.rows is not None and len(sources) > 1:
        raise UsageError(f"--rows writes the rows of one file or run, and {len(sources)} are named")
    if arguments.rows is not None and Path(arguments.rows).suffix != ".jsonl":
        raise UsageError(f"--rows {arguments.rows!r} has another format; name a .jsonl file")
    if arguments.rows is not None:
        read = [path for source in sources for path in (source.predictions, source.data) if path is not None]
        files.refuse_input(Path(arguments.rows), read)


def _scored(source: Source, arguments: Namespace) -> Scored:
    from ..predictions.selection import Selection

    scoring = scoring_of(source, arguments)
    selection = Selection(metrics=scoring.metrics, worst=arguments.worst)
    sample: Sample | None = None
    targets = hashlib.sha256()
    with ExitStack() as stack:
        if arguments.intervals or arguments.compare:
            from ..predictions.bootstrap import Sample as Kept

            sample = Kept(scoring.metrics)
        stream = stack.enter_context(files.replacing(Path(arguments.rows))) if arguments.rows else None
        for block in scoring.measure(source.cases()):
            selection.add(block)
            if sample is not None:
                sample.add(block.model, len(block.cases))
                for case in block.cases:
                    targets.update(json.dumps(case.target, default=str).encode() + b"\n")
            if stream is not None:
                stream.writelines(_row_lines(block, scoring.metrics))
        scores = scoring.scores()
    found: dict[str, Interval] = {}
    if arguments.intervals and sample is not None:
        from ..predictions.bootstrap import intervals

        found = intervals(sample, num_draws=arguments.draws, seed=arguments.seed)
    return Scored(
        source=source,
        num_rows=scoring.num_rows,
        lower_is_better=scoring.lower_is_better,
        scores=scores,
        intervals=found,
        sample=sample,
        targets=targets.hexdigest(),
        selection=selection,
    )


def _row_lines(block: Any, metrics: Any) -> list[bytes]:
    from ..predictions.measure import scores_of_row

    lines = []
    for place, case in enumerate(block.cases):
        identifier = {} if case.row.id is NO_ID else {ID: case.row.id}
        row = {INDEX: case.row.index, **identifier, **scores_of_row(metrics, block.model, place)}
        lines.append(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    return lines


def _compare(found: list[Scored], arguments: Namespace) -> dict[str, dict[str, Comparison]]:
    """Return the differences of each source to the first one, by its name."""
    from ..predictions.bootstrap import compare

    first = found[0]
    others = [one for one in found[1:] if one.sample is not None]
    if first.sample is None:
        return {}
    if other := next((one for one in others if one.num_rows == first.num_rows and one.targets != first.targets), None):
        raise UsageError(
            f"{other.source.name} and {first.source.name} answer other rows: their targets differ, and --compare draws "
            "the same rows of both"
        )
    return {
        one.source.name: compare(first.sample, one.sample, num_draws=arguments.draws, seed=arguments.seed)
        for one in others
        if one.sample is not None
    }


def _format(found: list[Scored], compared: Mapping[str, Mapping[str, Comparison]]) -> str:
    if len(found) == 1 and not found[0].intervals:
        text = format_scores(found[0].scores)
    else:
        text = _table(found)
    for name, differences in compared.items():
        shown = headlines(dict.fromkeys(differences, 0.0))
        rows = [
            [
                label(score),
                f"{one.difference:+.4f}",
                f"[{one.interval[0]:+.4f}, {one.interval[1]:+.4f}]",
                f"{one.p:.3f}",
            ]
            for score, one in differences.items()
            if score in shown
        ]
        header = ("", "difference", "95 % interval", "p")
        text += f"\n\n{name} less {found[0].source.name}\n{format_table(rows, header=header)}"
    for one in found:
        if worst := one.selection.chosen().get("worst"):
            from .prediction_view import format_rows

            text += f"\n\nworst rows of {one.source.name}\n\n{format_rows(worst)}"
    return text


def _table(found: list[Scored]) -> str:
    """Return a line for each source.

    Above those of one data file is the line of copying its inputs.
    """
    names = list(dict.fromkeys(name for one in found for name in headlines(one.scores[MODEL])))
    rows: list[list[object]] = []
    for data in dict.fromkeys(one.source.data for one in found):
        mine = [one for one in found if one.source.data == data]
        copied = next((one.scores[BASELINE] for one in mine if BASELINE in one.scores), None)
        if copied is not None:
            rows.append([WHO[BASELINE], mine[0].num_rows, *(format_score(copied.get(name)) for name in names)])
        for one in mine:
            rows.append([one.source.name, one.num_rows, *(_cell(one, name) for name in names)])
            if before := one.scores.get(BEFORE_POST):
                shown = (format_score(before.get(name)) for name in names)
                rows.append([f"{one.source.name}, {WHO[BEFORE_POST]}", one.num_rows, *shown])
    return format_table(rows, header=("", "rows", *(label(name) for name in names)))


def _cell(one: Scored, name: str) -> str:
    text = format_score(one.scores[MODEL].get(name))
    if name not in one.intervals:
        return text
    low, high = one.intervals[name]
    return f"{text} [{low:.3f}, {high:.3f}]"


def _print_csv(found: list[Scored]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("name", "who", "rows", "score", "better", "value", "low", "high"))
    for one in found:
        for who, scores in one.scores.items():
            for name, value in scores.items():
                ends = one.intervals.get(name, ("", "")) if who == MODEL else ("", "")
                better = "lower" if name in one.lower_is_better else "higher"
                writer.writerow((one.source.name, who, one.num_rows, name, better, value, *ends))


def _plain(found: list[Scored], compared: Mapping[str, Mapping[str, Comparison]]) -> dict[str, Any]:
    """Return the results as JSON values: of several sources by their names."""
    results = {one.source.name: _plain_one(one) for one in found}
    if len(found) == 1:
        return results[found[0].source.name]
    differences = {
        name: {
            score: {"difference": one.difference, "interval": list(one.interval), "p": one.p}
            for score, one in by_score.items()
        }
        for name, by_score in compared.items()
    }
    return {**results, **({"less " + found[0].source.name: differences} if differences else {})}


def _plain_one(one: Scored) -> dict[str, Any]:
    more: dict[str, Any] = {}
    if one.intervals:
        more["intervals"] = {name: list(ends) for name, ends in one.intervals.items()}
    if worst := one.selection.chosen().get("worst"):
        more["worst"] = [shown.to_json() for shown in worst]
    return {**one.scores, **more}
