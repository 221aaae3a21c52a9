"""Look at what the score stages of a recipe measure with, before anything runs.

Metrics of the user's own code (`module:NAME`) run in the jobs, which have the folders of `environment.code` as
they were at submission. They are imported once here, by a process with the jobs' Python and those folders.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from ...errors import UsageError
from ...predictions.metrics import METRICS
from ...predictions.metrics.tokenizers import tokenizer_problem
from ..schema import Recipe, StageSettings
from ..stages import resolve_stages
from ..tasks import task_of
from .cache import code_folders, jobs_python


def scoring_reasons(recipe: Recipe) -> Iterator[str]:
    """Yield why a score stage could not measure, such as a missing package."""
    stages = [one.settings for one in resolve_stages(recipe).values() if any(rows.use == "score" for rows in one.rows)]
    for settings in stages:
        named = [name for name in settings.score.metrics if not METRICS.is_path(name)]
        if recipe.environment.python is None:
            if problem := tokenizer_problem(settings.score.tokenizer):
                yield f"score.tokenizer is {settings.score.tokenizer}, which {problem}"
            for name in named:
                if problem := METRICS.load(name).problem:
                    yield f"score.metrics has {name!r}, which {problem}"
    training = [one.settings for one in resolve_stages(recipe).values() if one.kind.leaves == "checkpoints"]
    for key, views, named in (
        ("score.metrics", stages, [name for one in stages for name in one.score.metrics]),
        ("checkpoints.metric", training, [one.checkpoints.metric for one in training]),
    ):
        if own := list(dict.fromkeys(filter(METRICS.is_path, named))):
            yield from _own_problems(recipe, views[0], own, key)


def _own_problems(recipe: Recipe, settings: StageSettings, names: list[str], key: str) -> Iterator[str]:
    python, environment = jobs_python(recipe, [*map(str, code_folders(recipe))])
    done = subprocess.run([python, "-m", __name__, *names], capture_output=True, text=True, env=environment)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        yield f"{key}: the process that imported {', '.join(names)} ({python}) failed: {reason}"
        return
    task = task_of(settings.task)
    for name, (problem, fields) in json.loads(done.stdout.splitlines()[-1]).items():
        module = name.partition(":")[0].partition(".")[0]
        if problem and not any(
            (folder / module).exists() or (folder / f"{module}.py").exists() for folder in _folders(recipe)
        ):
            here = Path.cwd()
            folder = "." if (here / f"{module}.py").exists() or (here / module).is_dir() else "FOLDER"
            problem += f"; the jobs import it from a folder that the recipe names: environment.code=[{folder}]"
        if missing := set(fields) - set(task.fields):
            problem = f"needs {', '.join(sorted(missing))} in each prediction, and {task.name} adds none"
        if problem:
            yield f"{key} has {name!r}: {problem}"


def _folders(recipe: Recipe) -> list[Path]:
    return [Path(folder) for folder in code_folders(recipe)]


def main() -> None:
    """Print the problem and the fields of each metric that is named."""
    found = {}
    for name in sys.argv[1:]:
        try:
            metric = METRICS.load(name)
            found[name] = (metric.problem, metric.fields)
        except UsageError as error:
            found[name] = (str(error), ())
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
