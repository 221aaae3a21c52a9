"""Lengths of rows: what they spread over, how they fill batches, and how prompt and response go together."""

from __future__ import annotations

import random
import statistics
from collections import Counter

import pytest

from sousbatch.recipes.data.statistics import LengthCounts, correlation_of, histogram_of, padding_of, spread_of

LENGTHS = [random.Random(row).randrange(3, 200) for row in range(997)]


def test_the_spread_is_that_of_the_sorted_lengths() -> None:
    found, ordered = spread_of(Counter(LENGTHS)), sorted(LENGTHS)
    assert (found.num_rows, found.least, found.most, found.total) == (997, ordered[0], ordered[-1], sum(LENGTHS))
    assert (found.median, found.p95) == (statistics.median(LENGTHS), ordered[947])  # 948 of 997 are 95 of 100
    assert found.mean == pytest.approx(statistics.mean(LENGTHS))


def test_every_row_is_in_one_bin_and_a_long_one_does_not_hide_the_others() -> None:
    bins = histogram_of(Counter([*LENGTHS, 100_000]))
    assert sum(num for _, _, num in bins) == 998 and len(bins) <= 13
    assert bins[-1][1] == 100_000 and bins[-1][2] == 1
    for low, high, num in bins[:-1]:
        assert num == sum(low <= length <= high for length in LENGTHS)


def test_padding_is_least_in_packs_and_less_by_length() -> None:
    found = padding_of(Counter(LENGTHS), 8, 512)
    assert found.packed < 0.02 and found.grouped < 0.1 < 0.3 < found.plain < 0.6
    assert padding_of({7: 100}, 4, 512).plain == 0
    assert padding_of({7: 100}, 4, None).packed is None


def test_prompt_and_response_are_correlated_as_pearson_says() -> None:
    counts, chance = LengthCounts(), random.Random(0)
    pairs = [(length, length // 7 + chance.randrange(1, 9)) for length in LENGTHS]
    for prompt, response in pairs:
        counts.add(num_tokens=prompt + response, num_kept=prompt, num_prompt=prompt, num_learned=response)
    plain = counts.to_plain()
    correlation, ratio = correlation_of(plain["sums"])
    assert correlation == pytest.approx(statistics.correlation(*zip(*pairs, strict=True)))
    assert ratio == pytest.approx(sum(r for _, r in pairs) / sum(p for p, _ in pairs))
    counts.add(num_tokens=500, num_kept=160, num_prompt=100, num_learned=60, num_target=60)  # a target apart
    assert counts.to_plain()["cut_tokens"] == plain["cut_tokens"] + 400
    assert plain["cut_tokens"] == sum(r for _, r in pairs) and correlation_of([1, 5, 5, 25, 25, 25])[0] is None
