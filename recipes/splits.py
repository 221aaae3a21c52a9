"""Look at a recipe's data files: which splits and columns its stages need, and what is there."""

from __future__ import annotations

import json
import string
from functools import partial
from pathlib import Path

from .. import files
from ..errors import PlanError, UsageError, nearest
from ..rundir import cache_dir
from . import check, hangul
from .compose import kind_of, stage_view, stages_of
from .look import cached, collect
from .plan import SplitFacts
from .rows import read_rows
from .schema import Generator, Recipe


def splits_of(recipe: Recipe) -> dict[str, SplitFacts]:
    """Return the splits that the recipe's stages need.

    Raises:
        PlanError: every missing split or column, empty file and broken line.
    """
    known = _generated(recipe.data.generator)
    known |= {name: _local_file(name, text) for name, text in recipe.data.splits.items()}
    reasons: list[str] = []
    splits: dict[str, SplitFacts] = {}
    for name, needs in _needed(recipe).items():
        if name not in known:
            hint = nearest(name, known)
            advice = "; set train.eval_split=null to do without" if needs == {("train.eval_split", "")} else ""
            keys = ", ".join(sorted({key for key, _ in needs}))
            reasons.append(
                f"split {name!r} ({keys}) is not in data.splits; known: {', '.join(known) or 'none'} {hint}".rstrip()
                + advice
            )
            continue
        found = collect(reasons, partial(_split, known[name]))
        if found is None:
            continue
        splits[name] = found
        if found.num_rows == 0:
            reasons.append(f"data file {found.path} of split {name!r} is empty; it needs at least one row")
            continue
        for key, column in sorted(needs):
            if column and column not in found.columns:
                columns = ", ".join(found.columns)
                hint = nearest(column, found.columns)
                reasons.append(
                    f"split {name!r} has no column {column!r} ({key}); {found.path} has: {columns} {hint}".rstrip()
                )
    if reasons:
        raise PlanError(reasons)
    return splits


def _needed(recipe: Recipe) -> dict[str, set[tuple[str, str]]]:
    """Return, per split, the (key that asks for it, column it must have) pairs."""
    needed: dict[str, set[tuple[str, str]]] = {}
    split = ""
    for stage in stages_of(recipe):
        view, kind = stage_view(recipe, stage), kind_of(recipe, stage)
        columns = view.data.columns
        if kind == "train":
            wanted = (
                [("data.columns.text", columns.text)]
                if _is_plain_text(view)
                else [("data.columns.target", columns.target), *prompt_columns(view)]
            )
            needed.setdefault("train", set()).update(wanted)
            if view.train.eval_split:
                needed.setdefault(view.train.eval_split, set()).update(wanted)
                needed[view.train.eval_split].add(("train.eval_split", ""))
        if kind == "predict":
            split = view.predict.split
            needed.setdefault(split, set()).update([("predict.split", ""), *prompt_columns(view)])
        if kind == "score" and split:
            needed[split].add(("data.columns.target", columns.target))
        if columns.id:
            for columns_of in needed.values():
                columns_of.add(("data.columns.id", columns.id))
    return needed


def _is_plain_text(recipe: Recipe) -> bool:
    return recipe.data.loss_on == "all" and recipe.data.prompt == ""


def prompt_columns(recipe: Recipe) -> list[tuple[str, str]]:
    """Return the columns that the prompt reads."""
    columns = {
        field: getattr(recipe.data.columns, field, None) or field for field in ("input", "context", "target", "text")
    }
    if recipe.data.prompt == "chat":
        return [("data.columns.input", recipe.data.columns.input)]
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(recipe.data.prompt) if name]
    except ValueError as error:
        raise UsageError(
            f"data.prompt {recipe.data.prompt!r} is no template: {error}; double a brace that stands for itself"
        ) from error
    return [(f"data.columns.{name}" if name in columns else "data.prompt", columns.get(name, name)) for name in names]


def _local_file(split: str, text: str) -> Path:
    """Return the local file of a split; one named by a URL is fetched into the cache once."""
    if "://" not in text:
        path = Path(text).expanduser()
        if not path.is_file():
            raise UsageError(f"data.splits.{split}: file {text!r} does not exist (looked in {Path.cwd()})")
        return path.resolve()
    import fsspec

    name = text.rsplit("/", 1)[-1]
    path = cache_dir() / "data" / files.digest_of(text)[:16] / name
    if not path.is_file():
        files.make_private_dir(path.parent)
        try:
            with fsspec.open(text, "rb") as source, files.replacing(path) as target:
                while block := source.read(1 << 20):
                    target.write(block)
        except (OSError, ValueError, ImportError) as error:
            raise UsageError(f"data.splits.{split}: {text!r} cannot be fetched: {error}") from error
    return path


def _split(path: Path) -> SplitFacts:
    stat = path.stat()
    key = [str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino]
    facts, faults = check.build(SplitFacts, cached("splits", key, lambda: check.to_plain(_look_at(path))))
    if facts is None:
        raise UsageError(f"the cached look at {path} is damaged: {faults[0]}; remove {cache_dir() / 'splits'}")
    return facts


def _look_at(path: Path) -> SplitFacts:
    """Read a data file once: every row is parsed, so a broken line is found before the queue."""
    num_rows, columns = 0, None
    for row in read_rows(path):
        num_rows += 1
        columns = set(row) if columns is None else columns & row.keys()
    return SplitFacts(
        path=str(path),
        num_rows=num_rows,
        num_bytes=path.stat().st_size,
        digest=files.digest_file(path),
        columns=tuple(sorted(columns or ())),
    )


def _generated(generator: Generator | None) -> dict[str, Path]:
    """Return the splits of the recipe's generator, made once per setting and version of its code."""
    if generator is None:
        return {}
    options = {name: value for name, value in check.to_plain(generator).items() if name != "name"}
    code = files.digest_file(Path(hangul.__file__))
    folder = cache_dir() / "generated" / files.digest_of([options, code])[:16]
    if not folder.is_dir():
        files.make_private_dir(folder.parent)
        temporary = files.make_private_dir(files.temporary_path(folder))
        for split, rows in hangul.generate(**options).items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            files.write_text(temporary / f"{split}.jsonl", text)
        try:
            temporary.rename(folder)
        except OSError:  # another process was quicker, with the same rows
            files.remove_tree(temporary)
    return {path.stem: path for path in sorted(folder.glob("*.jsonl"))}
