"""What the verbs of `sousbatch checkpoints` do."""

from __future__ import annotations

import json
import os
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import show
from .errors import NotFoundError, UsageError
from .rundir import RunPaths, find_run

if TYPE_CHECKING:
    from .checkpoints.retention import Policy
    from .checkpoints.rotate import Done, Means
    from .checkpoints.zero.places import Place
    from .checkpoints.zero.source import Source
    from .checkpoints.zero.work import Choices


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


def listing(arguments: Namespace) -> int:
    from .checkpoints.commit import list_checkpoints

    found = [checkpoint for folder in _checkpoint_dirs(arguments.path) for checkpoint in list_checkpoints(folder)]
    if arguments.json:
        print(json.dumps([vars(one) | {"path": str(one.path)} for one in found], indent=1))
    else:
        print(show.checkpoints(found) if found else f"no checkpoints in {arguments.path}")
    return 0


def verify(arguments: Namespace) -> int:
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


def prune(arguments: Namespace) -> int:
    from .checkpoints.rotate import prune

    found = [(folder, *_policy_of(folder, arguments)) for folder in _checkpoint_dirs(arguments.path)]
    if not found:
        raise NotFoundError(f"no checkpoints in {arguments.path}")
    problems = 0
    for folder, policy, means in found:
        for verdict, done in prune(folder, policy, means, is_dry=arguments.dry_run):
            print(show.verdict(verdict, done))
            if done is not None:
                _record(folder, done)
                problems += bool(done.problem)
    return 1 if problems else 0


def _record(folder: Path, done: Done) -> None:
    """Tell the run that *folder* belongs to, if any, what became of a checkpoint; its report shows that."""
    from . import ledger
    from .checkpoints.budget import held_bytes

    paths = RunPaths(root=folder.parent.parent)
    if not paths.ledger_dir.is_dir() or folder != paths.checkpoints(folder.name):
        return
    client = ledger.open_client(paths.ledger_dir)
    client.write(
        done.outcome,
        stage=folder.name,
        step=done.checkpoint.step,
        attempt=done.checkpoint.attempt,
        content=done.checkpoint.content,
        num_bytes=done.checkpoint.num_bytes,
        held_bytes=held_bytes(folder),
        left_bytes=done.left_bytes,
        reason=done.reason,
        message=done.problem,
    )
    client.close()


def _policy_of(folder: Path, arguments: Namespace) -> tuple[Policy, Means]:
    """Return the policy of the run that *folder* belongs to, else the usual one, with what the command line says."""
    from .checkpoints.retention import Policy
    from .checkpoints.rotate import Means
    from .recipes.plan import read_plan
    from .recipes.stages import stage_view
    from .recipes.storage import means_of, policy_of

    policy, means = Policy(), Means(check_fence=lambda: None)
    paths = RunPaths(root=folder.parent.parent)
    if paths.plan.is_file() and folder == paths.checkpoints(folder.name):
        view = stage_view(read_plan(paths.plan).recipe, folder.name)
        policy, means = policy_of(view), means_of(view, paths, folder.name, lambda: None)
    asked = {"keep_last": arguments.keep_last, "keep_best": arguments.keep_best, "thins": arguments.thin or None}
    return replace(policy, **{key: value for key, value in asked.items() if value is not None}), means


def _config_dir(checkpoint: Place) -> Place | None:
    """Return the folder with the config and tokenizer of *checkpoint*: itself or the one above, if any."""
    return next((place for place in (checkpoint, checkpoint.parent) if (place / "config.json").is_file()), None)


def consolidate(arguments: Namespace) -> int:
    from .checkpoints.sound import open_sound
    from .checkpoints.zero.places import place_of
    from .checkpoints.zero.write import consolidate_part

    if arguments.adapter == "keep" and arguments.base:
        raise UsageError("--adapter keep and --base contradict each other; leave out one of them")
    checkpoint, out = place_of(arguments.path), place_of(arguments.out)
    choices = _choices(arguments, checkpoint)
    source = open_sound(checkpoint)
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
