"""Find a run from any folder.

Submission leaves a link to each run in the user's state folder; these links are the index.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from . import files
from .errors import NotFoundError, UsageError
from .run_folder import RunPaths, points_in
from .user_folders import state_dir

RUN_PREFIX = "run:"  # before the name of a run, where another name may stand, too


def _index_dir() -> Path:
    return state_dir() / "runs"


def remember_run(paths: RunPaths) -> None:
    """Add the run to the index.

    Links of the same id whose folder is gone are removed.
    """
    folder = files.make_private_dir(_index_dir())
    link = folder / f"{paths.recipe_name}.{paths.run_id}.{files.digest_of(str(paths.root))[:8]}"
    temporary = files.temporary_path(link)
    temporary.symlink_to(paths.root)
    temporary.replace(link)
    for other, root in _links(paths).items():
        if other != link and (root == paths.root or not root.is_dir()):
            other.unlink(missing_ok=True)


def forget_run(paths: RunPaths) -> None:
    """Remove the run from the index."""
    for link, root in _links(paths).items():
        if root == paths.root:
            link.unlink(missing_ok=True)


def _links(paths: RunPaths) -> dict[Path, Path]:
    """Return the links to runs with the recipe and id of *paths*.

    There is one for each runs directory; each comes with its target.
    """
    name, found = f"{paths.recipe_name}.{paths.run_id}", {}
    for link in _index_dir().glob(f"{glob.escape(name)}*"):
        with suppress(OSError):  # removed since the listing, or no link
            if f"{link.name}.".startswith(f"{name}."):
                found[link] = Path(os.readlink(link))
    return found


def known_runs(*, gone: bool = False) -> tuple[RunPaths, ...]:
    """Return the indexed runs whose folder exists, oldest first.

    With *gone* return those whose folder does not exist. A run that exists in another runs directory, too, is not gone:
    jobs are found by recipe and id alone.
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
    """Return the run that *name* means.

    *name* is a folder, an id or its beginning, also that of a sweep's point, or a recipe's name. Where a recipe has
    several runs, *newest* takes the one submitted last, for callers that only look. With *gone* a run is found whose
    folder does not exist any more.

    Raises:
        NotFoundError: no run answers to *name*.
        UsageError: more than one does.
    """
    folder = Path(name).expanduser()
    here = RunPaths(root=folder.resolve())
    if here.plan.is_file() or here.ledger_dir.is_dir():
        return here
    runs = known_runs()
    matches = _called(name, runs) or _points(name, runs)
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


def _points(name: str, runs: Sequence[RunPaths]) -> list[RunPaths]:
    """Return the points of sweeps whose id begins with *name*."""
    if not re.fullmatch("[0-9a-f]{4,}", name):  # so that a mistyped recipe does not look into every sweep
        return []
    return [point for paths in runs for point in points_in(paths) if point.run_id.startswith(name)]


def find_checkpoint_dirs(text: str) -> list[Path]:
    """Return the folders of checkpoints that *text* means.

    *text* is a folder, or a run, whose train stages have such folders.
    """
    folder = Path(text).expanduser()
    above = RunPaths(root=folder.resolve().parent)
    if folder.resolve() == above.checkpoints_dir and above.plan.is_file():
        folder = above.root
    if folder.is_dir() and not RunPaths(root=folder).plan.is_file():
        return [folder]
    try:
        base = find_run(str(folder), newest=True).checkpoints_dir
    except NotFoundError as error:
        raise NotFoundError(f"{text!r} is neither a folder nor a run; `sousbatch status` lists the runs") from error
    return sorted(path for path in base.iterdir() if path.is_dir()) if base.is_dir() else []
