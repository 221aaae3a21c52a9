"""Say how certain a score is, and whether two differ, by drawing rows again.

An interval is the middle 95 % of the scores of 1,000 files, each with as many rows drawn with replacement (Efron 1979,
the percentile method). Two systems are compared on the same draws (Koehn 2004); the p-value is two-sided: the share of
draws whose difference lies at least as far from the mean of all as the measured one from 0, one draw added to both
(Riezler and Maxwell 2005, as in sacrebleu).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from .measure import Columns, Scores, scores_of
from .metrics import Metric

NUM_DRAWS, SEED = 1000, 0
_PERCENTS = (2.5, 97.5)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How much higher the second system scores.

    *interval* is that of the difference, *p* how likely one as large is by chance.
    """

    difference: float
    interval: tuple[float, float]
    p: float


class Sample:
    """The measured columns of all rows.

    A number or a text takes 8 bytes; what a text says is kept once.
    """

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self._metrics, self.num_rows = metrics, 0
        self._numbers: dict[tuple[str, str], array[float]] = {}
        self._codes: dict[tuple[str, str], tuple[array[int], dict[str | None, int]]] = {}

    def add(self, columns: Columns, num_rows: int) -> None:
        """Add a block of rows."""
        self.num_rows += num_rows
        for metric, by_name in columns.items():
            for name, column in by_name.items():
                if isinstance(column, array):
                    self._numbers.setdefault((metric, name), array("d")).extend(column)
                else:
                    codes, known = self._codes.setdefault((metric, name), (array("q"), {}))
                    codes.extend(known.setdefault(text, len(known)) for text in column)

    def scores(self, times: NDArray[np.float64] | None = None) -> Scores:
        """Return the scores where each row counts so many *times*, else once."""
        weights = np.ones(self.num_rows) if times is None else times
        sums: dict[str, dict[str, Any]] = {name: {} for name in self._metrics}
        for (metric, name), column in self._numbers.items():
            sums[metric][name] = float(weights @ np.frombuffer(column))
        for (metric, name), (codes, known) in self._codes.items():
            counts = np.bincount(np.frombuffer(codes, np.int64), weights, len(known)).tolist()
            sums[metric][name] = {
                text: count for text, count in zip(known, counts, strict=True) if text is not None and count
            }
        found: Scores = {}
        for metric, columns in sums.items():
            if columns:
                found |= scores_of(metric, self._metrics[metric], columns, self.num_rows)
        return found


def intervals(sample: Sample, *, num_draws: int = NUM_DRAWS, seed: int = SEED) -> dict[str, tuple[float, float]]:
    """Return the 95 % interval of each score."""
    found: dict[str, list[float]] = {}
    for times in _draws(sample.num_rows, num_draws, seed):
        for name, value in sample.scores(times).items():
            found.setdefault(name, []).append(value)
    return {name: _middle(values) for name, values in found.items()}


def compare(one: Sample, other: Sample, *, num_draws: int = NUM_DRAWS, seed: int = SEED) -> dict[str, Comparison]:
    """Return the difference *other* less *one* of each score, on the same rows.

    Raises:
        UsageError: they have not as many rows.
    """
    if one.num_rows != other.num_rows:
        raise UsageError(
            f"{one.num_rows:,} rows cannot be compared with {other.num_rows:,}: both sides answer the same rows"
        )
    before, after = one.scores(), other.scores()
    found: dict[str, list[float]] = {name: [] for name in before if name in after}
    for times in _draws(one.num_rows, num_draws, seed):
        old, new = one.scores(times), other.scores(times)
        for name, differences in found.items():
            if name in old and name in new:  # a rare label may have no row in a draw
                differences.append(new[name] - old[name])
    return {name: _comparison(after[name] - before[name], values) for name, values in found.items()}


def _comparison(difference: float, drawn: list[float]) -> Comparison:
    values = np.array(drawn)
    num_further = int(np.sum(np.abs(values - values.mean()) >= abs(difference)))
    return Comparison(difference=difference, interval=_middle(drawn), p=(num_further + 1) / (len(drawn) + 1))


def _draws(num_rows: int, num_draws: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Yield how often each row is drawn, once for each draw."""
    generator = np.random.default_rng(seed)
    for _ in range(num_draws):
        yield np.bincount(generator.integers(0, num_rows, num_rows), minlength=num_rows).astype(np.float64)


def _middle(values: list[float]) -> tuple[float, float]:
    low, high = np.percentile(values, _PERCENTS)
    return float(low), float(high)
