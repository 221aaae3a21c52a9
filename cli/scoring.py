"""`sousbatch predictions score`: measure a prediction file."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import get_args

from ..errors import NotFoundError, UsageError
from ..predictions.metrics import DEFAULT_METRICS, Tokenizer
from ..predictions.rows import PREDICTION
from .parser import Parser, define


def define_score(score: Parser) -> None:
    """Define `predictions score`."""
    define(score, _score, "predictions score predictions.jsonl --data test.jsonl --target summary")
    score.add_argument("path", metavar="FILE", help="merged predictions (.jsonl)")
    score.add_argument("--data", required=True, metavar="FILE", help="the rows that were predicted")
    score.add_argument(
        "--target", default="target", metavar="COLUMN", help="column of the right answers (default target)"
    )
    score.add_argument(
        "--input",
        metavar="COLUMN",
        help="column of the inputs, for the copying baseline (default input)",
    )
    score.add_argument(
        "--field", default=PREDICTION, metavar="FIELD", help=f"field of the prediction (default {PREDICTION})"
    )
    score.add_argument(
        "--tokenizer", choices=get_args(Tokenizer), default="words", help="units of ROUGE (default words)"
    )
    score.add_argument(
        "--metric",
        action="append",
        metavar="NAME",
        help=f"what is measured, given once for each (default {', '.join(DEFAULT_METRICS)})",
    )
    score.add_argument("--json", action="store_true", help="as JSON")


def _score(arguments: Namespace) -> int:
    from ..predictions.rows import predictions_of
    from ..predictions.scoring import score_with_baseline
    from ..recipes.data.rows import read_rows
    from .results import format_scores

    for path in (arguments.path, arguments.data):
        if not Path(path).is_file():
            raise NotFoundError(f"{path!r} does not exist")
    path = Path(arguments.path)
    predictions = predictions_of(read_rows(path), path, field=arguments.field)
    rows = list(read_rows(Path(arguments.data)))
    bad = next((number for number, row in enumerate(rows, 1) if row.get(arguments.target) is None), None)
    if bad is not None:
        has = ", ".join(rows[bad - 1])
        raise UsageError(f"row {bad} of {arguments.data} has no {arguments.target!r}; it has: {has}")
    if arguments.input is not None and not any(arguments.input in row for row in rows):
        has = ", ".join(rows[0])
        raise UsageError(f"no row of {arguments.data} has {arguments.input!r}, which --input names; they have: {has}")
    column = arguments.input or "input"
    scores = score_with_baseline(
        predictions,
        [row[arguments.target] for row in rows],
        [row.get(column) for row in rows],
        metrics=arguments.metric or DEFAULT_METRICS,
        tokenizer=arguments.tokenizer,
    )
    print(json.dumps(scores, indent=1) if arguments.json else format_scores(scores))
    return 0
