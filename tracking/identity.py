"""Name the tracked runs of a run at submission, once for all attempts.

`freeze` writes a `RunIdentity` into the run folder; each job derives the `Identity` of its task from it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files import make_private_dir, read_json, write_json


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The tracked run of one task of a stage.

    Attempts of the task share the *id*, so that they draw one curve. *folder* is where a tracker leaves its files,
    *mode* whether it may use the network, *config* what the run is listed with.
    """

    id: str
    name: str
    group: str
    job_type: str
    project: str
    entity: str | None
    tags: tuple[str, ...]
    mode: str
    folder: Path
    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What the tracked runs of a run share. The points of a sweep have one *group*.

    *trackers* are the names of those that show the run; none do where *mode* is `disabled`.
    """

    recipe: str
    run: str
    group: str
    mode: str
    trackers: tuple[str, ...]
    project: str
    entity: str | None
    tags: tuple[str, ...]

    def of_task(self, stage: str, kind: str, task: int | None, folder: Path, attempt: int) -> Identity:
        """Return the identity of a task; *task* is None where *stage* has only one."""
        return Identity(
            id=f"{self.run}-{stage}" + ("" if task is None else f"-{task}"),
            name=f"{self.recipe} {stage}",
            group=f"{self.recipe}-{self.group}",
            job_type=kind,
            project=self.project,
            entity=self.entity,
            tags=self.tags,
            mode=self.mode,
            folder=folder,
            config={"run": self.run, "recipe": self.recipe, "stage": stage, "attempt": attempt},
        )


def write_identity(identity: RunIdentity, folder: Path) -> None:
    """Write *identity* into a run's tracking folder."""
    write_json(make_private_dir(folder) / "identity.json", asdict(identity))


def read_identity(folder: Path) -> RunIdentity:
    """Return the identity that was fixed at submission.

    Raises:
        OSError, ValueError, KeyError or TypeError: there is none, or it is damaged.
    """
    found = read_json(folder / "identity.json")
    return RunIdentity(**found | {name: tuple(found[name]) for name in ("trackers", "tags")})
