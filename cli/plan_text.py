"""A plan as text: stages, data, forecast beside the free space, warnings."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .plan_data import USES
from .tables import format_size, format_table

if TYPE_CHECKING:
    from ..recipes.facts import Rows, StepCount
    from ..recipes.plan import Plan, Stage


def as_text(value: Plan) -> str:
    """Return a plan as text: stages, data, forecast beside the free space, warnings."""
    model, space = value.inputs.model, value.inputs.disk_space
    splits = [
        [name, split.num_rows, format_size(split.num_bytes), split.shown] for name, split in value.inputs.splits.items()
    ]
    storage = [[line.what, format_size(line.num_bytes), line.formula] for line in value.forecast.storage]
    others = (
        f", {format_size(space.promised_bytes)} promised to {space.num_runs} other run{'s' * (space.num_runs > 1)}"
        if space.num_runs
        else ""
    )
    space_line = f"{space.folder} has {format_size(max(0, space.free_bytes))} free ({space.source}{others})"
    storage.append(["peak", format_size(value.forecast.storage_peak_bytes), space_line])
    parts = [
        f"{value.recipe.name} on {value.site.name}: run {value.run_id}, {model.num_params:,} parameters"
        + _trained(value),
        format_table([_stage_row(stage) for stage in value.stages], header=("stage", "kind", "where", "after", "")),
        format_table(splits, header=("data", "rows", "size", "file")),
        *_steps(value),
        *_lengths(value),
        *_labels(value),
        *_tokens(value),
        format_table(storage, header=("storage", "", "")),
    ]
    for name, lines in value.forecast.device.items():
        rows = [[line.what, format_size(line.num_bytes), line.formula] for line in lines]
        rows.append(
            ["sum", format_size(sum(line.num_bytes for line in lines)), "plus what the libraries themselves take"]
        )
        of = "a rank" if value.stage(name).batch else "a device"
        parts.append(format_table(rows, header=(f"memory of {of} of {name}", "", "")))
    return "\n\n".join([*parts, *(f"warning: {warning}" for warning in all_warnings(value))])


def all_warnings(plan: Plan) -> list[str]:
    """Return the warnings of a plan, and what its trackers would not find in a job."""
    from ..cluster.environment import withheld
    from ..launchers.registry import launcher_of
    from ..tracking.base import doubts

    environment, given = dict(os.environ), plan.recipe.environment
    if launcher_of(plan).keeps_environment:
        for name in withheld(os.environ, given.inherit):
            del environment[name]
    environment |= {name: str(value) for name, value in given.variables.items()}
    spec = plan.recipe.tracking
    return [*plan.warnings, *doubts(spec.trackers, spec.mode, environment, spec.alerts)]


def _steps(value: Plan) -> list[str]:
    """Return what the steps of `data` did, where there are any.

    Rows that two stages share are listed once.
    """
    shown: dict[str, list[list[str]]] = {}
    for one in value.inputs.prepared:
        shown.setdefault(
            one.rows.path,
            [
                [f"{one.stage} {USES[one.use]} {one.split}", f"{one.num_source_rows:,} rows", "", "", ""],
                *(_step_row(step) for step in one.steps),
                ["", f"{one.rows.num_rows:,} rows are used", "", "", one.rows.path],
            ],
        )
    rows = [row for part in shown.values() for row in part]
    return [format_table(rows, header=("prepared rows", "step", "changed", "dropped", "made"))] * bool(rows)


def _step_row(step: StepCount) -> list[str]:
    kept = f"none; {_some(step.kept)} stay to be predicted" if step.kept.num else ""
    made = f"{step.added:,}" if step.added else ""
    return ["", step.name, _some(step.changed), _some(step.dropped) or kept, made]


def _some(rows: Rows) -> str:
    """Return such as "12 (row 3, 4, 9, 17, 20 ...)"."""
    more = " ..." if rows.num > len(rows.first) else ""
    return f"{rows.num:,} (row {', '.join(map(str, rows.first))}{more})" if rows.num else ""


def _trained(value: Plan) -> str:
    """Return what share of the model its trainings train, where it is not all."""
    from ..recipes.forecast.parameters import params_of

    shares = {}
    for stage in value.stages:
        if stage.batch is not None:
            params = params_of(stage.settings, value.inputs.model)
            total = params.trainable + params.frozen
            percent = f"{100 * params.trainable / total:.2g} %"
            shares[stage.name] = f"trains {_short(params.trainable)} of {_short(total)} parameters ({percent})"
            shares[stage.name] *= bool(params.frozen)
    if len(set(shares.values())) == 1:
        return "".join(f", {text}" for text in set(shares.values()) if text)
    return "".join(f", {name} {text or 'trains all'}" for name, text in shares.items())


def _short(number: int) -> str:
    """Return a count with three digits, such as 1.23 M."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _tokens(value: Plan) -> list[str]:
    """Return how many tokens are added from a file or the data, and what for."""
    tokens = value.inputs.tokens
    if tokens is None:
        return []
    return [
        f"{len(tokens.added):,} tokens are added from {tokens.source}: a training row has {tokens.before:g} tokens "
        f"before and {tokens.after:g} after, on average"
    ]


def _lengths(value: Plan) -> list[str]:
    """Return how long the rows of the data are in tokens, where they were counted."""
    rows = [
        [
            f"{one.stage} {USES[one.use]} {one.split}",
            one.num_examples,
            one.num_rows,
            one.longest,
            one.limit or "no limit",
        ]
        for one in value.inputs.lengths
    ]
    return [format_table(rows, header=("all rows checked", "examples", "rows", "longest", "allowed tokens"))] * bool(
        rows
    )


def _labels(value: Plan) -> list[str]:
    """Return the labels of a classification, in the order of its probabilities."""
    labels = value.inputs.labels
    return [f"labels, in the order of a row's probabilities: {', '.join(map(repr, labels))}"] if labels else []


def _example_words(stage: Stage) -> str:
    """Return what an example of a train stage is."""
    data, rows = stage.settings.data, stage.splits["train"]
    if data.packing == "blocks":
        return f"blocks of {data.max_tokens} tokens"
    if data.packing == "rows" and rows.num_examples:
        return f"packs of {rows.num_rows / rows.num_examples:.1f} rows"
    return "rows"


def _stage_row(stage: Stage) -> list[str]:
    wanted, batch = stage.resources, stage.batch
    counts = [(stage.num_tasks, "task"), (wanted.nodes, "node"), (wanted.devices_per_node, wanted.device)]
    where = " x ".join(f"{count} {what}{'s' * (count > 1)}" for count, what in counts if count > 1 or what != "task")
    if not stage.uses_devices:
        where = f"{stage.num_tasks} process" + "es" * (stage.num_tasks > 1)
    what = ""
    if batch is not None:
        shares = f"{batch.world_size} ranks x {batch.micro_batch} x {batch.accumulation}"
        saves = f"a checkpoint every {batch.save_every_steps}"
        what = f"{batch.steps} steps of {batch.global_batch} {_example_words(stage)} = {shares}, {saves}"
    after = ", ".join(item.stage + (" (however it ends)" if item.condition == "any" else "") for item in stage.after)
    return [stage.name, stage.kind, where, after, what]
