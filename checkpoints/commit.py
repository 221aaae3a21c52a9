"""Committed checkpoints.

They are written under a temporary name, marked last, then renamed. A folder `step-00000100` with a marker is a
checkpoint, and `step-00000100-weights` what is left of one that was stripped to its weights; anything else is none,
however complete it looks. Folders of other trainers, and links, are *third-party*: listed, verified and consolidated,
never removed.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from .. import files
from ..errors import DamagedError, NotFoundError

MARKER = "checkpoint.json"
_FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})(-weights)?")
_THIRD_PARTY_NAME = re.compile(r"(?:checkpoint-|global_step)(\d+)")

# DeepSpeed's rank files, torch's distributed checkpoints (accelerate puts them a folder lower), safetensors.
_THIRD_PARTY_FILES = (
    "*_states.pt",
    ".metadata",
    "pytorch_model_fsdp_0/.metadata",
    "shard-*-model-*.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
)

# What a flipped bit makes of a zip file, besides a wrong CRC: another method, an encrypted record, a wild offset.
_UNREADABLE = (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError, struct.error)

Status = Literal["committed", "third-party", "incomplete"]
Content = Literal["full", "weights"]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One training state on disk, or the weights of one.

    *metric* is None where none was measured. A file called `pinned` in the folder pins it.
    """

    path: Path
    step: int
    attempt: int = 0
    status: Status = "committed"
    content: Content = "full"
    num_bytes: int = 0
    metric: float | None = None
    is_pinned: bool = False
    world_size: int = 0

    @property
    def order(self) -> tuple[int, int]:
        """The order of age: the attempt, then the step, never a clock.

        An attempt that went back behind a damaged checkpoint writes the newer ones, at lower steps.
        """
        return (self.attempt, self.step)


def begin(folder: Path, step: int, attempt: int, content: Content = "full") -> Path:
    """Return an empty temporary folder for the checkpoint of *step*.

    One rank calls it, after `sweep`.
    """
    sweep(folder)
    return files.make_private_dir(temporary_dir(folder, step, attempt, content))


def sweep(folder: Path) -> None:
    """Remove what killed saves and removals left in *folder*.

    Nothing that was committed has such a name.
    """
    for path in files.make_private_dir(folder).iterdir():
        if path.name.startswith(files.TEMPORARY_PREFIX):
            files.discard(path)


def temporary_dir(folder: Path, step: int, attempt: int, content: Content = "full") -> Path:
    """Return the temporary name of the checkpoint of *step*.

    All ranks of an attempt write to it.
    """
    return folder / f"{files.TEMPORARY_PREFIX}{name_of(step, content)}.{attempt:04d}"


def is_name_of_save(name: str) -> bool:
    """Say whether a folder's name is one that our saves give.

    They give it also before they are committed.
    """
    return name.startswith(f"{files.TEMPORARY_PREFIX}step-") or bool(_NAME.fullmatch(name))


def name_of(step: int, content: Content) -> str:
    """Return the name of a checkpoint's folder."""
    return f"step-{step:08d}" + ("-weights" if content == "weights" else "")


def commit(
    temporary: Path,
    *,
    step: int,
    attempt: int,
    metric: float | None,
    world_size: int,
    check_fence: Callable[[], None],
    content: Content = "full",
) -> Checkpoint:
    """Make the state in *temporary* a checkpoint.

    One rank calls it, after all have written.

    Raises:
        FencedError: a newer attempt exists; nothing was committed.
    """
    entries = {
        str(path.relative_to(temporary)): _fingerprint(path) for path in sorted(temporary.rglob("*")) if path.is_file()
    }
    values = {
        "format": _FORMAT,
        "step": step,
        "attempt": attempt,
        "metric": metric if metric is not None and math.isfinite(metric) else None,
        "world_size": world_size,
        "content": content,
        "files": entries,
    }
    files.sync_tree(temporary)
    files.write_json(temporary / MARKER, values)
    target = temporary.parent / name_of(step, content)
    doomed = files.temporary_path(target)
    check_fence()
    if target.exists():  # it was committed and then damaged, so that training went back behind it
        os.rename(target, doomed)
    os.rename(temporary, target)
    files.sync_dir(temporary.parent)
    files.discard(doomed)
    return read_checkpoint(target)


def _fingerprint(path: Path) -> dict[str, Any]:
    """Return size and digest of a file.

    A torch file is a zip whose directory holds the CRC-32 of every record, so the digest of
    the directory vouches for all of it without reading it again at save.
    """
    size = path.stat().st_size
    if path.suffix == ".pt" and zipfile.is_zipfile(path):
        return {"num_bytes": size, "zip_directory": zip_directory(path)}
    return {"num_bytes": size, "sha256": files.digest_file(path)}


def zip_directory(file: Path | IO[bytes]) -> str:
    """Return the digest of a zip file's directory.

    The directory has its records' names, sizes, CRC-32s and places.
    """
    with zipfile.ZipFile(file) as archive:
        rows = [(info.filename, info.file_size, info.CRC, info.header_offset) for info in archive.infolist()]
    return hashlib.sha256(files.canonical_json(rows).encode()).hexdigest()


def read_checkpoint(path: Path) -> Checkpoint:
    """Return the committed checkpoint at *path*.

    Raises:
        NotFoundError: there is no marker.
        DamagedError: the marker is not readable, or names a file outside of the folder.
    """
    try:
        values = files.read_json(path / MARKER)
        sizes = [entry["num_bytes"] for entry in values["files"].values()]
        outside = [name for name in values["files"] if name.startswith("/") or ".." in name.split("/")]
        if outside:
            raise ValueError(f"it names {outside[0]!r}")
        return Checkpoint(
            path=path,
            step=values["step"],
            attempt=values["attempt"],
            content=values.get("content", "full"),
            num_bytes=sum(sizes),
            metric=values["metric"],
            world_size=values["world_size"],
            is_pinned=(path / "pinned").exists(),
        )
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} is no committed checkpoint: it has no {MARKER}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"the marker {path / MARKER} cannot be read: {error}") from error


def list_checkpoints(folder: Path) -> tuple[Checkpoint, ...]:
    """Return what is in *folder*, by step.

    The list has committed, incomplete and third-party checkpoints. *folder* may hold the checkpoints or be one.
    """
    if not folder.is_dir():
        raise NotFoundError(f"{folder} is not a folder")
    itself = _look(folder)
    return (itself,) if itself else _below(folder)


def _below(folder: Path) -> tuple[Checkpoint, ...]:
    found = [one for path in sorted(folder.iterdir()) if path.is_dir() and (one := _look(path))]
    return tuple(sorted(found, key=lambda one: (one.step, one.attempt)))


def committed(folder: Path) -> tuple[Checkpoint, ...]:
    """Return the committed checkpoints of *folder*, oldest first.

    There are none when it does not exist.
    """
    if not folder.is_dir():
        return ()
    mine = (one for one in _below(folder) if one.status == "committed")
    return tuple(sorted(mine, key=lambda one: (one.order, one.content == "full")))


def last_committed(folder: Path) -> Checkpoint | None:
    """Return the newest committed checkpoint of *folder*, if any."""
    return (committed(folder) or (None,))[-1]


def best_committed(folder: Path, goal: Literal["lowest", "highest"]) -> Checkpoint | None:
    """Return the committed checkpoint with the best metric.

    Return the newest one where none has a metric.
    """
    measured = [one for one in reversed(committed(folder)) if one.metric is not None]
    if not measured:
        return last_committed(folder)
    return min(measured, key=lambda one: (one.metric or 0.0) * (1 if goal == "lowest" else -1))


def _look(path: Path) -> Checkpoint | None:
    if path.is_symlink():
        is_one = _NAME.fullmatch(path.name) or _THIRD_PARTY_NAME.fullmatch(path.name)
        return Checkpoint(path=path, step=_step_in(path), status="third-party") if is_one else None
    if (path / MARKER).is_file() and _NAME.fullmatch(path.name):
        try:
            return read_checkpoint(path)
        except NotFoundError:  # removed since this look at it began
            return None
        except DamagedError:
            return Checkpoint(
                path=path, step=_step_in(path), status="incomplete", num_bytes=files.num_bytes_below(path)
            )
    if path.name.startswith(f"{files.TEMPORARY_PREFIX}step-"):
        return Checkpoint(path=path, step=_step_in(path), status="incomplete", num_bytes=files.num_bytes_below(path))
    if _THIRD_PARTY_NAME.fullmatch(path.name) or any(any(path.glob(pattern)) for pattern in _THIRD_PARTY_FILES):
        return Checkpoint(path=path, step=_step_in(path), status="third-party", num_bytes=files.num_bytes_below(path))
    return None


def _step_in(path: Path) -> int:
    number = re.search(r"(\d+)", path.name)
    return int(number[1]) if number else 0


def verify(checkpoint: Checkpoint, *, reads_all: bool = True) -> tuple[str, ...]:
    """Return what is wrong with a checkpoint's files.

    Return nothing when all is as it was committed. A third-party one has no marker: of it the zip records' CRCs are
    checked. Without *reads_all* only sizes and zip directories are compared with the marker: enough to find a file that
    was cut off or swapped, in no time.
    """
    if checkpoint.status == "incomplete":
        return (_why_incomplete(checkpoint.path),)
    if checkpoint.status == "third-party":
        problems = [_zip_problem(path, path.name) for path in sorted(checkpoint.path.rglob("*.pt"))]
        return tuple(problem for problem in problems if problem)
    entries: dict[str, dict[str, Any]] = files.read_json(checkpoint.path / MARKER)["files"]
    problems = [_problem(checkpoint.path / name, name, entry, reads_all) for name, entry in sorted(entries.items())]
    return tuple(problem for problem in problems if problem)


def _why_incomplete(path: Path) -> str:
    try:
        read_checkpoint(path)
    except DamagedError as error:
        return str(error)
    except NotFoundError:
        pass
    return f"{path} was never committed"


def _problem(path: Path, name: str, entry: dict[str, Any], reads_all: bool) -> str:
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    if size != entry["num_bytes"]:
        return f"{name} has {size:,} bytes; {entry['num_bytes']:,} were committed"
    if "sha256" in entry:
        return (
            ""
            if not reads_all or files.digest_file(path) == entry["sha256"]
            else f"{name} differs from what was committed"
        )
    if problem := _zip_problem(path, name, reads_all):
        return problem
    return "" if zip_directory(path) == entry["zip_directory"] else f"{name} is another file than was committed"


def _zip_problem(path: Path, name: str, reads_all: bool = True) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip() if reads_all else None
    except _UNREADABLE as error:
        return f"{name} is not an intact torch file: {error}"
    return f"{name}: record {broken} is damaged" if broken else ""
