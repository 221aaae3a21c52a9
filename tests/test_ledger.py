"""Append-only files: incomplete tails, full disks, numbers under contention, and the fence."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sousbatch import ledger
from sousbatch.errors import FencedError, NoRoomError, NotFoundError
from sousbatch.events import Event, Frozen, Intent, Problem, Resumed, Saved, Started, Step, of


@pytest.fixture
def small_disk(mount_tmpfs: Callable[[str], Path]) -> Path:
    """A file system of 64 KiB."""
    return mount_tmpfs("size=64k")


def kinds(folder: Path) -> list[str]:
    return [event.kind for event in ledger.read(folder)]


def messages(found: list[Event]) -> list[str | None]:
    return [event.message for event in of(found, Problem)]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    writer = ledger.open_attempt(tmp_path, "train", 3)
    writer.write(Started(host='한글\n\u2028 and "quotes"', pid=7))
    writer.close()
    (event,) = ledger.read(tmp_path)
    assert isinstance(event, Started) and (event.kind, event.role) == ("attempt", "stage")
    assert (event.stage, event.task, event.number) == ("train", 3, 1)
    assert event.data() == {"host": '한글\n\u2028 and "quotes"', "pid": 7}


def test_events_come_by_number_and_sequence_whatever_the_clocks_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = random.Random(1)
    monkeypatch.setattr("time.time", lambda: clock.random())
    expected = []
    for number in range(1, 12):
        writer = ledger.open_attempt(tmp_path, "train", 0)
        for sequence in range(12):
            writer.write(Step(step=sequence))
            expected.append((number, sequence))
        writer.close()
        os.utime(writer.path, (number * -100 + 5000, number * -100 + 5000))
    assert [(event.number, event.sequence) for event in ledger.read(tmp_path)] == expected


@pytest.mark.parametrize(
    "tail", [b"", b'{"seq', b'{"sequence": 1, "time": 1.0, "kind": "x"', b"\xed\x95", b"[1]\n", b"7\n"]
)
def test_a_torn_tail_costs_no_other_line(tmp_path: Path, tail: bytes) -> None:
    first = ledger.open_job(tmp_path, "train", 0, 1)
    first.write(Problem(message="one"))
    first.close()
    with first.path.open("ab") as stream:
        stream.write(tail)
    assert messages(ledger.read(tmp_path)) == ["one"]
    second = ledger.open_job(tmp_path, "train", 0, 1)
    second.write(Problem(message="two"))
    second.write(Problem(message="three"))
    second.close()
    assert messages(ledger.read(tmp_path)) == ["one", "two", "three"]


def test_a_poll_returns_only_what_is_new_and_waits_for_whole_lines(tmp_path: Path) -> None:
    reader = ledger.LedgerReader(tmp_path / "ledger")
    assert reader.poll() == []
    writer = ledger.open_job(tmp_path / "ledger", "train", 0, 1)
    writer.write(Problem(message="one"))
    assert messages(reader.poll()) == ["one"]
    line = b'{"sequence": 1, "time": 0, "kind": "problem", "message": "two"}\n'
    with writer.path.open("ab", buffering=0) as stream:
        stream.write(line[:20])
        assert reader.poll() == []
        stream.write(line[20:])
    assert messages(reader.poll()) == ["two"]
    assert reader.poll() == []
    writer.close()


def test_files_of_others_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "client.bak.jsonl").write_text('{"sequence": 0, "time": 0, "kind": "x"}\n')
    (tmp_path / "notes.txt").write_text("hello\n")
    writer = ledger.open_client(tmp_path)
    writer.write(Frozen(plan="digest"))
    writer.close()
    assert writer.number == 1 and kinds(tmp_path) == ["frozen"]


@pytest.mark.parametrize(
    "line",
    [
        '{"sequence": "x", "time": 0, "kind": "ended", "exit_code": 0}',
        '{"sequence": true, "time": 0, "kind": "ended", "exit_code": 0}',
        '{"sequence": 1, "time": "now", "kind": "ended", "exit_code": 0}',
        '{"sequence": 1, "time": NaN, "kind": "ended", "exit_code": 0}',
        '{"sequence": 1, "time": 1' + "0" * 400 + ', "kind": "ended", "exit_code": 0}',
        '{"sequence": 1, "time": 0, "kind": ["ended"], "exit_code": 0}',
        '{"sequence": 1, "time": 0, "kind": "ended", "exit_code": "0"}',
        '{"sequence": 1, "time": 0, "kind": "ended"}',
        '{"sequence": 1, "time": 0, "kind": "error"}',
        '{"sequence": 1, "time": 0, "kind": "step", "step": 1' + "0" * 100 + "}",
        '{"sequence": 1, "time": 0, "kind": "step", "step": 1, "loss": "low"}',
        '{"sequence": 1, "time": 0, "kind": "unit", "unit": [0], "num_rows": 1}',
        "[" * 100_000,
    ],
)
def test_a_line_with_values_of_other_types_is_passed_over(tmp_path: Path, line: str) -> None:
    writer = ledger.open_job(tmp_path, "train", 0, 1)
    writer.write(Problem(message="one"))
    with writer.path.open("a") as stream:
        stream.write(line + "\n")
    writer.write(Problem(message="two"))
    writer.close()
    assert messages(ledger.read(tmp_path)) == ["one", "two"]
    ledger.open_job(tmp_path, "train", 0, 1).close()  # which looks for the last sequence number


@pytest.mark.parametrize("line", ['{"sequence": 1, "time": 0, "kind": "sent", "key": 7}\n', "\0\0\0\n", "[1]\n"])
def test_a_clients_line_that_is_no_event_is_told_since_a_job_may_be_missing(tmp_path: Path, line: str) -> None:
    writer = ledger.open_client(tmp_path)
    writer.write(Frozen(plan="digest"))
    reader = ledger.LedgerReader(tmp_path)
    assert [event.kind for event in reader.poll()] == ["frozen"] and reader.damage == ""
    with writer.path.open("a") as stream:
        stream.write(line)
    writer.close()
    assert reader.poll() == [] and f"{writer.path} is damaged" in reader.damage


def test_of_many_steps_those_asked_for_are_read_evenly_with_the_last_and_all_else(tmp_path: Path) -> None:
    writer = ledger.open_job(tmp_path, "train", 0, 1)
    for step in range(1, 1001):
        if step % 10 == 0:
            writer.write(Step(step=step, values={"eval_loss": 1.0}))
        writer.write(Step(step=step, values={"loss": 1.0}))
        if step % 500 == 0:
            writer.write(Saved(step=step))
    writer.close()
    found = ledger.read(tmp_path, max_steps=20)
    steps = [event.step for event in of(found, Step) if "loss" in event.values]
    assert 10 <= len(steps) <= 21 and steps[-1] == 1000 and steps == sorted(steps)
    gaps = {after - before for before, after in zip(steps[:-2], steps[1:-1], strict=True)}
    assert len(gaps) == 1, "evenly spread"
    assert 10 <= len([event for event in of(found, Step) if "eval_loss" in event.values]) <= 21
    assert [event.step for event in of(found, Saved)] == [500, 1000]
    last = [event for event in of(ledger.read(tmp_path, max_steps=1), Step) if "loss" in event.values][-1]
    assert last.step == 1000


OPENER = """
import sys, pathlib
from sousbatch import events, ledger
for _ in range(20):
    writer = ledger.open_attempt(pathlib.Path(sys.argv[1]), "train", 0)
    writer.write(events.Started(host=sys.argv[2]))
    writer.close()
    print(writer.number)
"""


def test_eight_processes_at_once_get_numbers_without_gap_or_double(tmp_path: Path) -> None:
    openers = [
        subprocess.Popen([sys.executable, "-c", OPENER, str(tmp_path), str(who)], stdout=subprocess.PIPE, text=True)
        for who in range(8)
    ]
    numbers = [int(number) for opener in openers for number in opener.communicate()[0].split()]
    assert sorted(numbers) == list(range(1, 161))
    assert len(ledger.read(tmp_path)) == 160


def test_a_ledger_never_makes_the_folder_of_a_deleted_run_again(tmp_path: Path) -> None:
    folder = tmp_path / "deleted" / "ledger"
    for opened in (
        lambda: ledger.open_attempt(folder, "train", 0),
        lambda: ledger.open_job(folder, "train", 0, 1),
        lambda: ledger.open_client(folder),
    ):
        with pytest.raises(NotFoundError, match="deleted does not exist any more"):
            opened()
    assert not (tmp_path / "deleted").exists()


def test_an_attempt_is_fenced_off_by_a_newer_one_of_its_own_task_only(tmp_path: Path) -> None:
    ledger.open_attempt(tmp_path, "train", 0).close()
    ledger.open_attempt(tmp_path, "train", 1).close()
    ledger.open_attempt(tmp_path, "train", 1).close()
    ledger.open_attempt(tmp_path, "train-more", 0).close()
    ledger.check_fence(tmp_path, "train", 0, 1)
    ledger.check_fence(tmp_path, "train", 1, 2)
    with pytest.raises(FencedError, match="attempt 1 of train was replaced"):
        ledger.check_fence(tmp_path, "train", 1, 1)


def test_a_full_disk_loses_events_of_a_job_but_not_the_job(small_disk: Path) -> None:
    writer = ledger.open_job(small_disk, "train", 0, 1)
    writer.write(Problem(message="before"))
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space"), ballast.open("wb", buffering=0) as stream:
        while True:
            if stream.write(b"x" * 4096) < 4096:
                raise OSError(errno.ENOSPC, "No space")
    for step in range(200):
        writer.write(Saved(content="x" * 100, step=step))
    survivors = len(ledger.read(small_disk))
    assert survivors < 201, "the disk was meant to be full"
    ballast.unlink()
    writer.write(Problem(message="after"))
    writer.close()
    assert kinds(small_disk) == ["problem"] + ["saved"] * (survivors - 1) + ["problem"]


def test_a_client_does_not_go_on_when_its_intent_could_not_be_written(small_disk: Path) -> None:
    writer = ledger.open_client(small_disk / "ledger")
    with pytest.raises(NoRoomError, match=r"no space left to write .*client\.0001\.jsonl; free some space"):
        for _ in range(1000):
            writer.write(Intent(stage="train", key="x" * 500))
    writer.close()
    assert set(kinds(small_disk / "ledger")) == {"intent"}


def test_a_store_that_went_away_costs_a_job_events_and_a_client_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, client = ledger.open_job(tmp_path, "train", 0, 1), ledger.open_client(tmp_path)

    def broken(descriptor: int, text: bytes) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", broken)
        job.write(Saved(step=1))
        with pytest.raises(OSError, match="Input/output"):
            client.write(Intent(stage="train", key="k"))
    job.write(Resumed(step=1))
    job.close()
    client.close()
    assert kinds(tmp_path) == ["resumed"]
