"""Freeze what a run is at submission, and verify it when a stage starts."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import files, ledger
from ..errors import RunError, SousbatchError, UsageError
from ..events import Accepted, Event, Frozen, of
from ..recipes.inspect.cache import code_digest_of, code_files
from ..recipes.inspect.model import model_digest
from ..recipes.inspect.versions import installed, versions_of
from ..recipes.plan import Plan, Stage
from ..recipes.schema import validate
from ..recipes.yaml_files import to_yaml
from ..run_folder import RunPaths
from ..run_index import remember_run
from ..tracking.identity import RunIdentity, write_identity
from .base import Launcher, Request

_MOST_TOLD = 8
_AGAIN = "`resume` would end in the same way: put it back, or submit the recipe with --again, which makes another run"
_PUT_BACK = (
    "put back what it was and `resume`, or submit the recipe again, which makes another run of what is there now"
)


def freeze(
    plan: Plan,
    launcher: Launcher,
    paths: RunPaths,
    *,
    within: RunPaths | None = None,
    point: int | None = None,
    label: str = "",
) -> None:
    """Write all that the jobs will read, plan.json last: it makes the folder a run.

    The run of a *point* lies *within* that of its sweep, whose copy of the code it shares; *label* is what sets the
    point apart.

    Raises:
        UsageError: the code was edited since the plan was made.
    """
    if within is not None and within.code_dir.is_dir() and not paths.code_dir.exists():
        paths.code_dir.symlink_to(within.code_dir)
    for folder in plan.recipe.environment.code if within is None else ():
        source = Path(folder).expanduser().absolute()
        for path in code_files(source):
            target = paths.code(folder) / path.relative_to(source)
            files.make_private_dir(target.parent)
            shutil.copyfile(path, target)
    if _frozen_code(plan, paths) != plan.inputs.code_digest:
        files.remove_tree(paths.code_dir)
        raise UsageError("the code in environment.code was edited while it was being submitted; submit again")
    if within is None:
        _freeze_steps(plan, paths)
        _freeze_files(plan, paths)
    elif within.used_files_dir.is_dir() and not paths.used_files_dir.exists():
        paths.used_files_dir.symlink_to(within.used_files_dir)
    requests = _write_requests(launcher.prepare(plan, paths), paths)
    files.write_text(paths.recipe, to_yaml(plan.recipe))
    write_identity(_identity(plan, paths, within or paths, label), paths.tracking_dir)
    client, frozen = ledger.open_client(paths.ledger_dir), plan.to_json()
    client.write(Frozen(plan=files.digest_of(frozen), point=point, requests=requests))
    client.close()
    files.sync_tree(paths.root)
    files.write_text(paths.plan, frozen)
    if within is None:
        remember_run(paths)


def _freeze_steps(plan: Plan, paths: RunPaths) -> None:
    """Copy the own functions that prepared the rows, as a record."""
    every = [plan.inputs, *(variant.inputs for variant in (plan.sweep.variants if plan.sweep else ()))]
    prepared = [one for inputs in every for one in inputs.prepared]
    sources = {source: digest for one in prepared for source, digest in one.sources.items()}
    for source, digest in sources.items():
        target = paths.steps_dir / digest[:8] / Path(source).name
        files.make_private_dir(target.parent)
        shutil.copyfile(source, target)
        if files.digest_file(target) != digest:
            files.remove_tree(paths.steps_dir)
            raise UsageError(f"{source}, which prepared the data, was edited while being submitted; submit again")


def _freeze_files(plan: Plan, paths: RunPaths) -> None:
    """Copy the files that jobs will read."""
    every = [plan.inputs, *(variant.inputs for variant in (plan.sweep.variants if plan.sweep else ()))]
    for one in (used for inputs in every for used in inputs.used_files.values()):
        target = paths.used_file(one.path, one.digest)
        files.make_private_dir(target.parent)
        shutil.copyfile(one.path, target)
        if files.digest_file(target) != one.digest:
            files.remove_tree(paths.used_files_dir)
            raise UsageError(f"{one.path} was edited while it was being submitted; submit again")


def verify(paths: RunPaths, plan: Plan, stage: Stage, *, is_point: bool = False) -> None:
    """Raise a RunError when what was frozen at submission is not what is there now.

    The environment of a point is that of its sweep.
    """
    events = ledger.read(paths.ledger_dir, max_steps=1)
    frozen = [event.plan for event in of(events, Frozen)]
    text = paths.plan.read_text(encoding="utf-8")
    if frozen and files.digest_of(text) not in frozen:  # a client may have died between record and file
        raise RunError(f"{paths.plan} was changed after submission", advice=_AGAIN)
    if not paths.run_id.startswith(plan.run_id):
        raise RunError(
            f"this sousbatch reads run {plan.run_id} in {paths.plan}: sousbatch itself was changed after submission, "
            "or the folder has another name",
            advice=_AGAIN,
        )
    if _frozen_code(plan, paths) != plan.inputs.code_digest:
        raise RunError(f"the code in {paths.code_dir} was changed after submission", advice=_AGAIN)
    asked = RunPaths(root=paths.runs_dir) if is_point else paths
    expected = _accepted(ledger.read(asked.ledger_dir, max_steps=1)) or plan.inputs.versions
    found = installed()
    changed = [
        f"{name} was {version} and is {found.get(name, 'gone')}"
        for name, version in expected.items()
        if found.get(name) != version
    ]
    if changed:
        raise RunError(
            f"the environment was changed after submission: {', '.join(changed)}",
            advice=f"put it back, or resume in this one: `sousbatch resume {asked.run_id} --accept-environment`",
        )
    if plan.sweep is not None:
        return  # each point checks its own
    model, kind = stage.model, stage.record
    adds_adapter = kind.leaves == "model" and stage.settings.adapter.method != "full"
    if model.made_by is None and (kind.starts_from_model or adds_adapter):
        now = model_digest(Path(model.folder), Path(model.tokenizer_folder), stage.settings.model.config)
        if now != model.digest:
            raise RunError(f"the model in {model.folder} was changed or removed after submission", advice=_PUT_BACK)
    for used in plan.inputs.used_files.values():
        frozen_file = paths.used_file(used.path, used.digest)
        if not frozen_file.is_file() or files.digest_file(frozen_file) != used.digest:
            raise RunError(f"{frozen_file}, a copy of {used.path}, was changed after submission", advice=_AGAIN)
    for split in stage.splits.values():
        where = f"data file {split.path} (split {split.name!r})"
        if not Path(split.path).is_file():
            raise RunError(f"{where} is gone since submission", advice=_PUT_BACK)
        if files.digest_file(Path(split.path)) != split.digest:
            raise RunError(f"{where} was changed after submission", advice=_PUT_BACK)


def _identity(plan: Plan, paths: RunPaths, group: RunPaths, label: str) -> RunIdentity:
    shown = validate.to_plain(plan.recipe.tracking)
    shown |= {name: tuple(shown[name]) for name in ("trackers", "tags", "alerts", "uploads")}
    told = label.split(" ") if label else _changes(plan)
    return RunIdentity(
        recipe=paths.recipe_name,
        run=paths.run_id,
        group=group.run_id,
        folder=str(paths.root),
        told=tuple(told[:_MOST_TOLD]),
        config=_tracked_config(plan),
        **shown,
    )


def _changes(plan: Plan) -> list[str]:
    """Return what sets the run apart from the recipe of its name: "seed=2"."""
    from ..recipes.compose import compose
    from ..recipes.reference import differences

    try:
        found = differences(compose(plan.recipe.name), plan.recipe)
    except SousbatchError:  # it came from a file elsewhere
        return []
    untold = ("resources", "tracking", "environment", "description")  # and what planning settles
    settled = ("consolidate.dtype", "score.metrics")
    return [
        f"{key}={value}"
        for key, _, value in found
        if key.split(".")[0] not in untold and key not in settled and not isinstance(value, (dict, list))
    ]


def _tracked_config(plan: Plan) -> dict[str, Any]:
    """Return the recipe and what the run was made of, as a tracker lists it."""
    recipe, inputs = validate.to_plain(plan.recipe), plan.inputs
    train = next((stage for stage in plan.stages if stage.batch is not None), None)
    made_of = {
        "site": plan.site.name,
        "version": plan.version,
        "code": inputs.code_digest,
        "data": plan.data_digests,
        "model": inputs.model.digest,
        "num_params": inputs.model.num_params,
        "versions": inputs.versions,
        "world_size": train.batch.world_size if train and train.batch else None,
        "steps": train.steps if train else None,
        "storage_bytes": plan.forecast.storage_peak_bytes,
    }
    return {key: value for key, value in recipe.items() if key not in ("tracking", "stages")} | {"made_of": made_of}


def accept_environment(plan: Plan, launcher: Launcher, paths: RunPaths) -> None:
    """Record that a person lets the run resume in the environment of now.

    Its package versions are checked from here on, and the requests are written again for it.
    """
    was = _accepted(ledger.read(paths.ledger_dir, max_steps=1)) or plan.inputs.versions
    client = ledger.open_client(paths.ledger_dir)
    client.write(Accepted(versions=versions_of(plan.recipe.environment), was=was))
    requests = _write_requests(launcher.prepare(plan, paths), paths)
    client.write(Frozen(plan=files.digest_of(paths.plan.read_text(encoding="utf-8")), requests=requests))
    client.close()


def take_time_limits(plan: Plan, wanted: Plan, launcher: Launcher, paths: RunPaths) -> Plan:
    """Return *plan* with the time limits of *wanted*, which its next jobs get.

    A unit of a prediction that is longer than the limit could never be committed else.
    """
    limits = {stage.name: stage.resources.time_min for stage in wanted.stages}
    stages = tuple(replace(one, resources=replace(one.resources, time_min=limits[one.name])) for one in plan.stages)
    if stages == plan.stages:
        return plan
    plan = replace(plan, stages=stages)
    requests, text = _write_requests(launcher.prepare(plan, paths), paths), plan.to_json()
    client = ledger.open_client(paths.ledger_dir)
    client.write(Frozen(plan=files.digest_of(text), requests=requests))
    client.close()
    files.write_text(paths.plan, text)
    return plan


def read_requests(plan: Plan, paths: RunPaths) -> dict[str, Request]:
    """Return the frozen requests by stage: they are what is sent.

    Raises:
        UsageError: they are not what was written, or name another run folder.
    """
    frozen = of(ledger.read(paths.ledger_dir, max_steps=1), Frozen)
    again = f"`sousbatch resume {paths.run_id} --accept-environment` writes them again"
    stages = [stage.name for stage in plan.stages]
    if not frozen or _digest_of_requests(stages, paths) != frozen[-1].requests:
        raise UsageError(f"run {paths.run_id}: its requests were changed after submission; {again}")
    found = {}
    for stage in stages:
        values = files.read_json(paths.request_values(stage))
        text = paths.request(stage).read_text(encoding="utf-8")
        request, faults = validate.build(Request, values | {"text": text})
        if request is None:
            raise UsageError(f"{paths.request_values(stage)} is no request: {'; '.join(map(str, faults[:3]))}; {again}")
        found[stage] = request
    folders = {Path(request.log_dir).parent for request in found.values()}
    elsewhere = [folder for folder in folders if folder.resolve() != paths.root.resolve()]
    if elsewhere:
        raise UsageError(f"run {paths.run_id} was submitted in {elsewhere[0]} and moved to {paths.root}; {again}")
    return found


def _write_requests(requests: Sequence[Request], paths: RunPaths) -> str:
    """Write each stage's request, its text in a file of its own; return their digest."""
    for request in requests:
        values = validate.to_plain(request)
        files.make_private_dir(paths.request(request.stage).parent)
        files.write_text(paths.request(request.stage), values.pop("text"))
        files.write_json(paths.request_values(request.stage), values)
    return _digest_of_requests([request.stage for request in requests], paths)


def _digest_of_requests(stages: Sequence[str], paths: RunPaths) -> str:
    """Return the digest of the request files, or nothing where one is missing."""
    try:
        texts = [files.digest_file(paths.request(stage)) for stage in stages]
        values = [files.digest_file(paths.request_values(stage)) for stage in stages]
    except OSError:
        return ""
    return files.digest_of([texts, values])


def _accepted(events: Sequence[Event]) -> dict[str, str]:
    """Return the versions that a person accepted last."""
    return next((event.versions for event in reversed(of(events, Accepted))), {})


def _frozen_code(plan: Plan, paths: RunPaths) -> str:
    return code_digest_of([paths.code(folder) for folder in plan.recipe.environment.code])
