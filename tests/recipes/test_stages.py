"""Stages are resolved once, from the recipe alone: each sees what the stage it works on has settled, then its own."""

from __future__ import annotations

import re
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from sousbatch.errors import PlanError, RecipeError
from sousbatch.recipes.compile import compile
from sousbatch.recipes.facts import Lengths
from sousbatch.recipes.plan import Plan
from sousbatch.recipes.schema import Recipe, StageSpec, rules
from sousbatch.recipes.stages import ResolvedStage, resolve_stages, smoke


def _resolved(small: ModuleType, **stages: StageSpec) -> dict[str, ResolvedStage]:
    return resolve_stages(replace(small.RECIPE, stages=stages))


def _compiled(small: ModuleType, **stages: StageSpec) -> Plan:
    return compile(replace(small.RECIPE, stages=stages), small.SITE, small.INPUTS)


def _set(**sections: Any) -> StageSpec:
    return StageSpec(set=sections)


def test_a_consolidate_stage_sees_the_adapter_and_the_goal_of_its_train_stage(small: ModuleType) -> None:
    train = _set(adapter={"method": "lora", "rank": 3}, checkpoints={"goal": "highest"})
    seen = _resolved(small, train=train, consolidate=StageSpec())["consolidate"].settings
    assert (seen.adapter.method, seen.adapter.rank, seen.checkpoints.goal) == ("lora", 3, "highest")


def test_each_consolidate_stage_sees_its_own_train_stage(small: ModuleType) -> None:
    found = _resolved(
        small,
        train=StageSpec(),
        consolidate=StageSpec(),
        tune=StageSpec(kind="train", of="consolidate", set={"adapter": {"method": "lora"}}),
        merged=StageSpec(kind="consolidate", of="tune"),
    )
    methods = {name: stage.settings.adapter.method for name, stage in found.items()}
    assert methods == {"train": "full", "consolidate": "full", "tune": "lora", "merged": "lora"}
    assert {name: stage.train_stage for name, stage in found.items()} == {
        **dict.fromkeys(("train", "consolidate"), "train"),
        **dict.fromkeys(("tune", "merged"), "tune"),
    }
    assert found["merged"].model_stage == "consolidate"  # the base of its adapter


def test_merge_and_score_see_the_rows_of_their_predict_stage(small: ModuleType) -> None:
    predict = _set(predict={"split": "validation", "rows": 4}, data={"columns": {"target": "label"}})
    found = _compiled(small, predict=predict, merge=StageSpec(), score=StageSpec())
    score = found.stage("score")
    assert (score.splits["score"].name, score.splits["score"].num_rows) == ("validation", 4)
    assert score.settings.data.columns.target == "label"
    assert found.stage("merge").settings.predict.split == "validation"


def test_what_a_stage_sets_itself_wins_over_what_it_inherits(small: ModuleType) -> None:
    train, consolidate = _set(checkpoints={"goal": "highest"}), _set(checkpoints={"goal": "lowest"})
    assert _resolved(small, train=train, consolidate=consolidate)["consolidate"].settings.checkpoints.goal == "lowest"


def test_a_metric_of_answers_is_measured_on_the_first_rows_of_the_evaluated_split(small: ModuleType) -> None:
    def uses(**train: Any) -> dict[str, tuple[str, int | None]]:
        stage = _set(checkpoints={"metric": "rougeL"}, train={"eval_split": "validation", **train})
        found = _resolved(small, train=stage, consolidate=StageSpec())
        assert found["consolidate"].settings.goal == "highest"
        return {rows.use: (rows.split, rows.most) for rows in found["train"].rows}

    assert uses(eval_rows=5)["predict"] == uses(eval_rows=5)["eval"] == ("validation", 5)
    assert uses(eval_rows=5, metric_rows=2)["predict"] == ("validation", 2)
    assert "predict" not in {rows.use for rows in _resolved(small, train=StageSpec())["train"].rows}


def test_what_a_stage_does_not_inherit_is_the_recipes(small: ModuleType) -> None:
    found = _resolved(small, train=_set(consolidate={"dtype": "float32"}), consolidate=StageSpec())
    assert found["consolidate"].settings.consolidate.dtype is None


def test_a_train_stage_keeps_weights_as_its_consolidate_stage_will_write_them(small: ModuleType) -> None:
    found = _resolved(small, train=StageSpec(), consolidate=_set(consolidate={"dtype": "float32", "choose": "last"}))
    assert found["train"].settings.consolidate == found["consolidate"].settings.consolidate
    own = _resolved(small, train=_set(consolidate={"choose": "last"}), consolidate=StageSpec())
    assert own["train"].settings.consolidate.choose == "last"


def test_a_fault_of_an_inherited_section_is_said_of_the_stage_that_sets_it(small: ModuleType) -> None:
    train = _set(checkpoints={"archive_url": "somewhere"})
    recipe: Recipe = replace(small.RECIPE, stages={"train": train, "consolidate": StageSpec()})
    assert [fault.key for fault in rules.faults_of(recipe)] == ["stages.train.set.checkpoints.archive_url"]


def test_the_rows_that_are_kept_are_the_examples_of_a_split(small: ModuleType) -> None:
    place: dict[str, Any] = {"stage": "train", "use": "train", "split": "train", "limit": 32}
    lengths = Lengths(**place, num_rows=100, num_examples=90, longest=9, longest_kept=9)
    plan = compile(small.RECIPE, small.SITE, replace(small.INPUTS, lengths=(lengths,)))
    split, batch = plan.stage("train").splits["train"], plan.stage("train").batch
    assert (split.num_rows, split.num_examples) == (100, 90)
    assert batch is not None and batch.steps_per_epoch == 12  # of 8 examples each


def test_a_set_that_fits_no_schema_is_a_fault_of_the_recipe(small: ModuleType) -> None:
    with pytest.raises(RecipeError, match="train.steps is 'many'"):
        _resolved(small, train=_set(train={"steps": "many"}))


def test_a_step_that_a_consolidate_stage_chooses_stays_and_is_counted(small: ModuleType) -> None:
    chosen = _set(consolidate={"choose": "step-7"})
    found = _compiled(small, train=StageSpec(), last=StageSpec(kind="consolidate"), consolidate=chosen)
    assert found.stage("train").settings.checkpoints.keep_steps == (7,)
    usual = _compiled(small, train=StageSpec(), last=StageSpec(kind="consolidate"))
    sizes = [plan.forecast.checkpoints["train"].full_bytes for plan in (found, usual)]
    assert sizes[0] > sizes[1]


@pytest.mark.parametrize(
    ("choice", "more", "says"),
    [
        ("step-700", {}, "ends at step 26, and the checkpoint of step 700 is wanted"),
        ("step-07x", {}, r"consolidate.choose is 'step-07x' \(best, last, or a step such as step-200\)"),
        ("step-7", {"patience": 2}, "train.patience may end the training before a step whose checkpoint is wanted"),
    ],
)
def test_a_step_that_may_never_be_is_refused(small: ModuleType, choice: str, more: dict[str, Any], says: str) -> None:
    recipe = replace(
        small.RECIPE, stages={"train": _set(train=more), "consolidate": _set(consolidate={"choose": choice})}
    )
    faults = rules.faults_of(recipe)
    if faults:
        assert re.search(says, " ".join(map(str, faults)))
        return
    with pytest.raises(PlanError, match=says):
        compile(recipe, small.SITE, small.INPUTS)


def test_a_smoke_run_has_no_step_that_was_chosen(small: ModuleType) -> None:
    """It has two steps: the last of them stands for the one that will be wanted."""
    stages = {"train": StageSpec(), "consolidate": _set(consolidate={"choose": "step-7"})}
    keeping = replace(small.RECIPE.checkpoints, keep_steps=(9,))
    plan = compile(smoke(replace(small.RECIPE, stages=stages, checkpoints=keeping)), small.SITE, small.INPUTS)
    assert plan.stage("train").settings.checkpoints.keep_steps == ()
    assert plan.stage("consolidate").settings.consolidate.choose == "last"
