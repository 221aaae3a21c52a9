"""Show a task as a run of Weights & Biases.

No module but this one and its neighbours of the same name knows the variables and settings of W&B. What a task logs
lies in the run's tracking folder first; W&B's own process sends it from there, and `wandb_sync` what stayed behind.
"""

from __future__ import annotations

import logging
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import EXIT_STOPPED
from ..redaction import redacted
from .base import Artifact, Ending, Outcome
from .identity import Identity, RunIdentity
from .wandb_files import Part, RowAppender, Sent, last_steps, note_page, only_writer, pages_of, parts_of, settle
from .wandb_server import NoKeyError, OutOfReachError, Server, find_server
from .wandb_sync import has_left, send

_MOST_ROWS, _MOST_TITLE = 1000, 128  # of a table, of an alert
_NAME = re.compile(r"[^A-Za-z0-9._-]")  # what the name of an artifact cannot have
_RECENT = 1000  # rows of more than the second after which W&B's own process writes them
_LEFT_S = 12.0  # how long a start may send what earlier attempts left
_END_S = 30.0  # and an end what W&B's own process left; Slurm may kill it before
# What W&B does unless the user's environment says otherwise. The limits are for a server that does not answer.
_DEFAULTS = {
    "WANDB_CONSOLE": "off",
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "1",
    "WANDB_INIT_TIMEOUT": "12",
    "WANDB_FINISH_TIMEOUT": "55",
    "WANDB_X_SERVICE_WAIT": "25",
}


class WandbTracker:
    """A W&B run, or what one stage shows in it."""

    _run: Any
    _identity: Identity

    def __init__(self) -> None:
        self._num_rows, self._is_asked, self._writer = 0, False, ExitStack()
        self._online: _Online | None = None
        self._shown: Mapping[str, int] = {}
        # rows that W&B's own process may not have written yet, and what takes its place when it is gone
        self._recent: deque[dict[str, Any]] = deque(maxlen=_RECENT)
        self._own: RowAppender | None = None

    def start(self, identity: Identity) -> None:
        """Open the run; attempts after the first one resume it."""
        mode, why = self._choose(identity)
        if identity.node and mode != "shared":
            raise OutOfReachError(f"node {identity.node} is not shown: {why}")
        for name, value in _DEFAULTS.items():  # some are read when wandb is imported
            os.environ.setdefault(name, value)
        os.environ.update(_variables(identity))
        self._identity = identity
        if mode != "offline":
            try:
                self._run = self._init(mode, identity.node)
            except Exception as error:  # wandb has a dozen kinds
                if identity.node:
                    raise
                mode, why = "offline", str(error)
        if mode == "offline":
            self._online = None
            self._writer.close()
            Part(folder=_part_folder(identity)).write(Sent())
            self._run = self._init(mode)
        if identity.node:
            return
        self._shown = last_steps(_earlier(identity))
        if mode != "offline":
            note_page(identity.folder, identity.id, self._run.url)
        if why:
            _warn(f"{why}; W&B is recorded offline, and `sousbatch sync {identity.config['run']}` sends it")
        # an attempt adds itself to what earlier ones wrote, and may have other values of what is not the recipe's
        self._run.config.update(identity.config, allow_val_change=True)
        self._run.define_metric(f"{identity.prefix}*", step_metric=f"{identity.prefix}step")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Add a row, without W&B's own step: W&B drops the rows of a repeated step.

        What an attempt that was killed has shown, and this one repeats, is left out.
        """
        prefix = self._identity.prefix
        new = {name: value for name, value in values.items() if step > self._shown.get(f"{prefix}{name}", -1)}
        if new or not values:
            self._log({"step": step, **new})

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set values of the run's summary."""
        self._run.summary.update({f"{self._identity.prefix}{name}": value for name, value in values.items()})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Add a row with a table."""
        import wandb

        kept = [list(row) for row in rows[:_MOST_ROWS]]
        self._log({name: wandb.Table(columns=list(columns), data=kept, allow_mixed_types=True)})

    def artifact(self, artifact: Artifact) -> None:
        """Add files to what the run made or used, by reference or uploaded."""
        import wandb

        facts = {"digest": artifact.digest, "path": str(artifact.path), **artifact.facts}
        shown = wandb.Artifact(_NAME.sub("-", artifact.name), type=artifact.kind, metadata=facts)
        if artifact.kind in self._identity.uploads and artifact.is_made:
            add = shown.add_dir if artifact.path.is_dir() else shown.add_file
            add(str(artifact.path), policy="immutable")  # without a copy
        else:
            shown.add_reference(artifact.path.resolve().as_uri(), checksum=False)
        if artifact.is_made:
            self._run.log_artifact(shown)
        else:  # as use_artifact does, which waits for the server and refuses to work offline
            self._run._log_artifact(shown, is_user_created=True, use_after_commit=True)

    def alert(self, title: str, text: str) -> None:
        """Send a message to where the user's account says."""
        self._run.alert(title=title[:_MOST_TITLE], text=text, wait_duration=0)

    def wants_stop(self) -> bool:
        """Say whether a person pressed the stop button of the run's page."""
        return self._is_asked

    def finish(self, exit_code: int) -> None:
        """Write what is left, and end the run.

        One that saved and left for another attempt is preempted, and not failed.
        """
        try:
            if exit_code == EXIT_STOPPED and not self._is_asked:
                self._run.mark_preempting()
            self._run.finish(exit_code=exit_code)
        except OSError:
            if self._identity.node:  # the file of the first node is not its own
                raise
            return self._finish_without_service(exit_code)
        if self._online is not None:
            self._online.finish(self._num_rows)
        self._writer.close()

    @staticmethod
    def doubt(mode: str, environment: Mapping[str, str]) -> str:
        """Say what a job would do without a key, or nothing where it finds one."""
        try:
            find_server(environment)
        except NoKeyError as error:
            lost = "; the metrics of other nodes are lost" * (mode == "shared")
            return (
                f"tracking.mode={mode}: {error}, so jobs will record offline{lost}; `wandb login`, or set "
                "WANDB_API_KEY and environment.inherit=[WANDB_API_KEY], else `sousbatch sync` sends it afterwards"
            )
        return ""

    @staticmethod
    def link(folders: Sequence[Path], run: RunIdentity) -> str:
        """Return the address of a run's page; of several runs, of their project."""
        page = next((page for folder in folders for page in pages_of(folder)), "")
        return page if run.per == "run" and len(folders) == 1 else page.rpartition("/runs/")[0]

    @staticmethod
    def has_left(folder: Path) -> bool:
        """Say whether a run recorded something that is not known to have arrived."""
        return has_left(folder)

    @staticmethod
    def send(
        folder: Path, run: RunIdentity, endings: Mapping[str, Ending], *, limit_s: float, by_itself: bool
    ) -> Iterator[Outcome]:
        """Send what the attempts that have ended recorded."""
        if by_itself and _asked_mode(run.mode) in ("offline", "disabled"):
            return iter(())
        if by_itself and not _has_key():  # most people have none
            return iter(())
        return send(folder, run.project, run.entity, endings, limit_s=limit_s)

    def _log(self, values: Mapping[str, Any]) -> None:
        row = {f"{self._identity.prefix}{name}": value for name, value in values.items()}
        self._recent.append(row)
        self._num_rows += 1
        if self._own is not None:
            self._own.add(_plain(row))
            return
        try:
            self._run.log(row)
        except OSError:
            self._write_lost_rows()

    def _write_lost_rows(self) -> None:
        """Take the place of W&B's own process; write the rows that it had not.

        Slurm sends SIGTERM to all of a job before it requeues it; that process ends at once, and the job saves first.
        """
        part = Part(folder=_part_folder(self._identity))
        if part.file is None:
            raise  # what ended W&B's own process
        self._own = RowAppender(part.file, self._online.base if self._online else 0)
        num_lost = self._num_rows - self._own.num_rows
        for row in list(self._recent)[-num_lost:] if num_lost > 0 else ():
            self._own.add(_plain(row))

    def _finish_without_service(self, exit_code: int) -> None:
        """Leave the file whole, and send what did not arrive while there is time."""
        import wandb

        if self._own is None:
            self._write_lost_rows()
        assert self._own is not None
        self._own.close()
        with suppress(OSError):  # which it would else print when Python ends
            wandb.teardown()
        self._writer.close()
        if self._online is not None:
            one = self._identity
            for name in _variables(one):
                os.environ.pop(name, None)
            ended = {one.part: Ending(exit_code=exit_code)}
            for outcome in send(one.folder, one.project, one.entity, ended, limit_s=_END_S):
                if outcome.problem:
                    _warn(f"W&B: {outcome.problem}")

    def _init(self, mode: str, node: int = 0) -> Any:
        import wandb

        settings = wandb.Settings(stop_fn=self._stop)
        if mode == "shared":
            settings.x_label, settings.x_primary = f"node{node}", not node
            settings.x_update_finish_state = not node
        return wandb.init(mode=mode, settings=settings)  # type: ignore[arg-type]

    def _stop(self) -> None:
        self._is_asked = True

    def _choose(self, identity: Identity) -> tuple[str, str]:
        """Return the mode of this task, and why it is offline though nobody asked for it."""
        mode = _asked_mode(identity.mode)
        if mode in ("offline", "disabled"):
            return mode, ""
        try:
            server = find_server(os.environ)
        except NoKeyError as error:
            return "offline", "" if mode == "auto" else str(error)
        try:
            if identity.node:  # the first one is the writer of rows
                server.look(identity.project, identity.entity, identity.id)
            else:
                self._online = self._take(identity, server)
        except OutOfReachError as error:
            return "offline", str(error)
        return "shared" if mode == "shared" else "online", ""

    def _take(self, identity: Identity, server: Server) -> _Online:
        """Become the writer of the run at the server.

        Raises:
            OutOfReachError: another task is, or the server does not answer.
        """
        num_rows = server.look(identity.project, identity.entity, identity.id).num_rows
        left = [part for part in _earlier(identity) if not ((mark := part.read()) and mark.is_done)]
        if earlier := {part.label: Ending(exit_code=EXIT_STOPPED) for part in left}:
            list(send(identity.folder, identity.project, identity.entity, earlier, limit_s=_LEFT_S))
            num_rows = server.look(identity.project, identity.entity, identity.id).num_rows
        if not self._writer.enter_context(only_writer(identity.folder, identity.id)):
            raise OutOfReachError("another task of the run is online")
        own, parts = Part(folder=_part_folder(identity)), parts_of(identity.folder, identity.id)
        settle(parts, num_rows)
        own.write(Sent(base=num_rows))
        return _Online(part=own, server=server, identity=identity, base=num_rows)


@dataclass(frozen=True, kw_only=True)
class _Online:
    """The part of a run that W&B's own process sends.

    The server had *base* rows of the run before.
    """

    part: Part
    server: Server
    identity: Identity
    base: int

    def finish(self, num_rows: int) -> None:
        """Mark the part as sent where its *num_rows* have arrived."""
        there = self.server.look(self.identity.project, self.identity.entity, self.identity.id).num_rows
        if there - self.base >= num_rows:
            self.part.write(Sent(arrived=num_rows, is_done=True))


def _earlier(identity: Identity) -> list[Part]:
    """Return what earlier attempts of this task left."""
    task, _, number = identity.part.rpartition("-")
    found = [(part, *part.label.rpartition("-")) for part in parts_of(identity.folder, identity.id)]
    return [part for part, before, _, other in found if before == task and int(other) < int(number)]


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without tables, which W&B's own process would write."""
    return {name: value for name, value in row.items() if isinstance(value, (int, float, str))}


def _asked_mode(mode: str) -> str:
    """Return the mode that the recipe asks for, or leaves to the environment."""
    return os.environ.get("WANDB_MODE", mode) if mode == "auto" else mode


def _has_key() -> bool:
    try:
        find_server(os.environ)
    except NoKeyError:
        return False
    return True


def _part_folder(identity: Identity) -> Path:
    return identity.folder / "wandb" / identity.part


def _node_folder(identity: Identity) -> Path:
    """Return where a node beside the first one leaves files; none is sent later."""
    return identity.folder / "nodes" / f"{identity.part}-{identity.node}"


def _warn(text: str) -> None:
    logging.getLogger(__name__).warning("%s", redacted(text))


def _variables(identity: Identity) -> dict[str, str]:
    variables = {
        "WANDB_PROJECT": identity.project,
        "WANDB_RUN_ID": identity.id,
        "WANDB_NAME": identity.name,
        "WANDB_RUN_GROUP": identity.group,
        "WANDB_JOB_TYPE": identity.job_type,
        "WANDB_NOTES": identity.notes,
        "WANDB_RESUME": "allow",
        "WANDB_DIR": str(_node_folder(identity) if identity.node else _part_folder(identity)),
        "WANDB_DATA_DIR": str(identity.folder / "data"),
        "WANDB_CACHE_DIR": str(identity.folder / "cache"),
    }
    if identity.tags:
        variables["WANDB_TAGS"] = ",".join(tag.replace(",", ";") for tag in identity.tags)
    if identity.entity:
        variables["WANDB_ENTITY"] = identity.entity
    return variables
