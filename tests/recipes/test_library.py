"""Every recipe that we ship composes, compiles and says what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from sousbatch.cluster.site import Site
from sousbatch.recipes.catalog import LIBRARY_DIR
from sousbatch.recipes.compile import compile
from sousbatch.recipes.compose import compose
from sousbatch.recipes.inspect.inputs import inspect
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


@pytest.mark.parametrize("method", sorted(path.stem for path in (LIBRARY_DIR / "adapter").glob("*.yaml")))
def test_a_shipped_adapter_is_called_as_its_method(method: str) -> None:
    assert compose("hangul-restoration", [f"adapter={method}"]).adapter.method == method
