"""Compose a checked `Recipe` from its name or file, and overrides.

Hydra parses the overrides and composes the YAML files; values are then laid over plain
mappings and checked by `schema/`, so that every fault is reported in one go.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import Fault, RecipeError, UsageError, nearest
from ..user_folders import config_file
from . import overrides
from .best import with_best
from .catalog import find_recipe, list_groups, list_recipes, search_dirs
from .schema import Recipe, rules, validate
from .stage_kinds import USUAL_KINDS
from .stages import layered_resources
from .yaml_files import check_size, limited_files


def compose(name: str, texts: Sequence[str] = ()) -> Recipe:
    """Return the recipe called *name* with the overrides *texts* laid over it.

    Raises:
        NotFoundError: no such recipe.
        RecipeError: every fault of the file and the overrides.
    """
    values, faults = values_of(name, texts)
    return recipe_of(values, faults, source=str(find_recipe(name)))


def values_of(name: str, texts: Sequence[str] = ()) -> tuple[dict[str, Any], list[Fault]]:
    """Return the plain values of a recipe with its overrides, and the faults so far.

    Every ${key} is still in the values.
    """
    path, texts = find_recipe(name), with_best(texts)
    faults: list[Fault] = []
    groups, others = overrides.split_groups(overrides.parse(texts, faults), path.parent, faults)
    values = _over(_site_defaults(faults), _compose_files(path, groups))
    for item in others:
        overrides.lay_over(values, item, faults)
    faults += overrides.without_effect(values, others)
    _drop_stages(values)
    values.setdefault("name", path.stem)
    return values, faults


def _drop_stages(values: dict[str, Any]) -> None:
    """Take away the stages that are false.

    Another file gives them, or they are usual ones.
    """
    stages = values.get("stages")
    dropped = [name for name, spec in stages.items() if spec is False] if isinstance(stages, dict) else []
    if not dropped:
        return
    given = {name: spec for name, spec in values["stages"].items() if name not in dropped}
    usual: dict[str, Any] = {kind: {} for kind in USUAL_KINDS if kind not in dropped}
    values["stages"] = given or usual or values["stages"]  # where none is left it is a fault


def recipe_of(values: dict[str, Any], faults: Sequence[Fault] = (), *, source: str = "") -> Recipe:
    """Return the checked recipe of plain *values*, which came from *source*.

    Raises:
        RecipeError: every fault of the values, after the *faults* found before.
    """
    name = str(values["name"])
    borrowed = rules.borrowed_secrets(values)
    if borrowed:  # before a fault elsewhere could show what they resolve to
        raise RecipeError(name, [*faults, *borrowed])
    values = _resolved(values, source or name)
    recipe, found = validate.build(Recipe, values)
    found = [*faults, *found, *validate.unknown_names(Recipe, values)]
    if recipe is not None:
        found += rules.faults_of(recipe)
    if recipe is None or found:
        raise RecipeError(name, found)
    return replace(recipe, resources=layered_resources(recipe, values.get("resources") or {}))


def _site_defaults(faults: list[Fault]) -> dict[str, Any]:
    """Return what the user's own file lays under every recipe, such as the partition."""
    import yaml

    path, known = config_file(), ("resources", "environment", "tracking")
    others = ("gpu_memory_gb", "device_hour_price")  # what is said of the cluster, see site_file
    try:
        text = path.read_text(encoding="utf-8")
        check_size(path, text)
        found = yaml.safe_load(text) or {}
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(found, dict) or not set(found) <= {*known, *others}:
        wrong = sorted(set(found) - {*known, *others}) if isinstance(found, dict) else [type(found).__name__]
        problem = f"has {', '.join(map(str, wrong))}"
        hint = f"it can have the sections {', '.join((*known, *others))}"
        faults.append(Fault(key=str(path), problem=problem, hint=hint))
        return {}
    return {name: value for name, value in found.items() if name not in others}


def _over(under: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return *under* with *values* laid over it, section by section."""
    merged = dict(under)
    for name, value in values.items():
        below = merged.get(name)
        merged[name] = _over(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _compose_files(path: Path, groups: list[str]) -> dict[str, Any]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    places = ",".join("'file://" + str(place).replace("'", "\\'") + "'" for place in search_dirs())
    search = f"hydra.searchpath=[{places}]"
    try:
        with (
            initialize_config_dir(config_dir=str(path.parent), version_base="1.3"),
            warnings.catch_warnings(),
            limited_files(),
        ):
            # a defaults list without _self_: the recipe's own values win, as they should
            warnings.filterwarnings("ignore", message=".*is missing `_self_`")
            config = hydra_compose(path.stem, overrides=[search], return_hydra_config=True)
            chosen = config.hydra.runtime.choices
            with open_dict(config):
                del config["hydra"]
            if groups:  # a group that the file's defaults list lacks is appended with '+'
                signed = [text if text.split("=")[0] in chosen else f"+{text}" for text in groups]
                config = hydra_compose(path.stem, overrides=[search, *signed])
        values = OmegaConf.to_container(config, resolve=False)
    except (HydraException, OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    except RecursionError as error:
        raise UsageError(
            f"recipe {str(path)!r} cannot be read: files of its defaults list name each other in a circle"
        ) from error
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def _resolved(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Return *values* with every ${key} replaced, after the overrides are in them."""
    if "${" not in repr(values):  # as in most recipes; OmegaConf takes milliseconds, and a sweep comes here often
        return values
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        resolved = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    except OmegaConfBaseException as error:
        raise _unreadable(name, error) from error
    assert isinstance(resolved, dict), "a mapping stays one"
    return {str(key): value for key, value in resolved.items()}


def _unreadable(path: Path | str, error: Exception) -> UsageError:
    from hydra.errors import MissingConfigException

    if isinstance(error, MissingConfigException) and (missing := error.missing_cfg_file):
        known = [f"{group}/{file}" for group, files in list_groups().items() for file in files]
        known += [recipe.name for recipe in list_recipes()]
        hint = nearest(str(missing), known) or "`sousbatch recipes list` shows recipes and groups"
        reason = f"nothing is called {str(missing)!r}, which its defaults list names ({hint})"
    elif "got ListConfig" in str(error):
        reason = "it is a list; a recipe has keys, such as task: causal_lm"
    else:
        reason = " ".join(str(error).split("Config search path:")[0].split())
    return UsageError(f"recipe {str(path)!r} cannot be read: {reason}")
