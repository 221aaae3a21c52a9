"""`sousbatch predictions ensemble`: join the predictions of several models."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from ..errors import UsageError
from ..files import refuse_input
from ..predictions.metrics.tokenizers import Tokenizer
from ..predictions.rows import ID, INDEX, PredictionRow, predictions_of
from ..recipes.data.rows import read_rows
from ..run_index import find_run
from .parser import RUN_HELP, Parser, define

if TYPE_CHECKING:
    from ..predictions.ensemble import Member, Way


def define_ensemble(ensemble: Parser) -> None:
    """Define `predictions ensemble`."""
    define(
        ensemble,
        _ensemble,
        "predictions ensemble a.jsonl b.jsonl c.jsonl --out voted.jsonl --weights 2,1,1 --by majority",
        "predictions ensemble a.jsonl b.jsonl c.jsonl --out voted.jsonl --by risk --metric chrf",
    )
    ensemble.add_argument(
        "paths", nargs="+", metavar="FILE|RUN", help=f"merged predictions (.jsonl), or a run: {RUN_HELP}"
    )
    ensemble.add_argument("--out", required=True, metavar="FILE", help="the joined predictions (.jsonl)")
    ensemble.add_argument(
        "--by",
        choices=("probabilities", "spans", "risk", "majority"),
        help="how rows are joined (default: by what they have: probabilities of labels, spans, else risk, which takes "
        "the text that is most like the others)",
    )
    ensemble.add_argument(
        "--of",
        choices=("probabilities", "logits"),
        default="probabilities",
        help="whether the mean is of probabilities or of logits (default probabilities)",
    )
    ensemble.add_argument("--weights", type=_numbers, metavar="W,W", help="one for each model (default: all alike)")
    ensemble.add_argument(
        "--labels",
        action="append",
        type=_labels,
        metavar="A,B",
        help="labels in the order of the probabilities, once for all files or once for each; a run knows its own",
    )
    ensemble.add_argument("--metric", default="rouge", metavar="NAME", help="likeness of --by risk (default rouge)")
    ensemble.add_argument(
        "--tokenizer", choices=get_args(Tokenizer), default="words", help="units of that metric (default words)"
    )
    ensemble.add_argument(
        "--null-threshold",
        type=_number,
        metavar="X",
        help="of spans: no answer where its score is above the best span's by more than this (default: that of the "
        "runs, never for files)",
    )


def _number(text: str) -> float:
    with suppress(ValueError):
        if (value := float(text)) == value:
            return value
    raise argparse.ArgumentTypeError(f"must be a number, not {text!r}")


def _numbers(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(one) for one in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 < value < float("inf") for value in values):
        raise argparse.ArgumentTypeError(f"must be numbers above 0 with commas between, such as 2,1,1, not {text!r}")
    return values


def _labels(text: str) -> tuple[str, ...]:
    labels = tuple(text.split(","))
    if not all(labels) or len(set(labels)) < len(labels):
        raise argparse.ArgumentTypeError(f"must be labels with commas between, each once, such as no,yes, not {text!r}")
    return labels


def _ensemble(arguments: Namespace) -> int:
    from ..predictions.ensemble import Ensemble, labels_told, write_joined

    out = Path(arguments.out).expanduser().absolute()
    refuse_input(out, map(Path, arguments.paths))
    if out.is_dir():
        raise UsageError(f"{arguments.out} is a folder; name the joined file, such as {out / 'joined.jsonl'}")
    if out.suffix not in ("", ".jsonl"):
        raise UsageError(f"{arguments.out} would hold lines of JSON; call it .jsonl")
    if len(arguments.paths) < 2:
        raise UsageError("an ensemble needs two models or more, and one is named")
    weights = arguments.weights or (1.0,) * len(arguments.paths)
    if len(weights) != len(arguments.paths):
        raise UsageError(f"--weights has {len(weights)} numbers for {len(arguments.paths)} models")
    members = _members(arguments)
    way = arguments.by or _way_of_all(members)
    threshold = _null_threshold(arguments, members) if way == "spans" else None
    ensemble = Ensemble(
        way=way,
        weights=weights,
        of=arguments.of,
        metric=arguments.metric,
        tokenizer=arguments.tokenizer,
        null_threshold=threshold,
    )
    if way == "probabilities":
        members = [one if one.labels else replace(one, labels=labels_told(one)) for one in members]
    num_rows = write_joined(ensemble.joined(members), out)
    print(f"{out}: {num_rows:,} rows of {len(members)} models, by {way}" + f" of {arguments.of}" * (way == "spans"))
    if way == "spans" and threshold is None:
        print("  every question gets an answer; --null-threshold=0 lets it be without one")
    for name in (one for one in arguments.paths if Path(one).is_file()):
        if not {INDEX, ID} & next(iter(read_rows(Path(name))), {}).keys():
            print(
                f"  {name} says neither index nor id of its rows: that they are in the order of the others is assumed"
            )
    return 0


def _null_threshold(arguments: Namespace, members: Sequence[Member]) -> float | None:
    """Return the threshold that was given, else that of the runs, else None."""
    told = {member.null_threshold: member.name for member in members}
    if arguments.null_threshold is not None or len(told) == 1:
        return arguments.null_threshold if arguments.null_threshold is not None else members[0].null_threshold
    shown = ", ".join(f"{name}: {'none' if value is None else f'{value:g}'}" for value, name in told.items())
    raise UsageError(f"the models have different thresholds of no answer ({shown}); give --null-threshold")


def _way_of_all(members: Sequence[Member]) -> Way:
    """Return how the first row of each model can be joined, which must be one way."""
    from ..predictions.ensemble import way_of

    ways: dict[Way, str] = {}
    for member in members:
        first = next(iter(member.read()), None)
        if first is None:
            raise UsageError(f"{member.name} has no rows")
        ways.setdefault(way_of(first), member.name)
    (way, name), *others = ways.items()
    for other, other_name in others:
        raise UsageError(f"{other_name} has what --by {other} joins, and {name} what --by {way} joins; say which")
    return way


def _members(arguments: Namespace) -> list[Member]:
    given = arguments.labels or []
    if len(given) not in (0, 1, len(arguments.paths)):
        raise UsageError(f"--labels is given {len(given)} times for {len(arguments.paths)} models; once, or for each")
    labels = given * len(arguments.paths) if len(given) == 1 else given or [()] * len(arguments.paths)
    found = [_member(path, own) for path, own in zip(arguments.paths, labels, strict=True)]
    digests = {digest: member.name for member, _, digest in found if digest}
    if len(digests) > 1:
        raise UsageError(f"{' and '.join(digests.values())} predicted rows of different data")
    read = [path.resolve() for _, path, _ in found]
    if again := next((member.name for member, path, _ in found if read.count(path.resolve()) > 1), None):
        raise UsageError(f"{again} is named twice; --weights gives a model more weight than others")
    return [member for member, _, _ in found]


def _member(named: str, labels: tuple[str, ...]) -> tuple[Member, Path, str]:
    """Return what *named* is, its file, and the digest of a run's data."""
    from ..predictions.ensemble import Member

    if Path(named).is_file():
        return Member(name=named, read=partial(_rows, Path(named)), labels=labels), Path(named), ""
    from ..recipes.decodings import decodings_of
    from ..recipes.plan import read_plan

    paths = find_run(named, newest=True)
    plan = read_plan(paths.plan)
    if plan.sweep is not None:
        raise UsageError(
            f"{paths.run_id} is a sweep; name the folders of its points, which `sousbatch status {paths.run_id}` lists"
        )
    merged = {
        paths.predictions_file(stage.name, way): (stage.splits["predict"].digest, stage.settings)
        for stage in plan.stages
        if "predict" in stage.splits
        for way in decodings_of(stage.settings)
    }
    there = [path for path in merged if path.is_file()]
    if len(there) != 1:
        has = (
            f"several predictions; name one of: {', '.join(map(str, there))}" if there else "no merged predictions yet"
        )
        raise UsageError(f"run {paths.run_id} has {has}")
    read = partial(_rows, there[0])
    digest, settings = merged[there[0]]
    member = Member(
        name=paths.run_id,
        read=read,
        labels=labels or plan.inputs.labels,
        null_threshold=settings.question_answering.null_threshold,
    )
    return member, there[0], digest


def _rows(path: Path) -> Iterator[PredictionRow]:
    return predictions_of(read_rows(path), path)
