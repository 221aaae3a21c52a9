"""`sousbatch predictions show`: rows with texts and scores.

Input, target and prediction stand one below the other. Equal places of the texts stand below each other. Each text has
lines of its own, so that a terminal that turns right-to-left text moves nothing else; what would steer the terminal is
shown escaped.
"""

from __future__ import annotations

import json
import shutil
import sys
import unicodedata
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..predictions.rows import ID, INDEX, RAW_PREDICTION
from .parser import Parser, count, define
from .prediction_sources import add_source_arguments, find_sources, scoring_of

if TYPE_CHECKING:
    from ..predictions.measure import Measured
    from ..predictions.selection import Selection, ShownRow

MAX_CHARACTERS = 2000  # of a text that is shown
_JOINERS = "\u200c\u200d"  # within words of Persian, and within emoji
_LABELS = {RAW_PREDICTION: "before post"}
_WHY = {
    "worst": "worst rows",
    "best": "best rows",
    "random": "random rows",
    "row": "rows asked for",
    "found": "rows with the text",
}


def define_show(show: Parser) -> None:
    """Define `predictions show`."""
    define(
        show,
        _show,
        "predictions show 3f2a --worst 5 --random 5",
        "predictions show predictions.jsonl --data test.jsonl --target summary --search 42",
    )
    add_source_arguments(show)
    show.add_argument("--worst", type=count, default=0, metavar="N", help="rows with the worst score (default 5)")
    show.add_argument("--best", type=count, default=0, metavar="N", help="rows with the best score")
    show.add_argument("--random", type=count, default=0, metavar="N", help="rows at random")
    show.add_argument("--seed", type=count, default=0, metavar="N", help="which rows are the random ones (default 0)")
    show.add_argument("--search", metavar="TEXT", help="rows with this text in input, target or prediction")
    show.add_argument("--row", type=count, action="append", metavar="K", help="the row with index K, from 0 on")
    show.add_argument("--json", action="store_true", help="as JSON")
    show.set_defaults(needs_target=False)


def _show(arguments: Namespace) -> int:
    from ..predictions.measure import measure
    from ..predictions.selection import MAX_FOUND, Selection

    (source, *more) = find_sources(arguments)
    if len(arguments.paths) > 1:
        raise UsageError(f"`predictions show` shows one file or run; name one of: {', '.join(arguments.paths)}")
    if more:
        others = ", ".join(str(one.predictions) for one in more)
        print(f"sousbatch: these are rows of {source.predictions}; there are also: {others}", file=sys.stderr)
    if source.data is None and (arguments.worst or arguments.best or arguments.metric):
        raise UsageError(
            f"{source.predictions} has no targets beside it; name the rows that it answers with --data FILE"
        )
    scoring = None if source.data is None else scoring_of(source, arguments)
    selection = Selection(
        metrics={} if scoring is None else scoring.metrics,
        **{name: getattr(arguments, name) for name in ("worst", "best", "random", "seed", "search")},
        indices=arguments.row or (),
    )
    _set_default(selection)
    cases = source.cases()
    blocks: Iterable[Measured] = measure(cases, (), "words") if scoring is None else scoring.measure(cases)
    num_rows = 0
    for block in blocks:
        selection.add(block)
        num_rows += len(block.cases)
    if not num_rows:
        raise UsageError(f"{source.predictions} has no rows")
    if missing := [row for row in selection.indices if row >= num_rows]:
        raise UsageError(f"there is no row {missing[0]}: the last of {num_rows:,} rows is {num_rows - 1}")
    chosen = selection.chosen()
    if arguments.json:
        print(json.dumps({why: [one.to_json() for one in rows] for why, rows in chosen.items()}, ensure_ascii=False))
        return 0
    parts = [f"{_WHY[why]}\n\n{format_rows(rows) or 'none'}" for why, rows in chosen.items()]
    print("\n\n".join(parts))
    if selection.num_found > MAX_FOUND:
        print(f"\nthe first {MAX_FOUND} of {selection.num_found:,} rows with the text")
    return 0


def _set_default(selection: Selection) -> None:
    """Show the worst rows where nothing else was asked for.

    Where nothing is measured, some at random are shown.
    """
    if any((selection.worst, selection.best, selection.random, selection.indices, selection.search)):
        return
    if selection.metrics:
        selection.worst = 5
    else:
        selection.random = 5


def format_rows(rows: Sequence[ShownRow], *, width: int | None = None) -> str:
    """Return rows as text.

    Its lines have at most *width* columns, by default those of the terminal.
    """
    columns = width or max(40, shutil.get_terminal_size((100, 24)).columns)
    return "\n\n".join("\n".join(_lines(row, columns)) for row in rows)


def _lines(row: ShownRow, width: int) -> Iterator[str]:
    values = row.to_json()
    identifier = f" (id {escape_text(str(values[ID]))})" if ID in values else ""
    scores = "".join(f"  {name} {value:.3f}" for name, value in _shown_scores(row))
    yield f"row {values.pop(INDEX)}{identifier}{scores}"
    texts = {_LABELS.get(name, name): value for name, value in values.items() if name not in (ID, "scores")}
    margin = max(map(len, texts)) + 2
    for name, value in texts.items():
        if value is None:
            continue
        head = name
        for line in wrap(cut_text(value), width - margin):
            yield f"{head.ljust(margin)}{line}".rstrip()
            head = ""


def _shown_scores(row: ShownRow) -> Iterator[tuple[str, float]]:
    from ..predictions.scoring import headlines

    return ((name, row.scores[name]) for name in headlines(row.scores))


def cut_text(value: object) -> str:
    """Return a value of a row as text with escapes, cut where it is long."""
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    escaped = escape_text(text[:MAX_CHARACTERS])
    return escaped if len(text) <= MAX_CHARACTERS else f"{escaped} … ({len(text):,} characters)"


def escape_text(text: str) -> str:
    """Return *text* with what steers a terminal written as escapes.

    These are control characters, marks of direction and line ends, such as \\n.
    """
    return "".join(_escaped(one) if unicodedata.category(one)[0] in "CZ" else one for one in text)


def _escaped(character: str) -> str:
    if character == " " or character in _JOINERS or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode("ascii")


def text_width(character: str) -> int:
    """Return how many columns a character takes in a terminal."""
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def wrap(text: str, width: int) -> list[str]:
    """Return *text* in lines of at most *width* columns.

    They end at a blank where one is near.
    """
    lines, line, used = [], "", 0
    for character in text:
        size = text_width(character)
        if used + size > width:
            head, blank, tail = line.rpartition(" ")
            if not blank or len(tail) > width // 3:
                head, tail = line, ""
            lines.append(head)
            line, used = tail, sum(map(text_width, tail))
        line, used = line + character, used + size
    return [*lines, line]
