"""Read what ran: one row for each run and each point of a sweep.

What a finished run's files say is remembered by their sizes and times, so that a thousand runs take less than a second.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from .. import files, ledger
from ..errors import EXIT_STOPPED, SousbatchError
from ..events import CheckpointEvent, Event, Merged, ModelWritten, Sent, Step, TrialEnded, of
from ..ledger_queries import by_stage, done_tasks, endings
from ..predictions.metrics import is_lower_better
from ..predictions.scoring import MODEL
from ..recipes.plan import plan_values
from ..recipes.reference import flat
from ..recipes.stage_kinds import STAGE_KINDS
from ..run_folder import RunPaths, points_in
from ..user_folders import recall, remember
from .base import Launcher
from .overview import many_states
from .states import StageState, is_final, word_of

_FORMAT = 3  # raised when the same files are read as other facts
# Keys of a recipe that say nothing of what was tried.
_UNTOLD = ("name", "description", "resources", "environment", "tracking", "stages")


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One run, one point of a sweep, or one of the decodings of either.

    *values* are the dotted keys of its recipe, *data* the digests of its splits. *loss* is the last of training, *best*
    the best value of `checkpoints.metric`. *scores* are the model's, by metric, with the stage before it where several
    score. *device_hours* count each device that a stage had. *examples_per_s* and *tokens_per_s* are the median of what
    the last attempt at training measured, without evaluation and saving; *device_memory_gb* is the most of a device.
    *held_bytes* are those of checkpoints, models and predictions by the ledger.
    """

    run: str
    recipe: str
    folder: Path
    state: str
    sweep: str = ""
    decoding: str = ""
    sent_at: float = 0.0
    values: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    step: int = 0
    steps: int = 0
    loss: float | None = None
    best: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    examples_per_s: float | None = None
    tokens_per_s: float | None = None
    device_memory_gb: float | None = None
    device_hours: float = 0.0
    held_bytes: int = 0
    model: Path | None = None


def read_history(runs: Sequence[RunPaths], launcher_of: Callable[[str], Launcher]) -> list[RunRow]:
    """Return the rows of *runs*, oldest first.

    A sweep has those of its points that have begun.

    Launchers are asked about the runs alone that the ledger does not know to be done, and about sweeps with points that
    it does not know to have ended.
    """
    found = [(paths, sweep, _facts(paths)) for run in runs for paths, sweep in _with_points(run)]
    asked = dict.fromkeys(
        RunPaths(root=paths.runs_dir) if sweep else paths
        for paths, sweep, facts in found
        if not facts["is_done"] and (not sweep or facts["word"] == "running")
    )
    states = {paths.root: looked for _, paths, looked in many_states(list(asked), launcher_of)}
    return [
        RunRow(
            run=paths.run_id,
            recipe=paths.recipe_name,
            folder=paths.root,
            sweep=sweep,
            state=_state(facts, states.get(paths.runs_dir if sweep else paths.root), is_point=bool(sweep)),
            model=_there(paths.model(facts["model"])) if facts["model"] else None,
            held_bytes=sum(size for name, size in facts["held"].items() if (paths.root / name).is_dir()),
            **facts["numbers"] | decoding,
        )
        for paths, sweep, facts in found
        for decoding in facts["decodings"]
    ]


def _state(facts: Mapping[str, Any], states: Mapping[str, StageState] | None, *, is_point: bool) -> str:
    """Return the state of a run by its facts and the *states* of its stages.

    Those of a point are its sweep's; what runs by its ledger is lost when the sweep is over.
    """
    if facts["is_done"]:
        return "done"
    if states is None or (is_point and not (facts["word"] == "running" and is_final(states))):
        return str(facts["word"])
    return "lost" if is_point else word_of(state.word for state in states.values())


def _there(model: Path) -> Path | None:
    """Return the folder of a model, or None where it was removed.

    A trial that is not the best of its search loses its model.
    """
    return model if model.is_dir() else None


def differing(rows: Sequence[RunRow]) -> list[str]:
    """Return the keys whose values are not the same in all *rows*."""
    keys = dict.fromkeys(key for row in rows for key in row.values)
    return [key for key in keys if any(row.values.get(key) != rows[0].values.get(key) for row in rows)]


def by_seed(rows: Sequence[RunRow]) -> Iterator[tuple[list[RunRow], dict[str, tuple[float, float]]]]:
    """Yield the done runs that differ by their seed alone.

    Mean and standard deviation of each score come with them.

    The deviation is that of a sample: with n - 1.
    """
    groups: dict[str, list[RunRow]] = {}
    for row in rows:
        if row.state == "done":
            told = {key: value for key, value in row.values.items() if key != "seed"}
            groups.setdefault(files.digest_of([told, dict(row.data)]), []).append(row)
    for group in groups.values():
        names = [name for name in group[0].scores if all(name in row.scores for row in group)]
        numbers = {name: [row.scores[name] for row in group] for name in names}
        yield group, {name: (mean(all_), stdev(all_) if len(all_) > 1 else 0.0) for name, all_ in numbers.items()}


def _with_points(run: RunPaths) -> Iterator[tuple[RunPaths, str]]:
    points = points_in(run)
    yield from ((point, run.run_id) for point in points)
    if not points:
        yield run, ""


def _facts(paths: RunPaths) -> dict[str, Any]:
    """Return what the files of a run say; of a done one it is remembered."""
    key = [_FORMAT, str(paths.root), _stamp(paths.plan), _stamp(paths.metrics)]
    try:
        with os.scandir(paths.ledger_dir) as entries:
            key.append(sorted((entry.name, entry.stat().st_size) for entry in entries))
    except OSError:
        key.append(None)
    if (known := recall("history", key)) is not None:
        return dict(known)
    found = _read(paths)
    if found["is_done"]:
        with suppress(OSError):  # it is read again where the cache is full
            remember("history", key, found)
    return found


def _stamp(path: Path) -> list[int]:
    try:
        stat = path.stat()
    except OSError:
        return []
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _read(paths: RunPaths) -> dict[str, Any]:
    try:
        plan, events = plan_values(paths.plan), ledger.read(paths.ledger_dir, max_steps=1000)
        stages = {stage["name"]: stage for stage in plan["stages"]}
        recipe = {key: value for key, value in plan["recipe"].items() if key not in _UNTOLD}
        done = [len(done_tasks(events, name)) == stage["num_tasks"] for name, stage in stages.items()]
        mine = by_stage(events)
        return {
            "is_done": all(done),
            "word": _word_by(events),
            "model": next((event.stage for event in reversed(of(events, ModelWritten))), ""),
            "decodings": _decodings(recipe, paths),
            "held": _held(paths, events),
            "numbers": {
                "data": {name: split["digest"][:12] for name, split in plan["inputs"]["splits"].items()},
                "sent_at": min((event.time for event in of(events, Sent)), default=events[0].time if events else 0.0),
                "device_hours": sum(_device_hours(stage, mine.get(name, [])) for name, stage in stages.items()),
                **_training(stages, events),
            },
        }
    except (SousbatchError, KeyError, TypeError, AttributeError, ValueError):  # damaged, or of another version
        return {"is_done": False, "word": "unknown", "model": "", "decodings": [{}], "held": {}, "numbers": {}}


def _word_by(events: Sequence[Event]) -> str:
    """Return the state of a point that is not done.

    The newest attempts in its ledger tell it.
    """
    if any(event.word == "pruned" for event in of(events, TrialEnded)):
        return "pruned"
    newest = {(stage, task): end for (stage, task, _), end in sorted(endings(events).items())}
    codes = {end[0] if end is not None else None for end in newest.values()}
    if codes - {0, None, EXIT_STOPPED}:
        return "failed"
    if EXIT_STOPPED in codes and None not in codes:
        return "stopped"
    return "running" if codes else "waiting"


def _decodings(recipe: Mapping[str, Any], paths: RunPaths) -> list[dict[str, Any]]:
    """Return name, values and scores of each decoding of a run.

    A run without any has one, without a name.
    """
    changes = recipe["predict"].get("decodings", {})
    plain = dict(flat({**recipe, "predict": {**recipe["predict"], "decodings": None}}))
    del plain["predict.decodings"]
    return [
        {
            "decoding": name,
            "values": plain | {f"predict.{key}": value for key, value in changes.get(name, {}).items()},
            "scores": _scores(paths, name),
        }
        for name in changes or ("",)
    ]


def _training(stages: Mapping[str, Any], events: Sequence[Event]) -> dict[str, Any]:
    """Return the numbers of the last train stage, if there is one."""
    trained = [stage for stage in stages.values() if stage["batch"]]
    if not trained:
        return {}
    stage, batch = trained[-1], trained[-1]["batch"]
    steps = [event for event in of(events, Step) if event.stage == stage["name"]]
    losses = [event for event in steps if "loss" in event.values]
    spec = stage["settings"]["checkpoints"]
    measured = [event.metric for event in of(events, CheckpointEvent) if event.metric is not None]
    goal = spec["goal"] or (
        "lowest" if spec["metric"].endswith("loss") or is_lower_better(spec["metric"]) else "highest"
    )
    last = [event.values for event in losses if event.number == losses[-1].number]
    return {
        "step": max((event.step for event in steps), default=0),
        "steps": batch["steps"],
        "loss": losses[-1].values["loss"] if losses else None,
        "best": (min if goal == "lowest" else max)(measured, default=None),
        "examples_per_s": _measured(last, "examples_per_s", median),
        "tokens_per_s": _measured(last, "tokens_per_s", median),
        "device_memory_gb": _measured([event.values for event in losses], "device_memory_gb", max),
    }


def _measured(values: Sequence[Mapping[str, float]], name: str, of_all: Callable[[list[float]], float]) -> float | None:
    found = [one[f"throughput/{name}"] for one in values if f"throughput/{name}" in one]
    return of_all(found) if found else None


def _scores(paths: RunPaths, decoding: str) -> dict[str, float]:
    """Return the model's scores.

    Where several stages score, the name of the stage stands before each.
    """
    try:
        found = files.read_json(paths.metrics)
        mine = {name.partition("@")[0]: one for name, one in found.items() if name.partition("@")[2] == decoding}
        return {
            f"{stage}/{name}" if len(mine) > 1 else name: float(value)
            for stage, result in mine.items()
            for name, value in result["scores"][MODEL].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none yet, or damaged
        return {}


def _device_hours(stage: Mapping[str, Any], events: Sequence[Event]) -> float:
    """Return the hours of all attempts at a stage, times its devices.

    A stage without devices has none.
    """
    asked = stage["resources"]
    if not STAGE_KINDS[stage["kind"]].uses_devices:
        return 0.0
    spans: dict[tuple[int, int], list[float]] = {}
    for event in events:
        if event.role in ("stage", "job"):
            spans.setdefault((event.task, event.number), []).append(event.time)
    seconds = sum(max(times) - min(times) for times in spans.values())
    return float(seconds / 3600 * asked["nodes"] * asked["devices_per_node"])


def _held(paths: RunPaths, events: Sequence[Event]) -> dict[str, int]:
    """Return what the folders of a run hold, by their names in it.

    `clean` and searches remove some later.
    """
    checkpoints, models = paths.checkpoints_dir.name, paths.model_dir.name
    found: dict[str, int] = {}
    for event in events:
        if isinstance(event, CheckpointEvent) and event.held_bytes is not None:
            found[f"{checkpoints}/{event.stage}"] = event.held_bytes
        elif isinstance(event, ModelWritten):
            found[f"{models}/{event.stage}"] = event.num_bytes or 0
    merged = {(event.stage, event.decoding): 2 * (event.num_bytes or 0) for event in of(events, Merged)}  # and units
    return found | {".": sum(merged.values())}
