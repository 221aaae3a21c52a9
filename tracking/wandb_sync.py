"""Send what attempts recorded for W&B: each once, in order, by `wandb sync`.

What counts is how many rows the server has, not what `wandb sync` says: it ends with 0 also when its key was refused,
and sends a file again whose marker is lost. So it gets a copy without the rows that have arrived.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import files
from ..errors import EXIT_STOPPED
from ..redaction import redacted
from .base import Ending, Outcome
from .wandb_files import (
    Part,
    Sent,
    count_rows,
    is_row,
    note_page,
    only_writer,
    parts_of,
    read_records,
    settle,
    write_records,
)
from .wandb_server import OutOfReachError, Server, find_server

_SETTLES_S = 15.0  # how long after a request its rows may take to be counted
_DIES_S = 3.0  # how long W&B's own process goes on sending when what started it was killed: measured 2 s


def has_left(folder: Path) -> bool:
    """Say whether a run recorded something that is not known to have arrived."""
    parts = [Part(folder=one) for one in folder.glob("wandb/*-*-*") if one.is_dir()]  # and no lock
    return any(not (mark and mark.is_done) for mark in (part.read() for part in parts))


def send(
    folder: Path, project: str, entity: str | None, endings: Mapping[str, Ending], *, limit_s: float
) -> Iterator[Outcome]:
    """Send what ended attempts recorded, and yield what became of each.

    *endings* are those of attempts by their labels. What is not sent after *limit_s* stays for the next time.
    """
    until = time.monotonic() + limit_s
    try:
        server = find_server(os.environ)
    except OutOfReachError as error:
        yield Outcome(what="W&B", problem=str(error), of_run=False)
        return
    runs = {
        path.name.removeprefix("run-").removesuffix(".wandb") for path in folder.glob("wandb/*/wandb/*/run-*.wandb")
    }
    for each in sorted(runs):
        with only_writer(folder, each) as is_free:
            if not is_free:
                yield Outcome(what=each, problem="another sync, or a job that is online, sends it")
                continue
            yield from _Sender(server, project, entity, each, until, folder).send(endings)


@dataclass(frozen=True)
class _Sender:
    """What is the same for all parts of a tracked run."""

    server: Server
    project: str
    entity: str | None
    run: str
    until: float
    folder: Path

    def send(self, endings: Mapping[str, Ending]) -> Iterator[Outcome]:
        """Send the parts that have ended and were not sent, oldest first."""
        parts = [part for part in parts_of(self.folder, self.run) if part.label in endings]
        left = [part for part in parts if not (mark := part.read()) or not mark.is_done]
        try:
            for part in left:
                mark = part.read()
                if mark is not None and mark.base is not None:  # its sender may be sending still
                    silent_s = max(0.0, time.time() - part.file.stat().st_mtime) if part.file else 0.0
                    time.sleep(max(0.0, _DIES_S - silent_s))
                    patience_s = min(_SETTLES_S - silent_s, (self.until - time.monotonic()) / 2)
                    self._wait_for(mark.base + count_rows(part) - mark.arrived, patience_s)
            marks = settle(parts, self._num_rows()) if left else {}
            for part in left:
                if time.monotonic() > self.until:
                    raise OutOfReachError("there was no time left")
                # the last one that began says how the run ended, also when an earlier one is sent after it
                self._send_part(part, marks[part.label], endings[part.label], endings[parts[-1].label])
                yield Outcome(what=part.label)
        except OutOfReachError as error:
            yield Outcome(what=self.run, problem=str(error))

    def _num_rows(self) -> int:
        """Ask how many rows the server has, and remember where it shows them."""
        arrived = self.server.look(self.project, self.entity, self.run)
        note_page(self.folder, self.run, arrived.page)
        return arrived.num_rows

    def _send_part(self, part: Part, sent: Sent, ending: Ending, last: Ending) -> None:
        """Send what a server lacks of *part*.

        Raises:
            OutOfReachError: not all of it has arrived.
        """
        original = part.file
        if original is None:
            return
        folder, base = part.folder / f"{files.TEMPORARY_PREFIX}copy", self._num_rows()
        files.discard(folder)
        copy = folder / f"offline-{original.parent.name.removeprefix('offline-')}" / original.name
        files.make_private_dir(copy.parent)
        try:
            (copy.parent / "files").symlink_to(original.parent / "files")
            num_rows = _write_copy(copy, original, sent.arrived, self._run_record(), ending, last)
            part.write(replace(sent, base=base))
            said = self._wandb_sync(copy)
            has_ended = Path(f"{copy}.synced").is_file()
            there = self._wait_for(base + num_rows, patience_s=_SETTLES_S if has_ended else 0)
        finally:
            files.discard(folder)
        is_done = has_ended and there - base >= num_rows
        if has_ended:  # what was ended may be sending still, so that the next sync counts
            part.write(Sent(arrived=sent.arrived + max(0, there - base), is_done=is_done))
        if not is_done:
            why = said or f"{there - base} of {num_rows} rows of {part.label} arrived"
            raise OutOfReachError(f"{why}; the next sync sends the rest")

    def _run_record(self) -> Any:
        from wandb.proto import wandb_internal_pb2 as protocol

        run = protocol.RunRecord(run_id=self.run, project=self.project, entity=self.entity or "", resume=True)
        return protocol.Record(run=run)

    def _wait_for(self, num_rows: int, patience_s: float) -> int:
        """Wait for rows to be counted; return how many the server has."""
        until = time.monotonic() + patience_s
        while (there := self._num_rows()) < num_rows and time.monotonic() < until:
            time.sleep(0.5)
        return there

    def _wandb_sync(self, copy: Path) -> str:
        """Run `wandb sync`; return why it was ended, or what it said that went wrong."""
        own = {
            "WANDB_DIR": copy.parent,
            "WANDB_DATA_DIR": copy.parent / "data",
            "WANDB_CACHE_DIR": copy.parent / "cache",
        }
        environment = {name: value for name, value in os.environ.items() if name not in ("WANDB_MODE", "WANDB_SILENT")}
        environment |= {name: str(path) for name, path in own.items()} | {"WANDB_ERROR_REPORTING": "false"}
        environment |= {"WANDB_BASE_URL": self.server.url}
        alive, held = os.pipe()  # it ends when the other end is closed, however this process ends
        try:
            done = subprocess.run(
                [sys.executable, "-m", "sousbatch.tracking.wandb_sync", "sync", str(copy.parent)],
                env=environment,
                cwd=copy.parent,
                stdin=alive,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=max(1.0, self.until - time.monotonic()),
            )
        except subprocess.TimeoutExpired:
            return "the server took too long"
        finally:
            os.close(alive)
            os.close(held)
        lines = [line for line in f"{done.stdout}\n{done.stderr}".splitlines() if "error" in line.lower()]
        return redacted(" ".join(lines[-1:]))[:300]


def _write_copy(copy: Path, original: Path, arrived: int, run: Any, ending: Ending, last: Ending) -> int:
    """Write what a server lacks of a file; return how many rows that is.

    A file that was cut, since its writer was killed, gets the end that it lacks, and the *run* where it lacks all.
    """
    num_rows, has_run, has_end = 0, False, False

    def lacking() -> Iterator[Any]:
        nonlocal num_rows, has_run, has_end
        seen = 0
        for record in read_records(original):
            has_run = has_run or record.WhichOneof("record_type") == "run"
            if is_row(record):
                seen += 1
                if seen <= arrived:
                    continue
                num_rows += 1
                if not has_run:
                    yield run
                    has_run = True
            if record.WhichOneof("record_type") == "exit":
                has_end = True
                if last is not ending:
                    record.exit.exit_code = last.exit_code
            yield record
        if not has_run:
            yield run
        if not has_end:
            yield from _end_records(ending, last)

    write_records(copy, original, lacking())
    return num_rows


def _end_records(ending: Ending, last: Ending) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2 as protocol

    if ending.error:
        summary = protocol.Record()
        summary.summary.update.add(key="error", value_json=json.dumps(ending.error))
        yield summary
    if last.exit_code == EXIT_STOPPED:
        preempting = protocol.Record()
        preempting.preempting.SetInParent()
        yield preempting
    end = protocol.Record()
    end.exit.exit_code = last.exit_code
    yield end


def _end_with_parent() -> None:
    """End this process when whoever holds the other end of standard input has."""
    os.read(0, 1)  # sys.stdin has a lock, over which Python would abort at its own end
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":  # `wandb`, bound to the process that started it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    runpy.run_module("wandb", run_name="__main__", alter_sys=True)
