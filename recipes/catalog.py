"""Find recipes by name or path: in $SOUSBATCH_RECIPES, then in the library."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import NotFoundError, UsageError, nearest
from .yaml_files import check_size

LIBRARY_DIR = Path(__file__).parent / "library"


@dataclass(frozen=True, kw_only=True)
class RecipeFile:
    """A recipe that can be named."""

    name: str
    path: Path
    description: str


def search_dirs() -> tuple[Path, ...]:
    """Return the folders that are searched for recipes, first ones first."""
    given = os.environ.get("SOUSBATCH_RECIPES", "")
    folders = (Path(part).expanduser().resolve() for part in given.split(os.pathsep) if part)
    return (*(folder for folder in folders if folder.is_dir()), LIBRARY_DIR)


def list_recipes() -> tuple[RecipeFile, ...]:
    """Return every recipe of the search folders; the first of a name hides others."""
    import yaml

    found: dict[str, RecipeFile] = {}
    for folder in search_dirs():
        for path in sorted(folder.glob("*.yaml")):
            try:
                text = path.read_text(encoding="utf-8")
                check_size(path, text)
                values = yaml.safe_load(text)
            except (yaml.YAMLError, UnicodeDecodeError, UsageError):
                values = None
            description = values.get("description") if isinstance(values, dict) else "cannot be read"
            found.setdefault(path.stem, RecipeFile(name=path.stem, path=path, description=str(description or "")))
    return tuple(found[name] for name in sorted(found))


def list_groups() -> dict[str, list[str]]:
    """Return the names of the files of each group, such as resources: [h100, ...]."""
    found: dict[str, set[str]] = {}
    for folder in search_dirs():
        for path in folder.glob("*/*.yaml"):
            if path.parent.name != "sites":
                found.setdefault(path.parent.name, set()).add(path.stem)
    return {name: sorted(found[name]) for name in sorted(found)}


def find_recipe(name: str) -> Path:
    """Return the file of a recipe given by name or by path.

    Raises:
        NotFoundError: with the known names and the nearest one.
    """
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        path = Path(name).expanduser()
        if path.is_dir():
            raise NotFoundError(f"recipe file {name!r} is a folder; name a file in it")
        if not path.is_file():
            raise NotFoundError(f"recipe file {name!r} does not exist (looked in {path.absolute().parent})")
        if path.suffix != ".yaml":
            raise NotFoundError(f"recipe file {name!r} must be called *.yaml; rename it")
        return path.resolve()
    for folder in search_dirs():
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    if "=" in name:
        raise NotFoundError(f"{name!r} is an override; a recipe comes before it, as in hangul-restoration {name}")
    known = [recipe.name for recipe in list_recipes()]
    hint = nearest(name, known)
    raise NotFoundError(
        f"recipe {name!r} is unknown; known: {', '.join(known)}"
        + (f" ({hint})" if hint else "")
        + "; your own recipe is named by its file, such as ./my-recipe.yaml"
    )


def copy_recipe(name: str, source: str, folder: Path) -> Path:
    """Copy the recipe *source* into *folder* under another name; return the file.

    Its comments are kept.

    Raises:
        NotFoundError: there is no such recipe.
        UsageError: the name is not that of a file, or the file exists.
    """
    if name != Path(name).name or name.startswith(".") or name.endswith((".yaml", ".yml")) or not name.strip():
        raise UsageError(f"recipe name {name!r} must be a plain word, such as my-recipe; it becomes my-recipe.yaml")
    original = find_recipe(source)
    path = folder / f"{name}.yaml"
    text = original.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("name:")]  # a recipe is called as its file
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(f"# made from {original.stem}\n" + "\n".join(lines) + "\n")
    except FileExistsError:
        raise UsageError(f"{path} exists; give another name, or edit that file") from None
    return path
