"""Each named step does what its example says, and the filters look at the texts of a row together."""

from __future__ import annotations

import pytest

from sousbatch.recipes.data.cleaning import TEXT_STEPS, filter_of, is_own, problem_of


@pytest.mark.parametrize("name", TEXT_STEPS)
def test_a_step_turns_its_example_into_what_is_said(name: str) -> None:
    before, after = TEXT_STEPS[name].example
    change = TEXT_STEPS[name].change
    assert before != after
    assert change(before) == after == change(after)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("html", "if a < b and c > d: x <- 3 <3"),
        ("control", "a\tb\nc 👨‍👩‍👧 می‌خواهم"),
        ("symbols", "25°C, 3㎏, ₩5,000, “따옴표” — ※ 참고… 50% © 2024"),
        ("repeats", "... aaa 1000000 ㅋㅋㅋ"),
        ("emails", "a@b 3@4"),
        ("urls", "http:// is a scheme"),
        ("blanks", "a\n\nb c"),
    ],
)
def test_a_step_leaves_what_only_looks_alike(name: str, text: str) -> None:
    assert TEXT_STEPS[name].change(text) == text


@pytest.mark.parametrize("emoji", ["👩‍🔬", "❤️‍🔥", "🏳️‍🌈", "1️⃣"[1:], "🏴\U000e0067\U000e0062\U000e007f", "👨‍👩‍👧"])
def test_nothing_of_an_emoji_is_left(emoji: str) -> None:
    assert TEXT_STEPS["symbols"].change(f"a{emoji}b") == "ab"


def test_filters_keep_the_first_of_equal_rows_and_count_characters_together() -> None:
    first = filter_of("drop_duplicates")
    assert [first(row) for row in (["a", "b"], ["ab", ""], ["a", "b"], ["b", "a"])] == [True, True, False, True]
    assert [filter_of("drop_empty")(row) for row in (["a", "b"], ["a", " \n"])] == [True, False]
    assert [filter_of("min_chars:4")(row) for row in (["ab", "c"], ["ab", "cd"])] == [False, True]
    assert [filter_of("max_chars:3")(row) for row in (["ab", "c"], ["ab", "cd"])] == [True, False]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("htlm", "did you mean 'html'?"),
        ("min_chars", "such as min_chars:10"),
        ("max_chars:-1", "such as max_chars:10"),
        ("whatever", "an own function is written module:function"),
    ],
)
def test_a_step_that_does_not_exist_is_refused_with_what_would_be_right(name: str, said: str) -> None:
    assert said in " ".join(problem_of(name))


def test_names_with_a_colon_or_a_point_are_own_functions() -> None:
    assert [is_own(name) for name in ("my:fix", "my.steps.fix", "min_chars:5", "html")] == [True, True, False, False]
