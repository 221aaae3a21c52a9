"""Every recipe that we ship composes, compiles and says what it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from sousbatch.cluster.site import Site
from sousbatch.recipes.catalog import LIBRARY_DIR
from sousbatch.recipes.compile import compile
from sousbatch.recipes.compose import compose
from sousbatch.recipes.inspect.inputs import inspect
from sousbatch.recipes.schema import validate
from sousbatch.recipes.site_file import read_site_file
from sousbatch.recipes.stages import smoke

NAMES = sorted(path.stem for path in LIBRARY_DIR.glob("*.yaml"))
SITE = Site(
    name="here",
    launcher="local",
    cpus_per_node=2,
    memory_bytes=8 * 10**9,
    gpus_per_node=8,
    gpu_memory_bytes=80 * 10**9,
)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_compiles_without_a_warning(name: str, tmp_path: Path) -> None:
    recipe = compose(name)
    assert compile(recipe, SITE, inspect(recipe, tmp_path)).warnings == ()


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_compiles_as_a_smoke_run(name: str, tmp_path: Path) -> None:
    recipe = smoke(compose(name))
    plan = compile(recipe, SITE, inspect(recipe, tmp_path))
    assert [stage.batch.steps for stage in plan.stages if stage.batch] == [2]


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_has_its_own_name_and_a_description(name: str) -> None:
    recipe = compose(name)
    assert recipe.name == name and recipe.description


PROFILES = sorted(path.stem for path in (LIBRARY_DIR / "resources").glob("*.yaml"))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_compiles_for_every_profile_of_resources(name: str, profile: str, tmp_path: Path) -> None:
    recipe = compose(name, [f"resources={profile}"])
    site, space = read_site_file(profile)
    plan = compile(recipe, site, replace(inspect(recipe, tmp_path), disk_space=space))
    assert {stage.resources.device for stage in plan.stages} == {"cpu" if profile == "cpu" else "gpu"}


@pytest.mark.parametrize("group", ["model", "schedule", "data"])
def test_each_file_of_a_group_lays_values_over_the_keys_of_its_name(group: str) -> None:
    stages = "stages={train: {}, consolidate: {}}"
    for path in sorted((LIBRARY_DIR / group).glob("*.yaml")):
        given = yaml.safe_load(path.read_text())
        recipe = compose("hangul-restoration", [f"{group}={path.stem}", stages])
        section = recipe.train.schedule if group == "schedule" else getattr(recipe, group)
        assert given and {key: validate.to_plain(section)[key] for key in given if key != "columns"} == {
            key: value for key, value in given.items() if key != "columns"
        }


@pytest.mark.parametrize("method", sorted(path.stem for path in (LIBRARY_DIR / "adapter").glob("*.yaml")))
def test_a_shipped_adapter_is_called_as_its_method(method: str) -> None:
    assert compose("hangul-restoration", [f"adapter={method}"]).adapter.method == method
