"""Who may use the machine: tables, and random days on random machines."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from sousbatch.launchers.local.machine import Need, Share, Ticket, admit, clamped, why_waiting

GB = 10**9
TWO_CORES = Share(cores=0b11, memory=8 * GB)
FOUR_GPUS = Share(cores=0xFF, devices=("0", "1", "2", "3"), memory=64 * GB)


def ticket(place: int, cores: int = 1, devices: int = 0, gb: int = 0, **values: Any) -> Ticket:
    need = Need(cores=cores, devices=devices, memory=gb * GB)
    return Ticket(**{"place": (place, place), "who": f"r/{place} (train)", "wants": 1, "need": need, **values})


TABLE: dict[str, tuple[Share, list[dict[str, Any]], dict[str, list[Any]]]] = {
    "two one-core jobs side by side": (TWO_CORES, [{"place": 1}, {"place": 2}], {"j1": [0b01], "j2": [0b10]}),
    "the first goes first": (TWO_CORES, [{"place": 2, "cores": 2}, {"place": 1, "cores": 2}], {"j1": [0b11]}),
    "a large one is not passed": (
        TWO_CORES,
        [{"place": 1, "wants": 0, "held": Share(cores=1)}, {"place": 2, "cores": 2}, {"place": 3}],
        {},
    ),
    "what a large one does not need is free": (
        FOUR_GPUS,
        [
            {"place": 1, "devices": 1, "wants": 0, "held": Share(cores=1, devices=("0",))},
            {"place": 2, "devices": 4},
            {"place": 3},
            {"place": 4, "devices": 1},
        ],
        {"j3": [0b100]},
    ),
    "more than there is gets all there is": (
        TWO_CORES,
        [{"place": 1, "cores": 9}, {"place": 2}],
        {"j1": [0b11]},
    ),
    "and waits for the whole": (
        TWO_CORES,
        [{"place": 1, "wants": 0, "held": Share(cores=1)}, {"place": 2, "cores": 9}, {"place": 3}],
        {},
    ),
    "memory counts where it is given": (
        TWO_CORES,
        [{"place": 1, "gb": 6, "wants": 0, "held": Share(cores=1, memory=6 * GB)}, {"place": 2, "gb": 3}, {"place": 3}],
        {},
    ),
    "memory is no matter to who gives none": (
        FOUR_GPUS,
        [{"place": 1, "wants": 0, "held": Share(cores=1, memory=64 * GB)}, {"place": 2}],
        {"j2": [0b10]},
    ),
    "as many tasks as fit": (TWO_CORES, [{"place": 1, "wants": 5}, {"place": 2}], {"j1": [0b01, 0b10]}),
    "who waits for an earlier stage keeps nothing": (
        TWO_CORES,
        [{"place": 1, "standing": "later", "cores": 2}, {"place": 2}],
        {"j2": [0b01]},
    ),
    "who waits for a short stage keeps its place": (
        TWO_CORES,
        [
            {"place": 1, "wants": 0, "held": Share(cores=1)},
            {"place": 2, "standing": "next"},
            {"place": 3},
        ],
        {},
    ),
}


@pytest.mark.parametrize(("seen", "line", "expected"), TABLE.values(), ids=TABLE)
def test_who_is_admitted(seen: Share, line: list[dict[str, Any]], expected: dict[str, list[int]]) -> None:
    granted = admit({f"j{one['place']}": ticket(seen=seen, **one) for one in line})
    assert {name: [share.cores for share in shares] for name, shares in granted.items() if shares} == expected


def test_each_device_is_granted_once_and_only_where_it_is_seen() -> None:
    half = replace(FOUR_GPUS, devices=("3", "2"))
    tickets = {
        name: ticket(place, devices=1, seen=seen)
        for place, (name, seen) in enumerate({"a": FOUR_GPUS, "b": half, "c": half, "d": half, "e": FOUR_GPUS}.items())
    }
    granted = {name: shares[0].devices for name, shares in admit(tickets).items() if shares}
    assert granted == {"a": ("0",), "b": ("3",), "c": ("2",), "e": ("1",)}


def test_cores_that_another_shell_may_not_use_are_no_matter() -> None:
    tickets = {"a": ticket(1, seen=Share(cores=0b01)), "b": ticket(2, seen=Share(cores=0b10))}
    assert all(admit(tickets).values())


@pytest.mark.parametrize(
    ("seen", "line", "expected"),
    [
        (TWO_CORES, [{"place": 7}], ""),
        (
            TWO_CORES,
            [{"place": 1, "wants": 0, "held": Share(cores=3)}, {"place": 7, "cores": 2}],
            "waits for 2 of 2 cores; run r/1 (train) uses 2 cores",
        ),
        (
            FOUR_GPUS,
            [
                {"place": 1, "wants": 0, "held": Share(cores=1, devices=("0",))},
                {"place": 2, "devices": 4},
                {"place": 7, "devices": 1},
            ],
            "waits for 1 of 4 GPUs; run r/1 (train) uses 1 GPU, run r/2 (train) is before it; number 2 in line",
        ),
        (
            TWO_CORES,
            [{"place": 1, "wants": 0, "held": Share(cores=1, memory=6 * GB)}, {"place": 7, "gb": 9}],
            "waits for 8.0 of 8.0 GB; run r/1 (train) uses 6.0 GB",
        ),
        (
            FOUR_GPUS,
            [
                *({"place": n, "wants": 0, "held": Share(cores=1 << n, devices=(str(n),))} for n in range(4)),
                {"place": 7, "devices": 1},
            ],
            "waits for 1 of 4 GPUs; " + "".join(f"run r/{n} (train) uses 1 GPU, " for n in range(3)) + "1 more",
        ),
    ],
)
def test_who_waits_says_for_what_and_for_whom(seen: Share, line: list[dict[str, Any]], expected: str) -> None:
    assert why_waiting({f"j{one['place']}": ticket(seen=seen, **one) for one in line}, "j7") == expected


@pytest.mark.parametrize("seed", range(12))
def test_any_day_ends_never_over_capacity_and_none_is_kept_waiting_by_one_behind(seed: int) -> None:
    draw = random.Random(seed)
    machine = Share(
        cores=(1 << draw.randint(1, 8)) - 1, devices=tuple("abcd"[: draw.randint(0, 4)]), memory=draw.randint(1, 9) * GB
    )
    coming = [some_ticket(draw, number, machine) for number in range(20)]
    tickets: dict[str, Ticket] = {}
    running: dict[str, list[Share]] = {}
    for _ in range(1500):
        if coming and draw.random() < 0.3:
            tickets[f"j{len(coming)}"] = coming.pop(0)
        busy = sorted(name for name in tickets if running.get(name))
        if busy and draw.random() < 0.4:
            name = draw.choice(busy)
            running[name].pop(draw.randrange(len(running[name])))
            tickets[name] = replace(tickets[name], held=total(running[name]))
            if draw.random() < 0.1 or not (tickets[name].wants or running[name]):  # killed, or done
                del tickets[name], running[name]
        for name in draw.sample(sorted(tickets), len(tickets)):  # they look one after another, in any order
            if shares := admit(tickets)[name]:
                running[name] = [*running.get(name, []), *shares]
                wants = tickets[name].wants - len(shares)
                tickets[name] = replace(tickets[name], wants=wants, held=total(running[name]))
                check_room(machine, [share for some in running.values() for share in some])
                check_nobody_is_kept(tickets, name, shares)
        if not coming and not tickets:
            return
    raise AssertionError(f"{len(coming)} jobs never came, {len(tickets)} never ended")


def some_ticket(draw: random.Random, place: int, machine: Share) -> Ticket:
    cores, devices, gb = draw.randint(1, 9), draw.randint(0, len(machine.devices)), draw.choice([0, 0, 2, 12])
    return ticket(place, cores, devices, gb, seen=machine, wants=draw.randint(1, 3))


def total(shares: list[Share]) -> Share:
    found = Share()
    for share in shares:
        found = found.plus(share)
    return found


def amounts(of: Share) -> tuple[int, int, int]:
    return of.cores.bit_count(), len(of.devices), of.memory


def check_room(machine: Share, shares: list[Share]) -> None:
    used = [sum(column) for column in zip(*map(amounts, shares), strict=True)]
    assert all(part <= whole for part, whole in zip(used, amounts(machine), strict=True))
    assert amounts(total(shares)) == tuple(used), "a core or a device was granted twice"
    assert amounts(machine.plus(total(shares)))[:2] == amounts(machine)[:2], "one was granted that is not there"


def check_nobody_is_kept(tickets: dict[str, Ticket], name: str, shares: list[Share]) -> None:
    """A job that waits before *name* finds all that it needs free of what *name* has just got."""
    free = [
        whole - part
        for whole, part in zip(
            amounts(tickets[name].seen), amounts(total([one.held for one in tickets.values()])), strict=True
        )
    ]
    for other in tickets.values():
        if other.wants and other.place < tickets[name].place:
            need = clamped(other.need, other.seen)
            for left, wanted, got in zip(
                free, (need.cores, need.devices, need.memory), amounts(total(shares)), strict=True
            ):
                assert not got or left >= wanted
