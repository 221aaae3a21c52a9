"""Describe the lengths of rows: spread, histogram, padding, correlation."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..facts import Rows
from .packing import packs_of

_MOST_SIMULATED = 20_000  # rows whose batches are made up to see their padding
_NUM_BINS = 12
_GROUP_BATCHES = 50  # whose rows transformers sorts by length at once (LengthGroupedSampler)


class LengthCounts:
    """Counts the lengths of a stage's rows while they are tokenised."""

    def __init__(self) -> None:
        self._counts = {name: Counter[int]() for name in ("tokens", "prompt", "response", "kept")}
        self._sums = [0, 0, 0, 0, 0, 0]
        self._cut = self._left_out = self._left_out_rows = 0

    def add(
        self, *, num_tokens: int, num_kept: int | None, num_prompt: int, num_learned: int, num_target: int = 0
    ) -> None:
        """Count an example of *num_tokens*, of which the job sees *num_kept*.

        None says that it is left out. A target that is encoded apart has *num_target* tokens more.
        """
        counts, prompt = self._counts, num_prompt
        counts["tokens"][num_tokens] += 1
        if num_learned:
            counts["prompt"][prompt] += 1
            counts["response"][num_learned] += 1
            new = (1, prompt, num_learned, prompt * prompt, num_learned * num_learned, prompt * num_learned)
            self._sums = [one + other for one, other in zip(self._sums, new, strict=True)]
        if num_kept is None:
            self._left_out_rows, self._left_out = self._left_out_rows + 1, self._left_out + num_tokens
        else:
            counts["kept"][num_kept] += 1
            self._cut += max(0, num_tokens + num_target - num_kept)

    def to_plain(self) -> dict[str, object]:
        """Return what was counted as JSON values."""
        return {
            **{name: sorted(counter.items()) for name, counter in self._counts.items()},
            "sums": self._sums,
            "cut_tokens": self._cut,
            "left_out_rows": self._left_out_rows,
            "left_out_tokens": self._left_out,
        }


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Rows and their tokens: *p95* is what 95 of 100 rows do not exceed."""

    num_rows: int
    least: int
    median: float
    mean: float
    p95: int
    most: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Padding:
    """Shares of a micro batch that are padding, 0 to 1.

    As the rows come, with `train.group_by_length`, and with `data.packing=rows`, None where rows cannot be packed.
    """

    micro_batch: int
    plain: float
    grouped: float
    packed: float | None


@dataclass(frozen=True, kw_only=True)
class Leaks:
    """Rows whose input is that of a row of *split*, which is trained on.

    *same_target* have its target too.
    """

    split: str
    num_rows: int
    same_input: Rows
    same_target: Rows


@dataclass(frozen=True, kw_only=True)
class RowStatistics:
    """The lengths of the rows of one split, as one use in one stage sees them.

    *correlation* is Pearson's of prompt and response, *ratio* all response tokens over all prompt tokens.
    """

    stage: str
    use: str
    split: str
    limit: int | None
    spreads: dict[str, Spread]
    histogram: tuple[tuple[int, int, int], ...]
    cut_rows: int
    cut_tokens: int
    left_out_rows: int
    left_out_tokens: int
    correlation: float | None = None
    ratio: float | None = None
    padding: Padding | None = None
    leaks: tuple[Leaks, ...] = ()


def spread_of(counts: Mapping[int, int]) -> Spread:
    """Return the spread of *counts*, length -> rows, of at least one row."""
    num_rows, total = sum(counts.values()), sum(length * num for length, num in counts.items())
    middle = (_at(counts, (num_rows - 1) // 2) + _at(counts, num_rows // 2)) / 2
    return Spread(
        num_rows=num_rows,
        least=min(counts),
        median=middle,
        mean=total / num_rows,
        p95=_at(counts, math.ceil(0.95 * num_rows) - 1),
        most=max(counts),
        total=total,
    )


def _at(counts: Mapping[int, int], place: int) -> int:
    """Return the length at a place, from 0, of all lengths in order."""
    done = 0
    for length in sorted(counts):
        done += counts[length]
        if done > place:
            return length
    raise IndexError(place)


def histogram_of(counts: Mapping[int, int]) -> tuple[tuple[int, int, int], ...]:
    """Return (first length, last length, rows) of at most a dozen bins of one width.

    The last bin holds all that are longer than three times the 95th percentile, so that one long row does not hide the
    others.
    """
    spread = spread_of(counts)
    most = min(spread.most, 3 * max(1, spread.p95))
    raw = max(1, math.ceil((most + 1) / _NUM_BINS))
    unit = 10 ** max(0, len(str(raw)) - 2)
    width = math.ceil(raw / unit) * unit
    bins = Counter[int]()
    for length, num in counts.items():
        bins[min(length, most) // width] += num
    last = max(bins)
    return tuple(
        (number * width, spread.most if number == last else (number + 1) * width - 1, bins[number])
        for number in range(min(bins), last + 1)
    )


def padding_of(counts: Mapping[int, int], micro_batch: int, size: int | None) -> Padding:
    """Return what of the batches of rows with these lengths is padding.

    Batches are made up from at most 20,000 rows, the same ones every time. *size* is that of a pack, None where rows
    cannot be packed.
    """
    lengths = list(_thinned(counts))
    random.Random(0).shuffle(lengths)
    chunk = micro_batch * _GROUP_BATCHES
    grouped = [
        length for start in range(0, len(lengths), chunk) for length in sorted(lengths[start : start + chunk])[::-1]
    ]
    return Padding(
        micro_batch=micro_batch,
        plain=_padded_share(lengths, micro_batch),
        grouped=_padded_share(grouped, micro_batch),
        packed=None if size is None else _packed_share(lengths, size),
    )


def _packed_share(lengths: Sequence[int], size: int) -> float:
    num_packs = sum(1 for _ in packs_of(lengths, size)) if max(lengths) <= size else 0
    return 1 - sum(lengths) / (num_packs * size) if num_packs else 0.0


def _thinned(counts: Mapping[int, int]) -> Iterator[int]:
    total, place = sum(counts.values()), 0
    pace = max(1.0, total / _MOST_SIMULATED)
    done, next_at = 0, 0.0
    for length in sorted(counts):
        done += counts[length]
        while next_at < done:
            yield length
            place += 1
            next_at = place * pace


def _padded_share(lengths: Sequence[int], micro_batch: int) -> float:
    batches = [lengths[start : start + micro_batch] for start in range(0, len(lengths), micro_batch)]
    return 1 - sum(lengths) / max(1, sum(max(batch) * len(batch) for batch in batches))


def correlation_of(sums: Sequence[int]) -> tuple[float | None, float | None]:
    """Return Pearson's correlation and the ratio of the second to the first.

    *sums* are the number of pairs and the sums of x, y, x * x, y * y and x * y. A value is None where it is undefined.
    """
    num, x, y, xx, yy, xy = sums
    over = (num * xx - x * x) * (num * yy - y * y)
    return ((num * xy - x * y) / math.sqrt(over) if over > 0 else None), (y / x if x else None)
