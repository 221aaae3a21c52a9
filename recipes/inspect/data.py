"""Read a recipe's data files.

It finds which splits and columns the stages need, and what is there.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from ... import files
from ...errors import PlanError, UsageError, nearest
from ...user_folders import cache_dir, cached
from ..data import generators
from ..data.preparing import steps_of
from ..data.rows import read_rows
from ..facts import SplitFacts
from ..schema import Generator, Recipe, validate
from ..stages import resolve_stages
from ..tasks import Column, task_of
from .cache import collect
from .sources import find_source

_FORMAT = 2  # raised when the facts of a file are found in another way


def read_splits(recipe: Recipe) -> dict[str, SplitFacts]:
    """Return the splits that the recipe's stages need.

    Raises:
        PlanError: every missing split or column, empty file and broken line.
    """
    reasons: list[str] = []
    made, given = _generated(recipe.data.generator), recipe.data.splits
    known = {**given, **made}
    for name in sorted(made.keys() & given):
        reasons.append(f"data.splits.{name} is also made by data.generator; rename it, or set data.generator=null")
    splits: dict[str, SplitFacts] = {}
    for name, needs in _needed(recipe).items():
        if name not in known:
            reasons.append(_missing_split(name, needs, list(known)))
        elif (found := collect(reasons, partial(_split, name, known[name]))) is not None:
            splits[name] = found
            scored = needs.scored - needs.columns
            reasons += check_columns(name, found, needs.columns | scored, scored, _unscored(recipe))
    if reasons:
        raise PlanError(reasons)
    return splits


@dataclass
class _Needs:
    """The needs of the stages for a split.

    They are the keys that ask for the split, the columns that it must have, and those that are *scored*.
    """

    keys: set[str] = field(default_factory=set)
    columns: set[Column] = field(default_factory=set)
    scored: set[Column] = field(default_factory=set)


def _unscored(recipe: Recipe) -> str:
    """Return the advice that takes the stages out which need the right answers."""
    stages = resolve_stages(recipe)
    scores = [name for name, stage in stages.items() if stage.kind.name == "score"]
    if recipe.stages:
        return f"; to predict without scores, set {' '.join(f'~stages.{name}' for name in scores)}"
    kept = ", ".join(f"{name}: {{}}" for name in stages if name not in scores)
    return f"; to predict without scores, set 'stages={{{kept}}}'"


def _needed(recipe: Recipe) -> dict[str, _Needs]:
    task, needed = task_of(recipe.task), defaultdict[str, _Needs](_Needs)
    for stage in resolve_stages(recipe).values():
        for rows in stage.rows:
            needs, identity = needed[rows.split], stage.settings.data.columns.id
            needs.keys.add(rows.key)
            if stage.kind.leaves == "predictions" and identity:
                needs.columns.add(Column(named_by="data.columns.id", name=identity))
            steps = steps_of(stage.settings, rows.use)
            if steps is None or not steps.own_functions:  # which may make columns; they are checked when that is done
                wanted = needs.scored if rows.use == "score" else needs.columns
                wanted.update(task.columns(stage.settings, rows.use))
    return needed


# What to do where there is no such file.
_WITHOUT = {
    "train.eval_split": (
        "; set train.eval_split=null to do without, or write some of the training rows into a file of their own and "
        "set +data.splits.validation=FILE: rows are not set aside for you"
    ),
    "predict.split": (
        "; to train only, set 'stages={train: {}, consolidate: {}}'; to predict the training rows, set "
        "predict.split=train"
    ),
    "train.split": "; to predict only, set 'stages={predict: {}, merge: {}, score: {}}'",
}


def _missing_split(name: str, needs: _Needs, known: Sequence[str]) -> str:
    keys = sorted(needs.keys - {"score"})
    hint = f" ({nearest(name, known)})" if nearest(name, known) else ""
    advice = _WITHOUT.get(keys[0], "") if len(keys) == 1 else ""
    return (
        f"split {name!r} ({', '.join(keys)}) is not in data.splits; known: {', '.join(known) or 'none'}{hint}{advice}"
    )


def check_columns(
    name: str, found: SplitFacts, columns: Collection[Column], scored: Collection[Column] = (), unscored: str = ""
) -> Iterator[str]:
    """Yield why the split called *name* lacks *columns*, and that it is empty.

    Only scores need the *scored* ones; *unscored* tells how to do without.
    """
    if found.num_rows == 0:
        yield f"data file {found.shown} of split {name!r} is empty; it needs at least one row"
        return
    for one in sorted(columns, key=lambda one: (one.name, one.named_by)):
        column, named_by = one.name, one.named_by
        if column in found.nested and not one.may_nest:
            yield _nested_column(name, found, column, named_by)
            continue
        if column in found.columns:
            continue
        rows = enumerate(read_rows(Path(found.path)), 1)
        number, row = next((at, row) for at, row in rows if _is_missing(row.get(column)))
        where = f"split {name!r}" if number == 1 else f"{found.place(number)} of split {name!r}"
        if column in row:
            what = "null" if row[column] is None else "NaN"
            advice = "give it a value or drop the row"
            yield f"{where} has {what} in column {column!r} ({named_by}) of {found.shown}; {advice}"
            continue
        said = next((name for name in ("messages", "conversations") if name in row and name in found.nested), None)
        hint = f"; {_as_turns(said)}" if said else f" ({nearest(column, row)})" if nearest(column, row) else ""
        if named_by == "data.columns.id" and not hint:
            hint = "; set data.columns.id=null where rows have no names"
        if not hint and one in scored:
            hint = unscored
        yield f"{where} has no column {column!r} ({named_by}); {found.shown} has there: {', '.join(row)}{hint}"


def _as_turns(column: str) -> str:
    named = "" if column == "messages" else f" data.columns.messages={column}"
    return f"for conversations set data.prompt=messages{named}"


def _nested_column(name: str, found: SplitFacts, column: str, named_by: str) -> str:
    rows = enumerate(read_rows(Path(found.path)), 1)
    number, value = next((at, row[column]) for at, row in rows if isinstance(row.get(column), (list, dict, bytes)))
    what = "a list" if isinstance(value, list) else "bytes" if isinstance(value, bytes) else "an object"
    is_said = isinstance(value, list) and value and isinstance(value[0], dict) and {"role", "from"} & value[0].keys()
    turns = f"; {_as_turns(column)}" if is_said else ""
    return (
        f"{found.place(number)} of split {name!r} has {what} in column {column!r} ({named_by}) of {found.shown}, and "
        f"text is read from it; write what the model reads and what it should answer as text columns{turns}"
    )


def _split(name: str, texts: str | tuple[str, ...]) -> SplitFacts:
    source = find_source(name, (texts,) if isinstance(texts, str) else texts)
    path = source.path
    stat = path.stat()
    key = [_FORMAT, str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino]
    facts, faults = validate.build(SplitFacts, cached("splits", key, lambda: validate.to_plain(read_file(path))))
    if facts is None:
        raise UsageError(f"the cached facts of {path} are damaged: {faults[0]}; remove {cache_dir() / 'splits'}")
    return replace(facts, parts=source.parts)


def read_file(path: Path) -> SplitFacts:
    """Read a data file once.

    Every row is parsed, so a broken line is found before the queue.
    """
    num_rows, columns, nested = 0, None, set[str]()
    for row in read_rows(path):
        num_rows += 1
        there = {name for name, value in row.items() if not _is_missing(value)}
        if columns is None:
            columns = there
        elif columns != there:
            columns &= there
        if len(nested) < len(row):
            nested.update(name for name, value in row.items() if isinstance(value, (list, dict, bytes)))
    return SplitFacts(
        path=str(path),
        num_rows=num_rows,
        num_bytes=path.stat().st_size,
        digest=files.digest_file(path),
        columns=tuple(sorted(columns or ())),
        nested=tuple(sorted(nested)),
    )


def _is_missing(value: object) -> bool:
    """Say whether a value is none: null, or the NaN that pandas writes for it."""
    return value is None or value != value


def _generated(generator: Generator | None) -> dict[str, str]:
    """Return the files of the recipe's generator.

    They are made once per setting and version of its code.
    """
    if generator is None:
        return {}
    options = {name: value for name, value in validate.to_plain(generator).items() if name != "name"}
    folder = cache_dir() / "generated" / files.digest_of([generator.name, options, generators.code_digest()])[:16]
    if not folder.is_dir():
        made = generators.GENERATORS[generator.name](**options)
        temporary = files.make_private_dir(files.temporary_path(folder))
        for split, rows in made.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            files.write_text(temporary / f"{split}.jsonl", text)
        try:
            temporary.rename(folder)
        except OSError:  # another process was quicker, with the same rows
            files.remove_tree(temporary)
    return {path.stem: str(path) for path in sorted(folder.glob("*.jsonl"))}
