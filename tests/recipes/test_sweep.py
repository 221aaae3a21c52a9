"""Sweeps: the points are those of Hydra, each the recipe that composing its overrides alone would give."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from sousbatch.cluster.site import Site
from sousbatch.errors import PlanError, RecipeError
from sousbatch.recipes.compile import compile
from sousbatch.recipes.compose import compose
from sousbatch.recipes.inspect.inputs import inspect
from sousbatch.recipes.plan import Plan, read_plan
from sousbatch.recipes.stages import smoke
from sousbatch.recipes.sweep import plan_sweep, point_plan, point_recipe

HERE = Site(
    name="here", launcher="local", cpus_per_node=4, memory_bytes=16 * 10**9, gpus_per_node=0, gpu_memory_bytes=0
)
SHARED = ("train.epochs=3", "predict.max_new_tokens=7")


def made(project: Path, sweep: Sequence[str], *, is_smoke: bool = False, texts: Sequence[str] = SHARED) -> Plan:
    return plan_sweep("./small.yaml", texts, sweep, HERE, project / "runs", is_smoke=is_smoke)


AXES = {
    "values": ["train.learning_rate=1e-3,1e-4", "seed=1,2"],
    "a range of seeds": ["seed=range(0,2)", "checkpoints.keep_last=1,2"],
    "files of a group": ["adapter=full,lora", "seed=4,5"],
    "files of answers": ["predict.output.format=csv,tsv", "seed=1,2"],
    "splits": ["train.split=train,validation", "seed=1,2"],
    "text that needs quotes": ["data.separator='a, b','c=d'", "seed=1,2"],
    "one axis that decides others": ["train.epochs=1,2", "train.global_batch=2,4"],
}


@pytest.mark.parametrize("sweep", AXES.values(), ids=AXES)
def test_points_are_what_composing_one_by_one_gives(project: Path, sweep: list[str]) -> None:
    plan = made(project, sweep)
    assert plan.sweep is not None
    alone = [compose("./small.yaml", [*SHARED, *texts]) for texts in hydra_points(sweep)]
    assert [point_recipe(plan.sweep, index) for index in range(len(plan.sweep.points))] == alone
    for index, recipe in enumerate(alone):
        found = point_plan(plan, index)
        inputs = replace(inspect(recipe, project / "runs"), disk_space=found.inputs.disk_space)
        assert found == compile(recipe, HERE, inputs)


def test_a_thousand_points_are_what_composing_one_by_one_gives(project: Path) -> None:
    """Each axis shows all its values in the few points that are compared in full."""
    sweep = ["adapter=full,lora", "train.learning_rate=1e-3,1e-4", "seed=range(0,250)"]
    plan, expected = made(project, sweep), hydra_points(sweep)
    assert plan.sweep is not None and plan.stages[0].num_tasks == len(expected) == 1000
    for index in (0, 249, 250, 777, 999):
        assert point_recipe(plan.sweep, index) == compose("./small.yaml", [*SHARED, *expected[index]])


def hydra_points(sweep: list[str]) -> list[list[str]]:
    """Return the points in the order of Hydra's own sweeper."""
    (batch,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(sweep), None)
    return [list(point) for point in batch]


def test_a_smoke_sweep_has_smoke_recipes(project: Path) -> None:
    plan = made(project, ["seed=1,2"], is_smoke=True)
    assert plan.sweep is not None
    assert point_recipe(plan.sweep, 1) == smoke(compose("./small.yaml", [*SHARED, "seed=2"]))


def test_what_is_given_twice_is_one_point(project: Path) -> None:
    plan = made(project, ["seed=1,2,1", "train.learning_rate=1e-3,1e-3"])
    assert plan.sweep is not None
    assert [point.label for point in plan.sweep.points] == [
        "seed=1 train.learning_rate=0.001",
        "seed=2 train.learning_rate=0.001",
    ]


def test_the_inputs_are_looked_at_once_for_each_choice_of_files(project: Path) -> None:
    plan = made(project, ["adapter=full,lora", "seed=range(0,20)", "train.learning_rate=1e-3,1e-4"])
    assert plan.sweep is not None
    assert (len(plan.sweep.variants), len(plan.sweep.points)) == (2, 80)


def test_the_plan_comes_back_from_its_json(project: Path) -> None:
    plan = made(project, ["adapter=full,lora", "seed=1,2"])
    (project / "plan.json").write_text(plan.to_json())
    assert read_plan(project / "plan.json") == plan


def test_the_id_tells_sweeps_apart(project: Path) -> None:
    ids = [made(project, sweep).run_id for sweep in (["seed=1,2"], ["seed=1,2"], ["seed=1,3"], ["train.epochs=1,2"])]
    assert ids[0] == ids[1] and len(set(ids)) == 3 and all(one.startswith("sweep-") for one in ids)


BAD_AXES = {
    "one value": ("seed=1", "write key=value,value or key=range(1,4)"),
    "an interval": ("seed=interval(0,1)", "is no axis of a sweep"),
    "no value": ("seed", "is no axis of a sweep"),
    "resources": ("resources.train.nodes=1,2", "all points share one name and one request"),
    "name": ("name=a,b", "cannot be swept"),
}


@pytest.mark.parametrize("axis, said", BAD_AXES.values(), ids=BAD_AXES)
def test_what_cannot_be_swept_is_refused(project: Path, axis: str, said: str) -> None:
    with pytest.raises(RecipeError) as refusal:
        made(project, [axis, "seed=1,2"])
    assert said in str(refusal.value)


def test_all_faults_of_the_axes_come_at_once(project: Path) -> None:
    with pytest.raises(RecipeError) as refusal:
        made(project, [axis for axis, _ in BAD_AXES.values()])
    assert len(refusal.value.faults) == len(BAD_AXES)


@pytest.mark.parametrize("axis", ["train.learning_rat=1,2", "seed=1,-1", "adapter=full,lore"])
def test_a_value_that_no_recipe_takes_is_refused_before_anything_is_sent(project: Path, axis: str) -> None:
    with pytest.raises(RecipeError):
        made(project, [axis])


def test_a_point_that_cannot_run_is_named(project: Path) -> None:
    with pytest.raises(PlanError) as refusal:
        made(project, ["train.global_batch=4,5"], texts=["resources.train.devices_per_node=2"])
    assert "point train.global_batch=5:" in str(refusal.value)


def test_a_value_that_no_recipe_takes_is_found_among_a_thousand(project: Path) -> None:
    with pytest.raises(RecipeError):
        made(project, ["seed=range(0,500)", "train.learning_rate=1e-3,-1"])


def test_one_request_is_enough_for_every_stage_of_a_point(project: Path) -> None:
    texts = [
        *["resources.train.cpus_per_device=2", "resources.train.time_min=30", "resources.default.time_min=10"],
        *["resources.train.nodes=2", "resources.merge.memory_gb=3"],
    ]
    plan = made(project, ["seed=1,2"], texts=texts)
    wanted = plan.stages[0].resources
    assert (wanted.nodes, wanted.cpus_per_device, wanted.memory_gb) == (2, 2, 3)
    assert wanted.time_min == 30 + 4 * 10


def test_too_many_points_for_the_store_are_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sousbatch.recipes.sweep as module

    def small_store(*arguments: object, **named: object) -> object:
        found = inspect(*arguments, **named)  # type: ignore[arg-type]
        return replace(found, disk_space=replace(found.disk_space, free_bytes=100_000_000))

    monkeypatch.setattr(module, "inspect", small_store)
    with pytest.raises(PlanError) as refusal:
        made(project, ["seed=range(0,900)"])
    assert "900 points will hold" in str(refusal.value) and "sweep fewer points" in str(refusal.value)


def test_planning_a_sweep_needs_no_torch(project: Path) -> None:
    import subprocess
    import sys

    program = f"""
import json, sys
from pathlib import Path
from sousbatch.cluster.site import Site
from sousbatch.recipes.sweep import plan_sweep
plan_sweep("./small.yaml", [], ["seed=1,2"], Site(**json.loads({json.dumps(json.dumps(vars(HERE)))})), Path("runs"))
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=project, timeout=180)
