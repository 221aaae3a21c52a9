"""Recipes drawn at random: plain torch, transformers and peft come to the same numbers, answers and scores.

`make test-plain` compares 150 of them, `make test-plain SEEDS=1000-1999` those of other seeds.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

Ask = Callable[[dict[str, Any]], dict[str, Any]]

_FIRST, _LAST = map(int, os.environ.get("SOUSBATCH_TEST_SEEDS", "0-149").split("-"))


def expect_no_difference(seen: dict[str, Any]) -> None:
    for why in ("no small model", "refused"):
        if why in seen:
            pytest.skip(f"{why}: {seen[why]}")
    assert "codes" not in seen, seen
    assert seen["differences"] == [], seen["overrides"]


@pytest.mark.recipes
@pytest.mark.parametrize("seed", range(_FIRST, _LAST + 1))
def test_a_recipe_does_what_plain_torch_does(forked: Ask, seed: int) -> None:
    expect_no_difference(forked({"seed": seed, "num_keys": [4, 14], "do": "compare_with_plain_training"}))


def test_a_quick_recipe_does_what_plain_torch_does(forked: Ask) -> None:
    expect_no_difference(forked({"seed": 5, "do": "compare_with_plain_training"}))
