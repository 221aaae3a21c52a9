"""Decide which jobs may use which cores and devices of this machine now. Pure.

A ticket stands for a local job. One that does not fit yet keeps what it can get, so that nothing behind it
can make it wait longer; what it does not need is free for others. No stage's duration is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

Standing = Literal["ready", "next", "later"]
_MOST_NAMES = 3


@dataclass(frozen=True, kw_only=True)
class Share:
    """A part of the machine.

    *cores* is a mask of their numbers, *devices* are names, *memory* is bytes.
    """

    cores: int = 0
    devices: tuple[str, ...] = ()
    memory: int = 0

    def plus(self, other: Share) -> Share:
        """Return both together."""
        devices = self.devices + tuple(name for name in other.devices if name not in self.devices)
        return Share(cores=self.cores | other.cores, devices=devices, memory=self.memory + other.memory)


@dataclass(frozen=True, kw_only=True)
class Need:
    """The resources that one task asks for."""

    cores: int = 1
    devices: int = 0
    memory: int = 0


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """A job in the queue.

    *place* is the run's number, then its own; *seen* is the part of the machine it may use.

    *wants* counts the tasks that it would start now, *held* is what its running tasks have. A job is *ready*
    when all that it waits for has ended; *next* when only short stages are between; else *later*.
    """

    place: tuple[int, int]
    who: str
    seen: Share
    need: Need
    wants: int
    held: Share = Share()
    standing: Standing = "ready"


def clamped(need: Need, seen: Share) -> Need:
    """Return *need*, but no more than the whole machine.

    A task that asks for more waits for all of it, not for ever.
    """
    return Need(
        cores=min(need.cores, seen.cores.bit_count()),
        devices=min(need.devices, len(seen.devices)),
        memory=min(need.memory, seen.memory),
    )


def admit(tickets: Mapping[str, Ticket]) -> dict[str, list[Share]]:
    """Return what each job may start with now: one share for each task."""
    granted: dict[str, list[Share]] = {name: [] for name in tickets}
    for name, share, fits in _line(tickets):
        if fits and tickets[name].standing == "ready":
            granted[name].append(share)
    return granted


def why_waiting(tickets: Mapping[str, Ticket], name: str) -> str:
    """Return what the next task of job *name* waits for, or "".

    It names who has it, and the job's place in the queue.
    """
    line = list(_line(tickets))
    share = next((share for other, share, fits in line if other == name and not fits), None)
    if share is None:
        return ""
    mine, order = tickets[name], list(dict.fromkeys(other for other, _, _ in line))
    got, need, seen = _amounts(share), _amounts(clamped(mine.need, mine.seen)), _amounts(mine.seen)
    lacking = [kind for kind in need if got[kind] < need[kind]]
    users, ahead = {}, order[: order.index(name)]
    for other in sorted(tickets, key=lambda other: tickets[other].place):
        held = _amounts(tickets[other].held)
        if uses := " and ".join(_text(kind, held[kind]) for kind in lacking if held[kind]):
            users[other] = f"run {tickets[other].who} uses {uses}"
    names = [*users.values(), *(f"run {tickets[other].who} is before it" for other in ahead if other not in users)]
    shown = names[:_MOST_NAMES] + ([f"{len(names) - _MOST_NAMES} more"] if len(names) > _MOST_NAMES else [])
    wants = " and ".join(_text(kind, need[kind], seen[kind]) for kind in lacking)
    return f"waits for {wants}; {', '.join(shown)}" + (f"; number {len(ahead) + 1} in line" if ahead else "")


def _line(tickets: Mapping[str, Ticket]) -> Iterator[tuple[str, Share, bool]]:
    """Yield in order what each next task would get, and if that is enough.

    After a task that does not fit comes no other one of its job; what it could get stays kept for it.
    """
    taken = Share()
    for ticket in tickets.values():
        taken = taken.plus(ticket.held)
    waiting = [name for name, ticket in tickets.items() if ticket.standing != "later"]
    for name in sorted(waiting, key=lambda name: tickets[name].place):
        ticket = tickets[name]
        for _ in range(ticket.wants):
            share, fits = _choose(clamped(ticket.need, ticket.seen), ticket.seen, taken)
            yield name, share, fits
            taken = taken.plus(share)
            if not fits:
                break


def _choose(need: Need, seen: Share, taken: Share) -> tuple[Share, bool]:
    """Return how much of *need* is free, and whether that is all of it.

    What is kept for earlier jobs is not free.
    """
    free, cores = seen.cores & ~taken.cores, 0
    while free and cores.bit_count() < need.cores:
        cores |= free & -free
        free &= free - 1
    devices = tuple(name for name in seen.devices if name not in taken.devices)[: need.devices]
    memory = max(0, min(need.memory, seen.memory - taken.memory))
    share = Share(cores=cores, devices=devices, memory=memory)
    return share, _amounts(share) == _amounts(need)


def _amounts(of: Share | Need) -> dict[str, int]:
    cores, devices = (of.cores, of.devices) if isinstance(of, Need) else (of.cores.bit_count(), len(of.devices))
    return {"core": cores, "GPU": devices, "memory": of.memory}


def _text(kind: str, number: int, total: int | None = None) -> str:
    """Write an amount: `2 of 4 GPUs`, `1 core`, `16.0 of 64.0 GB`."""
    if kind == "memory":
        return f"{number / 1e9:.1f} {f'of {total / 1e9:.1f} ' if total else ''}GB"
    noun = kind if (total or number) == 1 else f"{kind}s"
    return f"{number} {f'of {total} ' if total else ''}{noun}"
