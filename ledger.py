"""Append and read a run's events: one file per writer, numbered by attempt.

A file's number is allocated by creating it exclusively, so the n-th start of a stage's task
owns the number n, and a writer that sees a higher number knows that it has been replaced. Reading
merges the files by number and sequence, never by a clock.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import files
from .errors import DamagedError, FencedError, NoRoomError, NotFoundError, is_no_room
from .events import KINDS, Event, Step

_FILE_PATTERN = re.compile(
    r"(?P<role>client|stage|job|rank[0-9]+)(\.(?P<stage>[a-z0-9-]+)-(?P<task>\d{5}))?\.(?P<number>\d{4,})\.jsonl"
)


_BLOCK_BYTES = 1 << 20
_STEP_MARK, _MARK_BYTES = b'"kind": "step"', 100  # where `Ledger.write` puts the kind of a line


class Ledger:
    """The one writer of one ledger file, from any of its threads.

    A full disk, or one that is away for a while, loses an event of a job but never its work: the
    line is dropped and the next one starts afresh. With *is_strict* it raises instead: a client
    must not send what it could not write down.
    """

    def __init__(self, descriptor: int, path: Path, number: int, *, is_strict: bool = False) -> None:
        self.path = path
        self.number = number
        self._descriptor = descriptor
        self._is_strict = is_strict
        self._lock = threading.Lock()
        text = path.read_bytes()
        self._sequence = 1 + max(map(_sequence_in, text.split(b"\n")))
        self._is_incomplete = bool(text) and not text.endswith(b"\n")

    def write(self, event: Event) -> None:
        """Append one event; all but `Step` events are durable when this returns.

        Raises:
            NoRoomError: the disk is full, and the ledger is strict.
        """
        with self._lock:
            self._write(event)

    def _write(self, event: Event) -> None:
        head = {"sequence": self._sequence, "time": time.time(), "kind": event.kind}
        place = {"stage": event.stage} if event.stage else {}
        line = json.dumps(head | place | event.data(), ensure_ascii=False)
        text = (("\n" if self._is_incomplete else "") + line + "\n").encode()
        self._sequence += 1
        try:
            written = os.write(self._descriptor, text)
            self._is_incomplete = (self._is_incomplete and written == 0) or 0 < written < len(text)
            if written < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if not isinstance(event, Step):
                os.fsync(self._descriptor)
        except OSError as error:
            if self._is_strict and is_no_room(error):
                raise NoRoomError(f"no space left to write {self.path}; free some space and try again") from error
            if self._is_strict:
                raise

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def open_client(folder: Path) -> Ledger:
    """Open the next client ledger; its number is the number of the submission."""
    return _open_next(folder, "client", is_strict=True)


def open_attempt(folder: Path, stage: str, task: int) -> Ledger:
    """Open the next attempt of a stage's task.

    Its number fences off all earlier ones.
    """
    return _open_next(folder, f"stage.{stage}-{task:05d}")


def open_job(folder: Path, stage: str, task: int, attempt: int, rank: int = 0) -> Ledger:
    """Open the ledger of one rank of an attempt's job; rank 0 speaks for all."""
    role = f"rank{rank}" if rank else "job"
    path = _made(folder) / f"{role}.{stage}-{task:05d}.{attempt:04d}.jsonl"
    return Ledger(_create(path, exclusive=False), path, attempt)


def _made(folder: Path) -> Path:
    """Make a ledger folder in its run, but never the run itself.

    A run that was deleted meanwhile stays deleted.
    """
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except FileNotFoundError as error:
        raise NotFoundError(f"{folder.parent} does not exist any more") from error
    return folder


def _create(path: Path, *, exclusive: bool) -> int:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | (os.O_EXCL if exclusive else 0)
    return os.open(path, flags, 0o600)


def _open_next(folder: Path, stem: str, *, is_strict: bool = False) -> Ledger:
    _made(folder)
    matches = (_FILE_PATTERN.fullmatch(path.name) for path in folder.glob(f"{stem}.*.jsonl"))
    number = max((int(match["number"]) for match in matches if match), default=0) + 1
    while True:
        path = folder / f"{stem}.{number:04d}.jsonl"
        try:
            descriptor = _create(path, exclusive=True)
        except FileExistsError:
            number += 1
            continue
        files.sync_dir(folder)
        return Ledger(descriptor, path, number, is_strict=is_strict)


def check_fence(folder: Path, stage: str, task: int, attempt: int) -> None:
    """Raise FencedError when a newer attempt than *attempt* has been opened.

    Attempts have no gaps, so looking for the next number is enough. Call it right before
    every commit: after a node failure the old processes may live on for a while.
    """
    if (folder / f"stage.{stage}-{task:05d}.{attempt + 1:04d}.jsonl").exists():
        raise FencedError(f"attempt {attempt} of {stage} was replaced by a newer one; it commits nothing more")


class LedgerReader:
    """Reads a ledger folder; each poll returns only what is new.

    With *max_steps* it returns no more than so many `step` events of a file, evenly spread, and the last one: a
    training of a year leaves more of them than anybody can look at, and to parse them takes minutes. *damage* says
    what a client's file holds beside events: no writer of ours leaves that there, so something may be missing.
    """

    def __init__(self, folder: Path, *, max_steps: int | None = None) -> None:
        self.damage = ""
        self._folder = folder
        self._max_steps = max_steps
        self._offsets: dict[str, int] = {}

    def poll(self) -> list[Event]:
        """Return the events since the last poll, by number, writer and sequence.

        Raises:
            DamagedError: a file cannot be read at all.
        """
        events: list[Event] = []
        if not self._folder.is_dir():
            return events
        for entry in os.scandir(self._folder):
            match = _FILE_PATTERN.fullmatch(entry.name)
            if match is None or entry.stat().st_size <= self._offsets.get(entry.name, 0):
                continue
            events += self._read(Path(entry.path), match)
        return sorted(events, key=lambda event: (event.number, event.role, event.stage, event.task, event.sequence))

    def _read(self, path: Path, match: re.Match[str]) -> Iterator[Event]:
        role, number, stage, task = match["role"], int(match["number"]), match["stage"], int(match["task"] or 0)
        lines = self._new_lines(path)
        for line in lines if self._max_steps is None else _thinned(lines, self._max_steps):
            try:
                data, kind, place = _split(line)
                if kind in KINDS:
                    place |= {"stage": stage, "task": task} if stage else _place_in(data)
                    yield KINDS[kind].read(data, role=role, number=number, **place)
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                if role == "client" and line.strip():
                    self.damage = f"{path} is damaged: it has a line that is no event ({line[:40]!r})"

    def _new_lines(self, path: Path) -> Iterator[bytes]:
        """Yield the lines since the last poll that have their end."""
        offset = self._offsets.get(path.name, 0)
        try:
            with path.open("rb", buffering=_BLOCK_BYTES) as stream:
                stream.seek(offset)
                for line in stream:
                    if line.endswith(b"\n"):
                        offset += len(line)
                        yield line
            self._offsets[path.name] = offset
        except OSError as error:
            raise DamagedError(f"{path} cannot be read: {error.strerror}") from error


def _thinned(lines: Iterator[bytes], max_steps: int) -> Iterator[bytes]:
    """Yield *lines*, but only every n-th and the last of the steps.

    Steps with a validation loss are counted apart.
    """
    plain, validated = _Spread(max_steps), _Spread(max_steps)
    for line in lines:
        if line.find(_STEP_MARK, 0, _MARK_BYTES) < 0:
            yield line
        else:
            (validated if b'"eval_loss"' in line else plain).add(line)
    yield from plain.lines()
    yield from validated.lines()


class _Spread:
    """At most so many lines of any number, evenly spread, and the last one."""

    def __init__(self, most: int) -> None:
        self._most, self._every, self._count = most, 1, 0
        self._kept: list[bytes] = []
        self._newest = b""

    def add(self, line: bytes) -> None:
        self._newest = line
        self._count += 1
        if self._count % self._every == 0:
            self._kept.append(line)
            if len(self._kept) > self._most:
                self._every *= 2
                self._kept = self._kept[1::2]

    def lines(self) -> list[bytes]:
        is_newest_kept = self._count % self._every == 0
        return self._kept if is_newest_kept and self._kept or not self._count else [*self._kept, self._newest]


def read(folder: Path, *, max_steps: int | None = None) -> list[Event]:
    """Return all events of a ledger folder, by number, writer and sequence.

    *max_steps* is that of `LedgerReader`.
    """
    return LedgerReader(folder, max_steps=max_steps).poll()


def _sequence_in(line: bytes) -> int:
    """Return the sequence number of a line, or -1 when it is incomplete."""
    try:
        return int(json.loads(line)["sequence"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return -1


def _split(line: bytes) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Return what a line holds of its own, its kind, and its sequence and time."""
    data = json.loads(line)
    sequence, moment, kind = data.pop("sequence"), data.pop("time"), data.pop("kind")
    if type(sequence) is not int or type(kind) is not str:
        raise ValueError("sequence or kind is of another type")
    if type(moment) not in (int, float) or not math.isfinite(moment):
        raise ValueError("time is no number")
    return data, kind, {"sequence": sequence, "time": moment}


def _place_in(data: dict[str, Any]) -> dict[str, Any]:
    """Return the stage that a client's line names."""
    if type(data.get("stage", "")) is not str:
        raise ValueError("stage is no text")
    return {"stage": data["stage"]} if "stage" in data else {}
