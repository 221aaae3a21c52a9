"""The faults of a recipe that its types cannot show.

Finding them needs no look at site, model or data.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ...checkpoints.choice import is_choice, step_named
from ...errors import Fault, nearest
from ...predictions.metrics import METRICS
from ...redaction import holds_secret, is_secret
from ...run_folder import NAME_PATTERN
from ...run_index import RUN_PREFIX
from ..data.post import problem_of
from ..data.preparing import step_faults
from ..decodings import decoding_faults, decodings_of
from ..generation import engine_faults
from ..publications import publish_faults
from ..stage_kinds import RECIPE_KINDS, STAGE_KINDS, RowUse, StageKind
from ..stages import fitting_sources, kind_name, resolve_stages, settings_of, stages_of
from ..tasks import TASKS, task_faults, task_of
from . import QuestionAnswering, Recipe, Resources, Schedule, StageSettings, validate

# sbatch options that a run depends on, and what to write instead.
_OWNED = {
    "array": "set resources.<stage>.tasks",
    "nodes": "set resources.<stage>.nodes",
    "ntasks": "set resources.<stage>.devices_per_node",
    "ntasks-per-node": "set resources.<stage>.devices_per_node",
    "cpus-per-task": "set resources.<stage>.cpus_per_device",
    "time": "set resources.<stage>.time_min",
    "partition": "set resources.<stage>.partition",
    **dict.fromkeys(
        ("output", "error", "open-mode", "chdir"), "logs lie in the run folder; `sousbatch logs` shows them"
    ),
    **dict.fromkeys(("comment", "dependency", "kill-on-invalid-dep", "parsable", "wait", "test-only"), "leave it out"),
    **dict.fromkeys(("signal", "requeue"), "leave it out: a run depends on being warned and requeued"),
    **dict.fromkeys(("export", "export-file"), "name the variables in environment.variables or environment.inherit"),
    **dict.fromkeys(("wrap", "job-name", "clusters"), "leave it out"),
}
# Variables that W&B reads and each job sets, and what to write instead.
_TRACKED = {
    "WANDB_MODE": "and set tracking.mode",
    "WANDB_PROJECT": "and set tracking.project",
    "WANDB_ENTITY": "and set tracking.entity",
    "WANDB_TAGS": "and set tracking.tags",
    **dict.fromkeys(
        ("WANDB_RUN_ID", "WANDB_NAME", "WANDB_RUN_GROUP", "WANDB_JOB_TYPE", "WANDB_NOTES"), "the run decides it"
    ),
    **dict.fromkeys(("WANDB_RESUME", "WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"), "its files lie in the run"),
}
# A value that a line of shell spells out; one that it reads from elsewhere begins with $ or `.
_ASSIGNED = re.compile(r"""(?<![\w$])([A-Za-z_]\w*)=["']?([^\s"'$`;]+)""")
_NAME_HINT = "lower-case letters, digits and '-', 63 at most"
# There is one of each in a run, so a stage cannot have its own.
_SHARED = (
    *("name", "description", "task", "resources", "environment", "tracking", "stages", "data.splits", "data.generator"),
    *("model.path", "model.revision", "model.from_scratch", "model.config", "model.tokenizer"),
)


def faults_of(recipe: Recipe) -> list[Fault]:
    """Return every fault of a recipe whose types are right."""
    faults = [*_secrets(recipe), *_basics(recipe), *_variables(recipe), *_code(recipe), *_stages(recipe)]
    faults += _resources(recipe)
    if not faults:  # what follows needs stages with kinds
        faults += [*_sources(recipe), *_views(recipe), *publish_faults(recipe)]
    return faults


def _basics(recipe: Recipe) -> Iterator[Fault]:
    if not NAME_PATTERN.fullmatch(recipe.name):
        like = re.sub(r"[^a-z0-9]+", "-", recipe.name.lower()).strip("-")[:63] or "my-recipe"
        yield Fault(key="name", problem=f"is {recipe.name!r}", hint=f"{_NAME_HINT}, such as name: {like}")
    if not recipe.model.path:
        yield Fault(key="model.path", problem="is missing", hint="a hub id, a local folder, or library:NAME")
    if recipe.model.from_scratch and recipe.model.path.startswith(RUN_PREFIX):
        problem = f"is true, and model.path {recipe.model.path!r} is a trained model"
        yield Fault(key="model.from_scratch", problem=problem, hint="set model.from_scratch=false")
    if not recipe.data.splits and recipe.data.generator is None:
        yield Fault(key="data.splits", problem="is missing", hint="such as {train: train.jsonl, test: test.jsonl}")
    problem, hint = TASKS.problem(recipe.task)
    if problem:
        yield Fault(key="task", problem=problem, hint=hint)
    if recipe.question_answering != QuestionAnswering() and recipe.task != "question_answering":
        yield Fault(
            key="question_answering", problem=f"has no meaning for task {recipe.task}", hint="leave it out, or set task"
        )


def _variables(recipe: Recipe) -> Iterator[Fault]:
    for key in ("variables", "inherit"):
        for name in getattr(recipe.environment, key):
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                hint = "letters, digits and '_', no digit first"
                yield Fault(key=f"environment.{key}", problem=f"has {name!r}, which is no variable's name", hint=hint)
            elif name in _TRACKED:
                problem = f"has {name}, which the job sets by the recipe's own key"
                yield Fault(key=f"environment.{key}", problem=problem, hint=f"leave it out, {_TRACKED[name]}")


def _secrets(recipe: Recipe) -> Iterator[Fault]:
    """Return which keys hold a secret.

    A recipe is written into plan, requests and scripts. The secret's value is never shown.
    """
    for name, value in recipe.environment.variables.items():
        if is_secret(name, value):
            hint = f"`export {name}=...` where you submit, and set environment.inherit=[{name}]"
            yield Fault(
                key=f"environment.variables.{name}", problem="holds a secret, which would be written", hint=hint
            )
    for number, line in enumerate(recipe.environment.setup):
        assigned = _ASSIGNED.findall(line)
        if holds_secret(line) or any(is_secret(name, value) for name, value in assigned):
            hint = "read it from a file there, or `export` it where you submit and name it in environment.inherit"
            yield Fault(key=f"environment.setup.{number}", problem="holds a secret, which would be written", hint=hint)
    plain = validate.to_plain(recipe)
    plain["environment"] |= {"variables": {}, "setup": []}
    for key, value in _texts(plain, ""):
        if holds_secret(value) or (key.startswith("tracking.") and is_secret("WANDB", value)):
            hint = "leave user, password and token out of it; export them where you submit, by environment.inherit"
            yield Fault(key=key, problem="holds a secret, which would be written", hint=hint)


def borrowed_secrets(values: dict[str, Any]) -> list[Fault]:
    """Return which keys of a recipe take a secret from this shell.

    The recipe is not resolved yet. The secret may have any form.
    """
    hint = "name the variable in environment.inherit, and read it in the job"
    return [
        Fault(key=key, problem=f"takes the secret {name} from this shell, and it would be written", hint=hint)
        for key, value in _texts(values, "")
        for name in re.findall(r"\$\{oc\.env:\s*['\"]?([A-Za-z_]\w*)", value)
        if is_secret(name, os.environ.get(name, "a word"))
    ]


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield every text of plain values, with its key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, (dict, list)):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in inner:
            yield from _texts(item, f"{key}.{name}" if key else str(name))


def _code(recipe: Recipe) -> Iterator[Fault]:
    """Return code folders that cannot lie side by side.

    Code folders lie side by side in the run folder, so each needs a name of its own.
    """
    names = [Path(folder).name for folder in recipe.environment.code]
    for folder, name in zip(recipe.environment.code, names, strict=True):
        if name in ("", ".."):
            yield Fault(key="environment.code", problem=f"has {folder!r}", hint="give the folder by its name")
    for name, count in Counter(names).items():
        if name and count > 1:
            yield Fault(
                key="environment.code", problem=f"has {count} folders called {name!r}", hint="rename all but one"
            )


def _stages(recipe: Recipe) -> Iterator[Fault]:
    for name, spec in recipe.stages.items():
        key = f"stages.{name}"
        if not NAME_PATTERN.fullmatch(name):
            yield Fault(key=key, problem="is no name for a stage", hint=_NAME_HINT)
        if (spec.kind or name) not in RECIPE_KINDS:
            problem = f"{f'is {spec.kind!r}' if spec.kind else 'is missing'}; known: {', '.join(RECIPE_KINDS)}"
            yield Fault(key=f"{key}.kind", problem=problem, hint=nearest(spec.kind or name, RECIPE_KINDS))
        for path in _SHARED:
            section, _, inner = path.partition(".")
            given = spec.set.get(section, {})
            if section in spec.set and (not inner or (isinstance(given, dict) and inner in given)):
                yield Fault(key=f"{key}.set.{path}", problem="is one for the whole run", hint=f"set {path} itself")
        yield from _unread(key, spec.set, STAGE_KINDS.get(spec.kind or name))
        yield from validate.build(Recipe, spec.set, key=f"{key}.set")[1]
        yield from validate.unknown_names(Recipe, spec.set, key=f"{key}.set")


def _unread(key: str, changes: Mapping[str, Any], kind: StageKind | None) -> Iterator[Fault]:
    """Return the sections that a stage sets and that its job does not read."""
    sections = {field.name for field in fields(StageSettings)} - {"task", "seed"}
    for section in sorted(sections & changes.keys()):
        if kind is not None and section not in kind.reads:
            problem = f"does nothing: a {kind.name} stage reads {', '.join(kind.reads) or 'no section'}"
            yield Fault(key=f"{key}.set.{section}", problem=problem, hint="set it where it is read, or leave it out")


def _views(recipe: Recipe) -> list[Fault]:
    """Return what is wrong in the recipe as its stages see it.

    Each fault is given once, under the key that says it.
    """
    faults, common = list[Fault](), settings_of(recipe)
    found: dict[str | None, list[Fault]] = {}
    for name, stage in resolve_stages(recipe).items():
        uses_here = tuple(rows.use for rows in stage.rows)

        def ask(settings: StageSettings, uses: Sequence[RowUse] = uses_here) -> list[Fault]:
            return [*_stage_faults(settings, uses), *step_faults(settings), *_decodings(settings, uses)]

        found[name], of_all = ask(stage.settings), ask(common)
        for fault in found[name]:
            if fault in of_all:
                faults.append(fault)
            elif fault not in found.get(stage.of, ()):  # else it is said of the stage that it comes from
                faults.append(replace(fault, key=f"stages.{name}.set.{fault.key}"))
    return list(dict.fromkeys(faults))


def _stage_faults(view: StageSettings, uses: Sequence[RowUse]) -> Iterator[Fault]:
    yield from _sections(view)
    if "predict" in uses and task_of(view.task).generates:
        yield from engine_faults(view)
    yield from task_faults(view, uses)


def _decodings(view: StageSettings, uses: Sequence[RowUse]) -> Iterator[Fault]:
    """Return what is wrong with each decoding, as it would be alone."""
    if not view.predict.decodings:
        return
    faults = list(decoding_faults(view))
    yield from faults
    for name, one in decodings_of(view).items() if not faults else ():
        for fault in _stage_faults(one, uses):
            if fault.key.startswith("predict."):
                yield replace(fault, key=f"predict.decodings.{name}.{fault.key.removeprefix('predict.')}")


def _sources(recipe: Recipe) -> Iterator[Fault]:
    for name, spec in stages_of(recipe).items():
        kind, fitting = STAGE_KINDS[kind_name(recipe, name)], fitting_sources(recipe, name)
        if spec.of is not None and spec.of not in fitting:
            works_on = f"a {kind.name} stage works on a {kind.source} stage above it: {', '.join(fitting) or 'none'}"
            yield Fault(key=f"stages.{name}.of", problem=f"is {spec.of!r}; {works_on}", hint=nearest(spec.of, fitting))
        elif kind.takes_source == "required" and not fitting:
            yield Fault(key=f"stages.{name}", problem=f"has no {kind.source} stage above it to work on")


def _resources(recipe: Recipe) -> Iterator[Fault]:
    known = list(dict.fromkeys((*stages_of(recipe), *RECIPE_KINDS, "default")))
    for name, wanted in recipe.resources.items():
        if name not in known:
            problem = f"is no stage and no kind; known: {', '.join(known)}"
            yield Fault(key=f"resources.{name}", problem=problem, hint=nearest(name, known))
        yield from _sbatch(f"resources.{name}", wanted)


def _sbatch(key: str, wanted: Resources) -> Iterator[Fault]:
    """Return values that would harm the #SBATCH lines.

    They would break out of their line, or take the run out of our hands.
    """
    for word in ("partition", "account", "qos", "constraint", "exclude", "reservation"):
        value = getattr(wanted, word)
        if value is not None and not re.fullmatch(r"[\w.,:@+=&|*()\[\]-]+", value, re.ASCII):
            problem = f"is {value!r}, which is no name that Slurm knows"
            yield Fault(key=f"{key}.{word}", problem=problem, hint="letters, digits and . , : @ + = & | * ( ) [ ] _ -")
    for line in wanted.sbatch:
        option = re.match(r"--([a-z][a-z-]*)(=|$)", line)
        if option is None or not line.isprintable() or "$" in line:
            problem = f"has {line!r}, which is no #SBATCH line"
            hint = "one option, as --name=value, without $: Slurm does not expand variables there"
            yield Fault(key=f"{key}.sbatch", problem=problem, hint=hint)
        elif option[1] in _OWNED:
            hint = _OWNED[option[1]].replace("resources.<stage>", key)
            yield Fault(key=f"{key}.sbatch", problem=f"has --{option[1]}", hint=hint)


def _measured(view: StageSettings) -> Iterator[Fault]:
    """Return why `checkpoints.metric` cannot be measured while training."""
    key, name, task = "checkpoints.metric", view.checkpoints.metric, task_of(view.task)
    if METRICS.problem(name)[0]:
        known = ("loss", "eval_loss", *METRICS)
        yield Fault(key=key, problem=f"is {name!r}; known: {', '.join(known)}", hint=nearest(name, known))
        return
    if view.train.eval_split is None:
        hint = "set train.eval_split=SPLIT, or checkpoints.metric=loss"
        yield Fault(key=key, problem=f"is {name!r}, and there is no train.eval_split to answer", hint=hint)
    if METRICS.is_path(name):  # it is looked at where it will run (`inspect.scorers`)
        if view.checkpoints.goal is None:
            hint = "set checkpoints.goal=highest, or lowest"
            yield Fault(key="checkpoints.goal", problem=f"is missing, and {key} is own code, {name!r}", hint=hint)
        return
    if missing := set(METRICS.load(name).fields) - set(task.fields):
        problem = f"is {name!r}, which needs {', '.join(sorted(missing))} in each answer; {task.name} adds none"
        yield Fault(key=key, problem=problem, hint=f"such as {task.metrics[0]}")


def _kept(view: StageSettings) -> Iterator[Fault]:
    """Return what is wrong with the checkpoints that are to stay."""
    spec = view.checkpoints
    faults = list(_measured(view)) if view.measures_answers else []
    yield from faults
    if spec.goal and not faults and not METRICS.is_path(spec.metric):
        best = replace(view, checkpoints=replace(spec, goal=None)).goal
        if spec.goal != best:
            problem = f"is {spec.goal}, and the best {spec.metric} is the {best}"
            yield Fault(key="checkpoints.goal", problem=problem, hint="leave it out: it is for metrics of own code")
    if spec.keep_best > 1 and not view.is_measured:
        problem = f"is {spec.keep_best}, and nothing measures {spec.metric}"
        yield Fault(
            key="checkpoints.keep_best", problem=problem, hint="set train.eval_split=SPLIT, or checkpoints.metric=loss"
        )
    if not is_choice(view.consolidate.choose):
        hint = "best, last, or a step such as step-200"
        yield Fault(key="consolidate.choose", problem=f"is {view.consolidate.choose!r}", hint=hint)
    if spec.keep_best == 0 and view.consolidate.choose == "best" and view.is_measured:
        problem = "is 0, and consolidate.choose is best"
        yield Fault(key="checkpoints.keep_best", problem=problem, hint="keep 1, or set consolidate.choose=last")
    if view.train.patience is not None and (spec.keep_steps or step_named(view.consolidate.choose)):
        problem = "may end the training before a step whose checkpoint is wanted"
        hint = "leave out checkpoints.keep_steps and choose best or last, or set train.patience=null"
        yield Fault(key="train.patience", problem=problem, hint=hint)
    url = spec.archive_url
    if url is not None and "://" not in url and not url.startswith("/"):
        yield Fault(
            key="checkpoints.archive_url",
            problem=f"is {url!r}",
            hint=f"an absolute folder, such as /data/{url}, or a URL",
        )


def _patterns(view: StageSettings) -> Iterator[Fault]:
    """Return targets of an adapter that are no regular expressions."""
    for number, target in enumerate(view.adapter.target_modules):
        try:
            re.compile(target)
        except re.error as error:
            problem = f"is {target!r}, which is no pattern: {error}"
            yield Fault(key=f"adapter.target_modules.{number}", problem=problem, hint="such as .*(q_proj|v_proj)")


def _unused_periods(schedule: Schedule) -> Iterator[Fault]:
    """Return the keys of a period that the shape of the schedule does not have."""
    without = {
        "period_steps": ("constant", "linear"),
        "period_epochs": ("constant", "linear"),
        "period_factor": ("constant", "linear", "cosine", "step"),
    }
    for name, shapes in without.items():
        if schedule.name in shapes and getattr(schedule, name) != getattr(Schedule(), name):
            hint = "leave it out, or set train.schedule.name=cosine_restarts"
            yield Fault(key=f"train.schedule.{name}", problem=f"has no meaning for {schedule.name}", hint=hint)


def _sections(view: StageSettings) -> Iterator[Fault]:
    """Return what is wrong between keys of one section.

    The recipe is taken as some stage sees it.
    """
    schedule, train, predict = view.train.schedule, view.train, view.predict
    if (
        schedule.name in ("step", "cosine_restarts")
        and schedule.period_steps is None
        and schedule.period_epochs is None
    ):
        key = "train.schedule.period_steps"
        yield Fault(key=key, problem=f"is missing: schedule {schedule.name} needs it", hint="such as 500")
    for name in ("patience", "eval_every_steps"):
        if getattr(train, name) is not None and train.eval_split is None:
            yield Fault(key=f"train.{name}", problem="needs train.eval_split", hint="such as validation")
    yield from _unused_periods(schedule)
    yield from _patterns(view)
    yield from _kept(view)
    if predict.min_new_tokens > predict.max_new_tokens:
        problem = f"is {predict.min_new_tokens}, above max_new_tokens {predict.max_new_tokens}"
        yield Fault(key="predict.min_new_tokens", problem=problem)
    for number, name in enumerate(predict.post):
        problem, hint = problem_of(name)
        if problem:
            yield Fault(key=f"predict.post.{number}", problem=problem, hint=hint)
    if predict.post and task_of(view.task).has_labels:
        problem = f"changes texts, and the predictions of {view.task} are labels"
        yield Fault(key="predict.post", problem=problem, hint="leave it out")
    beams = predict.num_beams or 1
    if predict.sample and beams > 1:
        problem = f"is {beams} with predict.sample"
        yield Fault(key="predict.num_beams", problem=problem, hint="draw tokens or search beams, not both")
    if predict.keep_logprobs and beams > 1:
        problem = f"is {beams} with predict.keep_logprobs, and a beam's tokens were not chosen one by one"
        yield Fault(key="predict.num_beams", problem=problem, hint="set it to 1")
    if predict.samples > 1 and not predict.sample:
        problem = f"is {predict.samples} without predict.sample, so all would be the same"
        yield Fault(key="predict.samples", problem=problem, hint="set predict.sample=true")
    if "" in predict.stop:
        yield Fault(key="predict.stop", problem="has an empty text, at which every answer ends", hint="leave it out")
