"""Every name inside a run folder, and finding a run from any folder.

Nobody else joins these strings. A run is found through an index of links that
submission leaves in the user's state folder.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import files
from .errors import NotFoundError, UsageError

PLAN_FORMAT = 4
_CACHE_FORMAT = 3
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
        """The copy of one of the recipe's code folders; no two of them have the same name."""
        return self.code_dir / Path(folder).name

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
        """What the run may come to hold of its store."""
        return self.root / "reservation.json"

    @property
    def tracking_dir(self) -> Path:
        """W&B's files."""
        return self.root / "tracking"

    def request(self, stage: str) -> Path:
        """The exact text that was sent for *stage*."""
        return self.root / "requests" / f"{stage}.sh"

    def log(self, stage: str, task: int) -> Path:
        """What a task of *stage* printed, all attempts one after another."""
        return self.root / "logs" / f"{stage}-{task:05d}.log"

    @property
    def stop_dir(self) -> Path:
        """Flags that ask ranks to stop."""
        return self.root / "stop"

    def stop_flag(self, stage: str, task: int) -> Path:
        """Its presence asks the ranks of a task to save and stop at a step boundary."""
        return self.stop_dir / f"{stage}-{task:05d}"

    def checkpoints(self, stage: str) -> Path:
        """The checkpoints of a train stage."""
        return self.root / "checkpoints" / stage

    def model(self, stage: str) -> Path:
        """The consolidated model of a consolidate stage."""
        return self.root / "model" / stage

    def predictions(self, stage: str) -> Path:
        """The prediction folders of a predict stage, one per prediction key."""
        return self.root / "predictions" / stage

    def metrics_of(self, stage: str) -> Path:
        """The scores of one score stage."""
        return self.root / "metrics" / f"{stage}.json"


def runs_dir(given: str | None) -> Path:
    """Return the folder that holds all runs: *given*, else $SOUSBATCH_RUNS, else ./runs."""
    return Path(given or os.environ.get("SOUSBATCH_RUNS") or "runs").expanduser().resolve()


def state_dir() -> Path:
    """Return the user's private state folder: $SOUSBATCH_STATE, else XDG's place for it."""
    given = os.environ.get("SOUSBATCH_STATE")
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(given) if given else Path(base) / "sousbatch"


def cache_dir() -> Path:
    """Return the folder for what can be made again: $SOUSBATCH_CACHE, else XDG's place for it."""
    given = os.environ.get("SOUSBATCH_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(base) / "sousbatch"


def cached(kind: str, key: Any, make: Callable[[], Any]) -> Any:
    """Return the remembered value of *key*, or make and remember it; both are plain JSON values."""
    value = recall(kind, key)
    if value is None:
        value = make()
        remember(kind, key, value)
    return value


def recall(kind: str, key: Any) -> Any:
    """Return the remembered value of *key*, None where there is none."""
    try:
        return files.read_json(_cache_file(kind, key))
    except (OSError, ValueError):
        return None


def remember(kind: str, key: Any, value: Any) -> None:
    """Remember the plain JSON *value* of *key*."""
    path = _cache_file(kind, key)
    files.make_private_dir(path.parent)
    files.write_json(path, value)


def _cache_file(kind: str, key: Any) -> Path:
    return cache_dir() / kind / f"{files.digest_of([_CACHE_FORMAT, key])}.json"


def config_file() -> Path:
    """Return the user's defaults for a site: $SOUSBATCH_CONFIG, else XDG's place for it."""
    given = os.environ.get("SOUSBATCH_CONFIG")
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(given) if given else Path(base) / "sousbatch" / "config.yaml"


def _index_dir() -> Path:
    return state_dir() / "runs"


def remember_run(paths: RunPaths) -> None:
    """Put the run into the index, in place of links of the same id that lead nowhere any more."""
    folder = files.make_private_dir(_index_dir())
    link = folder / f"{paths.recipe_name}.{paths.run_id}.{files.digest_of(str(paths.root))[:8]}"
    temporary = files.temporary_path(link)
    temporary.symlink_to(paths.root)
    temporary.replace(link)
    for other, root in _links(paths).items():
        if other != link and (root == paths.root or not root.is_dir()):
            other.unlink(missing_ok=True)


def forget_run(paths: RunPaths) -> None:
    """Take the run out of the index."""
    for link, root in _links(paths).items():
        if root == paths.root:
            link.unlink(missing_ok=True)


def _links(paths: RunPaths) -> dict[Path, Path]:
    """Return the links, and where they lead, of all runs with the recipe and id of *paths*: one in each runs folder."""
    name, found = f"{paths.recipe_name}.{paths.run_id}", {}
    for link in _index_dir().glob(f"{glob.escape(name)}*"):
        with suppress(OSError):  # removed since the listing, or no link
            if f"{link.name}.".startswith(f"{name}."):
                found[link] = Path(os.readlink(link))
    return found


def known_runs(*, gone: bool = False) -> tuple[RunPaths, ...]:
    """Return the runs of the index, oldest submission first: those whose folder is there, or with *gone* the others.

    Of those that are gone not the ones that there are elsewhere, too: jobs are found by recipe and id alone.
    """
    folder = _index_dir()
    if not folder.is_dir():
        return ()
    found = []
    for link in folder.iterdir():
        with suppress(OSError):  # removed since the listing, or no link
            found.append((link.lstat().st_mtime_ns, link.name, RunPaths(root=Path(os.readlink(link)))))
    runs = [paths for _, name, paths in sorted(found, key=lambda entry: entry[:2]) if not _is_temporary(name)]
    here = [paths for paths in runs if paths.root.is_dir()]
    names = {(paths.recipe_name, paths.run_id) for paths in here}
    return tuple(here if not gone else (one for one in runs if (one.recipe_name, one.run_id) not in names))


def _is_temporary(name: str) -> bool:
    return name.startswith(files.TEMPORARY_PREFIX)


def find_run(name: str, *, newest: bool = False, gone: bool = False) -> RunPaths:
    """Return the run that *name* means: a folder, an id or its beginning, or a recipe's name.

    Where a recipe has several runs, *newest* takes the one submitted last, for those who only look. With *gone* a run
    is found whose folder is there no more.

    Raises:
        NotFoundError: no run answers to *name*.
        UsageError: more than one does.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() and ((folder / "plan.json").is_file() or (folder / "ledger").is_dir()):
        return RunPaths(root=folder.resolve())
    runs = known_runs()
    matches = _called(name, runs)
    if not matches and (lost := _called(name, known_runs(gone=True))):
        if not gone:
            root = lost[-1].root
            raise NotFoundError(
                f"run {root.name}: its folder {root} is gone; put it back, or name it where it is now; "
                f"`sousbatch cancel {root.name}` ends what still runs of it"
            )
        matches = lost
    exact = [paths for paths in matches if paths.run_id == name]
    if len(exact) == 1:
        return exact[0]
    if not matches:
        known = ", ".join(paths.run_id for paths in runs[-5:]) or "none yet"
        raise NotFoundError(
            f"run {name!r} does not exist; newest known: {known}; `sousbatch status` lists all, "
            "and a run moved by hand is named by its folder"
        )
    if newest and all(paths.recipe_name == name for paths in matches):
        return matches[-1]
    if len(matches) > 1:
        ids = [paths.run_id for paths in matches]
        if len(set(ids)) < len(ids):  # the same submission in several runs folders
            raise UsageError(f"{name!r} names {len(ids)} runs: {', '.join(str(one.root) for one in matches)}; give one")
        raise UsageError(f"{name!r} names {len(ids)} runs: {', '.join(ids)}; give one id")
    return matches[0]


def _called(name: str, runs: Sequence[RunPaths]) -> list[RunPaths]:
    return [paths for paths in runs if paths.run_id.startswith(name) or paths.recipe_name == name]
