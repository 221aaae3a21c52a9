"""`sousbatch recipes new`, `check`, `diff` and `docs`, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sousbatch.recipes.compose import compose


def test_a_copied_recipe_is_the_same_recipe_with_its_comments(sousbatch, project: Path):
    code, out, _ = sousbatch("recipes", "new", "mine", "--from", "hangul-restoration")
    assert code == 0 and "sousbatch plan ./mine.yaml" in out
    assert "# 400 steps" in (project / "mine.yaml").read_text()
    assert sousbatch("recipes", "diff", "mine.yaml", "hangul-restoration") == (0, "no key differs\n", "")
    assert compose("mine.yaml").name == "mine"


@pytest.mark.parametrize(
    ("name", "source", "said"),
    {
        "exists": ("small", "hangul-restoration", "small.yaml exists"),
        "is a path": ("../mine", "hangul-restoration", "must be a plain word"),
        "is a file's": ("mine.yaml", "hangul-restoration", "must be a plain word"),
        "is no name": ("Mine", "hangul-restoration", "cannot be copied: recipe 'Mine': name is 'Mine'"),
        "has no source": ("mine", "hangul-restorations", "did you mean 'hangul-restoration'?"),
    }.values(),
)
def test_a_recipe_is_not_copied_where_its_name_or_source_is_wrong(sousbatch, project: Path, name, source, said):
    before = sorted(project.iterdir())
    code, _, err = sousbatch("recipes", "new", name, "--from", source)
    assert code == 2 and said in err and sorted(project.iterdir()) == before


def test_recipes_are_checked_together_and_every_fault_of_each_is_named(sousbatch, project: Path):
    (project / "wrong.yaml").write_text("train: {lr: 1, epochs: -1}\nmodel: {path: model}\n")
    code, out, _ = sousbatch("recipes", "check", "small.yaml", "wrong.yaml")
    assert code == 2
    assert "small.yaml: causal_lm, train > consolidate > predict > merge > score; every key is right" in out
    assert "train.learning_rate" in out and "train.epochs" in out


def test_recipes_and_runs_are_compared_key_by_key(sousbatch, project: Path):
    (project / "other.yaml").write_text((project / "small.yaml").read_text() + "predict: {top_k: 3}\nseed: 4\n")
    code, out, _ = sousbatch("recipes", "diff", "small.yaml", "other.yaml", "--json")
    assert code == 0
    wanted = {"seed": (0, 4), "predict.top_k": (0, 3)}
    found = {row["key"]: (row["first"], row["second"]) for row in json.loads(out)}
    assert found == wanted
    code, _, err = sousbatch("recipes", "diff", "small.yaml", "run:abc")
    assert code != 0 and "abc" in err


def test_the_reference_names_every_key_with_its_values_and_other_words(sousbatch):
    code, out, _ = sousbatch("recipes", "docs")
    assert code == 0
    assert "## `train.schedule`" in out and "## `resources.*`" in out
    assert "| `learning_rate` | number > 0 | `2e-05` | highest rate | `lr` |" in out


def test_the_reference_in_the_documentation_is_in_step(sousbatch):
    written = Path(__file__).parents[2] / "docs/reference.md"
    assert sousbatch("recipes", "docs")[1] == written.read_text(encoding="utf-8"), (
        "sousbatch recipes docs > docs/reference.md"
    )
