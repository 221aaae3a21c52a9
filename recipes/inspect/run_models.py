"""Find the model of an earlier run: the one that it made, or one of a checkpoint.

`run:ID` and `run:ID:STAGE` name the model of a consolidate stage; `run:ID@step-200`, `@best` and `@last` a checkpoint,
which is consolidated into the cache, once.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from ... import files
from ...checkpoints.choice import choose_checkpoint, is_choice
from ...checkpoints.commit import MARKER, Checkpoint, committed
from ...checkpoints.consolidation.manifest import MANIFEST_NAME
from ...checkpoints.formats.lora import UnmergeableError
from ...checkpoints.integrity import open_verified
from ...errors import SousbatchError, UsageError
from ...run_folder import RunPaths
from ...run_index import find_run
from ..forecast.storage import model_of
from ..plan import Plan, Stage, read_plan
from ..retention import consolidate_options
from ..schema import validate
from .model_cache import made_once

logger = logging.getLogger(__name__)

ALL = "@all"  # every checkpoint of a train stage, as the values of a sweep
_NAME = re.compile(r"run:(?P<run>.+?)(:(?P<stage>[a-z0-9-]+))?(@(?P<choice>[a-z0-9-]+))?")


def find_run_model(key: str, name: str) -> tuple[Path, bool]:
    """Return the folder of the model that *name* means, and whether a cache holds it.

    Raises:
        UsageError: there is no such run, model or checkpoint, or the checkpoint cannot become a model here.
    """
    try:
        paths, stage, choice = _parsed(name)
        if choice is None:
            return _model_in(paths, stage), False
        if name.endswith(ALL):
            raise UsageError(f"{ALL} stands for every checkpoint: write --sweep {key}={name}")
        plan = read_plan(paths.plan)
        train = _train_stage(plan, stage)
        chosen = choose_checkpoint(paths.checkpoints(train.name), choice, train.settings.goal)
        return _made(f"{key} {name!r}", paths, plan, train, chosen), True
    except SousbatchError as error:
        raise UsageError(f"{key} {name!r}: {error}") from error


def each_checkpoint(key: str, name: str) -> list[str]:
    """Return the name of the model of each checkpoint, for such as `run:ID@all`."""
    try:
        paths, stage, _ = _parsed(name)
        train = _train_stage(read_plan(paths.plan), stage)
        steps = dict.fromkeys(one.step for one in committed(paths.checkpoints(train.name)))
    except SousbatchError as error:
        raise UsageError(f"{key} {name!r}: {error}") from error
    if not steps:
        raise UsageError(f"{key} {name!r}: stage {train.name!r} has no committed checkpoint")
    return [f"{name.removesuffix(ALL)}@step-{step}" for step in steps]


def _parsed(name: str) -> tuple[RunPaths, str | None, str | None]:
    found = _NAME.fullmatch(name)
    form = "write run:ID, run:ID:STAGE, or run:ID@step-200 (@best, @last) for a checkpoint"
    if found is None or (found["choice"] and not is_choice(found["choice"]) and found["choice"] != "all"):
        raise UsageError(form)
    return find_run(found["run"]), found["stage"], found["choice"]


def _model_in(paths: RunPaths, stage: str | None) -> Path:
    there = sorted(path.parent.name for path in paths.root.glob(f"model/*/{MANIFEST_NAME}"))
    if stage is None and len(there) == 1:
        stage = there[0]
    if stage in there:
        return paths.model(stage)
    if not there:
        raise UsageError(
            f"run {paths.run_id} has no finished model yet; `sousbatch status {paths.run_id}` says why, and "
            f"run:{paths.run_id}@last is that of its last checkpoint"
        )
    names = ", ".join(f"run:{paths.run_id}:{name}" for name in there)
    raise UsageError(f"run {paths.run_id} has no model {stage!r}; name {names}" if stage else f"name one of {names}")


def _train_stage(plan: Plan, name: str | None) -> Stage:
    found = [stage for stage in plan.stages if stage.record.leaves == "checkpoints" and name in (None, stage.name)]
    if len(found) != 1:
        there = ", ".join(stage.name for stage in plan.stages if stage.record.leaves == "checkpoints")
        raise UsageError(f"run {plan.run_id} has these stages with checkpoints: {there or 'none'}; name one of them")
    return found[0]


def _made(what: str, paths: RunPaths, plan: Plan, train: Stage, chosen: Checkpoint) -> Path:
    """Return the model of a checkpoint, as a consolidate stage would make it."""
    from ...checkpoints.consolidation.consolidate import consolidate  # it imports numpy, which other plans do without

    follower = (one for one in plan.stages if one.of == train.name and one.record.leaves == "model")
    stage = next(follower, train)
    base = train.model.dir_in(paths) if train.settings.adapter.method != "full" else None
    spec = validate.to_plain(stage.settings.consolidate) | {"choose": ""}
    identity = files.digest_of([files.digest_file(chosen.path / MARKER), spec, train.model.digest if base else ""])

    def make(target: Path) -> None:
        logger.warning("%s: the checkpoint of step %d is made a model in the cache, once", what, chosen.step)
        try:
            consolidate(open_verified(chosen.path), target / "model", consolidate_options(stage, chosen, base))
        except UnmergeableError as error:
            raise UsageError(
                f"only peft merges this adapter, in memory: {error}; let a consolidate stage with "
                f"consolidate.choose=step-{chosen.step} do it, or take run:{paths.run_id}"
            ) from error

    size = model_of(stage.settings, plan.inputs.model).num_bytes
    return made_once(what, f"{paths.run_id}-step-{chosen.step}-{identity[:16]}", size, make) / "model"
