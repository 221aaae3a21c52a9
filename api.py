"""The functions of `import sousbatch` for Python code, such as a notebook.

Each does what a command does, prints nothing, and raises the errors of `sousbatch.errors`, all of them a
`SousbatchError`. `sousbatch/__init__.py` imports this module when the first of its names is used.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from . import files, run_index, user_folders
from .errors import NotFoundError, PlanError, RunError, UsageError
from .errors import SousbatchError as SousbatchError  # one of the public names
from .run_folder import RunPaths, run_of_units

if TYPE_CHECKING:
    from .checkpoints.consolidation.manifest import Manifest
    from .launchers.states import StageState
    from .predictions.merge import Change, MergeReport
    from .predictions.samplers import Sampler
    from .recipes.facts import Inputs
    from .recipes.plan import Plan
    from .recipes.schema import Recipe

_POLL_S = 0.5


def compose(recipe: str | Path, overrides: Sequence[str] = (), *, smoke: bool = False) -> Recipe:
    """Return the recipe called *recipe* with *overrides*.

    *recipe* may also be the path of a YAML file.

    Args:
        overrides: in Hydra's form, such as `"train.learning_rate=1e-4"` or `"adapter=lora"`.
        smoke: shrink it to 2 steps and 8 rows, to try the whole chain.

    Raises:
        NotFoundError: there is no such recipe.
        RecipeError: every fault of the recipe and its overrides.
    """
    from .recipes.compose import compose as composed
    from .recipes.stages import smoke as shrunk

    _check_list("overrides", overrides)
    found = composed(str(recipe), overrides)
    return shrunk(found) if smoke else found


def inspect(
    recipe: Recipe,
    *,
    runs_dir: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Inputs:
    """Return what the model and the data of *recipe* are.

    Every row of the data is read. What *runs_dir* can hold is returned, too.

    Args:
        runs_dir: the folder of all runs; by default `$SOUSBATCH_RUNS`, else `./runs`.
        progress: gets (what is read, rows read, rows in all).

    Raises:
        PlanError: every reason why model or data cannot be used.
    """
    from .launchers.registry import watcher
    from .launchers.reservations import dead_runs
    from .recipes.inspect import inputs

    folder = _runs_dir(runs_dir)
    return inputs.inspect(recipe, folder, progress, dead_runs(folder, watcher))


def compile(recipe: Recipe, inputs: Inputs, *, launcher: Literal["slurm", "local"] | None = None) -> Plan:
    """Return the plan of *recipe*.

    It has the stages, their resources, and a forecast of memory and storage in bytes.

    Args:
        launcher: where it is to run; by default Slurm where one is configured, else this machine.

    Raises:
        PlanError: every reason why it cannot run there; *inputs* are those of another recipe.
        SlurmError: Slurm was asked for, or is configured, and does not answer.
    """
    from .launchers.registry import choose_site
    from .recipes.compile import compile as compiled
    from .recipes.inspect.inputs import settings_digest

    if inputs.settings_digest != settings_digest(recipe):
        raise PlanError(
            [f"the inputs are not those of recipe {recipe.name!r} as it is now; call inspect(recipe) again"]
        )
    return compiled(recipe, choose_site(launcher), inputs)


def submit(plan: Plan, *, runs_dir: str | Path | None = None, again: bool = False) -> Run:
    """Send the jobs of *plan* and return its run at once.

    A run that is there already is followed or resumed.

    Args:
        runs_dir: the folder of all runs, as `inspect` got it.
        again: make another run where one of the same recipe, code and data is there.

    Raises:
        NoRoomError: the disk is full, or promised to other runs.
        SlurmError: Slurm refused a job, or does not answer.
    """
    from .launchers import submission
    from .launchers.registry import launcher_of, watcher
    from .launchers.reservations import release_dead

    folder = _runs_dir(runs_dir)
    release_dead(folder, watcher)
    return Run(paths=submission.submit(plan, launcher_of(plan), folder, again=again).paths)


def open_run(run: str | Path) -> Run:
    """Return an existing run.

    *name* is its id or the beginning of it, its folder, or its recipe's name (the newest run).

    Raises:
        NotFoundError: there is no such run.
        UsageError: several have an id that begins so.
    """
    return Run(paths=run_index.find_run(str(run), newest=True))


@dataclass(frozen=True, kw_only=True)
class Run:
    """One submission of a plan.

    Its jobs do not depend on this process; `paths` names every file of its folder.
    """

    paths: RunPaths

    @property
    def id(self) -> str:
        """The name that `sousbatch status` and the other commands take."""
        return self.paths.run_id

    @property
    def state(self) -> dict[str, StageState]:
        """The state of each stage now, by the ledger and the launcher.

        `word` of each says it in one word.
        """
        from .launchers.registry import LOOK_S

        return self._look(max_age_s=LOOK_S)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until no stage is under way; return whether the run is done.

        Return False when *timeout_s* is over.

        Raises:
            RunError: a stage has failed, or was stopped or cancelled.
        """
        from .launchers.registry import WATCH_S
        from .launchers.states import is_final

        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not is_final(states := self._look(max_age_s=WATCH_S)):
            if deadline is not None and time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        unfinished = {name: state for name, state in states.items() if state.word != "done"}
        for name, state in sorted(unfinished.items(), key=lambda each: each[1].word != "failed"):
            reason = f" ({state.reason})" if state.reason else ""
            raise RunError(f"run {self.id}: stage {name} is {state.word}{reason}; see run.logs({name!r})")
        return True

    def cancel(self, *, save: bool = False) -> tuple[str, ...]:
        """End the jobs that wait or run and return their stages.

        With *save* training saves at a step boundary first.

        Raises:
            UnreachableError: it is unknown whether its jobs run.
        """
        from .launchers import submission
        from .launchers.registry import launcher_of
        from .recipes.plan import read_plan

        return submission.cancel(self.paths, launcher_of(read_plan(self.paths.plan)), save=save)

    def resume(self) -> None:
        """Send every stage that is neither done nor under way.

        It raises what `submit` raises.
        """
        from .launchers import submission
        from .launchers.registry import launcher_of
        from .recipes.plan import read_plan

        submission.resume(self.paths, launcher_of(read_plan(self.paths.plan)))

    def logs(self, stage: str) -> str:
        """Return what all tasks of *stage* have printed so far, one task after another.

        Raises:
            NotFoundError: the run has no such stage.
        """
        from .recipes.plan_summary import read_summary

        summary = read_summary(self.paths.plan)
        if summary.stages:
            summary.stage(stage)
        return "".join(path.read_text(encoding="utf-8", errors="replace") for path in self.paths.logs(stage))

    @property
    def model_dir(self) -> Path:
        """The consolidated model, which `from_pretrained` loads.

        Where there are several, `paths.model(STAGE)` names them.

        Raises:
            NotFoundError: it is not there yet.
        """
        return self._first(self.paths.model, "model")

    @property
    def predictions_path(self) -> Path:
        """The merged predictions, one JSON object a line.

        Where there are several, `paths.predictions_file(STAGE)` names them.

        Raises:
            NotFoundError: they are not there yet.
        """
        return self._first(self.paths.predictions_file, "merged predictions")

    @property
    def scores(self) -> dict[str, Any]:
        """The results of each score stage so far, by stage: the same as in metrics.json."""
        return dict(files.read_json(self.paths.metrics)) if self.paths.metrics.is_file() else {}

    def _look(self, *, max_age_s: float) -> dict[str, StageState]:
        from .launchers.overview import many_states
        from .launchers.registry import launcher_named

        ((_, _, states),) = many_states([self.paths], partial(launcher_named, max_age_s=max_age_s))
        return states

    def _first(self, path_of: Callable[[str], Path], what: str) -> Path:
        for stage in self.state:
            if path_of(stage).exists():
                return path_of(stage)
        raise NotFoundError(f"run {self.id} has no {what} yet; run.wait() returns when it is finished")


def consolidate(
    checkpoint: str | Path,
    out: str | Path,
    *,
    dtype: Literal["float16", "bfloat16", "float32"] = "float16",
    overflow: Literal["refuse", "clamp", "bfloat16"] = "refuse",
    merge_adapter: bool = False,
    base: str | Path | None = None,
    copy_from: str | Path | None = None,
    max_shard_gb: float = 5.0,
    workers: int | None = None,
    verify: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Write a checkpoint as a model that `from_pretrained` loads.

    The checkpoint is one of DeepSpeed or FSDP. What the model holds is returned. Paths may be URLs. An interrupted call
    continues where it stopped when it is made again.

    Args:
        out: a folder that is absent or empty; it appears when it is complete.
        overflow: what to do with weights beyond float16's range: refuse them, clamp them, or write bfloat16.
        merge_adapter: add an adapter to the model that it was trained on, which *base* names or the adapter itself.
        copy_from: the folder with config and tokenizer; by default the checkpoint, or the folder that holds it.
        max_shard_gb: largest weight file; 1 GB is 10^9 bytes.
        workers: threads; by default one for each core.
        verify: read back what was written and compare it.
        progress: gets (bytes written, bytes in all).

    Raises:
        NotFoundError: *checkpoint* is none.
        DamagedError: a file of it is not what its checksum or header says.
        RunError: weights are NaN, infinite or beyond the range of *dtype*.
        NoRoomError: the disk cannot hold the model; nothing was written.
    """
    from .checkpoints.consolidation.consolidate import consolidate as write_model
    from .checkpoints.consolidation.consolidate import refuse_within
    from .checkpoints.consolidation.options import ConsolidateOptions, Overflow
    from .checkpoints.formats.companion_files import config_dir
    from .checkpoints.formats.tensors import FloatDtype
    from .checkpoints.integrity import open_verified
    from .remote import parse_place

    for name, given, known in (("dtype", dtype, FloatDtype), ("overflow", overflow, Overflow)):
        if given not in get_args(known):
            raise UsageError(f"{name} is {given!r}; known: {', '.join(get_args(known))}")
    source_place, out_place = parse_place(str(checkpoint)), parse_place(str(out))
    source = open_verified(source_place)
    refuse_within(source_place, out_place)
    options = ConsolidateOptions(
        dtype=dtype,
        overflow=overflow,
        is_merged=merge_adapter,
        base_dir=parse_place(str(base)) if base else None,
        copy_from=parse_place(str(copy_from)) if copy_from else config_dir(source_place),
        max_shard_bytes=int(max_shard_gb * 1e9),
        num_workers=workers or len(os.sched_getaffinity(0)),
        is_compared=True,
        is_verified=verify,
    )
    manifest = write_model(
        source, out_place.absolute() if isinstance(out_place, Path) else out_place, options, progress=progress
    )
    assert manifest is not None  # the only part is the whole
    return manifest


def merge_predictions(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    num_rows: int | None = None,
    index_field: str | None = "index",
    sampler: Sampler | None = None,
    batch_rows: int | None = None,
    num_ranks: int | None = None,
    data: str | Path | None = None,
    post: Sequence[str] = (),
) -> MergeReport:
    """Join prediction shards into the one file *out*, in the order of their rows.

    Return what was found.

    Args:
        paths: shards (.jsonl, .csv, .parquet, .npy, .pt), folders of them, or one folder of units of a predict stage.
        num_rows: how many rows there must be; without it missing last rows cannot be seen.
        index_field: the field that holds a row's position; None joins the shards as they are named.
        sampler: what dealt out the rows to the ranks, whose shards have no index: "contiguous", "interleaved",
            "distributed" (PyTorch's DistributedSampler) or "batches" (accelerate's data loaders); it needs *num_rows*.
        batch_rows: rows of a batch of one rank; "batches" needs it.
        num_ranks: how many ranks there were; without it shards that look as if one was lost are refused.
        data: the rows that were predicted; rows without an index are compared with them in the columns that both have.
        post: steps as in the recipe's `predict.post`, over the units of a predict stage.

    Raises:
        IncompleteError: rows are missing; the others are in a file beside *out* that ends in `.partial`.
        DamagedError: the shards contradict each other; the same.
        NotFoundError: a path does not exist, or no shards are there.
    """
    from .predictions.merge import merge_units
    from .predictions.samplers import Dealing
    from .predictions.shard_files import find_shards
    from .predictions.shard_merge import merge_shards
    from .predictions.units import is_unit_folder, read_layout
    from .recipes.data.compared import compare_rows
    from .recipes.data.rows import read_rows

    _check_list("paths", paths)
    if not paths:
        raise UsageError("paths is empty; name the shards, or the folder that holds them")
    given, target = [Path(path).expanduser() for path in paths], Path(out).expanduser().absolute()
    if missing := [str(path) for path in given if not path.exists()]:
        raise NotFoundError(f"{', '.join(missing)}: no such file or folder")
    if target.is_dir():
        raise UsageError(f"{out} is a folder; name the merged file, such as {target / 'predictions.jsonl'}")
    if not target.parent.is_dir():
        raise NotFoundError(f"{target.parent}: no such folder, and {target.name} is to lie there")
    files.refuse_input(target, given)
    if is_unit_folder(target.parent):
        raise UsageError(f"{target.parent} holds the units of a run, and nothing else; write {target.name} elsewhere")
    if len(given) == 1 and is_unit_folder(given[0]):
        num_predicted = read_layout(given[0])[1].num_rows
        if num_rows not in (None, num_predicted):
            raise UsageError(f"--rows is {num_rows:,}, and the units of {given[0]} are of {num_predicted:,} rows")
        run = run_of_units(given[0])
        rest = f"sousbatch resume {run.run_id}" if run else ""
        return merge_units(given[0], target, change=_change(post, given[0]), rest=rest)
    if post:
        raise UsageError("post changes the texts of a folder of units, and these are shards of another trainer")
    if (sampler == "batches") != (batch_rows is not None) or batch_rows == 0:
        raise UsageError(
            "--sampler batches needs --batch-rows, the rows of a rank's batch (1 or more); others have none"
        )
    if num_ranks is not None and sampler is None:
        raise UsageError("--ranks says how many ranks a --sampler dealt out the rows to; give that, too")
    if data is not None:
        num_given = sum(1 for _ in read_rows(Path(data)))
        if num_rows not in (None, num_given):
            raise UsageError(
                f"--rows is {num_rows:,}, and {data} has {num_given:,} rows; name those that were predicted"
            )
        num_rows = num_given
    dealing = None
    if sampler is not None:
        dealing = Dealing(sampler=sampler, batch_rows=batch_rows or 1, num_ranks=num_ranks)
    return merge_shards(
        find_shards(given),
        target,
        num_rows=num_rows,
        index_field=index_field,
        dealing=dealing,
        check=None if data is None else partial(compare_rows, data=Path(data), form=target.suffix),
    )


def _change(post: Sequence[str], units: Path) -> Change | None:
    """Return the change that *post* makes of the rows of a folder of units.

    The input rows are those that the run of the folder predicted, where it lies in one.
    """
    from .recipes.data.post import change_of, files_in
    from .recipes.data.rows import read_rows
    from .recipes.plan import read_plan

    _check_list("post", post)
    if not post:
        return None
    # own functions, as planning finds them; those of the working folder may be newer than the run's
    sys.path += [os.getcwd()] * (os.getcwd() not in sys.path)
    split, run = "", run_of_units(units)
    rows: Iterator[Mapping[str, Any]] = iter(())
    if run is not None:
        plan = read_plan(run.plan)
        used = [plan.inputs.used_files[name] for name in post if name in plan.inputs.used_files]
        sys.path += [str(run.used_file(one.path, one.digest).parent) for one in used]
        sys.path += [str(run.code(folder)) for folder in plan.recipe.environment.code]
        found = plan.stage(units.resolve().parent.name).splits["predict"]
        split, rows = found.name, read_rows(Path(found.path))
    digests = {name: files.digest_file(Path(name)) for name in files_in(post) if Path(name).is_file()}
    digests["always"] = secrets.token_hex(4)  # own functions may have changed: the output is made anew
    return change_of(post, split, digests, Path, rows)


def score(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    metrics: Sequence[str] | None = None,
    tokenizer: Literal["words", "characters"] = "words",
) -> Mapping[str, float]:
    """Return how well predicted texts match the right ones, by metric.

    The values are fractions; 1 is best, for `cer` 0 is.

    Args:
        metrics: their names; by default those that texts need no more for.
        tokenizer: the units of ROUGE.

    Raises:
        UsageError: there are no texts, their numbers differ, or a metric is unknown.
    """
    from .predictions.metrics import DEFAULT_METRICS
    from .predictions.scoring import score_texts

    for name, values in (("predictions", predictions), ("references", references), ("metrics", metrics or ())):
        _check_list(name, values)
    return score_texts(predictions, references, metrics=metrics or DEFAULT_METRICS, tokenizer=tokenizer)


def _check_list(name: str, values: object) -> None:
    """Refuse one text, or a mapping, where several texts are expected."""
    if isinstance(values, (str, bytes, Path, Mapping)):
        raise UsageError(f"{name} is {values!r}; expected a list, such as [{str(values)!r}]")


def _runs_dir(given: str | Path | None) -> Path:
    return user_folders.runs_dir(None if given is None else str(given))
