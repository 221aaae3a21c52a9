"""What attempts recorded offline arrives once and in order, whatever happens to the server, the files and the sync."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sousbatch.tracking.base import Ending, Outcome, Place, has_left, places, send_at_end, send_left
from sousbatch.tracking.wandb_files import only_writer

from .conftest import RUN
from .stand_in import StandIn

DONE = Ending(exit_code=0)
STOPPED = Ending(exit_code=75)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sousbatch.tracking.wandb_sync._SETTLES_S", 0.5)


def send(file: Path, limit_s: float = 60, **endings: Ending) -> list[Outcome]:
    """Send what lies in the tracking folder of *file*; the attempts are called a1, a2."""
    parts = {f"train-0-{name[1:]}": ending for name, ending in endings.items()}
    return list(send_left(file.parents[4], parts, limit_s=limit_s))


def steps(server: StandIn) -> list[int]:
    return [row["train/step"] for row in server.runs[RUN].rows] if RUN in server.runs else []


def test_ended_attempts_arrive_once_and_in_order_as_one_run(recorded: Callable[..., Path], server: StandIn) -> None:
    file = recorded(1, range(4), exit_code=75)
    recorded(2, range(4, 7), exit_code=None)
    recorded(3, range(7, 9))
    folder, page = file.parents[4], f"{server.url}/team/our-project/runs/{RUN}"
    assert places([folder]) == [Place(tracker="wandb", has_left=True)]
    sent = send(file, a1=STOPPED, a2=Ending(exit_code=137, error="it was killed"))
    assert sent == [Outcome(what="train-0-1"), Outcome(what="train-0-2")]
    assert steps(server) == list(range(7)) and server.runs[RUN].summary["error"] == "it was killed"
    assert server.runs[RUN].endings[-1]["exitcode"] == 137
    assert places([folder]) == [Place(tracker="wandb", link=page, has_left=True)]
    assert send(file, a1=STOPPED, a2=DONE, a3=DONE) == [Outcome(what="train-0-3")]
    assert send(file, a1=STOPPED, a2=DONE, a3=DONE) == []
    assert steps(server) == list(range(9)) and [row["_step"] for row in server.runs[RUN].rows] == list(range(9))
    assert server.runs[RUN].endings[-1]["exitcode"] == 0
    assert places([folder]) == [Place(tracker="wandb", link=page)]
    assert not list(folder.rglob(".tmp-*"))


def test_a_lock_is_nothing_that_is_left(tmp_path: Path) -> None:
    with only_writer(tmp_path, f"{RUN}-train-0"):
        assert not has_left(tmp_path)


def test_an_attempt_whose_mark_was_lost_is_not_sent_again(recorded: Callable[..., Path], server: StandIn) -> None:
    file = recorded(1, range(4))
    send(file, a1=DONE)
    (file.parents[2] / "sent.json").unlink()
    assert send(file, a1=DONE) == [Outcome(what="train-0-1")]
    assert steps(server) == list(range(4))


@pytest.mark.parametrize("num_bytes", [1, 20, 100])
def test_of_a_file_that_was_cut_all_rows_before_the_cut_arrive(
    recorded: Callable[..., Path], server: StandIn, num_bytes: int
) -> None:
    file = recorded(1, range(4), exit_code=None)
    file.write_bytes(file.read_bytes()[:-num_bytes])
    assert send(file, a1=Ending(exit_code=1)) == [Outcome(what="train-0-1")]
    assert steps(server) == list(range(3))


def test_an_attempt_that_was_killed_before_its_file_was_written_holds_up_nothing(
    recorded: Callable[..., Path], server: StandIn
) -> None:
    file = recorded(1, (), exit_code=None)
    file.write_bytes(file.read_bytes()[:7])
    recorded(2, range(3))
    assert send(file, a1=Ending(exit_code=137), a2=DONE) == [Outcome(what="train-0-1"), Outcome(what="train-0-2")]
    assert steps(server) == list(range(3))


def test_a_refused_key_leaves_all_for_the_next_sync(recorded: Callable[..., Path], server: StandIn) -> None:
    file = recorded(1, range(4))
    server.fault = "refused"
    (outcome,) = send(file, a1=DONE)
    assert outcome.problem == f"{server.url} refuses the key" and not server.runs
    server.fault = None
    assert send(file, a1=DONE) == [Outcome(what="train-0-1")]


@pytest.mark.parametrize("fault", ["busy", "silent"])
def test_a_server_that_fails_in_the_middle_gets_the_rest_later(
    recorded: Callable[..., Path], server: StandIn, fault: str
) -> None:
    file = recorded(1, range(3))
    send(file, a1=DONE)
    recorded(2, range(3, 8))
    server.rows_before_fault = (5, fault)  # of a request the first rows are taken
    began = time.monotonic()
    (outcome,) = send(file, limit_s=4, a1=STOPPED, a2=DONE)
    assert outcome.problem and time.monotonic() - began < 15
    server.fault = None
    assert send(file, a1=STOPPED, a2=DONE) == [Outcome(what="train-0-2")]
    assert steps(server) == list(range(8))


def _sync(file: Path) -> None:
    send(file, a1=DONE)


def test_a_sync_that_is_killed_loses_and_doubles_no_row(recorded: Callable[..., Path], server: StandIn) -> None:
    file = recorded(1, range(8))
    server.rows_before_fault = (4, "silent")
    sync = multiprocessing.get_context("fork").Process(target=_sync, args=(file,))
    sync.start()
    while server.fault is None:
        time.sleep(0.01)
    assert sync.pid
    os.kill(sync.pid, signal.SIGKILL)
    sync.join()
    server.fault = None
    assert send(file, a1=DONE) == [Outcome(what="train-0-1")]
    assert steps(server) == list(range(8))


def test_there_is_one_sync_at_a_time(recorded: Callable[..., Path], server: StandIn) -> None:
    file = recorded(1, range(4))
    with only_writer(file.parents[4], RUN):
        (outcome,) = send(file, a1=DONE)
    assert outcome.problem == "another sync, or a job that is online, sends it"
    assert not server.runs


@pytest.mark.parametrize("mode", ["offline", "auto"])
def test_an_attempt_is_sent_at_its_end_where_nobody_wants_to_be_offline(
    recorded: Callable[..., Path], server: StandIn, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    file = recorded(1, range(4))
    monkeypatch.setenv("WANDB_MODE", mode)
    sent = send_at_end(file.parents[4], {"train-0-1": DONE})
    assert sent == ([] if mode == "offline" else [Outcome(what="train-0-1")])


def test_without_a_key_nothing_is_said_at_the_end_and_a_person_who_asks_is_told(
    recorded: Callable[..., Path], server: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = recorded(1, range(4))
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert send_at_end(file.parents[4], {"train-0-1": DONE}) == []
    (outcome,) = send(file, a1=DONE)
    assert "there is no key for 127.0.0.1" in outcome.problem
