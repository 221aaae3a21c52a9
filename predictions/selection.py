"""Choose rows to look at while they are measured.

These are the worst, the best, some at random, and those that are asked for.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from pathlib import Path
from typing import Any

from .. import files
from .measure import Case, Measured, Scores, scores_of_row
from .metrics import Metric
from .rows import ID, INDEX, NO_ID, PREDICTION, RAW_PREDICTION
from .scoring import headline

MAX_FOUND = 100  # rows that a search keeps
NUM_EXAMPLES = 5  # of each kind, in a run's report


@dataclass(frozen=True, kw_only=True)
class ShownRow:
    """A case with its scores, as if the file had this row alone."""

    case: Case
    scores: Scores

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        row = self.case.row
        identifier = {} if row.id is NO_ID else {ID: row.id}
        before = {RAW_PREDICTION: row.fields[RAW_PREDICTION]} if RAW_PREDICTION in row.fields else {}
        texts = {"input": self.case.input, "target": self.case.target, PREDICTION: row.prediction, **before}
        return {INDEX: row.index, **identifier, **texts, "scores": self.scores}


@dataclass(kw_only=True)
class Selection:
    """Keeps at most so many *worst*, *best* and *random* rows.

    It also keeps the rows with some *indices*, and those with the text *search*. Rows are ranked by the mean of the
    headlines of the first metric; of equals the earlier one comes first. The random rows depend on *seed* and their
    indices alone. *num_found* counts also the rows with the text that were not kept.
    """

    metrics: dict[str, Metric]
    worst: int = 0
    best: int = 0
    random: int = 0
    seed: int = 0
    indices: Sequence[int] = ()
    search: str | None = None
    num_found: int = 0
    _kept: dict[str, list[tuple[tuple[float, int], ShownRow]]] = field(default_factory=dict)

    def add(self, block: Measured) -> None:
        """Look at a block."""
        places = range(len(block.cases))
        if self.metrics and (self.worst or self.best):
            name, metric = next(iter(self.metrics.items()))
            columns = {name: block.model[name]}
            sign = 1 if metric.better == "higher" else -1
            values = [sign * headline(scores_of_row(self.metrics, columns, place)) for place in places]
            if self.worst:
                self._keep("worst", self.worst, block, values)
            if self.best:
                self._keep("best", self.best, block, [-value for value in values])
        if self.random:
            marks = [zlib.crc32(f"{self.seed} {case.row.index}".encode()) for case in block.cases]
            self._keep("random", self.random, block, marks)
        if self.indices:
            asked = [place for place in places if block.cases[place].row.index in self.indices]
            self._keep("row", len(self.indices), block, [0.0] * len(places), asked)
        if self.search is not None:
            found = [place for place in places if _has(block.cases[place], self.search)]
            self.num_found += len(found)
            self._keep("found", MAX_FOUND, block, [0.0] * len(places), found)

    def _keep(
        self, name: str, count: int, block: Measured, keys: Sequence[float], places: Iterable[int] | None = None
    ) -> None:
        asked = range(len(block.cases)) if places is None else places
        best = nsmallest(count, ((keys[place], block.cases[place].row.index, place) for place in asked))
        rows = [((key, index), self._shown(block, place)) for key, index, place in best]
        self._kept[name] = nsmallest(count, [*self._kept.get(name, ()), *rows], key=lambda one: one[0])

    def _shown(self, block: Measured, place: int) -> ShownRow:
        return ShownRow(case=block.cases[place], scores=scores_of_row(self.metrics, block.model, place))

    def chosen(self) -> dict[str, list[ShownRow]]:
        """Return the rows by why: "worst", "best", "random", "row" or "found"."""
        return {name: [shown for _, shown in rows] for name, rows in self._kept.items()}


def _has(case: Case, text: str) -> bool:
    texts = (case.input, case.target, case.row.prediction, case.row.fields.get(RAW_PREDICTION))
    return any(text in str(one) for one in texts if one is not None)


def write_examples(path: Path, selection: Selection) -> None:
    """Write the chosen rows, one a line, each with why it was chosen."""
    rows = [{"why": why, **shown.to_json()} for why, chosen in selection.chosen().items() for shown in chosen]
    files.write_text(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))


def read_examples(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return what `write_examples` wrote, by why it was chosen.

    There is nothing where the file is damaged or absent.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        for line in path.read_bytes().splitlines():
            row = files.parse_json(line)
            if all(isinstance(value, float) for value in row["scores"].values()) and INDEX in row:
                found.setdefault(row.pop("why"), []).append(row)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {}
    return found
