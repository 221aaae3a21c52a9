"""Name the tracked runs of a run at submission, once for all attempts.

`freeze` writes a `RunIdentity` into the run folder; each job derives the `Identity` of its task from it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..files import make_private_dir, read_json, write_json

Per = Literal["run", "stage", "task"]
Mode = Literal["auto", "online", "offline", "shared", "disabled"]
Upload = Literal["model", "predictions"]
Alert = Literal["done", "failed", "no_space", "stalled", "diverged"]
_MOST_LETTERS, _MOST_TAG_LETTERS = 128, 64  # a tracker may refuse longer ones


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The tracked run that a task of a stage shows its numbers in.

    Attempts share the *id*, so that they draw one curve; so do the stages of a run, whose names stand before their
    values as the *prefix*. *folder* is where a tracker leaves its files; *part* names the attempt there, such as
    train-0-1. *mode* says whether it may use the network, *config* what the run is listed with, *notes* how to find and
    resume it. On the first *node* of a task its numbers are shown, on the others what the node measures.
    """

    id: str
    name: str
    group: str
    job_type: str
    prefix: str
    notes: str
    project: str
    entity: str | None
    tags: tuple[str, ...]
    mode: str
    folder: Path
    part: str
    config: dict[str, Any]
    uploads: tuple[str, ...] = ()
    node: int = 0


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What the tracked runs of a run share. The points of a sweep have one *group*.

    *trackers* are the names of those that show the run; none do where *mode* is `disabled`. There is one tracked run
    *per* run, stage or task. *told* is what sets the run apart from others of its recipe, such as "seed=2", and
    *config* what it was made of.
    """

    recipe: str
    run: str
    group: str
    per: Per
    folder: str
    told: tuple[str, ...]
    config: dict[str, Any]
    mode: str
    trackers: tuple[str, ...]
    project: str
    entity: str | None
    tags: tuple[str, ...]
    alerts: tuple[str, ...] = ()
    uploads: tuple[str, ...] = ()

    def of_task(self, stage: str, kind: str, task: int | None, folder: Path, attempt: int) -> Identity:
        """Return the identity of a task; *task* is None where *stage* has only one."""
        is_whole, is_task = self.per == "run", self.per == "task" and task is not None
        said = f"{self.recipe} {' '.join(self.told) or self.run[:6]}"
        named = f"{self.run}-{stage}-{task}" if is_task else f"{self.run}-{stage}"
        return Identity(
            id=self.run if is_whole else named,
            name=(said if is_whole else f"{said} {stage}")[:_MOST_LETTERS],
            group=group_name(self.recipe, self.group),
            job_type="run" if is_whole else kind,
            prefix=f"{stage}/" if is_whole else "",
            notes=f"{self.folder}\n`sousbatch status {self.run}`, `sousbatch resume {self.run}`",
            project=self.project,
            entity=self.entity,
            tags=(*self.tags, *(text[:_MOST_TAG_LETTERS] for text in self.told)),
            mode=self.mode,
            folder=folder,
            part=part_name(stage, task or 0, attempt),
            config=self.config | {"recipe": self.recipe, "run": self.run, f"attempt/{stage}-{task or 0}": attempt},
            uploads=self.uploads,
        )


def group_name(recipe: str, group: str) -> str:
    """Return what the points of a sweep, or a run alone, are grouped by."""
    return f"{recipe}-{group}"


def part_name(stage: str, task: int, attempt: int) -> str:
    """Return what the files of an attempt are called by, such as train-0-1."""
    return f"{stage}-{task}-{attempt}"


def write_identity(identity: RunIdentity, folder: Path) -> None:
    """Write *identity* into a run's tracking folder."""
    write_json(make_private_dir(folder) / "identity.json", asdict(identity))


def read_identity(folder: Path) -> RunIdentity:
    """Return the identity that was fixed at submission.

    Raises:
        OSError, ValueError, KeyError or TypeError: there is none, or it is damaged.
    """
    found = read_json(folder / "identity.json")
    return RunIdentity(
        **found | {name: tuple(found[name]) for name in ("trackers", "tags", "told", "alerts", "uploads")}
    )
