"""Values as text for people: tables, sizes, plans, scores, progress."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from ..run_folder import RunPaths

if TYPE_CHECKING:
    from rich.progress import Progress

    from ..checkpoints.commit import Checkpoint
    from ..checkpoints.retention.decisions import Verdict
    from ..checkpoints.rotation import Done
    from ..cluster.sandbox.config import Sandbox
    from ..cluster.sandbox.lifecycle import Status
    from ..launchers.status import StageState
    from ..recipes.plan import Plan, Stage
    from ..recipes.plan_summary import PlanSummary
    from ..recipes.schema.validate import Option
    from .doctor import Finding


def columns(rows: Sequence[Sequence[object]], *, header: Sequence[str] = ()) -> str:
    """Return rows as aligned columns; numbers are aligned to the right."""
    table = [list(map(str, header))] * bool(header) + [[str(cell) for cell in row] for row in rows]
    if not table:
        return ""
    widths = [max(len(row[place]) for row in table) for place in range(len(table[0]))]
    is_number = [all(isinstance(row[place], (int, float)) for row in rows) for place in range(len(table[0]))]

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, is_number, strict=True)
        )
        return "  ".join(cells).rstrip()

    return "\n".join(line(row) for row in table)


def size(num_bytes: float) -> str:
    """Return bytes in the unit that leaves one to three digits before the point (1 kB = 1000 B)."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.2f} TB"


def keys(found: Iterable[Option]) -> str:
    """Return every key of the schema with its values, default and help."""
    rows = [
        [
            option.key,
            option.takes,
            _as_override(option.default),
            "(not in this version) " * option.is_later + option.help,
        ]
        for option in found
    ]
    table = columns(rows, header=("key", "takes", "default", "meaning"))
    return f"{table}\n\n(not in this version): a plan is refused where such a key has another value than its default"


def _as_override(value: object) -> str:
    """Return a default as one would write it."""
    if value is None or value == "":
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def plan(value: Plan) -> str:
    """Return a plan for people: stages, data, forecast against the room, warnings."""
    model, room = value.inputs.model, value.inputs.disk_space
    splits = [[name, split.num_rows, size(split.num_bytes), split.path] for name, split in value.inputs.splits.items()]
    storage = [[line.what, size(line.num_bytes), line.formula] for line in value.forecast.storage]
    others = (
        f", {size(room.promised_bytes)} promised to {room.num_runs} other run{'s' * (room.num_runs > 1)}"
        if room.num_runs
        else ""
    )
    room_line = f"{room.folder} can take {size(max(0, room.free_bytes))} ({room.source}{others})"
    storage.append(["peak", size(value.forecast.storage_peak_bytes), room_line])
    parts = [
        f"{value.recipe.name} on {value.site.name}: run {value.run_id}, {model.num_params:,} parameters",
        columns([_stage_row(stage) for stage in value.stages], header=("stage", "kind", "where", "after", "")),
        columns(splits, header=("data", "rows", "size", "file")),
        *_lengths(value),
        columns(storage, header=("storage", "", "")),
    ]
    for name, lines in value.forecast.device.items():
        rows = [[line.what, size(line.num_bytes), line.formula] for line in lines]
        rows.append(["sum", size(sum(line.num_bytes for line in lines)), "and what the libraries themselves take"])
        parts.append(columns(rows, header=(f"memory of a rank of {name}", "", "")))
    return "\n\n".join([*parts, *(f"warning: {warning}" for warning in value.warnings)])


def _lengths(value: Plan) -> list[str]:
    """Return what every row of the data is in tokens, where they were looked at."""
    words = {"train": "trains", "eval": "evaluates", "predict": "predicts"}
    rows = [
        [f"{one.stage} {words[one.use]} {one.split}", one.num_kept, one.num_rows, one.longest, one.limit or "no limit"]
        for one in value.inputs.lengths
    ]
    return [columns(rows, header=("all rows checked", "used", "of", "longest", "allowed tokens"))] * bool(rows)


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
        what = f"{batch.steps} steps of {batch.global_batch} rows = {shares}, {saves}"
    after = ", ".join(item.stage + (" (however it ends)" if item.condition == "any" else "") for item in stage.after)
    return [stage.name, stage.kind, where, after, what]


def status(found: Sequence[tuple[PlanSummary, RunPaths, Mapping[str, StageState]]]) -> str:
    """Return one line a run."""
    if not found:
        return "no runs yet; `sousbatch submit hangul-restoration` makes one"
    rows, header = [], ["run", "recipe", "state", "stage", "folder"]
    for plan, paths, states in found:
        word, stage, reason = _summary(plan, states)
        rows.append([paths.run_id, plan.recipe_name, word, stage, paths.root, reason])
    if not any(row[-1] for row in rows):
        return columns([row[:-1] for row in rows], header=header)
    return columns(rows, header=[*header, "reason"])


def _summary(plan: PlanSummary, states: Mapping[str, StageState]) -> tuple[str, str, str]:
    """Return the word and the stage that tell most about a run, and why nothing more is known of it."""
    if states and all(state.word == "done" for state in states.values()):
        return "done", "", ""
    order = (("running", "stopping"), ("unknown",), ("failed",), ("stopped",), ("cancelled",), ("waiting",), ("lost",))
    for words in order if states else ():
        for name, state in states.items():
            if state.word in words:
                progress = f" {state.step}/{state.total}" if state.total else ""
                return state.word, name + progress, state.reason if state.word == "unknown" else ""
    return ("unknown", "", plan.problem) if plan.problem else ("lost", "", "")


def run_status(plan: PlanSummary, paths: RunPaths, states: Mapping[str, StageState]) -> str:
    """Return one line a stage, and for what failed where its log is and what helps."""
    rows = [
        [name, state.word, f"{state.step}/{state.total}" if state.total else "", state.reason]
        for name, state in states.items()
    ]
    text = f"run {paths.run_id} of {plan.recipe_name} in {paths.root}\n"
    text += columns(rows, header=("stage", "state", "", "reason")) if rows else f"unknown: {plan.problem}"
    failed = [name for name, state in states.items() if state.word == "failed"]
    if plan.is_sweep and not plan.problem:
        from ..recipes.plan import read_plan

        text += f"\n\n{points(read_plan(paths.plan), paths)}"
    elif failed:
        text += f"\n\n{log_tail(paths, failed[0])}"
    return text


def one_run(plan: PlanSummary, paths: RunPaths, states: Mapping[str, StageState]) -> str:
    """Return `run_status`, and what helps where `resume` does not."""
    text = run_status(plan, paths, states)
    return f"{text}\n\n{what_helps(paths, states)}" if any(state.advice for state in states.values()) else text


def what_helps(paths: RunPaths, states: Mapping[str, StageState]) -> str:
    """Return the next step for a run that is not finished."""
    if not paths.root.is_dir():
        return f"its folder {paths.root} is gone; put it back, and `sousbatch resume {paths.run_id}` goes on"
    told = [state.advice for state in states.values() if state.advice]
    return told[0] if told else f"`sousbatch resume {paths.run_id}` goes on where it stands"


def points(plan: Plan, paths: RunPaths) -> str:
    """Return one line a point of a sweep that has begun, with its first score, and how many have not."""
    from ..launchers.status import point_states

    found = point_states(plan, paths)
    rows: list[list[object]] = []
    for point in found:
        if point.folder is None:
            continue
        score = ""
        for name, result in list(scores_of(RunPaths(root=point.folder)).items())[:1]:
            metric, value = next(iter(result["scores"]["model"].items()))
            score = f"{metric} {value:.4g} ({name})"
        rows.append([point.index, point.word, point.label, score, point.folder])
    waiting = sum(point.word == "waiting" for point in found)
    text = columns(rows, header=("point", "state", "values", "score", "folder")) if rows else ""
    return "\n".join([text] * bool(text) + [f"{waiting} of {len(found)} points have not begun"] * bool(waiting))


def log_tail(paths: RunPaths, stage: str, num_lines: int = 12) -> str:
    """Return the last lines of a stage's newest log, with its path; where srun names a failed rank, that rank's."""
    logs = sorted(paths.log(stage, 0).parent.glob(f"{stage}-?????.log"), key=lambda path: path.stat().st_mtime)
    if not logs:
        return f"{stage} has no log yet"
    lines = logs[-1].read_text(encoding="utf-8", errors="replace").splitlines()
    failed = next((match[1] for line in lines if (match := re.match(r"srun: error: .*task (\d+): ", line))), None)
    labelled = [line for line in lines if re.match(rf" *{failed}: ", line)]
    lines = (labelled or lines)[-num_lines:]
    return "\n".join([f"{logs[-1]}:", *(f"  {line[:200]}" for line in lines)])


def status_json(found: Sequence[tuple[PlanSummary, RunPaths, Mapping[str, StageState]]]) -> list[dict[str, Any]]:
    """Return runs and stages as plain values."""
    return [
        {
            "run": paths.run_id,
            "recipe": plan.recipe_name,
            "folder": str(paths.root),
            "state": _summary(plan, states)[0],
            "reason": _summary(plan, states)[2],
            "stages": {name: dataclasses.asdict(state) for name, state in states.items()},
        }
        for plan, paths, states in found
    ]


def checkpoints(found: Sequence[Checkpoint], holds: Sequence[str]) -> str:
    """Return one line a checkpoint, with what it holds."""
    rows = [
        [
            one.step,
            one.attempt,
            "pinned" if one.is_pinned else one.status,
            content,
            size(one.num_bytes),
            "" if one.metric is None else f"{one.metric:.4g}",
            one.path,
        ]
        for one, content in zip(found, holds, strict=True)
    ]
    return columns(rows, header=("step", "attempt", "status", "holds", "size", "metric", "path"))


def verdict(value: Verdict, done: Done | None) -> str:
    """Return one line: what happens, or happened, to a checkpoint, and why."""
    one = value.checkpoint
    if done is not None and done.problem:
        return f"{one.path}: kept: {done.problem}"
    frees_bytes = value.frees_bytes if done is None else one.num_bytes - done.left_bytes
    frees = f", {size(frees_bytes)}" if value.action != "keep" else ""
    return f"{one.path}: {value.action if done is None else done.outcome} ({value.reason}{frees})"


def scores(found: Mapping[str, Mapping[str, float]]) -> str:
    """Return the scores of the model beside those of copying the input."""
    names = [name for name in found["model"] if not name.endswith(("_precision", "_recall"))]
    rows = [[name, f"{found['model'][name]:.3f}", f"{found['copy_input'][name]:.3f}"] for name in names]
    return columns(rows, header=("", "model", "copying the input"))


def scores_of(paths: RunPaths) -> dict[str, Any]:
    """Return the scores of a run by stage, less what is no score: the file may be damaged."""
    try:
        found = json.loads(paths.metrics.read_text(encoding="utf-8"))
        return {name: result for name, result in found.items() if _is_score(result)}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def _is_score(result: Any) -> bool:
    try:
        both = [result["scores"][who] for who in ("model", "copy_input")]
        values = [value for each in both for value in each.values()]
        same = both[0].keys() == both[1].keys() and bool(both[0])
        return same and {"num_rows", "split"} <= result.keys() and all(type(one) in (int, float) for one in values)
    except (TypeError, KeyError, AttributeError):
        return False


def results(plan: Plan, paths: RunPaths) -> str:
    """Return where a run's model, predictions and scores lie, and the scores."""
    rows: list[tuple[str, object]] = []
    for stage in plan.stages:
        if stage.record.leaves == "model" and paths.model(stage.name).is_dir():
            rows.append((f"model ({stage.name})", paths.model(stage.name)))
        if stage.record.leaves == "predictions" and (paths.predictions(stage.name) / "predictions.jsonl").is_file():
            rows.append((f"predictions ({stage.name})", paths.predictions(stage.name) / "predictions.jsonl"))
    if plan.sweep is not None:
        return points(plan, paths)
    text = ""
    if paths.metrics.is_file():
        rows.append(("scores", paths.metrics))
        for name, result in scores_of(paths).items():
            text += f"\n\n{name}: {result['num_rows']} rows of {result['split']}\n{scores(result['scores'])}"
    return columns(rows) + text


def findings(found: Sequence[Finding]) -> str:
    """Return the doctor's findings, each with the command that mends it."""
    marks = {True: "ok", False: "LACKS", None: "-"}
    lines = []
    for one in found:
        lines.append(
            f"{marks[one.is_good]:6}{one.what}: {one.finding}" + (f"\n      {one.remedy}" if one.remedy else "")
        )
    return "\n".join(lines)


@contextmanager
def byte_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback of (bytes done, bytes in all) that shows progress on stderr."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        console = Console(stderr=True)
        with Progress(TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=console) as bar:
            task = bar.add_task(what)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    shown_at = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal shown_at
        if time.monotonic() - shown_at > 10:
            shown_at = time.monotonic()
            print(f"sousbatch: {what}: {size(done)} of {size(total)}", file=sys.stderr, flush=True)

    yield show


@contextmanager
def row_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a callback of (what, rows done, rows in all) that shows on stderr what takes more than a second."""
    began = shown_at = time.monotonic()
    bars: dict[str, Any] = {}
    with ExitStack() as stack:

        def show(what: str, done: int, total: int) -> None:
            nonlocal shown_at
            now = time.monotonic()
            if now - shown_at < (0.1 if sys.stderr.isatty() and now - began > 1 else 10):
                return
            shown_at = now
            if not sys.stderr.isatty():
                print(f"sousbatch: {what}: {done:,} of {total:,}", file=sys.stderr, flush=True)
                return
            if "bar" not in bars:
                bars["bar"] = stack.enter_context(_row_bar())
            if what not in bars:
                bars[what] = bars["bar"].add_task(what, total=total)
            bars["bar"].update(bars[what], completed=done)

        yield show


def _row_bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    parts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*parts, console=Console(stderr=True))


def sandbox_started(box: Sandbox, before: Mapping[str, bool]) -> str:
    """Return what a start found and made; *before* says which daemons lived, and is empty where none was."""
    dead = [name for name, lives in before.items() if not lives]
    word = f"runs again ({', '.join(dead)} had died)" if dead else "runs already" if before else "runs"
    counts = f"{box.nodes} nodes, each with {box.cpus} CPUs and {box.gpus} GPUs that it pretends to have"
    where = box.address if box.is_confined else "every address"
    if not where.startswith("127."):
        where += f" (a line '127.0.0.1 {box.hostname}' in /etc/hosts would keep it to loopback)"
    ends = f"sousbatch sandbox stop --dir {box.folder}"
    return f"a private Slurm {box.version} {word} in {box.folder}: {counts}; it listens at {where}; `{ends}` ends it"


def sandbox(found: Status) -> str:
    """Return the state of a private Slurm: daemons, nodes, partitions, jobs."""
    tables: list[tuple[Sequence[Sequence[str]], Sequence[str]]] = [
        ([[name, "runs" if lives else "is dead"] for name, lives in found.alive.items()], ("daemon", "")),
        (found.nodes, ("node", "state", "CPUs", "GPUs")),
        (found.partitions, ("partition", "state", "longest job", "nodes")),
        (found.jobs, ("job", "partition", "state", "time", "where, or why not", "name")),
    ]
    parts = [f"Slurm {found.box.version} of {found.box.prefix}"]
    parts += [columns(rows, header=header) for rows, header in tables if rows]
    if not all(found.alive.values()):
        parts.append("`sousbatch sandbox start` starts what is dead")
    return "\n\n".join(parts)
