"""What checkpoints hold, and the save level that a plan reaches."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from sousbatch.errors import PlanError
from sousbatch.recipes.compile import compile
from sousbatch.recipes.facts import Inputs
from sousbatch.recipes.forecast.memory import forecast
from sousbatch.recipes.forecast.storage import (
    FITS,
    Fit,
    checkpoint_of,
    later_bytes,
    needs,
    weights_of,
    with_dtype,
    with_slack,
)
from sousbatch.recipes.plan import Batch, Plan
from sousbatch.recipes.schema import Adapter, Checkpoints


def planned(small: ModuleType, free: int = 10**9, **checkpoints: Any) -> Plan:
    recipe = replace(small.RECIPE, checkpoints=Checkpoints(**{"every_steps": 1} | checkpoints))
    return compile(
        recipe, small.SITE, replace(small.INPUTS, disk_space=replace(small.INPUTS.disk_space, free_bytes=free))
    )


def batch_of(small: ModuleType, **changes: Any) -> Batch:
    batch = small.plan().stage("train").batch
    return replace(batch, steps=100, save_every_steps=10, **changes)


KEPT = {
    "last and best, and one being written": ({}, 3, 0),
    "last alone": ({"keep_best": 0}, 2, 0),
    "never more than are written": ({"keep_last": 50}, 10, 0),
    "some stay for good": ({"keep_every_steps": 50}, 5, 0),
    "multiples of both": ({"keep_every_steps": 15}, 6, 0),
    "those that do not stay for being new are stripped": ({"keep_every_steps": 50, "thin": True}, 2, 3),
}


@pytest.mark.parametrize(("policy", "num_full", "num_weights"), KEPT.values(), ids=KEPT)
def test_the_peak_of_checkpoints_is_all_that_stay_and_one_more(
    small: ModuleType, policy: dict[str, Any], num_full: int, num_weights: int
) -> None:
    recipe = replace(small.RECIPE, checkpoints=Checkpoints(**policy))
    stage = replace(small.plan().stage("train"), batch=batch_of(small), settings=recipe)
    full = checkpoint_of(recipe, small.MODEL, stage.batch).num_bytes
    weights = weights_of(recipe, small.MODEL).num_bytes
    slack = with_slack(full) - full, with_slack(weights) - weights
    needed = num_full * (full + slack[0]) + num_weights * (weights + slack[1])
    assert needs(recipe, small.MODEL, stage)[FITS[0]] == needed
    found = forecast(small.INPUTS, [stage])
    assert found.storage[0].num_bytes == num_full * full + num_weights * weights
    assert found.checkpoints["train"].keeps_all


def sizes(small: ModuleType) -> tuple[int, int, int]:
    """Return the room that a full checkpoint, weights, and all else that the small plan writes, ask for."""
    plan = planned(small)
    batch = plan.stage("train").batch
    assert batch is not None
    full, weights = checkpoint_of(plan.recipe, small.MODEL, batch), weights_of(plan.recipe, small.MODEL)
    return with_slack(full.num_bytes), with_slack(weights.num_bytes), later_bytes(plan.forecast)


# what must be there, as counts of full states and of weights
LEAST: dict[Fit, tuple[int, int]] = {
    Fit("full", keeps_all=True): (3, 0),
    Fit("full"): (2, 1),
    Fit("weights"): (0, 3),
    Fit("none"): (0, 1),
}


@pytest.mark.parametrize("fit", LEAST, ids=str)
@pytest.mark.parametrize("limit", ["budget", "store"])
def test_a_plan_says_how_well_checkpoints_fit(small: ModuleType, fit: Fit, limit: str) -> None:
    full, weights, later = sizes(small)
    room = LEAST[fit][0] * full + LEAST[fit][1] * weights
    lower = [*FITS, None][FITS.index(fit) + 1]
    for bytes_, expected in ((room, fit), (room - 1, lower)):
        if expected is None:
            continue
        plan = planned(small, budget_gb=bytes_ / 1e9) if limit == "budget" else planned(small, free=later + bytes_)
        found = plan.forecast.checkpoints["train"]
        assert (found.save_level, found.keeps_all) == expected
        assert plan.forecast.storage_peak_bytes <= later + bytes_
        warned = [text for text in plan.warnings if "smallest change" in text]
        assert bool(warned) != expected.keeps_all


@pytest.mark.parametrize("limit", ["budget", "store"])
def test_a_plan_is_refused_only_when_not_even_the_weights_at_the_end_fit(small: ModuleType, limit: str) -> None:
    _, weights, later = sizes(small)
    with pytest.raises(PlanError, match=r"not even the weights of stage 'train', .* GB, fit into"):
        if limit == "budget":
            planned(small, budget_gb=(weights - 1) / 1e9)
        else:
            planned(small, free=later + weights - 1)


def test_the_smallest_change_makes_all_fit_in_full(small: ModuleType) -> None:
    full, _, later = sizes(small)
    kept = planned(small, keep_every_steps=10, budget_gb=3 * full / 1e9).forecast.checkpoints["train"]
    change, more = kept.change.split(" or ")
    assert change == "checkpoints.keep_every_steps=null"  # of so small a model a stripped one is as large
    assert more.startswith("checkpoints.budget_gb=")
    budget = float(more.removeprefix("checkpoints.budget_gb="))
    assert planned(small, keep_every_steps=10, budget_gb=budget).forecast.checkpoints["train"].keeps_all
    short = planned(small, free=later + 2 * full).forecast.checkpoints["train"].change
    assert short.startswith("checkpoints.keep_best=0 consolidate.choose=last or ")
    assert short.endswith("GB more in the runs directory")


def large(small: ModuleType) -> Inputs:
    """A model of 10.7 billion parameters, of which a state that can be resumed takes 128 GB and weights 21.4 GB."""
    layer = next(tensor for tensor in small.MODEL.tensors if "q_proj" in tensor.name)
    model = replace(small.MODEL, tensors=(replace(layer, shape=(10_700_000, 1000)),), num_params=10_700_000_000)
    return replace(small.INPUTS, model=model, disk_space=replace(small.INPUTS.disk_space, free_bytes=2000 * 10**9))


@pytest.mark.parametrize(
    ("asked", "budget_gb", "change"),
    [
        ({"keep_best": 5}, 400, "checkpoints.thin=true"),
        ({"keep_best": 5}, 320, "checkpoints.keep_best=2 checkpoints.thin=true"),
        ({"keep_best": 5}, 290, "checkpoints.keep_best=1 checkpoints.thin=true"),
        ({"keep_last": 3}, 430, "checkpoints.keep_last=1"),
        ({"keep_last": 3, "keep_every_steps": 5}, 700, "checkpoints.thin=true"),
        (
            {"keep_last": 3, "keep_every_steps": 5},
            270,
            "checkpoints.keep_every_steps=null checkpoints.keep_last=1 checkpoints.keep_best=0 consolidate.choose=last",
        ),
        ({}, 200, "adapter=lora"),
        ({"from scratch": True}, 200, "checkpoints.budget_gb=393"),
    ],
    ids=str,
)
def test_the_change_that_a_plan_proposes_is_mild_and_true(
    small: ModuleType, asked: dict[str, Any], budget_gb: float, change: str
) -> None:
    inputs = large(small)
    if is_new := asked.get("from scratch", False):
        inputs = replace(inputs, model=replace(inputs.model, has_weights=False))
    policy = {} if is_new else asked
    recipe = replace(small.RECIPE, checkpoints=Checkpoints(**{"every_steps": 1, "budget_gb": budget_gb} | policy))
    found = compile(recipe, small.SITE, inputs).forecast.checkpoints["train"].change
    assert found.split(" or ")[0] == change
    values = {"thin": True, "keep_every_steps": None, "adapter": Adapter(method="lora")}
    for word in change.split():
        key, _, value = word.partition("=")
        section, _, name = key.partition(".")
        if section == "adapter":
            recipe = replace(recipe, adapter=values["adapter"])
        else:
            new = values.get(name, float(value) if name == "budget_gb" else value)
            new = int(value) if name in ("keep_last", "keep_best") else new
            recipe = replace(recipe, **{section: replace(getattr(recipe, section), **{name: new})})
    assert compile(recipe, small.SITE, inputs).forecast.checkpoints["train"].keeps_all


def test_10_7_billion_parameters_end_with_their_weights_on_a_disk_of_100_gb(small: ModuleType) -> None:
    """The server that died of its checkpoints."""
    inputs = replace(large(small), disk_space=replace(small.INPUTS.disk_space, free_bytes=95 * 10**9))
    plan = compile(replace(small.RECIPE, checkpoints=Checkpoints(every_steps=1)), small.SITE, inputs)
    kept = plan.forecast.checkpoints["train"]
    assert kept.save_level == "weights" and kept.change.startswith("adapter=lora")
    assert plan.forecast.storage_peak_bytes < 95 * 10**9
    lora = replace(plan.recipe, adapter=Adapter(method="lora"))
    assert compile(lora, small.SITE, inputs).forecast.checkpoints["train"].keeps_all


def test_two_train_stages_share_the_store(small: ModuleType) -> None:
    """What one leaves is there while the other works."""
    from sousbatch.recipes.schema import StageSpec

    full, weights, _ = sizes(small)
    stages = {"train": StageSpec(), "consolidate": StageSpec(), "again": StageSpec(kind="train", of="consolidate")}
    recipe = replace(small.RECIPE, stages=stages, checkpoints=Checkpoints(every_steps=1))
    plenty = compile(recipe, small.SITE, small.INPUTS)
    room = later_bytes(plenty.forecast) + 3 * full + weights
    tight = replace(small.INPUTS, disk_space=replace(small.INPUTS.disk_space, free_bytes=room))
    assert {kept.keeps_all for kept in compile(recipe, small.SITE, tight).forecast.checkpoints.values()} == {True}
    none = replace(small.INPUTS, disk_space=replace(small.INPUTS.disk_space, free_bytes=room - 3 * full))
    with pytest.raises(PlanError, match="not even the weights"):
        compile(recipe, small.SITE, none)


@pytest.mark.parametrize(
    ("config", "tensors", "expected"),
    [
        ({"dtype": "bfloat16"}, "float32", "bfloat16"),
        ({"torch_dtype": "bfloat16"}, "float32", "bfloat16"),
        ({"dtype": "float32"}, "bfloat16", "float16"),
        ({}, "bfloat16", "bfloat16"),
        ({}, "float32", "float16"),
    ],
)
def test_a_bfloat16_model_stays_one_where_the_recipe_is_silent(
    small: ModuleType, config: dict[str, str], tensors: str, expected: str
) -> None:
    model = replace(
        small.MODEL, config=small.CONFIG | config, tensors=tuple(replace(t, dtype=tensors) for t in small.MODEL.tensors)
    )
    assert with_dtype(small.RECIPE, model).consolidate.dtype == expected
    said = replace(small.RECIPE, consolidate=replace(small.RECIPE.consolidate, dtype="float32"))
    assert with_dtype(said, model) == said
