"""`sousbatch checkpoints`: list, verify and prune.

`consolidate` has a module of its own.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DamagedError, IncompleteError, NotFoundError, RunError, UsageError
from ..run_folder import run_of_checkpoints
from ..run_index import find_checkpoint_dirs
from .consolidate import define_consolidate
from .parser import Parser, add_command, add_verbs, count, define, positive_count
from .tables import format_size, format_table

if TYPE_CHECKING:
    from ..checkpoints.commit import Checkpoint
    from ..checkpoints.retention.decisions import RetentionDecision
    from ..checkpoints.rotation import PruneOptions, RetentionResult


def define_checkpoints(parser: Parser) -> None:
    """Define `checkpoints` and its verbs."""
    define(
        parser,
        None,
        "checkpoints list runs/hangul-restoration/3f2a",
        "checkpoints prune 3f2a --dry-run",
        "checkpoints consolidate checkpoint-500 model",
    )
    verbs = add_verbs(parser)
    listing = add_command(verbs, "list", "list the checkpoints of a run or a folder")
    define(listing, _list, "checkpoints list 3f2a")
    listing.add_argument("--json", action="store_true", help="as JSON")
    verify = add_command(verbs, "verify", "read every checkpoint and report what is damaged")
    define(verify, _verify, "checkpoints verify 3f2a")
    prune = add_command(
        verbs,
        "prune",
        "remove the checkpoints that the recipe's policy does not keep; a file named pinned in one keeps it",
    )
    define(prune, _prune, "checkpoints prune 3f2a --dry-run", "checkpoints prune 3f2a --keep-best 3")
    _add_prune_options(prune)
    for one in (listing, verify, prune):
        one.add_argument("path", metavar="PATH", help="folder, or a run")
    define_consolidate(
        add_command(verbs, "consolidate", "make a half-precision model of a DeepSpeed or FSDP checkpoint")
    )


def _add_prune_options(prune: Parser) -> None:
    prune.add_argument(
        "--dry-run", action="store_true", help="only show what would happen to each, and what that frees"
    )
    prune.add_argument(
        "--keep-last",
        type=positive_count,
        metavar="N",
        help="how many of the newest stay (default: the recipe's, else 1)",
    )
    prune.add_argument(
        "--keep-best", type=count, metavar="N", help="how many of the best stay (default: the recipe's, else 1)"
    )
    prune.add_argument(
        "--thin", action="store_true", help="strip to its weights what is kept for another reason than being new"
    )


def _list(arguments: Namespace) -> int:
    from ..checkpoints.commit import list_checkpoints

    found = [checkpoint for folder in find_checkpoint_dirs(arguments.path) for checkpoint in list_checkpoints(folder)]
    holds = [_holds(checkpoint) for checkpoint in found]
    if arguments.json:
        rows = zip(found, holds, strict=True)
        print(json.dumps([vars(one) | {"path": str(one.path), "content": content} for one, content in rows], indent=1))
    else:
        print(_as_text(found, holds) if found else f"no checkpoints in {arguments.path}")
    return 0


def _holds(checkpoint: Checkpoint) -> str:
    """Return what a checkpoint holds.

    For a checkpoint of another trainer, return whether it can be consolidated.
    """
    from ..checkpoints.formats.detect import open_source

    if checkpoint.status != "third-party":
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


def _verify(arguments: Namespace) -> int:
    from ..checkpoints.commit import list_checkpoints

    found = [checkpoint for folder in find_checkpoint_dirs(arguments.path) for checkpoint in list_checkpoints(folder)]
    bad = 0
    for checkpoint in found:
        problems, unread = _look_through(checkpoint)
        bad += bool(problems)
        print(f"{checkpoint.path}: " + ("; ".join(problems) if problems else f"intact{unread}"))
    if not found:
        raise NotFoundError(f"no checkpoints in {arguments.path}")
    return 1 if bad else 0


def _look_through(checkpoint: Checkpoint) -> tuple[tuple[str, ...], str]:
    """Return what is wrong with a checkpoint.

    For a checkpoint of another trainer, return also why it cannot be read here, if so.
    """
    from ..checkpoints.commit import verify
    from ..checkpoints.formats.detect import open_source

    problems = verify(checkpoint)
    if problems or checkpoint.status != "third-party":
        return problems, ""
    try:
        source = open_source(checkpoint.path)
    except RunError as error:
        return (str(error),), ""
    except UsageError as error:
        return (), f", judged by its files alone; it cannot be consolidated here: {error}"
    has_checksums = any(str(segment.path).endswith(".pt") for one in source.tensors for segment in one.segments)
    return (), "" if has_checksums else ", judged by the headers of its model alone: no checksum was compared"


def _prune(arguments: Namespace) -> int:
    from ..checkpoints.rotation import prune

    found = [(folder, _prune_options(folder, arguments)) for folder in find_checkpoint_dirs(arguments.path)]
    if not found:
        raise NotFoundError(f"no checkpoints in {arguments.path}")
    problems = 0
    for folder, options in found:
        for decision, done in prune(folder, options, is_dry=arguments.dry_run):
            print(_as_line(decision, done))
            if done is not None and decision.checkpoint.status == "committed":
                _record(folder, done)
                problems += bool(done.problem)
    return 1 if problems else 0


def _record(folder: Path, done: RetentionResult) -> None:
    """Record what became of a checkpoint in the run that *folder* belongs to.

    Without such a run nothing is recorded. The run's report shows the record.
    """
    from .. import ledger
    from ..checkpoints.capacity.allocation import measure_usage

    paths = run_of_checkpoints(folder)
    if paths is None or not paths.ledger_dir.is_dir():
        return
    client = ledger.open_client(paths.ledger_dir)
    client.write(done.event(stage=folder.name, held_bytes=measure_usage(folder)))
    client.close()


def _prune_options(folder: Path, arguments: Namespace) -> PruneOptions:
    """Return how to prune *folder*.

    It is how the run that *folder* belongs to prunes, else the usual way, with what the command line says.
    """
    from ..checkpoints.retention.policies import standard_rules
    from ..checkpoints.rotation import PruneOptions, RemovalOptions
    from ..recipes.forecast.storage import weights_of
    from ..recipes.plan import read_plan
    from ..recipes.retention import removal_options, retention_rules

    asked = {"keep_last": arguments.keep_last, "keep_best": arguments.keep_best, "thin": arguments.thin or None}
    given = {key: value for key, value in asked.items() if value is not None}
    paths = run_of_checkpoints(folder)
    if paths is None:
        return PruneOptions(
            rules=standard_rules(strips=given.pop("thin", False), **given),
            removal=RemovalOptions(check_fence=lambda: None),
        )
    plan = read_plan(paths.plan)
    settings = plan.stage(folder.name).settings
    settings = replace(settings, checkpoints=replace(settings.checkpoints, **given))
    return PruneOptions(
        rules=retention_rules(settings),
        removal=removal_options(settings, paths, folder.name, lambda: None),
        weights_bytes=weights_of(settings, plan.inputs.model).num_bytes,
        owns_leftovers=True,
    )


def _as_text(found: Sequence[Checkpoint], holds: Sequence[str]) -> str:
    """Return one line a checkpoint, with what it holds."""
    rows = [
        [
            one.step,
            one.attempt,
            "pinned" if one.is_pinned else one.status,
            content,
            format_size(one.num_bytes),
            "" if one.metric is None else f"{one.metric:.4g}",
            one.path,
        ]
        for one, content in zip(found, holds, strict=True)
    ]
    return format_table(rows, header=("step", "attempt", "status", "holds", "size", "metric", "path"))


def _as_line(value: RetentionDecision, done: RetentionResult | None) -> str:
    """Return one line: what happens, or happened, to a checkpoint, and why."""
    one = value.checkpoint
    if done is not None and done.problem:
        return f"{one.path}: kept: {done.problem}"
    frees_bytes = value.frees_bytes if done is None else one.num_bytes - done.left_bytes
    frees = f", {format_size(frees_bytes)}" if value.action != "keep" else ""
    return f"{one.path}: {value.action if done is None else done.outcome} ({value.reason}{frees})"
