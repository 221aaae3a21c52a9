"""From a recipe's name or file and overrides to a checked `Recipe`.

Hydra parses the overrides and composes the YAML files; values are then laid over plain
mappings and checked by `check.py`, so that every fault is reported in one go.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Fault, NotFoundError, RecipeError, UsageError, nearest
from ..rundir import NAME_PATTERN
from . import check
from .schema import KINDS, Kind, Recipe, StageSpec

LIBRARY_DIR = Path(__file__).parent / "library"


@dataclass(frozen=True, kw_only=True)
class RecipeFile:
    """A recipe that can be named."""

    name: str
    path: Path
    description: str


def search_dirs() -> tuple[Path, ...]:
    """Return the folders that are searched for recipes: those of $SOUSBATCH_RECIPES, then the library."""
    given = os.environ.get("SOUSBATCH_RECIPES", "")
    return tuple(Path(part).expanduser().resolve() for part in given.split(os.pathsep) if part) + (LIBRARY_DIR,)


def list_recipes() -> tuple[RecipeFile, ...]:
    """Return every recipe of the search folders; the first of a name hides later ones."""
    import yaml

    found: dict[str, RecipeFile] = {}
    for folder in search_dirs():
        for path in sorted(folder.glob("*.yaml")):
            try:
                values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            except (yaml.YAMLError, UnicodeDecodeError):
                values = {}
            description = values.get("description", "") if isinstance(values, dict) else ""
            found.setdefault(path.stem, RecipeFile(name=path.stem, path=path, description=str(description)))
    return tuple(found[name] for name in sorted(found))


def find_recipe(name: str) -> Path:
    """Return the file of a recipe given by name or by path.

    Raises:
        NotFoundError: with the known names and the nearest one.
    """
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        path = Path(name).expanduser()
        if not path.is_file():
            raise NotFoundError(f"recipe file {name!r} does not exist (looked in {path.absolute().parent})")
        return path.resolve()
    recipes = {recipe.name: recipe.path for recipe in list_recipes()}
    if name not in recipes:
        hint = nearest(name, recipes)
        known = ", ".join(recipes)
        raise NotFoundError(
            f"recipe {name!r} is unknown; known: {known}"
            + (f" ({hint})" if hint else "")
            + "; your own recipe is named by its file, such as ./my-recipe.yaml"
        )
    return recipes[name]


def compose(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe called *name* with *overrides* laid over it.

    Raises:
        NotFoundError: no such recipe.
        RecipeError: every fault of the file and the overrides.
    """
    path = find_recipe(name)
    faults: list[Fault] = []
    parsed = _parse(overrides, faults)
    groups = [item for item in parsed if _is_group_choice(item, path.parent)]
    for item in groups:
        _check_choice(item, path.parent, faults)
    values = _compose_files(path, [] if faults else [item.input_line for item in groups])
    for item in parsed:
        if item not in groups:
            _lay_over(values, item, faults)
    values.setdefault("name", path.stem)
    recipe, found = check.build(Recipe, values)
    faults += found
    if recipe is not None and not faults:
        faults += _beyond_types(recipe)
    if faults or recipe is None:
        raise RecipeError(str(values["name"]), faults)
    return recipe


def from_values(values: dict[str, Any]) -> Recipe:
    """Return the recipe that was written as plain *values*, such as a frozen one."""
    recipe, faults = check.build(Recipe, values)
    if recipe is None:
        raise RecipeError(str(values.get("name", "")), faults)
    return recipe


def stages_of(recipe: Recipe) -> dict[str, StageSpec]:
    """Return the recipe's stages: its own, or the five usual ones."""
    return recipe.stages or {kind: StageSpec() for kind in KINDS}


def kind_of(recipe: Recipe, stage: str) -> Kind:
    """Return the kind of a stage: what it says, else its name."""
    kind = stages_of(recipe)[stage].kind or stage
    if kind not in KINDS:
        raise UsageError(f"stage {stage!r} has no kind; set stages.{stage}.kind to one of {', '.join(KINDS)}")
    return kind


def stage_view(recipe: Recipe, stage: str) -> Recipe:
    """Return the recipe as *stage* sees it: its `set` laid over the sections."""
    changes = stages_of(recipe)[stage].set
    if not changes:
        return recipe
    values = check.to_plain(recipe)
    _merge(values, changes)
    view, faults = check.build(Recipe, values)
    if view is None:
        raise RecipeError(
            recipe.name, [Fault(key=f"stages.{stage}.set.{f.key}", problem=f.problem, hint=f.hint) for f in faults]
        )
    return view


def _merge(values: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, change in changes.items():
        if isinstance(change, dict) and isinstance(values.get(key), dict):
            _merge(values[key], change)
        else:
            values[key] = change


def _parse(overrides: Sequence[str], faults: list[Fault]) -> list[Any]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    parsed: list[Any] = []
    for text in overrides:
        try:
            item = parser.parse_override(text)
        except HydraException as error:
            reason = str(error).splitlines()[0]
            faults.append(Fault(key=text, problem="is not an override", hint=f"write key=value; {reason}"))
            continue
        if item.is_sweep_override():
            faults.append(Fault(key=text, problem="has several values", hint="a list is written [a,b]"))
            continue
        parsed.append(item)
    return parsed


def _options_of_group(item: Any, folder: Path) -> set[str]:
    key = item.get_key_element().lstrip("+~")
    places = [place / key for place in (folder, *search_dirs())] if "." not in key else []
    return {file.stem for place in places if place.is_dir() for file in place.glob("*.yaml")}


def _is_group_choice(item: Any, folder: Path) -> bool:
    """Say whether an override picks a file of a config group, such as adapter=lora."""
    return isinstance(item.value(), str) and bool(_options_of_group(item, folder))


def _check_choice(item: Any, folder: Path, faults: list[Fault]) -> None:
    known = _options_of_group(item, folder)
    if item.value() not in known:
        problem = f"is unknown; known: {', '.join(sorted(known))}"
        faults.append(Fault(key=item.input_line, problem=problem, hint=nearest(item.value(), known)))


def _compose_files(path: Path, groups: list[str]) -> dict[str, Any]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    places = ",".join("'file://" + str(place).replace("'", "\\'") + "'" for place in search_dirs())
    try:
        with initialize_config_dir(config_dir=str(path.parent), version_base="1.3"):
            search = f"hydra.searchpath=[{places}]"
            config = hydra_compose(path.stem, overrides=[search], return_hydra_config=True)
            chosen = config.hydra.runtime.choices
            with open_dict(config):
                del config["hydra"]
            if groups:  # a group that the file's defaults list lacks is appended with '+'
                signs = ["" if text.lstrip("+").split("=")[0] in chosen else "+" for text in groups]
                texts = [sign + text.lstrip("+") for sign, text in zip(signs, groups, strict=True)]
                config = hydra_compose(path.stem, overrides=[search, *texts])
        values = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"recipe file {str(path)!r} cannot be read: {reason}") from error
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def _lay_over(values: dict[str, Any], item: Any, faults: list[Fault]) -> None:
    *parents, last = item.key_or_group.split(".")
    place = values
    for number, name in enumerate(parents):
        if place.get(name) is None:
            place[name] = {}
        place = place[name]
        if not isinstance(place, dict):
            key = ".".join(parents[: number + 1])
            faults.append(
                Fault(key=item.input_line, problem=f"goes below {key}, which is {place!r}", hint="it is no section")
            )
            return
    if item.is_delete():
        place.pop(last, None)
    else:
        place[last] = item.value()


def _beyond_types(recipe: Recipe) -> list[Fault]:
    """Return the faults that need no look at the site, the model or the data."""
    faults = []
    if not NAME_PATTERN.fullmatch(recipe.name):
        faults.append(
            Fault(key="name", problem=f"is {recipe.name!r}", hint="lower-case letters, digits and '-', 63 at most")
        )
    if not recipe.model.path:
        faults.append(Fault(key="model.path", problem="is missing", hint="a hub id, a local folder, or library:NAME"))
    if not recipe.data.splits and recipe.data.generator is None:
        faults.append(
            Fault(key="data.splits", problem="is missing", hint="such as {train: train.jsonl, test: test.jsonl}")
        )
    return faults
