"""Collect the labels of a classification from the rows that train.

Labels that training does not know are found here, before anything is queued.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import PlanError
from ...predictions.metrics.labels import label_text
from ...user_folders import cached
from ..data.row_faults import places_of
from ..data.rows import read_rows
from ..facts import Prepared, Rows, SplitFacts
from ..labels import labels_in, ordered
from ..schema import Recipe
from ..stages import resolve_stages
from ..tasks import task_of

_NUM_NAMED = 5
_NUM_SHOWN = 10
_NONE = ""  # where a value is no label


class _Use(NamedTuple):
    """The labels of some rows: which rows have each, and whether they train."""

    split: str
    facts: SplitFacts
    column: str
    trains: bool
    rows: dict[str, Rows]


def read_labels(
    recipe: Recipe, config: Mapping[str, Any], splits: Mapping[str, SplitFacts], prepared: Sequence[Prepared]
) -> tuple[str, ...]:
    """Return the labels in the order of the model's outputs, none for a task without.

    They are those of the rows that train; without such rows, those that the model's *config* names.

    Raises:
        PlanError: a row has no label, or one that training does not know; all rows have one label.
    """
    if not task_of(recipe.task).has_labels:
        return ()
    uses = list(_uses(recipe, splits, prepared))
    reasons = [_no_label(use) for use in uses if _NONE in use.rows]
    trained = {label for use in uses if use.trains for label in use.rows} - {_NONE}
    has_training = any(use.trains for use in uses)
    labels = ordered(trained, config) if has_training else labels_in(config)
    if has_training and len(labels) < 2 and not reasons:
        use = next(use for use in uses if use.trains)
        reasons.append(
            f"split {use.split!r} has one label, {labels[0]!r}, in column {use.column!r} (data.columns.target), and a "
            "classification needs two or more; name another column, or add rows of other labels"
        )
    if not reasons:
        known = f"the {len(labels):,} labels of {'training' if has_training else 'the model'}"
        reasons += [_unknown(use, labels, known) for use in uses if use.rows.keys() - set(labels)]
    if reasons:
        raise PlanError(list(dict.fromkeys(reasons)))
    return labels


def _uses(recipe: Recipe, splits: Mapping[str, SplitFacts], prepared: Sequence[Prepared]) -> Iterator[_Use]:
    made = {(one.stage, one.use): one.rows for one in prepared}
    for stage in resolve_stages(recipe).values():
        for rows in stage.rows:
            if rows.use == "predict":
                continue
            facts, column = made.get((stage.name, rows.use), splits[rows.split]), stage.settings.data.columns.target
            num_rows = rows.num_rows(facts.num_rows)
            found = cached("labels", [2, facts.digest, column, num_rows], lambda: _count(facts, column, num_rows))  # noqa: B023  # it is asked for at once
            named = {label: Rows(num=num, first=tuple(first)) for label, (num, first) in found.items()}
            yield _Use(rows.split, facts, column, rows.use == "train", named)


def _count(facts: SplitFacts, column: str, num_rows: int) -> dict[str, tuple[int, list[int]]]:
    """Return how many rows have each label, and the numbers of the first."""
    seen: dict[str, tuple[int, list[int]]] = {}
    for number, row in enumerate(islice(read_rows(Path(facts.path)), num_rows), 1):
        value = row.get(column)
        is_label = isinstance(value, (str, int)) or (isinstance(value, float) and value.is_integer())
        label = label_text(value) if is_label else _NONE
        num, first = seen.get(label, (0, []))
        seen[label] = (num + 1, [*first, number] if len(first) < _NUM_NAMED else first)
    return seen


def _no_label(use: _Use) -> str:
    return (
        f"split {use.split!r} has {_rows(use, _NONE)} whose column {use.column!r} (data.columns.target) "
        "holds no label: it is empty, or a fraction; give each row a text, a whole number, or true or false"
    )


def _rows(use: _Use, label: str) -> str:
    rows = use.rows[label]
    return f"{rows.num:,} row{'s' * (rows.num > 1)} ({places_of(use.facts, rows)})"


def _unknown(use: _Use, labels: Sequence[str], known: str) -> str:
    unknown = [f"{label!r} in {_rows(use, label)}" for label in use.rows if label not in labels]
    more = f" and {len(unknown) - _NUM_SHOWN:,} more" if len(unknown) > _NUM_SHOWN else ""
    shown = ", ".join(map(repr, labels[:_NUM_SHOWN])) + (", ..." if len(labels) > _NUM_SHOWN else "")
    return (
        f"split {use.split!r} has labels in column {use.column!r} (data.columns.target) that are not among {known} "
        f"({shown}): {', '.join(unknown[:_NUM_SHOWN])}{more}; correct these rows, or train on rows with such labels"
    )
