"""Prepare the splits that a recipe cleans, selects or augments.

That is done once, into the cache, before anything is queued. Run as `python -m sousbatch.recipes.inspect.prepared`, it
reads one JSON request from stdin: that is how the user's own functions run in the Python of the jobs, and never in the
process that plans. It prints a JSON line as it goes, and the answer as the last.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ... import files
from ...checkpoints.capacity.limits import read_limits, tightest
from ...errors import NoRoomError, PlanError, UsageError, is_no_room
from ...user_folders import cache_dir, recall, remember
from ..data import chat, cleaning, hangul, own_functions, preparing, selection
from ..data.own_functions import OwnFunction, find_source
from ..data.preparing import Preparation, Steps, as_line, steps_of
from ..data.rows import read_rows
from ..facts import Prepared, SplitFacts
from ..schema import Recipe, validate
from ..stage_kinds import RowUse
from ..stages import ResolvedStage, resolve_stages
from ..tasks import task_of
from .cache import code_folders, collect, jobs_python
from .data import check_columns, read_file

Progress = Callable[[str, int, int], None]  # what is prepared, rows done, rows in all

_FORMAT = 1  # raised when a prepared file is written in another way
_MODULES = (chat, cleaning, hangul, own_functions, preparing, selection)
_REPORT_EVERY = 1000
_MORE_ROOM = "free some space, or let SOUSBATCH_CACHE name a folder of a larger disk"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """One split to prepare: the rows of *source*, by *steps*, into *target*."""

    split: str
    source: str
    num_rows: int
    steps: Steps
    target: str


def prepare_splits(
    recipe: Recipe, splits: dict[str, SplitFacts], code: str, progress: Progress | None = None
) -> tuple[Prepared, ...]:
    """Return the splits that the stages' steps prepare.

    Those without any step are not among them.     *code* is the digest of the recipe's code folders.

    Raises:
        PlanError: every reason why a split cannot be prepared: a function that fails, no row left, a full disk.
    """
    reasons: list[str] = []
    found: list[Prepared] = []
    for stage in resolve_stages(recipe).values():
        for rows in stage.rows:
            steps = steps_of(stage.settings, rows.use)
            if steps is not None:
                look = partial(
                    _prepared, recipe, code, stage, rows.use, splits[rows.split], rows.split, steps, progress
                )
                found += collect(reasons, look) or ()
    if reasons:
        raise PlanError(list(dict.fromkeys(reasons)))
    return tuple(found)


def _prepared(
    recipe: Recipe,
    code: str,
    stage: ResolvedStage,
    use: RowUse,
    source: SplitFacts,
    split: str,
    steps: Steps,
    progress: Progress | None,
) -> list[Prepared]:
    """Return one prepared split, remembered by all that decides its rows."""
    sources = _sources(recipe, steps)
    ours = [files.digest_file(Path(str(module.__file__))) for module in _MODULES]
    own = [code, sorted(sources.values()), recipe.environment.python] if steps.own_functions else None
    key = files.digest_of([_FORMAT, source.digest, validate.to_plain(steps), ours, own])
    target = cache_dir() / "prepared" / key[:16] / f"{split}.jsonl"
    values = recall("prepared", key)
    if values is None or not target.is_file() or target.stat().st_size != values["rows"]["num_bytes"]:
        work = Work(split=split, source=source.path, num_rows=source.num_rows, steps=steps, target=str(target))
        values = _make(recipe, work, _needed_bytes(source, steps), progress)
        remember("prepared", key, values)
    place = {"stage": stage.name, "use": use, "split": split, "sources": sources}
    made, faults = validate.build(Prepared, {**values, **place})
    if made is None:
        raise UsageError(f"the cached facts of {target} are damaged: {faults[0]}; remove {cache_dir() / 'prepared'}")
    if not made.rows.num_rows:
        raise UsageError(_none_left(made))
    reasons = list(check_columns(split, made.rows, set(task_of(recipe.task).columns(stage.settings, use))))
    if reasons:
        raise PlanError(reasons)
    return [made]


def _sources(recipe: Recipe, steps: Steps) -> dict[str, str]:
    """Return the files of the user's own functions, and their digests."""
    installed = [] if recipe.environment.python else sys.path
    folders = [*map(str, code_folders(recipe)), os.getcwd(), *installed]
    found = [find_source(name, folders) for _, name in steps.own_functions]
    return {str(path): files.digest_file(path) for path in found if path is not None}


def _needed_bytes(source: SplitFacts, steps: Steps) -> int:
    """Return about how many bytes are written, the prepared file's and others."""
    copies = steps.augment.copies if steps.augment else 0
    return source.num_bytes * (1 + copies + bool(steps.select))


def _none_left(made: Prepared) -> str:
    dropped = ", ".join(f"{one.name} dropped {one.dropped.num:,}" for one in made.steps if one.dropped.num)
    why = f": {dropped}" if dropped else ", and the file has none"
    return f"split {made.split!r} has no row left of {made.num_source_rows:,} for stage {made.stage!r}{why}"


def _make(recipe: Recipe, work: Work, needed_bytes: int, progress: Progress | None) -> dict[str, Any]:
    """Write the prepared file and return its facts, as plain values."""
    folder = files.make_private_dir(Path(work.target).parent)
    free = tightest(read_limits(folder)).num_bytes
    if free is not None and free < needed_bytes:
        raise UsageError(
            f"split {work.split!r} takes about {needed_bytes / 1e9:.3g} GB once it is prepared, and {folder} has "
            f"{free / 1e9:.3g} GB free; {_MORE_ROOM}"
        )
    if work.steps.own_functions:
        answer = _ask_process(recipe, work, progress)
    else:
        answer = write(work, progress or (lambda what, done, total: None))
    return {**answer, "rows": validate.to_plain(read_file(Path(work.target)))}


def write(work: Work, report: Progress) -> dict[str, Any]:
    """Write the rows of *work*, and return what was counted.

    Raises:
        UsageError: an own function failed, or the disk is full.
    """
    target, num_written = Path(work.target), 0
    try:
        with files.replacing(target) as stream:
            load = partial(_loaded, work.split)
            preparation = Preparation(
                read_rows(Path(work.source)), work.steps, load, lambda: tempfile.TemporaryFile(dir=target.parent)
            )
            for num_written, (_, row) in enumerate(preparation, 1):
                stream.write(as_line(row))
                if num_written % _REPORT_EVERY == 0:
                    report(f"rows of {work.split}, prepared", preparation.num_read, work.num_rows)
    except (OSError, NoRoomError) as error:
        if not is_no_room(error):
            raise
        raise UsageError(f"no space left in {target.parent} for split {work.split!r}; {_MORE_ROOM}") from error
    assert not work.steps.keeps_all or num_written == preparation.num_read, "rows to predict all stay"
    return {
        "num_source_rows": preparation.num_read,
        "steps": [validate.to_plain(count) for count in preparation.counts],
    }


def _loaded(split: str, key: str, name: str) -> OwnFunction:
    return OwnFunction(key, name, split)


def _ask_process(recipe: Recipe, work: Work, progress: Progress | None) -> dict[str, Any]:
    python, environment = jobs_python(recipe, [*map(str, code_folders(recipe))])
    # The request and the complaints are files: a pipe that nobody reads or writes any more would block or break.
    with tempfile.TemporaryFile("w+") as asked, tempfile.TemporaryFile("w+", errors="replace") as complaints:
        json.dump(validate.to_plain(work), asked)
        asked.seek(0)
        with subprocess.Popen(
            [python, "-m", f"{__package__}.prepared"],
            stdin=asked,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            env=environment,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                message = json.loads(line)
                if "answer" in message:
                    return dict(message["answer"])
                if "error" in message:
                    raise UsageError(message["error"])
                if progress is not None:
                    progress(message["what"], message["done"], message["total"])
        complaints.seek(0)
        reason = (complaints.read().strip().splitlines() or [f"exit code {process.returncode}"])[-1]
    names = ", ".join(name for _, name in work.steps.own_functions)
    raise UsageError(f"split {work.split!r}: the process that ran {names} ({python}) ended without an answer: {reason}")


def main() -> None:
    """Answer the request on stdin; what the user's functions print goes to stderr."""
    protocol = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.path.append(os.getcwd())
    work, faults = validate.build(Work, json.loads(sys.stdin.read()))
    assert work is not None, faults

    def report(what: str, done: int, total: int) -> None:
        print(json.dumps({"what": what, "done": done, "total": total}), file=protocol)

    try:
        answer: dict[str, Any] = {"answer": write(work, report)}
    except UsageError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), file=protocol)


if __name__ == "__main__":
    main()
