"""The order of rows by length."""

from __future__ import annotations

import random

from sousbatch.jobs.training.row_order import LengthSampler

LENGTHS = random.Random(1).choices(range(1, 500), k=1003)


def order(epoch: int = 0, seed: int = 7) -> list[int]:
    sampler = LengthSampler(LENGTHS, group=8, seed=seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def padding(rows: list[int]) -> int:
    steps = [[LENGTHS[row] for row in rows[first : first + 8]] for first in range(0, len(rows), 8)]
    return sum(max(step) * len(step) - sum(step) for step in steps)


def test_every_row_comes_once_in_an_epoch_and_each_epoch_has_an_order_of_its_own() -> None:
    assert sorted(order()) == list(range(1003))
    assert order() == order() and len({tuple(one) for one in (order(), order(1), order(2, 8))}) == 3


def test_a_step_has_rows_of_like_length_and_the_longest_row_comes_first() -> None:
    assert padding(order()) < padding(list(range(1003))) / 10
    assert LENGTHS[order()[0]] == max(LENGTHS)


def test_few_rows_and_none_are_ordered_too() -> None:
    assert list(LengthSampler([3], group=8, seed=0)) == [0]
    assert list(LengthSampler([], group=8, seed=0)) == []
