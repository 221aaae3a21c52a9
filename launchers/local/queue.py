"""Queue the local jobs of this host: a ticket file each, under one short lock.

A ticket counts while its job lives: the job's own lock shows it, also after a kill. `machine.py`
decides which job is next, in each process that looks; each job takes only what is its own.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ... import files
from .machine import Need, Share, Standing, Ticket, admit, why_waiting

_TICKET_BYTES = 4096  # reserved when a job is sent, so that a full disk stops no job that waits


@dataclass(frozen=True, kw_only=True)
class Form:
    """The entries that a job writes on its ticket when it enters the queue.

    *after* has the jobs that it waits for.
    """

    run: str
    who: str
    after: tuple[str, ...]
    is_short: bool
    seen: Share
    need: Need
    wants: int


def is_over(job: Path) -> bool:
    """Return whether the job of folder *job* has ended, or its process is gone."""
    try:
        return not files.is_locked(job / "lock") or bool((job / "end.json").read_bytes().strip())
    except FileNotFoundError:
        return True


class Line:
    """The line that the job *key* of *jobs_dir* stands in."""

    def __init__(self, jobs_dir: Path, key: str) -> None:
        # by host: the state folder may lie in a home that several machines share
        self._folder = jobs_dir.parent / f"machine-{socket.gethostname()}"
        self._jobs_dir, self._key = jobs_dir, key
        self._path = self._folder / f"{key}.json"

    def enter(self, form: Form) -> None:
        """Take the next place.

        Jobs of one run stand together, at the place of its first one that lives.
        """
        with files.locked(files.make_private_dir(self._folder) / "lock"):
            found = self._read()
            number = 1 + max((max(one["place"]) for one in found.values()), default=0)
            first = min((one["place"][0] for one in found.values() if one["run"] == form.run), default=number)
            ticket = asdict(form) | {"place": [first, number], "held": asdict(Share())}
            with self._path.open("wb") as stream:
                stream.write(_text(ticket))

    def settle(self, wants: int, held: Iterable[Share]) -> tuple[list[Share], str]:
        """Publish what the job has and wants; return what may start now, or why not."""
        with files.locked(self._folder / "lock"):
            found = self._read()
            before = found[self._key]
            mine = before | {"wants": wants, "held": asdict(_sum(held))}
            tickets = self._tickets(found | {self._key: mine})
            granted = admit(tickets)[self._key]
            mine |= {"wants": wants - len(granted), "held": asdict(_sum([tickets[self._key].held, *granted]))}
            if (text := _text(mine)) != _text(before):
                with self._path.open("r+b", buffering=0) as stream:
                    stream.write(text)
                    stream.truncate()
                os.utime(self._folder)  # makes the others look
            return granted, "" if granted else why_waiting(tickets, self._key)

    def leave(self) -> None:
        """Remove the ticket.

        Only once all can see that the job has ended: else a job could start before those that wait for this one.
        """
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def changed_at(self) -> int:
        """Return a number that changes when a ticket does; a kill does not change it."""
        return self._folder.stat().st_mtime_ns

    def _read(self) -> dict[str, dict[str, Any]]:
        """Return the tickets of living jobs, and remove those of the others."""
        found = {}
        for path in self._folder.glob("*.json"):
            if is_over(self._jobs_dir / path.stem) and path != self._path:
                path.unlink(missing_ok=True)
                continue
            with suppress(OSError, ValueError):
                found[path.stem] = files.read_json(path)
        return found

    def _tickets(self, found: Mapping[str, dict[str, Any]]) -> dict[str, Ticket]:
        tickets = {key: _ticket(one) for key, one in found.items()}
        over = {key: is_over(self._jobs_dir / key) for one in found.values() for key in one["after"]}

        def standing(key: str) -> Standing:
            open_ones = [other for other in found[key]["after"] if not over[other]]
            are_short = all(o in found and found[o]["is_short"] and tickets[o].held != Share() for o in open_ones)
            return "later" if not are_short else "next" if open_ones else "ready"

        return {key: replace(ticket, standing=standing(key)) for key, ticket in tickets.items()}


def _sum(shares: Iterable[Share]) -> Share:
    total = Share()
    for share in shares:
        total = total.plus(share)
    return total


def _ticket(values: Mapping[str, Any]) -> Ticket:
    return Ticket(
        place=(values["place"][0], values["place"][1]),
        who=values["who"],
        seen=_share(values["seen"]),
        need=Need(**values["need"]),
        wants=values["wants"],
        held=_share(values["held"]),
    )


def _share(values: Mapping[str, Any]) -> Share:
    return Share(cores=values["cores"], devices=tuple(values["devices"]), memory=values["memory"])


def _text(ticket: Mapping[str, Any]) -> bytes:
    return json.dumps(ticket).encode().ljust(_TICKET_BYTES)
