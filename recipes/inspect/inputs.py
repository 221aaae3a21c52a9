"""Inspect a recipe's model, data and runs directory.

This is the only effect before compiling.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path

from ... import files
from ...checkpoints.capacity import reservations
from ...checkpoints.capacity.limits import nearest_existing, read_limits, tightest
from ...errors import PlanError, UsageError
from ...remote import parse_place
from ...tracking.base import OPTIONAL, TRACKERS
from ..facts import DiskSpace, Inputs, Lengths, ModelFacts, Prepared, SplitFacts, TokenFacts, UsedFile
from ..labels import with_labels
from ..schema import Recipe
from ..schema.validate import to_plain
from ..stages import resolve_stages, with_tokens
from ..tasks import task_of
from .cache import code_digest, collect
from .data import read_splits
from .labels import read_labels
from .lengths import count_lengths
from .model import ModelPlaces, find_model, read_config, read_model
from .prepared import Progress, prepare_splits
from .scorers import scoring_reasons
from .tokens import find_tokens
from .used_files import read_used_files
from .versions import versions_of


def inspect(
    recipe: Recipe,
    store: Path,
    progress: Progress | None = None,
    dead_runs: Collection[Path] = (),
    variants: Sequence[Recipe] = (),
    ahead: Sequence[Recipe] = (),
) -> Inputs:
    """Return what *recipe* works on.

    *store* is the folder that will hold its runs; *progress* gets the number of rows read. The folders of *dead_runs*,
    whose jobs have all ended, promise nothing more than they hold. The *variants* of the recipe read the same; what
    they train of the model is looked at, too. Those *ahead* come next: what they train of the same model is looked at
    in the same process, and remembered.

    Raises:
        UsageError: this version does not have the task.
        PlanError: every reason why the model or the data cannot be used.
    """
    task = task_of(recipe.task)  # what it needs of model and data cannot be said of one that is refused
    reasons = list(_archive_reasons(recipe))
    places = collect(reasons, lambda: find_model(recipe))
    splits = collect(reasons, lambda: read_splits(recipe))
    code = collect(reasons, lambda: code_digest(recipe))
    prepared: tuple[Prepared, ...] | None = None
    if splits is not None and code is not None:
        prepared = collect(reasons, lambda: prepare_splits(recipe, splits, code, progress))
    used: dict[str, UsedFile] | None = None
    if splits is not None and prepared is not None:
        used = collect(reasons, lambda: read_used_files(recipe, splits, prepared))
    labels: tuple[str, ...] | None = ()
    if task.has_labels and places is not None and splits is not None and prepared is not None:
        labels = collect(reasons, lambda: read_labels(recipe, read_config(recipe, places), splits, prepared))
    alike = [[with_labels(one, labels or ()) for one in part] for part in ((recipe,), variants, ahead)]
    model, tokens, lengths = _read_tokens(reasons, alike, places, splits, prepared, progress)
    uses_four_bits = any(stage.settings.adapter.method == "qlora" for stage in resolve_stages(recipe).values())
    if uses_four_bits and recipe.environment.python is None and importlib.util.find_spec("bitsandbytes") is None:
        reasons.append(f"adapter.method qlora needs bitsandbytes; {sys.executable} -m pip install bitsandbytes")
    reasons += scoring_reasons(recipe)
    versions = collect(reasons, lambda: versions_of(recipe.environment))
    for name in recipe.tracking.trackers:
        collect(reasons, partial(TRACKERS.load, name))
        if name in OPTIONAL and recipe.environment.python is None and importlib.util.find_spec(name) is None:
            reasons.append(f"tracking.trackers {name} needs its package; {sys.executable} -m pip install {name}")
    unset = [name for name in recipe.environment.inherit if name not in os.environ]
    if unset:
        reasons.append(f"environment.inherit names {', '.join(unset)}, which this shell has not set; `export` it first")
    if (
        reasons
        or model is None
        or labels is None
        or splits is None
        or prepared is None
        or used is None
        or code is None
        or versions is None
    ):
        raise PlanError(list(dict.fromkeys(reasons)))
    space = measure_disk_space(store, recipe.checkpoints.store_budget_gb, dead_runs)
    return Inputs(
        model=model,
        splits=splits,
        disk_space=space,
        code_digest=code,
        versions=versions,
        lengths=lengths,
        settings_digest=settings_digest(recipe),
        prepared=prepared,
        labels=labels,
        tokens=tokens,
        used_files=used,
    )


def _read_tokens(
    reasons: list[str],
    alike: Sequence[Sequence[Recipe]],
    places: ModelPlaces | None,
    splits: dict[str, SplitFacts] | None,
    prepared: tuple[Prepared, ...] | None,
    progress: Progress | None,
) -> tuple[ModelFacts | None, TokenFacts | None, tuple[Lengths, ...]]:
    """Return the model, the tokens that are found for it, and the rows' lengths.

    *alike* are the recipe, its variants, and those ahead. What could not be seen is None; *reasons* gets why.
    """
    if places is None:
        return None, None, ()
    num_reasons, tokens = len(reasons), None
    if splits is not None and prepared is not None:
        tokens = collect(reasons, lambda: find_tokens(alike[0][0], places.tokenizer_folder, splits, prepared))
    if len(reasons) > num_reasons:
        return None, None, ()
    (recipe,), variants, ahead = ([with_tokens(one, tokens) for one in part] for part in alike)
    model = collect(reasons, lambda: read_model(recipe, places, variants, ahead))
    if model is None or splits is None or prepared is None:
        return model, tokens, ()
    lengths = collect(reasons, lambda: count_lengths(recipe, model, splits, prepared, progress))
    return model, tokens, lengths or ()


# Sections and keys that change what is read; the other keys of their sections change nothing that is.
READ_SECTIONS = ("model", "data", "adapter")
READ_KEYS = (
    *("train.split", "train.eval_split", "train.eval_rows", "train.metric_rows"),
    "checkpoints.metric",
    *("predict.split", "predict.rows", "predict.max_new_tokens", "predict.chunk_tokens"),
    *("predict.post", "predict.output"),
)


def settings_digest(recipe: Recipe) -> str:
    """Return the digest of the settings that decide what `inspect` reads of *recipe*."""
    stages = {
        name: [
            *(to_plain(getattr(stage.settings, section)) for section in READ_SECTIONS),
            to_plain(attrgetter(*READ_KEYS)(stage.settings)),
        ]
        for name, stage in resolve_stages(recipe).items()
    }
    return files.digest_of([recipe.task, to_plain(recipe.environment), stages])


def _archive_reasons(recipe: Recipe) -> Iterator[str]:
    """Return why the archive cannot be one.

    A file without a name is made in a folder; nothing is written to a URL.
    """
    for url in dict.fromkeys(stage.settings.checkpoints.archive_url for stage in resolve_stages(recipe).values()):
        if url is None:
            continue
        try:
            place = parse_place(url)
        except UsageError as error:
            yield f"checkpoints.archive_url: {error}"
            continue
        if url.startswith("memory:"):
            yield f"checkpoints.archive_url {url!r} ends with the process that writes to it; name a folder or a store"
        elif isinstance(place, Path) and not _takes_files(nearest_existing(place)):
            yield f"checkpoints.archive_url {url!r}: {nearest_existing(place)} is not a folder that you may write to"


def _takes_files(folder: Path) -> bool:
    """Say whether a file can be made in *folder*.

    Folders of /proc take none, whatever their permissions say.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def measure_disk_space(
    store: Path, store_budget_gb: float | None = None, dead_runs: Collection[Path] = ()
) -> DiskSpace:
    """Return what *store* can still take.

    That is its free space and quotas, less what its other runs are promised.
    """
    limit = tightest(read_limits(store))
    among = reservations.read_others(store, None, measures=store_budget_gb is not None, dead=dead_runs)
    promised = sum(max(0, one.promised_bytes - one.held_bytes) for one in among)
    free, source = (limit.num_bytes or 0) - promised, limit.source
    if store_budget_gb is not None:
        left = int(store_budget_gb * 1e9) - sum(max(one.promised_bytes, one.held_bytes) for one in among)
        held = (store_budget_gb * 1e9 - left) / 1e9
        budget = f"checkpoints.store_budget_gb={store_budget_gb:g}, of which other runs have {held:,.3g} GB"
        free, source = min((free, source), (left, budget))
    return DiskSpace(
        folder=str(store),
        free_bytes=free,
        free_inodes=limit.num_files or 0,
        source=source,
        promised_bytes=promised,
        num_runs=sum(one.promised_bytes > one.held_bytes for one in among),
    )
