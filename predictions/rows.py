"""Define a predicted row, and read it from and write it as JSON.

No other module knows the names of its fields. Merging copies the bytes of rows and reads no more than their index;
code that looks inside uses this type.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DamagedError, RunError, UsageError

INDEX, ID, PREDICTION = "index", "id", "prediction"
RAW_PREDICTION = "raw_prediction"  # the text before `predict.post`
NO_ID: Any = ...  # an id may be null, or NaN; this is no JSON, and stays itself in another process


@dataclass(frozen=True, kw_only=True)
class PredictionRow:
    """The prediction for one input row.

    *index* is its position in the input file, *id* the value of the recipe's id column, if it has one.
    *fields* are those that the task adds, such as labels, spans, the n best answers or probabilities.
    """

    index: int
    prediction: Any
    id: Any = NO_ID
    fields: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON values, in the order in which they are written."""
        identifier = {} if self.id is NO_ID else {ID: self.id}
        return {INDEX: self.index, **identifier, PREDICTION: self.prediction, **self.fields}

    def to_line(self) -> bytes:
        """Return the row as a line of a file.

        Raises:
            RunError: a value is no JSON: half a surrogate pair, an unknown type.
        """
        try:
            return json.dumps(self.to_json(), ensure_ascii=False).encode() + b"\n"  # a value may be NaN
        except (ValueError, TypeError) as error:
            raise RunError(f"the prediction of row {self.index} cannot be written as JSON: {error}") from error

    @classmethod
    def from_json(cls, values: Mapping[str, Any], *, position: int, field: str = PREDICTION) -> PredictionRow:
        """Return the row that JSON *values* hold, with the prediction in *field*.

        *position* is the index of a row that does not say its own. A CSV file has numbers as text.
        """
        index, rest = values.get(INDEX, position), {**values}
        for name in (INDEX, ID, field):
            rest.pop(name, None)
        is_text = isinstance(index, str) and index.isdecimal()
        return cls(
            index=int(index) if is_text else index,
            prediction=values[field],
            id=values.get(ID, NO_ID),
            fields=rest,
        )


def missing(values: Mapping[str, Any], field: str) -> str:
    """Return what a row has in place of a value, "" where it has one."""
    if field not in values:
        return f"no {field!r}; it has: {', '.join(values)}"
    value = values[field]
    return "" if value is not None and value == value else f"{'null' if value is None else 'NaN'} as {field!r}"


def predictions_of(
    rows: Iterable[Mapping[str, Any]], path: Path, *, field: str = PREDICTION
) -> Iterator[PredictionRow]:
    """Yield the predictions of a file's *rows*, which must be in input order.

    Raises:
        UsageError: a row has no prediction. NaN is none: so pandas writes an empty text that it has read.
        DamagedError: the rows are not in order, or some are missing.
    """
    for position, values in enumerate(rows):
        if problem := missing(values, field):
            raise UsageError(f"row {position + 1} of {path} has {problem}")
        found = PredictionRow.from_json(values, position=position, field=field)
        if type(found.index) is not int or found.index != position:
            raise DamagedError(
                f"{path} is not in row order, or lacks rows: it has {found.index!r} in the place of {position}; "
                "`sousbatch predictions merge` puts it in order, or names what is missing"
            )
        yield found
