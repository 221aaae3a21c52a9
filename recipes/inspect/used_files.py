"""Read the files that change and write predictions, before anything is queued.

These are the template of `predict.output`, and the regular expressions and own functions of `predict.post`. Run as
`python -m sousbatch.recipes.inspect.used_files`, it imports the functions of a JSON list on stdin: that is done in the
Python of the jobs, and never in the process that plans.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from ... import files
from ...errors import PlanError, UsageError
from ..data.output import check_template, fields_of, table_of
from ..data.own_functions import OwnFunction, find_source, split_name
from ..data.post import KEY, files_in, is_own, read_rules
from ..facts import Prepared, SplitFacts, UsedFile
from ..schema import Recipe
from ..stages import ResolvedStage, resolve_stages
from .cache import code_folders, collect, file_digest, jobs_python

_TEMPLATE = "predict.output.template"


def read_used_files(recipe: Recipe, splits: dict[str, SplitFacts], prepared: Sequence[Prepared]) -> dict[str, UsedFile]:
    """Return the files by the names that the recipe gives them.

    Raises:
        PlanError: every reason why one cannot be used.
    """
    reasons: list[str] = []
    found: dict[str, UsedFile] = {}
    for stage in resolve_stages(recipe).values():
        if not any(rows.use == "predict" for rows in stage.rows):  # a training may measure answers
            continue
        for name in files_in(stage.settings.predict.post):
            collect(reasons, partial(_use, found, name, KEY))
            if name in found:
                collect(reasons, partial(read_rules, Path(found[name].path), name))
        functions = [name for name in stage.settings.predict.post if is_own(name)]
        collect(reasons, partial(_use_functions, found, recipe, functions))
        if stage.kind.leaves == "predictions":
            collect(reasons, partial(_use_output, found, stage, splits, prepared))
    if reasons:
        raise PlanError(list(dict.fromkeys(reasons)))
    return found


def _use(found: dict[str, UsedFile], name: str, key: str) -> None:
    path = Path(name).expanduser().absolute()
    if not path.is_file():
        raise UsageError(f"{key} names {name!r}, and there is no file {path}")
    found[name] = UsedFile(path=str(path), digest=file_digest(path))


def _use_output(
    found: dict[str, UsedFile], stage: ResolvedStage, splits: dict[str, SplitFacts], prepared: Sequence[Prepared]
) -> None:
    """Find the template, and compare its columns and ids with the rows."""
    settings, output = stage.settings, stage.settings.predict.output
    if output is None:
        return
    if output.template is not None:
        _use(found, output.template, _TEMPLATE)
    (rows,) = (one for one in stage.rows if one.use == "predict")
    made = (one.rows for one in prepared if (one.stage, one.use) == (stage.name, "predict"))
    split = next(made, splits[rows.split])
    columns = settings.data.columns
    table = table_of(
        fields=fields_of(settings),
        inputs=split.columns,
        columns=output.columns,
        template=output.template,
        place=Path(found[output.template].path) if output.template is not None else None,
        format=output.format,
        identity=columns.id,
        target=columns.target,
    )
    num_rows = rows.num_rows(split.num_rows)
    check_template(table, Path(split.path), num_rows, columns.id, is_part=num_rows < split.num_rows)


def _use_functions(found: dict[str, UsedFile], recipe: Recipe, names: Sequence[str]) -> None:
    """Import the own functions as the merge will, those of the working folder alone."""
    if not names:
        return
    folders = [str(folder) for folder in code_folders(recipe)]
    with tempfile.TemporaryDirectory() as alone:
        for name in names:
            source = find_source(name, [os.getcwd()])
            if source is None or find_source(name, folders) is not None:
                continue
            if "." in split_name(name)[0]:
                raise UsageError(f"{KEY} names {name!r}, in a package of the working folder; {_move(source.parent)}")
            shutil.copyfile(source, Path(alone) / source.name)
            found[name] = UsedFile(path=str(source), digest=files.digest_file(source))
        if problem := _import(recipe, names, [*folders, alone]):
            in_copy = [name for name in names if name in found and alone in problem or "no module" in problem]
            raise UsageError(problem + (f"; {_move(Path.cwd())}" if in_copy else ""))


def _move(folder: Path) -> str:
    return (
        f"jobs see one file of the working folder, and of a folder in environment.code all: set "
        f"environment.code=[{folder}], or put the code into a folder of its own"
    )


def _import(recipe: Recipe, names: Sequence[str], folders: Sequence[str]) -> str:
    """Return why the Python of the jobs cannot import the functions, else nothing."""
    python, environment = jobs_python(recipe, folders)
    done = subprocess.run(
        [python, "-m", f"{__package__}.used_files"],
        input=json.dumps(list(names)),
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode == 0:
        return done.stdout.rpartition("\n\n")[2].strip()
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return f"{KEY}: the process that imported {', '.join(names)} ({python}) ended without an answer: {reason}"


def _problems(names: Sequence[str]) -> Iterator[str]:
    for name in names:
        try:
            OwnFunction(KEY, name, "")
        except UsageError as error:
            yield str(error)


def main() -> None:
    """Import the functions of stdin and print what is wrong, after an empty line."""
    found = "; ".join(_problems(json.loads(sys.stdin.read())))
    print(f"\n\n{found}")


if __name__ == "__main__":
    main()
