"""`sousbatch checkpoints consolidate`.

A checkpoint becomes a half-precision model.
"""

from __future__ import annotations

import os
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from ..checkpoints.consolidation.options import (
    DTYPE_HELP,
    MAX_SHARD_GB,
    MAX_SHARD_HELP,
    OVERFLOW_HELP,
    ConsolidateOptions,
    Overflow,
)
from ..checkpoints.formats.tensors import FloatDtype
from ..errors import NotFoundError, UsageError
from ..run_index import find_checkpoint_dirs
from .parser import Parser, count, define, positive_number, share
from .progress import byte_progress
from .tables import format_size, format_table

if TYPE_CHECKING:
    from ..checkpoints.consolidation.manifest import Manifest
    from ..checkpoints.formats.tensors import Source
    from ..remote import Place


def define_consolidate(parser: Parser) -> None:
    """Define `checkpoints consolidate`."""
    defaults = ConsolidateOptions()
    define(
        parser,
        _consolidate,
        "checkpoints consolidate checkpoint-500 model",
        "checkpoints consolidate checkpoint-500 model --dtype bfloat16 --verify",
        "checkpoints consolidate checkpoint-500 model --shard 0/80",
    )
    parser.add_argument("path", metavar="CKPT", help="checkpoint folder or URL")
    parser.add_argument("out", metavar="OUT", help="folder or URL to make")
    parser.add_argument(
        "--dtype",
        choices=get_args(FloatDtype),
        default=defaults.dtype,
        help=f"{DTYPE_HELP} (default {defaults.dtype})",
    )
    parser.add_argument(
        "--max-shard-gb",
        type=positive_number,
        default=MAX_SHARD_GB,
        help=f"{MAX_SHARD_HELP} (default {MAX_SHARD_GB:g})",
    )
    parser.add_argument(
        "--overflow",
        choices=get_args(Overflow),
        default=defaults.overflow,
        help=OVERFLOW_HELP,
    )
    parser.add_argument(
        "--adapter",
        choices=["merge", "keep", "raw"],
        help="an adapter: write the model that it makes of its base, or the adapter alone (default: keep); raw: all "
        "weights under their own names, as zero_to_fp32.py does, and no config.json",
    )
    parser.add_argument("--base", metavar="DIR", help="the model that an adapter was trained on; merges it")
    parser.add_argument(
        "--copy-from", metavar="DIR", help="take config and tokenizer from here (default: the checkpoint)"
    )
    _add_execution_options(parser)


def _add_execution_options(parser: Parser) -> None:
    parser.add_argument("--workers", type=count, default=0, help="threads (default: one per core)")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read back what was written, and compare it by another path",
    )
    parser.add_argument(
        "--shard",
        type=share,
        default=(0, 1),
        metavar="I/N",
        help="write every N-th weight file from the I-th on, counted from 0: a task of an array; "
        "the last to end makes OUT appear",
    )
    parser.add_argument(
        "--no-statistics",
        action="store_true",
        help="check no checksums, take no digests, count no zeros",
    )
    parser.add_argument("--dry-run", action="store_true", help="show what it costs, from headers alone; write nothing")
    parser.add_argument(
        "--disk-gbs",
        type=positive_number,
        default=1.0,
        metavar="GB/S",
        help="for --dry-run: what one task moves (default 1)",
    )


def _consolidate(arguments: Namespace) -> int:
    from ..checkpoints.consolidation.consolidate import consolidate, refuse_within
    from ..checkpoints.consolidation.manifest import MANIFEST_NAME
    from ..remote import parse_place

    _refuse_contradictions(arguments)
    checkpoint, out = parse_place(arguments.path), parse_place(arguments.out)
    source = _open(arguments.path, checkpoint, is_raw=arguments.adapter == "raw")
    options = _options(arguments, checkpoint)
    if arguments.dry_run:
        return _show_cost(arguments, source, options)
    refuse_within(checkpoint, out)
    was_there = (out / MANIFEST_NAME).is_file()
    started = time.monotonic()
    part, num_parts = arguments.shard
    try:
        with byte_progress("consolidating") as progress:
            manifest = consolidate(
                source,
                out.absolute() if isinstance(out, Path) else out,
                options,
                part=part,
                num_parts=num_parts,
                may_restart=num_parts == 1,
                progress=progress,
            )
    except KeyboardInterrupt:
        print(f"sousbatch: {arguments.out}: interrupted; the same command resumes it", file=sys.stderr)
        raise
    took = f"{time.monotonic() - started:.1f} s"
    if manifest is None:
        print(f"{arguments.out}: part {part} of {num_parts} is written, others are missing, {took}")
        return 0
    print(f"{arguments.out}: {'exists already: ' * was_there}{_made(manifest, options)}, {took}")
    if manifest.content == "model" and all(file.name != "config.json" for file in manifest.files):
        print(f"sousbatch: warning: {_without_config(arguments)}", file=sys.stderr)
    return 0


def _refuse_contradictions(arguments: Namespace) -> None:
    if arguments.out.startswith("memory:"):
        raise UsageError(f"{arguments.out}: would be gone when this command ends; name a folder or another URL")
    if arguments.adapter in ("keep", "raw") and arguments.base:
        raise UsageError(f"--adapter {arguments.adapter} and --base contradict each other; leave out one of them")
    if arguments.adapter == "raw" and arguments.copy_from:
        raise UsageError(
            "--adapter raw writes no config.json, since from_pretrained would invent weights with one; leave out "
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


def _made(manifest: Manifest, options: ConsolidateOptions) -> str:
    """Return what a model is, and what its dtype could not keep."""
    text = f"{manifest.num_params:,} parameters, {manifest.dtype}, {format_size(manifest.num_bytes)}"
    clamped = sum(manifest.num_overflowing.values())
    if clamped and options.overflow == "clamp":
        text += f", {clamped:,} values were clamped"
    return text + ("" if manifest.num_flushed is None else f", {manifest.num_flushed:,} values became zero")


def _open(text: str, checkpoint: Place, *, is_raw: bool) -> Source:
    """Open the checkpoint that *text* names.

    Where *text* means a run, or a folder of several checkpoints, name the newest.
    """
    from ..checkpoints.commit import list_checkpoints
    from ..checkpoints.integrity import open_verified

    try:
        return open_verified(checkpoint, is_raw=is_raw)
    except NotFoundError as error:
        try:
            found = [one for folder in find_checkpoint_dirs(text) for one in list_checkpoints(folder)]
        except NotFoundError:
            raise error from None
        intact = [one for one in found if one.status != "incomplete" and one.path != checkpoint]
        if not intact:
            raise
        newest = max(intact, key=lambda one: (one.status == "committed", one.order))
        raise UsageError(
            f"{text}: is not a checkpoint, but holds {len(intact)}; name one, the newest is {newest.path}"
        ) from error


def _options(arguments: Namespace, checkpoint: Place) -> ConsolidateOptions:
    from ..checkpoints.formats.companion_files import config_dir
    from ..remote import parse_place

    has_config = arguments.adapter != "raw"
    return ConsolidateOptions(
        dtype=arguments.dtype,
        max_shard_bytes=int(arguments.max_shard_gb * 1e9),
        num_workers=arguments.workers or len(os.sched_getaffinity(0)),
        overflow=arguments.overflow,
        is_merged=arguments.adapter == "merge",
        base_dir=parse_place(arguments.base) if arguments.base else None,
        copy_from=parse_place(arguments.copy_from)
        if arguments.copy_from
        else config_dir(checkpoint)
        if has_config
        else None,
        is_compared=has_config and not arguments.dry_run,
        has_statistics=not arguments.no_statistics,
        is_verified=arguments.verify,
    )


def _show_cost(arguments: Namespace, source: Source, options: ConsolidateOptions) -> int:
    from ..checkpoints.consolidation.cost import estimate_cost
    from ..checkpoints.consolidation.plan import plan_output

    cost = estimate_cost(
        plan_output(source, options),
        num_tasks=arguments.shard[1],
        num_workers=options.num_workers,
        bytes_per_second=arguments.disk_gbs * 1e9,
    )
    print(
        format_table(
            [
                ["read", f"{format_size(cost.read_bytes)} of {cost.num_files:,} files"],
                ["write", f"{format_size(cost.written_bytes)} in {cost.num_shards:,} weight files"],
                ["tasks", f"{cost.num_tasks:,}, the largest moves {format_size(cost.largest_task_bytes)}"],
                ["memory", f"{format_size(cost.memory_bytes)} a task"],
                ["time", f"{cost.seconds:,.1f} s at {arguments.disk_gbs:g} GB/s a task"],
            ]
        )
    )
    return 0
