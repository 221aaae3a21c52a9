"""The watchdog in processes of its own: what hangs tells where, and ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

HANG = """
import sys, time
from sousbatch.jobs import watchdog
watchdog._OTHERS_FIRST_S = 0.2
dog = watchdog.Watchdog(0.3 / 60, rank=int(sys.argv[1]))
def busy():
    for _ in range(10):
        time.sleep(0.1)
        dog.step()
def stuck_in_a_collective():
    time.sleep(1.5)
busy()
print("worked", flush=True)
if sys.argv[2] == "close":
    dog.close()
stuck_in_a_collective()
"""


def _run(rank: int, end: str = "hang") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HANG, str(rank), end]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def test_a_rank_without_a_step_shows_its_stack_and_ends() -> None:
    done = _run(0)
    assert done.returncode == 1 and done.stdout == "worked\n"
    assert "Timeout" in done.stderr and "stuck_in_a_collective" in done.stderr and "in busy" not in done.stderr


def test_the_other_ranks_show_theirs_and_leave_the_end_to_the_first() -> None:
    done = _run(1)
    assert done.returncode == 0 and "stuck_in_a_collective" in done.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_nothing_is_watched_after_the_last_step(rank: int) -> None:
    done = _run(rank, "close")
    assert done.returncode == 0 and done.stderr == ""
