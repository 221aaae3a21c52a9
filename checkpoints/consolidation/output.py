"""The output of a consolidation.

It is a folder that appears by one rename, or a URL whose manifest comes last. Until then its shards, each with a record
of what it holds, wait where the next attempt finds them. A shard's bytes follow from the checkpoint and the options
alone, so two attempts that write the same one do no harm.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from ...errors import DamagedError, UsageError, is_no_room
from ...files import TEMPORARY_PREFIX, read_json, remove_tree, replacing, sync_dir, temporary_path, write_json
from ...remote import Place, RemotePath, read_size
from ..formats.safetensors_file import Shard
from .cast import CastReport
from .checksums import all_of
from .manifest import MANIFEST_NAME, WeightFile
from .stream import WrittenShard

logger = logging.getLogger(__name__)

_PLAN_NAME = "plan.json"
_REMOTE_WORK = ".consolidation"


class TakenAwayError(UsageError):
    """The unfinished folder is gone, or its place taken.

    Another consolidation has restarted, or has ended.
    """


class Output(Protocol):
    """One consolidation's place to write to.

    *has_room_for_all*: shards may be written side by side.
    """

    has_room_for_all: bool

    def begin(self, plan: Mapping[str, Any]) -> Mapping[str, Any]:
        """Resume what was left for the same `request`, and return its plan.

        Otherwise start with *plan*.
        """

    def restart(self, plan: Mapping[str, Any]) -> None:
        """Drop what was written and start with *plan*."""

    def place(self, shard: Shard) -> Place:
        """Return where a finished shard lies."""

    def temporary(self, shard: Shard) -> Path:
        """Return where a shard is to be written."""

    def written(self, shard: Shard) -> WrittenShard | None:
        """Return what is known of a shard that is finished, else None."""

    def finish(self, shard: Shard, written: WrittenShard) -> None:
        """Put a written shard where it belongs, and remember what it holds."""

    def write(self, name: str, content: bytes) -> None:
        """Write one of the small files."""

    def commit(self, manifest: bytes) -> None:
        """Make the model appear; *manifest* is the last of its files."""

    def leave(self, *, is_shared: bool, is_refused: bool) -> None:
        """Take away, after a failure, what this process left unfinished.

        Take away all, where nothing else is worth keeping.
        """


def open_output(place: Place, *, may_restart: bool = True) -> Output:
    """Return the output for a folder or a URL.

    *may_restart* says that a folder's leftovers of others may be removed.
    """
    return _Folder(place, may_restart=may_restart) if isinstance(place, Path) else _Remote(place)


def work_dir(out_dir: Path) -> Path:
    """Return where the model of *out_dir* is until it is complete."""
    return out_dir.parent / f"{TEMPORARY_PREFIX}{out_dir.name}.part"


class _Folder:
    """`.tmp-OUT.part/` beside OUT.

    `model/` becomes OUT by one rename; `records/` and the plan are for resuming.
    """

    has_room_for_all = True

    def __init__(self, out_dir: Path, *, may_restart: bool = True) -> None:
        self._out = out_dir
        self._may_restart = may_restart
        self._begun: set[Path] = set()
        self._work = work_dir(out_dir)
        self._model = self._work / "model"
        self._records = self._work / "records"

    def begin(self, plan: Mapping[str, Any]) -> Mapping[str, Any]:
        found = self._found_plan()
        if found is not None and found.get("request") == plan["request"]:
            self._make_dirs()
            return found
        if found is not None and not self._may_restart:
            raise UsageError(
                f"{self._out}: parts of another checkpoint, or made with other options, wait in {self._work}; "
                "use those options, or remove that folder to restart"
            )
        if found is not None:
            logger.warning("%s: left by a consolidation with other options; restarting", self._work)
            remove_tree(self._work)
        self._start(plan)  # nothing is removed here: another task of the same array may have begun
        return plan

    def restart(self, plan: Mapping[str, Any]) -> None:
        remove_tree(self._work)
        self._start(plan)

    def place(self, shard: Shard) -> Path:
        return self._model / shard.file_name

    def temporary(self, shard: Shard) -> Path:
        path = self._work / f"{TEMPORARY_PREFIX}{shard.file_name}"
        self._begun.add(path)
        return path

    def written(self, shard: Shard) -> WrittenShard | None:
        record = self._records / f"{shard.file_name}.json"
        if not record.is_file() or not self.place(shard).is_file():
            return None
        return _from_json(shard, record.read_text(encoding="utf-8"), self.place(shard))

    def finish(self, shard: Shard, written: WrittenShard) -> None:
        with self._not_taken_away():
            try:
                os.rename(self.temporary(shard), self.place(shard))
            except FileNotFoundError:
                if not self.place(shard).is_file():  # else another process has just done the same
                    raise
            sync_dir(self._model)
            write_json(self._records / f"{shard.file_name}.json", _to_json(written))

    def write(self, name: str, content: bytes) -> None:
        temporary = temporary_path(self._work / name)
        with self._not_taken_away():
            with replacing(temporary) as stream:
                stream.write(content)
            os.replace(temporary, self._model / name)  # so that no temporary name is ever in what becomes the model
            sync_dir(self._model)

    def commit(self, manifest: bytes) -> None:
        self.write(MANIFEST_NAME, manifest)
        with self._not_taken_away():
            try:
                os.rename(self._model, self._out)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                raise TakenAwayError(f"{self._out}: appeared meanwhile; name another folder") from error
        sync_dir(self._out.parent)
        self.clear()

    def leave(self, *, is_shared: bool, is_refused: bool) -> None:
        if not is_shared and (is_refused or not any(self._records.glob("*.json"))):
            self.clear()
        for path in self._begun:
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove what is only for resuming."""
        if self._work.is_dir():
            remove_tree(self._work)

    @contextmanager
    def _not_taken_away(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise TakenAwayError(
                f"{self._work}: was taken away while it was written; another consolidation to {self._out} continues"
            ) from error

    def _start(self, plan: Mapping[str, Any]) -> None:
        self._make_dirs()
        write_json(self._work / _PLAN_NAME, dict(plan))

    def _make_dirs(self) -> None:
        try:
            self._model.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if is_no_room(error) or self._out.exists():  # another process has just ended
                raise
            raise UsageError(f"{self._out}: cannot be made ({error.strerror}); name a place to write to") from error
        self._records.mkdir(exist_ok=True)

    def _found_plan(self) -> dict[str, Any] | None:
        try:
            found = read_json(self._work / _PLAN_NAME)
        except (FileNotFoundError, NotADirectoryError):  # the latter is raised when the folder is made
            return None
        return found if isinstance(found, dict) else {}


def clear_leftovers(out: Place) -> None:
    """Remove what a consolidation that was killed at its very end left beside *out*."""
    if isinstance(out, Path):
        _Folder(out).clear()


class _Remote:
    """A URL as the output.

    Shards are written here one by one, sent, and compared by size; readers go by the manifest.
    """

    has_room_for_all = False

    def __init__(self, root: RemotePath) -> None:
        self._root = root
        self._work = root / _REMOTE_WORK
        self._staged: dict[str, Path] = {}

    def begin(self, plan: Mapping[str, Any]) -> Mapping[str, Any]:
        found = self._found_plan()
        if found is not None and found.get("request") != plan["request"]:
            raise UsageError(
                f"{self._root}: holds an unfinished consolidation of another checkpoint or with other options; "
                "remove it or name another place"
            )
        if found is None:
            (self._work / _PLAN_NAME).write_bytes(_encoded(plan))
        return plan if found is None else found

    def restart(self, plan: Mapping[str, Any]) -> None:
        self._work.remove()
        for path in list(self._root.glob("*.safetensors")):
            path.remove()
        (self._work / _PLAN_NAME).write_bytes(_encoded(plan))

    def place(self, shard: Shard) -> RemotePath:
        return self._root / shard.file_name

    def temporary(self, shard: Shard) -> Path:
        if shard.file_name not in self._staged:
            self._staged[shard.file_name] = Path(tempfile.mkdtemp(prefix="sousbatch-"))
        return self._staged[shard.file_name] / shard.file_name

    def written(self, shard: Shard) -> WrittenShard | None:
        record = self._work / f"{shard.file_name}.json"
        if not record.is_file() or not self.place(shard).is_file():
            return None
        return _from_json(shard, record.read_text(), self.place(shard))

    def finish(self, shard: Shard, written: WrittenShard) -> None:
        self.place(shard).upload(self.temporary(shard))
        if read_size(self.place(shard)) != shard.num_bytes:
            raise DamagedError(f"{self.place(shard)}: its size is not that of what was sent; try again")
        (self._work / f"{shard.file_name}.json").write_bytes(_encoded(_to_json(written)))
        shutil.rmtree(self._staged.pop(shard.file_name))

    def write(self, name: str, content: bytes) -> None:
        (self._root / name).write_bytes(content)

    def commit(self, manifest: bytes) -> None:
        (self._root / MANIFEST_NAME).write_bytes(manifest)
        self._work.remove()

    def leave(self, *, is_shared: bool, is_refused: bool) -> None:
        while self._staged:
            shutil.rmtree(self._staged.popitem()[1], ignore_errors=True)

    def _found_plan(self) -> dict[str, Any] | None:
        if not (self._work / _PLAN_NAME).is_file():
            if any(self._root.iterdir()):
                raise UsageError(f"{self._root}: is not empty; name another place")
            return None
        found = json.loads((self._work / _PLAN_NAME).read_text())
        return found if isinstance(found, dict) else {}


def _to_json(written: WrittenShard) -> dict[str, Any]:
    losses = {name: asdict(loss) for name, loss in written.losses.items()}
    return {"file": asdict(written.file), "losses": losses, "spans": dict(written.spans)}


def _from_json(shard: Shard, text: str, place: Place) -> WrittenShard | None:
    """Return what a record says.

    Return None where it is not of this shard, which is then written again.
    """
    try:
        values = json.loads(text)
        file = WeightFile(**values["file"])
        losses = {name: CastReport(**loss) for name, loss in values["losses"].items()}
        spans = all_of([values["spans"]])
    except (ValueError, LookupError, TypeError):
        return None
    is_same = (file.name, file.num_bytes) == (shard.file_name, shard.num_bytes) and read_size(place) == shard.num_bytes
    return WrittenShard(file=file, losses=losses, spans=spans) if is_same else None


def _encoded(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(dict(value), sort_keys=True, indent=2) + "\n").encode()
