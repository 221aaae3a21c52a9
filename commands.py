"""What each command does: call the packages, print what they return."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from . import show
from .errors import NotFoundError, UsageError
from .rundir import RunPaths, find_run, known_runs, runs_dir

if TYPE_CHECKING:
    from .checkpoints.zero.places import Place
    from .checkpoints.zero.source import Source
    from .checkpoints.zero.work import Choices
    from .launchers.submission import Submitted
    from .recipes.plan import Plan


def run(arguments: Namespace) -> int:
    """Do the command that was parsed and return its exit code."""
    name = arguments.command + (f" {arguments.verb}" if hasattr(arguments, "verb") else "")
    return _HANDLERS[name](arguments)


def _recipes_list(arguments: Namespace) -> int:
    from .recipes.search import list_recipes

    rows = [
        {"name": recipe.name, "description": recipe.description, "path": str(recipe.path)} for recipe in list_recipes()
    ]
    print(
        json.dumps(rows, indent=1, ensure_ascii=False)
        if arguments.json
        else show.columns([[row["name"], row["description"]] for row in rows])
    )
    return 0


def _recipes_show(arguments: Namespace) -> int:
    import yaml

    from .recipes import check, schema
    from .recipes.compose import compose

    if arguments.keys:
        print(show.keys(check.options(schema.Recipe)))
        return 0
    if arguments.recipe is None:
        raise UsageError("name a recipe, or ask for --keys; `sousbatch recipes list` lists the library")
    recipe = compose(arguments.recipe, arguments.overrides)
    print(yaml.safe_dump(check.to_plain(recipe), allow_unicode=True, sort_keys=False, width=1000), end="")
    return 0


def _plan_of(arguments: Namespace, *, is_smoke: bool = False) -> Plan:
    from .cluster.site import this_machine
    from .recipes.compile import compile
    from .recipes.compose import compose
    from .recipes.inputs import inspect
    from .recipes.stages import smoke

    recipe = compose(arguments.recipe, arguments.overrides)
    recipe = smoke(recipe) if is_smoke else recipe
    return compile(recipe, this_machine(), inspect(recipe, runs_dir(arguments.runs)))


def _plan(arguments: Namespace) -> int:
    from .launchers.local import LocalLauncher

    plan = _plan_of(arguments)
    if arguments.json:
        print(plan.to_json(), end="")
    elif arguments.script:
        paths = RunPaths(root=runs_dir(arguments.runs) / plan.recipe.name / plan.run_id)
        for request in LocalLauncher().prepare(plan, paths):
            print(request.text)
    else:
        print(show.plan(plan))
    return 0


def _submit(arguments: Namespace) -> int:
    from .launchers.local import LocalLauncher
    from .launchers.submission import submit

    plan = _plan_of(arguments, is_smoke=arguments.smoke)
    for warning in plan.warnings:
        print(f"sousbatch: warning: {warning}", file=sys.stderr)
    done = submit(plan, LocalLauncher(), runs_dir(arguments.runs), again=arguments.again)
    return _after_sending(done, arguments.detach)


def _resume(arguments: Namespace) -> int:
    from .launchers.local import LocalLauncher
    from .launchers.submission import resume

    return _after_sending(resume(find_run(arguments.run), LocalLauncher()), arguments.detach, joins=True)


def _after_sending(done: Submitted, detach: bool, *, joins: bool = False) -> int:
    """Follow what was sent; with *joins* also what was under way already."""
    from . import follow
    from .launchers.local import LocalLauncher

    words = {state.word for state in done.found.values()}
    run_id = done.paths.run_id
    if words == {"done"}:
        print(f"sousbatch: run {run_id} is done already; --again makes another", file=sys.stderr)
        print(show.results(done.plan, done.paths))
        return 0
    if not done.sent and not joins:
        print(f"sousbatch: run {run_id} is under way already; `sousbatch resume {run_id}` follows it", file=sys.stderr)
        return 0
    print(f"sousbatch: run {run_id} on {done.plan.site.name}, in {done.paths.root}", file=sys.stderr)
    if detach:
        print(run_id)
        return 0
    return follow.follow(done.plan, done.paths, LocalLauncher())


def _status(arguments: Namespace) -> int:
    from .launchers.local import LocalLauncher
    from .launchers.status import is_final, many_states

    while True:
        found = many_states([find_run(arguments.run, newest=True)] if arguments.run else known_runs(), LocalLauncher())
        if arguments.json:
            print(json.dumps(show.status_json(found), indent=1, ensure_ascii=False), flush=True)
        else:
            print(show.run_status(*found[0]) if arguments.run else show.status(found), flush=True)
        if not arguments.watch or all(is_final(states) for _, _, states in found):
            return 0
        time.sleep(2)


def _logs(arguments: Namespace) -> int:
    from . import follow
    from .launchers.local import LocalLauncher
    from .recipes.plan import read_plan

    paths = find_run(arguments.run, newest=True)
    plan = read_plan(paths.plan)
    stage = plan.stage(arguments.stage) if arguments.stage else follow.telling_stage(plan, paths, LocalLauncher())
    return follow.print_log(plan, paths, stage, LocalLauncher(), until_end=arguments.follow)


def _cancel(arguments: Namespace) -> int:
    from .launchers.local import LocalLauncher
    from .launchers.submission import cancel

    paths = find_run(arguments.run)
    stages = cancel(paths, LocalLauncher(), save=arguments.save)
    if not stages:
        print(f"sousbatch: nothing of run {paths.run_id} is waiting or running", file=sys.stderr)
        return 0
    print(
        f"sousbatch: cancelled {', '.join(stages)} of run {paths.run_id}; `sousbatch resume {paths.run_id}` goes on",
        file=sys.stderr,
    )
    return 0


def _clean(arguments: Namespace) -> int:
    from .launchers.local import LocalLauncher
    from .launchers.submission import clean

    if bool(arguments.run) == bool(arguments.older):
        raise UsageError("clean takes a run or --older AGE")
    if arguments.run:
        chosen = [find_run(arguments.run)]
    else:
        limit = time.time() - _age_s(arguments.older)
        chosen = [paths for paths in known_runs() if paths.plan.stat().st_mtime < limit]
    freed = 0
    for paths in chosen:
        freed += clean(paths, LocalLauncher(), whole=arguments.all, is_named=bool(arguments.run))
        if not paths.root.exists():
            LocalLauncher().forget(f"{paths.recipe_name}.{paths.run_id}.")
    print(f"{len(chosen)} run{'s' * (len(chosen) != 1)} looked at, {show.size(freed)} freed")
    return 0


def _age_s(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([dh])", text)
    if match is None:
        raise UsageError(f"--older {text!r} is no age; write 30d or 12h")
    return float(match[1]) * {"d": 86_400, "h": 3_600}[match[2]]


def _doctor(arguments: Namespace) -> int:
    from .doctor import examine

    print(show.findings(examine(runs_dir(arguments.runs))))
    return 0


def _checkpoint_dirs(text: str) -> list[Path]:
    """Return the folders of checkpoints that *text* means: a folder, or those of a run's train stages."""
    folder = Path(text).expanduser()
    if folder.is_dir() and not (folder / "plan.json").is_file():
        return [folder]
    try:
        base = find_run(text, newest=True).root / "checkpoints"
    except NotFoundError as error:
        raise NotFoundError(f"{text!r} is neither a folder nor a run; `sousbatch status` lists the runs") from error
    return sorted(path for path in base.iterdir() if path.is_dir()) if base.is_dir() else []


def _checkpoints_list(arguments: Namespace) -> int:
    from .checkpoints.commit import list_checkpoints

    found = [checkpoint for folder in _checkpoint_dirs(arguments.path) for checkpoint in list_checkpoints(folder)]
    if arguments.json:
        print(json.dumps([vars(one) | {"path": str(one.path)} for one in found], indent=1))
    else:
        print(show.checkpoints(found) if found else f"no checkpoints in {arguments.path}")
    return 0


def _checkpoints_verify(arguments: Namespace) -> int:
    from .checkpoints.commit import list_checkpoints, verify

    found = [checkpoint for folder in _checkpoint_dirs(arguments.path) for checkpoint in list_checkpoints(folder)]
    bad = 0
    for checkpoint in found:
        problems = verify(checkpoint)
        bad += bool(problems)
        print(f"{checkpoint.path}: " + ("; ".join(problems) if problems else "whole"))
    if not found:
        raise NotFoundError(f"no checkpoints in {arguments.path}")
    return 1 if bad else 0


def _config_dir(checkpoint: Place) -> Place | None:
    """Return the folder with the config and tokenizer of *checkpoint*: itself or the one above, if any."""
    return next((place for place in (checkpoint, checkpoint.parent) if (place / "config.json").is_file()), None)


def _checkpoints_consolidate(arguments: Namespace) -> int:
    from .checkpoints.zero.places import place_of
    from .checkpoints.zero.read import open_source
    from .checkpoints.zero.write import consolidate_part

    if arguments.adapter == "keep" and arguments.base:
        raise UsageError("--adapter keep and --base contradict each other; leave out one of them")
    checkpoint, out = place_of(arguments.path), place_of(arguments.out)
    choices = _choices(arguments, checkpoint)
    source = open_source(checkpoint)
    if arguments.dry_run:
        return _show_cost(arguments, source, choices)
    started = time.monotonic()
    part, num_parts = arguments.shard
    with show.byte_progress("consolidating") as progress:
        manifest = consolidate_part(
            source,
            out.absolute() if isinstance(out, Path) else out,
            choices,
            part=part,
            num_parts=num_parts,
            progress=progress,
        )
    took = f"{time.monotonic() - started:.1f} s"
    if manifest is None:
        print(f"{arguments.out}: part {part} of {num_parts} is written, others are missing, {took}")
        return 0
    flushed = "" if manifest.num_flushed is None else f", {manifest.num_flushed:,} values became zero"
    print(
        f"{arguments.out}: {manifest.num_params:,} parameters, {manifest.dtype}, {show.size(manifest.num_bytes)}"
        f"{flushed}, {took}"
    )
    return 0


def _choices(arguments: Namespace, checkpoint: Place) -> Choices:
    from .checkpoints.zero.places import place_of
    from .checkpoints.zero.work import Choices

    return Choices(
        dtype=arguments.dtype,
        max_shard_bytes=int(arguments.max_shard_gb * 1e9),
        num_workers=arguments.workers or len(os.sched_getaffinity(0)),
        overflow=arguments.overflow,
        is_merged=arguments.adapter == "merge",
        base_dir=place_of(arguments.base) if arguments.base else None,
        copy_from=place_of(arguments.copy_from) if arguments.copy_from else _config_dir(checkpoint),
        has_statistics=not arguments.no_statistics,
        is_verified=arguments.verify,
    )


def _show_cost(arguments: Namespace, source: Source, choices: Choices) -> int:
    from .checkpoints.zero.cost import cost_of
    from .checkpoints.zero.work import shards_of

    cost = cost_of(
        shards_of(source, choices),
        num_tasks=arguments.shard[1],
        num_workers=choices.num_workers,
        bytes_per_second=arguments.disk_gbs * 1e9,
    )
    print(
        show.columns(
            [
                ["read", f"{show.size(cost.read_bytes)} of {cost.num_files:,} files"],
                ["write", f"{show.size(cost.written_bytes)} in {cost.num_shards:,} weight files"],
                ["tasks", f"{cost.num_tasks:,}, the largest moves {show.size(cost.largest_task_bytes)}"],
                ["memory", f"{show.size(cost.memory_bytes)} a task"],
                ["time", f"{cost.seconds:,.1f} s at {arguments.disk_gbs:g} GB/s a task"],
            ]
        )
    )
    return 0


def _predictions_merge(arguments: Namespace) -> int:
    from .jobs.predictions.gather import merge_units
    from .jobs.predictions.shards import merge_shards

    paths, out = [Path(path).expanduser() for path in arguments.paths], Path(arguments.out).expanduser().absolute()
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise NotFoundError(f"{', '.join(missing)}: no such file or folder")
    _check_export(arguments.export, out)
    if len(paths) == 1 and (paths[0] / "layout.json").is_file():
        print(merge_units(paths[0], out))
        return _export(out, arguments.export)
    shards = [
        file
        for path in paths
        for file in (sorted(path.glob("*.jsonl")) or sorted(path.glob("*.csv")) if path.is_dir() else [path])
    ]
    if not shards:
        raise NotFoundError(f"{', '.join(arguments.paths)}: no .jsonl or .csv shards there")
    print(merge_shards(shards, out, num_rows=arguments.rows, index_field=arguments.index))
    return _export(out, arguments.export)


def _check_export(export: str | None, out: Path) -> None:
    if export is None:
        return
    if Path(export).suffix not in (".csv", ".parquet"):
        raise UsageError(f"--export {export!r} has an unknown format; known: .csv, .parquet")
    if out.suffix != ".jsonl":
        raise UsageError(f"--export needs --out to be a .jsonl file, and it is {out.name!r}")


def _export(merged: Path, export: str | None) -> int:
    """Write the merged rows once more as a table, where one is asked for."""
    from .jobs.predictions.export import write_csv, write_parquet

    if export is not None:
        path = Path(export).expanduser().absolute()
        (write_csv if path.suffix == ".csv" else write_parquet)(merged, path)
        print(path)
    return 0


def _predictions_score(arguments: Namespace) -> int:
    from .jobs.predictions.scores import score_with_baseline
    from .recipes.rows import read_rows

    for path in (arguments.path, arguments.data):
        if not Path(path).is_file():
            raise NotFoundError(f"{path!r} does not exist")
    predictions, rows = list(read_rows(Path(arguments.path))), list(read_rows(Path(arguments.data)))
    for row, column, path in ((predictions, arguments.field, arguments.path), (rows, arguments.target, arguments.data)):
        bad = next((number for number, one in enumerate(row, 1) if one.get(column) is None), None)
        if bad is not None:
            raise UsageError(f"row {bad} of {path} has no {column!r}; it has: {', '.join(row[bad - 1])}")
    if any("index" in row and row["index"] != number for number, row in enumerate(predictions)):
        raise UsageError(f"{arguments.path} is not in row order; `sousbatch predictions merge` puts it in order")
    scores = score_with_baseline(
        [str(row[arguments.field]) for row in predictions],
        [str(row[arguments.target]) for row in rows],
        [str(row.get(arguments.input, "")) for row in rows],
        metrics=["character_accuracy", "cer", "exact_match", "rouge1", "rouge2", "rougeL"],
        tokenizer=arguments.tokenizer,
    )
    print(json.dumps(scores, indent=1) if arguments.json else show.scores(scores))
    return 0


_HANDLERS: dict[str, Callable[[Namespace], int]] = {
    "recipes list": _recipes_list,
    "recipes show": _recipes_show,
    "plan": _plan,
    "submit": _submit,
    "status": _status,
    "logs": _logs,
    "cancel": _cancel,
    "resume": _resume,
    "clean": _clean,
    "doctor": _doctor,
    "checkpoints list": _checkpoints_list,
    "checkpoints verify": _checkpoints_verify,
    "checkpoints consolidate": _checkpoints_consolidate,
    "predictions merge": _predictions_merge,
    "predictions score": _predictions_score,
}
