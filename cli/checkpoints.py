"""What the verbs of `sousbatch checkpoints` do."""

from __future__ import annotations

import json
import os
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DamagedError, IncompleteError, NotFoundError, RunError, UsageError
from ..run_folder import RunPaths, find_run
from . import show

if TYPE_CHECKING:
    from ..checkpoints.commit import Checkpoint
    from ..checkpoints.consolidation.manifest import Manifest
    from ..checkpoints.consolidation.plan import Choices
    from ..checkpoints.formats.tensors import Source
    from ..checkpoints.rotation import Done, Rules
    from ..remote import Place


def _checkpoint_dirs(text: str) -> list[Path]:
    """Return the folders of checkpoints that *text* means: a folder, or those of a run's train stages."""
    folder = Path(text).expanduser()
    above = folder.resolve().parent
    if folder.resolve().name == "checkpoints" and (above / "plan.json").is_file():
        folder = above
    if folder.is_dir() and not (folder / "plan.json").is_file():
        return [folder]
    try:
        base = find_run(str(folder), newest=True).root / "checkpoints"
    except NotFoundError as error:
        raise NotFoundError(f"{text!r} is neither a folder nor a run; `sousbatch status` lists the runs") from error
    return sorted(path for path in base.iterdir() if path.is_dir()) if base.is_dir() else []


def listing(arguments: Namespace) -> int:
    from ..checkpoints.commit import list_checkpoints

    found = [checkpoint for folder in _checkpoint_dirs(arguments.path) for checkpoint in list_checkpoints(folder)]
    holds = [_holds(checkpoint) for checkpoint in found]
    if arguments.json:
        rows = zip(found, holds, strict=True)
        print(json.dumps([vars(one) | {"path": str(one.path), "content": content} for one, content in rows], indent=1))
    else:
        print(show.checkpoints(found, holds) if found else f"no checkpoints in {arguments.path}")
    return 0


def _holds(checkpoint: Checkpoint) -> str:
    """Return what a checkpoint holds; of another trainer's, whether that can be consolidated."""
    from ..checkpoints.formats.detect import open_source

    if checkpoint.status != "foreign":
        return checkpoint.content
    try:
        source = open_source(checkpoint.path)
    except IncompleteError:
        return "incomplete"
    except DamagedError:
        return "damaged"
    except (UsageError, NotFoundError):
        return "unknown"
    if source.content == "adapter":
        return "adapter"
    return "full" if source.kind.startswith(("DeepSpeed", "torch")) else "weights"


def verify(arguments: Namespace) -> int:
    from ..checkpoints.commit import list_checkpoints

    found = [checkpoint for folder in _checkpoint_dirs(arguments.path) for checkpoint in list_checkpoints(folder)]
    bad = 0
    for checkpoint in found:
        problems, unread = _look_through(checkpoint)
        bad += bool(problems)
        print(f"{checkpoint.path}: " + ("; ".join(problems) if problems else f"whole{unread}"))
    if not found:
        raise NotFoundError(f"no checkpoints in {arguments.path}")
    return 1 if bad else 0


def _look_through(checkpoint: Checkpoint) -> tuple[tuple[str, ...], str]:
    """Return what is wrong with a checkpoint, and of another trainer's why it cannot be read here, if so."""
    from ..checkpoints.commit import verify
    from ..checkpoints.formats.detect import open_source

    problems = verify(checkpoint)
    if problems or checkpoint.status != "foreign":
        return problems, ""
    try:
        source = open_source(checkpoint.path)
    except RunError as error:
        return (str(error),), ""
    except UsageError as error:
        return (), f", as far as its files tell; it cannot be consolidated here: {error}"
    has_checksums = any(str(segment.path).endswith(".pt") for one in source.tensors for segment in one.segments)
    return (), "" if has_checksums else ", as far as the headers of its model tell: no checksum was compared"


def prune(arguments: Namespace) -> int:
    from ..checkpoints.rotation import prune

    found = [(folder, _rules_of(folder, arguments)) for folder in _checkpoint_dirs(arguments.path)]
    if not found:
        raise NotFoundError(f"no checkpoints in {arguments.path}")
    problems = 0
    for folder, rules in found:
        for verdict, done in prune(folder, rules, is_dry=arguments.dry_run):
            print(show.verdict(verdict, done))
            if done is not None and verdict.checkpoint.status == "committed":
                _record(folder, done)
                problems += bool(done.problem)
    return 1 if problems else 0


def _record(folder: Path, done: Done) -> None:
    """Tell the run that *folder* belongs to, if any, what became of a checkpoint; its report shows that."""
    from .. import ledger
    from ..checkpoints.capacity.reservations import held_bytes

    paths = _run_of(folder)
    if paths is None or not paths.ledger_dir.is_dir():
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


def _run_of(folder: Path) -> RunPaths | None:
    """Return the run whose stage writes its checkpoints to *folder*, if any."""
    folder = folder.resolve()
    paths = RunPaths(root=folder.parent.parent)
    return paths if paths.plan.is_file() and folder == paths.checkpoints(folder.name) else None


def _rules_of(folder: Path, arguments: Namespace) -> Rules:
    """Return the rules of the run that *folder* belongs to, else the usual ones, with what the command line says."""
    from ..checkpoints.retention.decisions import Policy
    from ..checkpoints.rotation import Means, Rules
    from ..recipes.forecast.storage import means_of, policy_of, weights_of
    from ..recipes.plan import read_plan

    rules = Rules(policy=Policy(), means=Means(check_fence=lambda: None))
    paths = _run_of(folder)
    if paths is not None:
        plan = read_plan(paths.plan)
        settings = plan.stage(folder.name).settings
        rules = Rules(
            policy=policy_of(settings),
            means=means_of(settings, paths, folder.name, lambda: None),
            weights_bytes=weights_of(settings, plan.inputs.model).num_bytes,
            owns_leftovers=True,
        )
    asked = {"keep_last": arguments.keep_last, "keep_best": arguments.keep_best, "thins": arguments.thin or None}
    given = {key: value for key, value in asked.items() if value is not None}
    return replace(rules, policy=replace(rules.policy, **given))


def _config_dir(checkpoint: Place) -> Place | None:
    """Return the folder with the config and tokenizer of *checkpoint*: itself or the one above, if any."""
    return next((place for place in (checkpoint, checkpoint.parent) if (place / "config.json").is_file()), None)


def consolidate(arguments: Namespace) -> int:
    from ..checkpoints.consolidation.consolidate import consolidate_part, refuse_within
    from ..checkpoints.consolidation.manifest import MANIFEST_NAME
    from ..remote import place_of

    _refuse_contradictions(arguments)
    checkpoint, out = place_of(arguments.path), place_of(arguments.out)
    source = _open(arguments.path, checkpoint, is_raw=arguments.adapter == "raw")
    choices = _choices(arguments, checkpoint)
    if arguments.dry_run:
        return _show_cost(arguments, source, choices)
    refuse_within(checkpoint, out)
    was_there = (out / MANIFEST_NAME).is_file()
    started = time.monotonic()
    part, num_parts = arguments.shard
    try:
        with show.byte_progress("consolidating") as progress:
            manifest = consolidate_part(
                source,
                out.absolute() if isinstance(out, Path) else out,
                choices,
                part=part,
                num_parts=num_parts,
                begins_anew=num_parts == 1,
                progress=progress,
            )
    except KeyboardInterrupt:
        print(f"sousbatch: {arguments.out}: interrupted; the same command goes on where it stood", file=sys.stderr)
        raise
    took = f"{time.monotonic() - started:.1f} s"
    if manifest is None:
        print(f"{arguments.out}: part {part} of {num_parts} is written, others are missing, {took}")
        return 0
    print(f"{arguments.out}: {'was there already: ' * was_there}{_made(manifest, choices)}, {took}")
    if manifest.content == "model" and all(file.name != "config.json" for file in manifest.files):
        print(f"sousbatch: warning: {_without_config(arguments)}", file=sys.stderr)
    return 0


def _refuse_contradictions(arguments: Namespace) -> None:
    if arguments.out.startswith("memory:"):
        raise UsageError(f"{arguments.out}: is gone when this command ends; name a folder or a store's URL")
    if arguments.adapter in ("keep", "raw") and arguments.base:
        raise UsageError(f"--adapter {arguments.adapter} and --base contradict each other; leave out one of them")
    if arguments.adapter == "raw" and arguments.copy_from:
        raise UsageError(
            "--adapter raw writes no config.json, for with one from_pretrained would make weights up; leave out "
            "--copy-from"
        )


def _without_config(arguments: Namespace) -> str:
    """Return why a model's folder has no config.json, and what follows."""
    if arguments.adapter == "raw":
        return f"{arguments.out} holds all weights as they stand and no config.json; from_pretrained cannot load it"
    return (
        f"no config.json lies beside {arguments.path}, so the names of the weights were not compared and "
        f"from_pretrained cannot load {arguments.out}; remove it and consolidate again with --copy-from DIR, the "
        "folder of the model's config"
    )


def _made(manifest: Manifest, choices: Choices) -> str:
    """Return what a model is, and what its dtype could not keep."""
    text = f"{manifest.num_params:,} parameters, {manifest.dtype}, {show.size(manifest.num_bytes)}"
    clamped = sum(manifest.num_overflowing.values())
    if clamped and choices.overflow == "clamp":
        text += f", {clamped:,} values were clamped"
    return text + ("" if manifest.num_flushed is None else f", {manifest.num_flushed:,} values became zero")


def _open(text: str, checkpoint: Place, *, is_raw: bool) -> Source:
    """Open the checkpoint that *text* names; where it means a run, or a folder of several, name the newest."""
    from ..checkpoints.commit import list_checkpoints
    from ..checkpoints.integrity import open_sound

    try:
        return open_sound(checkpoint, is_raw=is_raw)
    except NotFoundError as error:
        try:
            found = [one for folder in _checkpoint_dirs(text) for one in list_checkpoints(folder)]
        except NotFoundError:
            raise error from None
        whole = [one for one in found if one.status != "torn" and one.path != checkpoint]
        if not whole:
            raise
        newest = max(whole, key=lambda one: (one.status == "committed", one.order))
        raise UsageError(
            f"{text}: is no checkpoint, but holds {len(whole)}; give one, the newest is {newest.path}"
        ) from error


def _choices(arguments: Namespace, checkpoint: Place) -> Choices:
    from ..checkpoints.consolidation.plan import Choices
    from ..remote import place_of

    has_config = arguments.adapter != "raw"
    return Choices(
        dtype=arguments.dtype,
        max_shard_bytes=int(arguments.max_shard_gb * 1e9),
        num_workers=arguments.workers or len(os.sched_getaffinity(0)),
        overflow=arguments.overflow,
        is_merged=arguments.adapter == "merge",
        base_dir=place_of(arguments.base) if arguments.base else None,
        copy_from=place_of(arguments.copy_from)
        if arguments.copy_from
        else _config_dir(checkpoint)
        if has_config
        else None,
        is_compared=has_config and not arguments.dry_run,
        has_statistics=not arguments.no_statistics,
        is_verified=arguments.verify,
    )


def _show_cost(arguments: Namespace, source: Source, choices: Choices) -> int:
    from ..checkpoints.consolidation.cost import cost_of
    from ..checkpoints.consolidation.plan import shards_of

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
