"""When answers count as filler."""

from __future__ import annotations

import math

import pytest

from sousbatch.jobs.training.guard import Answers


@pytest.mark.parametrize(
    ("measured", "is_over"),
    [
        ([(True, 3.0), (True, 2.0), (True, 9.0)], False),
        ([(True, 3.0), (False, 5.0), (False, 5.0)], True),
        ([(True, 3.0), (False, math.nan), (False, math.nan)], True),
        ([(True, 3.0), (False, 5.0)], False),
        ([(True, 3.0), (False, 5.0), (True, 4.0), (False, 5.0)], False),
        # the most frequent token is what a model learns first: its answers were chance before
        ([(True, 9.0), (False, 6.0), (False, 5.0)], False),
        ([(True, 5.745), (False, 5.858), (False, 5.773)], False),  # went on to 5.66
        ([(False, 6.0), (False, 7.0), (False, 8.0)], False),
    ],
)
def test_answers_of_one_token_are_filler_where_they_are_worse_than_varied_ones(
    measured: list[tuple[bool, float]], is_over: bool
) -> None:
    answers = Answers(is_text=True)
    assert [answers.became_filler(loss, is_varied=is_varied) for is_varied, loss in measured][-1] is is_over


def test_tokens_are_looked_at_until_two_differ() -> None:
    answers = Answers(is_text=True)
    answers.add({1}, {1, 2})
    assert answers.is_wanted
    answers.add({1, 5}, {3})
    assert not answers.is_wanted and answers.wanted == {1, 2, 3}
    answers.begin()
    assert answers.is_wanted and not answers.chosen
    assert not Answers(is_text=False).is_wanted
