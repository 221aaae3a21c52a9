"""Read from settings which checkpoints stay, what they hold, and how others go."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ..checkpoints.commit import Checkpoint
from ..checkpoints.consolidation.options import ConsolidateOptions
from ..checkpoints.formats.tensors import FloatDtype
from ..checkpoints.retention.policies import RetentionRules, standard_rules
from ..checkpoints.rotation import RemovalOptions
from ..run_folder import RunPaths
from .plan import Stage
from .schema import StageSettings


def retention_rules(settings: StageSettings) -> RetentionRules:
    """Return which checkpoints stay by a recipe."""
    spec = settings.checkpoints
    return standard_rules(
        keep_last=spec.keep_last,
        keep_best=num_best_kept(settings),
        keep_every_steps=spec.keep_every_steps,
        keep_steps=spec.keep_steps,
        goal=settings.goal,
        strips=spec.thin,
        archives=spec.archive_url is not None,
    )


def num_best_kept(settings: StageSettings) -> int:
    """Return how many stay for being the best; none where nothing is measured."""
    return settings.checkpoints.keep_best if settings.is_measured else 0


def removal_options(
    settings: StageSettings, paths: RunPaths, stage: str, check_fence: Callable[[], None]
) -> RemovalOptions:
    """Return how the checkpoints of *stage* are stripped and archived.

    They are stripped as the model will be made, and the archive has a folder for each run.
    """
    url = settings.checkpoints.archive_url
    return RemovalOptions(
        check_fence=check_fence,
        dtype=weights_dtype(settings),
        overflow=settings.consolidate.overflow,
        archive_url=url and f"{url}/{paths.recipe_name}/{paths.run_id}/{stage}",
    )


def weights_dtype(settings: StageSettings) -> FloatDtype:
    """Return the dtype of a checkpoint that keeps its weights alone.

    The model comes out of it bit for bit the same.

    A model's is that of the consolidated one. An adapter is small, and is added to its base in float32.
    """
    return model_dtype(settings) if settings.adapter.method == "full" else "float32"


def model_dtype(settings: StageSettings) -> FloatDtype:
    """Return the dtype of the consolidated model, which the settings of a plan name."""
    return settings.consolidate.dtype or "float16"


def consolidate_options(stage: Stage, chosen: Checkpoint, base: Path | None) -> ConsolidateOptions:
    """Return how *stage* makes a model of the *chosen* checkpoint.

    An adapter is merged into *base*.
    """
    spec, model = stage.settings.consolidate, stage.model
    return ConsolidateOptions(
        dtype=model_dtype(stage.settings),
        max_shard_bytes=int(spec.max_shard_gb * 1e9),
        num_workers=len(os.sched_getaffinity(0)),
        overflow=spec.overflow,
        base_dir=base,
        base_model=model.folder if model.has_weights else "",
        copy_from=chosen.path,
        is_verified=True,  # it costs seconds, after hours of training
    )
