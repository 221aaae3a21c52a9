"""Every name inside a run folder: nobody else joins these strings.

A run folder is RUNS/RECIPE/RUN. The folder of a sweep's point lies inside the sweep's run folder in the same way:
RUNS/RECIPE/SWEEP/RECIPE/RUN.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PLAN_FORMAT = 7
NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


@dataclass(frozen=True, kw_only=True)
class RunPaths:
    """The files and folders of the run in *root*."""

    root: Path

    @property
    def run_id(self) -> str:
        """The run's id: the name of its folder."""
        return self.root.name

    @property
    def recipe_name(self) -> str:
        """The recipe's name: the folder that holds all its runs."""
        return self.root.parent.name

    @property
    def runs_dir(self) -> Path:
        """The folder that holds all runs of all recipes.

        Of a sweep's point it is the sweep's run folder.
        """
        return self.root.parent.parent

    @property
    def recipe(self) -> Path:
        """The resolved recipe as text, for people."""
        return self.root / "recipe.yaml"

    @property
    def plan(self) -> Path:
        """The plan, written last: a run folder without it was never submitted."""
        return self.root / "plan.json"

    @property
    def code_dir(self) -> Path:
        """The user's code as it was at submission."""
        return self.root / "code"

    def code(self, folder: str) -> Path:
        """Return the folder with the copy of one of the recipe's code folders.

        No two of them have the same name.
        """
        return self.code_dir / Path(folder).name

    @property
    def steps_dir(self) -> Path:
        """The own functions that prepared the data, as a record; no job runs them."""
        return self.root / "steps"

    @property
    def used_files_dir(self) -> Path:
        """The user's files that jobs read, as they were at submission."""
        return self.root / "files"

    def used_file(self, path: str, digest: str) -> Path:
        """Return the copy of a file that jobs read, by its *path* and sha256."""
        return self.used_files_dir / digest[:8] / Path(path).name

    @property
    def ledger_dir(self) -> Path:
        """One append-only file per writer."""
        return self.root / "ledger"

    @property
    def lock(self) -> Path:
        """Held while a client changes what is submitted."""
        return self.root / ".lock"

    @property
    def metrics(self) -> Path:
        """The scores of every score stage."""
        return self.root / "metrics.json"

    @property
    def report(self) -> Path:
        """The page that shows the run."""
        return self.root / "report.html"

    @property
    def reservation(self) -> Path:
        """The bytes of the runs directory that the run was promised."""
        return self.root / "reservation.json"

    @property
    def tracking_dir(self) -> Path:
        """The identity of the tracked runs, and what trackers leave."""
        return self.root / "tracking"

    @property
    def log_dir(self) -> Path:
        """What the stages printed."""
        return self.root / "logs"

    @property
    def checkpoints_dir(self) -> Path:
        """The checkpoints of all train stages."""
        return self.root / "checkpoints"

    @property
    def search_dir(self) -> Path:
        """The study of a search, which its trials share."""
        return self.root / "search"

    @property
    def model_dir(self) -> Path:
        """The models of all consolidate stages."""
        return self.root / "model"

    @property
    def metrics_dir(self) -> Path:
        """The scores of each score stage."""
        return self.root / "metrics"

    def request(self, stage: str) -> Path:
        """Return the file of the exact text that was sent for *stage*."""
        return self.root / "requests" / f"{stage}.sh"

    def request_values(self, stage: str) -> Path:
        """Return the JSON file of all that is sent beside the text of a stage."""
        return self.root / "requests" / f"{stage}.json"

    def log(self, stage: str, task: int | str) -> Path:
        """Return the log of a task of *stage*, all attempts one after another.

        *task* is a number, or what a scheduler replaces by five digits.
        """
        return (
            self.log_dir / f"{stage}-{task:05d}.log" if isinstance(task, int) else self.log_dir / f"{stage}-{task}.log"
        )

    def logs(self, stage: str) -> list[Path]:
        """Return the logs that tasks of *stage* have begun."""
        return sorted(self.log_dir.glob(self.log(stage, "?????").name))

    @property
    def stop_dir(self) -> Path:
        """Flags that ask ranks to stop."""
        return self.root / "stop"

    def stop_flag(self, stage: str, task: int) -> Path:
        """Its presence asks the ranks of a task to save and stop at a step boundary."""
        return self.stop_dir / f"{stage}-{task:05d}"

    def checkpoints(self, stage: str) -> Path:
        """Return the folder of the checkpoints of a train stage."""
        return self.checkpoints_dir / stage

    def model(self, stage: str) -> Path:
        """Return the folder of the model of a consolidate stage."""
        return self.model_dir / stage

    def predictions(self, stage: str) -> Path:
        """Return the folder of a predict stage, with one folder per prediction key."""
        return self.root / "predictions" / stage

    def predictions_file(self, stage: str, decoding: str = "") -> Path:
        """Return the merged predictions of a predict stage, or of one decoding."""
        return self.predictions(stage) / f"predictions{decoding and '.'}{decoding}.jsonl"

    def submission_file(self, stage: str, suffix: str, decoding: str = "") -> Path:
        """Return the file of `predict.output`; its *suffix* begins with a point."""
        return self.predictions(stage) / f"submission{decoding and '.'}{decoding}{suffix}"

    def submission_files(self, stage: str) -> list[Path]:
        """Return the files of `predict.output` that are there, one a decoding."""
        return sorted(self.predictions(stage).glob("submission.*"))

    def unit_dirs(self) -> list[Path]:
        """Return the prediction folders of all predict stages."""
        return sorted(path for path in self.root.glob("predictions/*/*") if path.is_dir())

    def stage_metrics(self, stage: str, decoding: str = "") -> Path:
        """Return the scores of one score stage, or of one decoding."""
        return self.metrics_dir / f"{stage}{decoding and '@'}{decoding}.json"

    def stage_examples(self, stage: str, decoding: str = "") -> Path:
        """Return the worst, best and random rows of one score stage, or of one decoding."""
        return self.metrics_dir / f"{stage}{decoding and '@'}{decoding}.rows.jsonl"


def run_paths(runs_dir: Path, recipe_name: str, run_id: str) -> RunPaths:
    """Return the paths of a run in the folder that holds all runs.

    For a point of a sweep that folder is the sweep's run folder.
    """
    return RunPaths(root=runs_dir / recipe_name / run_id)


SWEEP_PREFIX = "sweep-"  # of the run ids of sweeps


def points_in(sweep: RunPaths) -> list[RunPaths]:
    """Return the runs of a sweep's points that have begun; another run has none."""
    if not sweep.run_id.startswith(SWEEP_PREFIX):  # of a thousand runs each look costs
        return []
    return [RunPaths(root=plan.parent) for plan in sorted(sweep.root.glob("*/*/plan.json"))]


def is_point(paths: RunPaths) -> bool:
    """Return whether a run is a point: its folder lies in that of a sweep."""
    return RunPaths(root=paths.runs_dir).plan.is_file()


def reserved_runs(runs_dir: Path) -> list[RunPaths]:
    """Return the runs that have a reservation, of all recipes."""
    return [RunPaths(root=path.parent) for path in sorted(runs_dir.glob("*/*/reservation.json"))]


def run_of_checkpoints(folder: Path) -> RunPaths | None:
    """Return the run with a train stage that writes to *folder*, if any.

    *folder* holds checkpoints.
    """
    folder = folder.resolve()
    paths = RunPaths(root=folder.parent.parent)
    return paths if paths.plan.is_file() and folder == paths.checkpoints(folder.name) else None


def run_of_units(folder: Path) -> RunPaths | None:
    """Return the run with a predict stage that writes its units to *folder*, if any."""
    folder = folder.resolve()
    paths = RunPaths(root=folder.parent.parent.parent)
    return paths if paths.plan.is_file() and folder.parent == paths.predictions(folder.parent.name) else None
