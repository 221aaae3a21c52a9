"""Recipes drawn at random: what planning takes trains, resumes, becomes a model and answers every row.

`make test-recipes` runs 150 of them, `make test-recipes SEEDS=1000-1999` those of other seeds.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

Ask = Callable[[dict[str, Any]], dict[str, Any]]

_FIRST, _LAST = map(int, os.environ.get("SOUSBATCH_TEST_SEEDS", "0-149").split("-"))


@pytest.mark.recipes
@pytest.mark.parametrize("seed", range(_FIRST, _LAST + 1))
def test_what_planning_takes_runs_to_its_end(forked: Ask, seed: int) -> None:
    seen = forked({"seed": seed})
    for why in ("no small model", "refused"):
        if why in seen:
            pytest.skip(f"{why}: {seen[why]}")
    assert "codes" not in seen, seen
    undisturbed, resumed = seen["losses"]
    assert resumed == pytest.approx(undisturbed, rel=1e-5), seen["overrides"]
    first, second = seen["answers"]
    assert first, seen["overrides"]
    for name, rows in first.items():
        assert [row["index"] for row in rows] == list(range(seen["rows"])), seen["overrides"]
        for row, again in zip(rows, second[name], strict=True):
            assert _flat(row) == pytest.approx(_flat(again), rel=2e-3, abs=2e-4), seen["overrides"]


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Return what is in *value* by its place."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: found for place, one in items for key, found in _flat(one, f"{name}.{place}").items()}
    return {name: value}
