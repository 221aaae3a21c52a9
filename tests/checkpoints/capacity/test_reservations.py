"""A store's room shared by its runs: grants, reservations, and who stands behind them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from sousbatch.checkpoints.capacity import allocation, reservations
from sousbatch.checkpoints.capacity.reservations import Holder, Reservation
from sousbatch.run_folder import RunPaths

NOBODY = Holder()


def no_job_is_gone(job: str) -> bool:
    return False


def run(store: Path, number: int) -> RunPaths:
    paths = RunPaths(root=store / "recipe" / f"run{number}")
    paths.root.mkdir(parents=True, exist_ok=True)
    return paths


def promise(promised: int, held: int = 0, holder: Holder = NOBODY) -> Reservation:
    return Reservation(run="r", promised_bytes=promised, held_bytes=held, holder=holder)


GRANTS = {
    "all that is wanted": ({"wanted_bytes": 50, "free_bytes": 100}, [], 50),
    "no more than is free": ({"wanted_bytes": 500, "free_bytes": 100}, [], 100),
    "what is held counts as given": ({"wanted_bytes": 500, "free_bytes": 100, "held_bytes": 30}, [], 130),
    "what others may yet write is not free": ({"wanted_bytes": 500, "free_bytes": 100}, [(60, 20)], 60),
    "what others have written is not free anyway": ({"wanted_bytes": 500, "free_bytes": 100}, [(60, 60)], 100),
    "never less than is held": ({"wanted_bytes": 500, "free_bytes": 0, "held_bytes": 30}, [(900, 0)], 30),
    "the store's own budget": ({"wanted_bytes": 500, "free_bytes": 999, "store_bytes": 100}, [(60, 20)], 40),
    "what others hold beyond their promise": (
        {"wanted_bytes": 500, "free_bytes": 999, "store_bytes": 100},
        [(10, 70)],
        30,
    ),
}


@pytest.mark.parametrize(("values", "others", "expected"), GRANTS.values(), ids=GRANTS)
def test_a_grant_is_what_the_others_leave(values: dict[str, int], others: list[tuple[int, int]], expected: int) -> None:
    among = [promise(*one) for one in others]
    assert reservations.grant_bytes(**{"held_bytes": 0, "store_bytes": None} | values, among=among) == expected


def test_a_reservation_is_read_back_and_an_unreadable_one_is_none(tmp_path: Path) -> None:
    paths = run(tmp_path, 1)
    assert reservations.read_reservation(paths) is None
    made = promise(100, 10, reservations.this_process(["local:a", "slurm:7"]))
    reservations.publish(paths, made)
    assert reservations.read_reservation(paths) == made
    paths.reservation.write_text('{"run": "r", "holder": 3}')
    assert reservations.read_reservation(paths) is None
    assert reservations.read_others(tmp_path, None, measures=True) == ()


def test_a_runs_own_promise_does_not_count_against_it(tmp_path: Path) -> None:
    mine, other = run(tmp_path, 1), run(tmp_path, 2)
    for paths, promised in ((mine, 100), (other, 7)):
        reservations.publish(paths, promise(promised, 0, reservations.this_process()))
    assert [one.promised_bytes for one in reservations.read_others(tmp_path, mine, measures=True)] == [7]
    assert len(reservations.read_others(tmp_path, None, measures=True)) == 2


def test_a_process_is_dead_when_its_number_its_boot_or_its_start_is_another() -> None:
    own = reservations.this_process()
    assert not reservations.is_dead(own, no_job_is_gone)
    assert reservations.is_dead(replace(own, boot_id="another boot"), no_job_is_gone)
    assert reservations.is_dead(replace(own, started=own.started - 100), no_job_is_gone)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert reservations.is_dead(replace(own, pid=ended.pid), no_job_is_gone)
    assert reservations.is_dead(NOBODY, no_job_is_gone)


@pytest.mark.parametrize("jump_s", [-3600, 3600])
def test_a_holder_lives_on_when_the_clock_jumps(jump_s: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's time of boot is the time of day less the uptime, so it jumps with the clock."""
    own, booted, now = reservations.this_process(), psutil.boot_time(), time.time()
    monkeypatch.setattr("psutil._psplatform.boot_time", lambda: booted + jump_s)
    monkeypatch.setattr(time, "time", lambda: now + jump_s)
    assert not reservations.is_dead(own, no_job_is_gone)


def test_of_another_host_only_the_jobs_can_tell() -> None:
    there = replace(reservations.this_process(), host="another", boot_id="another")
    assert not reservations.is_dead(there, no_job_is_gone)
    waiting = replace(there, jobs=("slurm:7", "slurm:8"))
    assert not reservations.is_dead(waiting, lambda job: job == "slurm:7")
    assert reservations.is_dead(waiting, lambda job: True)


def test_a_queued_run_keeps_its_promise_and_a_dead_one_only_what_it_holds(tmp_path: Path) -> None:
    queued, dead = run(tmp_path, 1), run(tmp_path, 2)
    (dead.root / "file").write_bytes(bytes(10_000))
    reservations.publish(queued, promise(100, 0, Holder(jobs=("slurm:7",))))
    reservations.publish(dead, promise(10**9, 0, Holder(jobs=("slurm:8",))))
    found = reservations.read_others(tmp_path, None, measures=True, dead={dead.root})
    assert [one.promised_bytes - one.held_bytes for one in found] == [100, 0]
    assert 10_000 <= found[1].held_bytes < 40_000


def test_a_store_without_locks_is_used_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: object, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with reservations.lock_runs_dir(tmp_path):
        pass


def test_the_lock_of_a_dead_holder_is_free(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom sousbatch.checkpoints.capacity import reservations\n"
        "with reservations.lock_runs_dir(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    started = time.monotonic()
    with reservations.lock_runs_dir(tmp_path):
        assert time.monotonic() - started < 1


def test_bytes_are_counted_as_a_quota_counts_them(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    empty = allocation.measure_usage(folder)
    (folder / "small").write_bytes(b"x")
    assert allocation.measure_usage(folder) == empty + 4096
    os.link(folder / "small", folder / "same")
    (folder / "elsewhere").symlink_to("/usr")
    assert allocation.measure_usage(folder) <= empty + 4096 + 4096
    with (folder / "sparse").open("wb") as stream:
        stream.truncate(10**6)
    assert allocation.measure_usage(folder) >= empty + 4096 + 10**6
    assert allocation.measure_usage(tmp_path / "nothing") == 0
