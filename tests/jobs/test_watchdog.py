"""The watchdog in processes of its own: a process that hangs says where, and ends."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("watchdog")

# It works for longer than the watchdog waits, in small steps, so that only `step` keeps it alive on a busy machine too.
HANG = """
import os, sys, time
from sousbatch.jobs import watchdog
watchdog._OTHERS_FIRST_S = 0.2
rank, end = int(sys.argv[1]), sys.argv[2]
dog = watchdog.Watchdog(1 / 60, rank=rank, tell=lambda: print("told", flush=True))
def busy():
    for _ in range(30):
        time.sleep(0.05)
        dog.step()
def stuck_in_a_collective():
    if end == "close":
        time.sleep(1.5)
    deadline = time.monotonic() + 60
    while end == "hang" and time.monotonic() < deadline and (rank == 0 or "stuck" not in open(sys.argv[3]).read()):
        time.sleep(0.05)
busy()
print("worked", flush=True)
if end == "close":
    dog.close()
stuck_in_a_collective()
"""
CASES = [(rank, end) for end in ("hang", "close") for rank in (0, 1)]
Ends = dict[tuple[int, str], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ends]:
    """How each case ended; they run at the same time, since they only wait."""
    folder: Path = tmp_path_factory.mktemp("watchdog")
    running = {}
    for rank, end in CASES:
        said = folder / f"{end}-{rank}"
        command = [sys.executable, "-c", HANG, str(rank), end, str(said)]
        with said.open("w") as stream:
            running[rank, end] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, text=True)
    found = {}
    for (rank, end), process in running.items():
        out, _ = process.communicate(timeout=180)
        said_text = (folder / f"{end}-{rank}").read_text()
        found[rank, end] = subprocess.CompletedProcess(process.args, process.returncode, out, said_text)
    yield found


def test_a_rank_without_a_step_shows_its_stack_and_ends(ends: Ends) -> None:
    done = ends[0, "hang"]
    assert done.returncode == 1 and done.stdout == "worked\ntold\n", "told once, before the end"
    assert "Timeout" in done.stderr and "stuck_in_a_collective" in done.stderr and "in busy" not in done.stderr


def test_the_other_ranks_show_theirs_and_leave_the_end_to_the_first(ends: Ends) -> None:
    done = ends[1, "hang"]
    assert done.returncode == 0 and done.stdout == "worked\n" and "stuck_in_a_collective" in done.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_nothing_is_watched_after_the_last_step(ends: Ends, rank: int) -> None:
    done = ends[rank, "close"]
    assert done.returncode == 0 and done.stdout == "worked\n" and done.stderr == ""
