"""The local launcher beyond the contract: kills, full disks, the machine's one claim."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sousbatch.launchers import local
from sousbatch.launchers.base import FINAL_WORDS, JobRef, JobState, Request
from sousbatch.launchers.local import LocalLauncher, job_state, write_end
from sousbatch.recipes.schema import Resources


@pytest.fixture
def launcher(tmp_path: Path) -> LocalLauncher:
    return LocalLauncher(tmp_path / "jobs")


@pytest.fixture
def request_of(tmp_path: Path) -> Callable[..., Request]:
    def make(text: str, **values: Any) -> Request:
        request = Request(
            stage="work",
            text=text + "\n",
            num_tasks=1,
            after=(),
            resources=Resources(device="cpu"),
            uses_devices=False,
            log_dir=str(tmp_path / "logs"),
        )
        return dataclasses.replace(request, **values)

    return make


def pid_of(folder: Path) -> int:
    return int((folder / "pid").read_text() or 0)


def end(launcher: LocalLauncher, ref: JobRef) -> JobState:
    deadline = time.monotonic() + 30
    while (state := launcher.states([ref])[ref]).word not in FINAL_WORDS:
        assert time.monotonic() < deadline, state
        time.sleep(0.02)
    return state


def test_a_killed_job_process_leaves_a_lost_job(
    launcher: LocalLauncher, request_of: Callable[..., Request], tmp_path: Path, until: Callable[..., Any]
) -> None:
    ref = launcher.send(request_of("sleep 0.5"), "key", {})
    until(lambda: launcher.states([ref])[ref].word == "running")
    os.kill(pid_of(tmp_path / "jobs" / "key"), signal.SIGKILL)
    state = end(launcher, ref)
    assert (state.word, state.reason) == ("lost", "its process was killed")
    assert launcher.send(request_of("sleep 0.5"), "key", {}) == ref
    assert end(launcher, ref).word == "lost", "a key that was accepted is not started again"
    until(lambda: not subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True).stdout)


CLIENT = """
import os, signal, subprocess, sys
from pathlib import Path
from sousbatch.launchers.base import Request
from sousbatch.launchers.local import LocalLauncher
from sousbatch.recipes.schema import Resources

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

place, where = Path(sys.argv[1]), sys.argv[2]
start = subprocess.Popen
if where == "before rename":
    Path.rename = die
elif where == "before start":
    subprocess.Popen = die
else:
    subprocess.Popen = lambda *args, **kwargs: (start(*args, **kwargs), die())
request = Request(stage="work", text=f"echo ran >> {place}/ran\\n", num_tasks=1, after=(),
                  resources=Resources(device="cpu"), uses_devices=False, log_dir=str(place / "logs"))
LocalLauncher(place / "jobs").send(request, "key", {})
"""


@pytest.mark.parametrize("where, is_accepted", [("before rename", False), ("before start", False), ("after", True)])
def test_a_killed_send_was_accepted_or_never_starts(
    launcher: LocalLauncher, tmp_path: Path, where: str, is_accepted: bool
) -> None:
    client = subprocess.run([sys.executable, "-c", CLIENT, str(tmp_path), where])
    assert client.returncode == -signal.SIGKILL
    found = launcher.find(["key"])
    assert bool(found) is is_accepted
    for ref in found.values():
        assert end(launcher, ref).word == "done"
    assert (tmp_path / "ran").exists() is is_accepted


def test_a_look_at_the_state_never_keeps_a_job_from_starting(
    launcher: LocalLauncher, request_of: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([False, False])
    real = local._try_lock
    monkeypatch.setattr(local, "_try_lock", lambda lock: next(answers, None) is None and real(lock))
    assert end(launcher, launcher.send(request_of("true"), "key", {})).word == "done"


def test_two_runs_take_the_machine_in_turn(
    launcher: LocalLauncher, request_of: Callable[..., Request], tmp_path: Path, until: Callable[..., Any]
) -> None:
    text = f"mkdir {tmp_path}/busy || exit 9; touch {tmp_path}/a; sleep 0.4; rmdir {tmp_path}/busy"
    first = launcher.send(request_of(text, uses_devices=True), "first", {})
    until((tmp_path / "a").exists)
    second = launcher.send(request_of(text, uses_devices=True), "second", {})
    until(lambda: launcher.states([second])[second].reason == "another run uses this machine")
    assert end(launcher, first).word == end(launcher, second).word == "done"


def test_a_kill_frees_the_machine(
    launcher: LocalLauncher, request_of: Callable[..., Request], tmp_path: Path, until: Callable[..., Any]
) -> None:
    first = launcher.send(request_of("sleep 0.5", uses_devices=True), "first", {})
    until(lambda: launcher.states([first])[first].word == "running")
    os.kill(pid_of(tmp_path / "jobs" / "first"), signal.SIGKILL)
    assert end(launcher, launcher.send(request_of("true", uses_devices=True), "second", {})).word == "done"
    until(lambda: not subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True).stdout)


def test_a_job_waiting_for_the_machine_is_cancelled(
    launcher: LocalLauncher, request_of: Callable[..., Request], until: Callable[..., Any]
) -> None:
    first = launcher.send(request_of("exec sleep 60", uses_devices=True), "first", {})
    until(lambda: launcher.states([first])[first].word == "running")
    second = launcher.send(request_of("true", uses_devices=True), "second", {})
    until(lambda: launcher.states([second])[second].reason)
    launcher.cancel([second], save=True)
    assert end(launcher, second) == JobState(word="cancelled", reason="cancelled while waiting")
    launcher.cancel([first], save=False)
    assert end(launcher, first).word == "cancelled"


def test_no_more_tasks_run_at_once_than_fit_and_each_has_a_slot_of_its_own(
    launcher: LocalLauncher, request_of: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_parallel", lambda resources: 2)
    text = f"mkdir {tmp_path}/slot-$SOUSBATCH_SLOT || exit 9; sleep 0.1; rmdir {tmp_path}/slot-$SOUSBATCH_SLOT"
    ref = launcher.send(request_of(text, num_tasks=5), "key", {})
    assert end(launcher, ref).word == "done"
    assert len(list((tmp_path / "logs").iterdir())) == 5


def test_a_full_disk_still_leaves_a_clear_end(
    small_disk: Path, request_of: Callable[..., Request], until: Callable[..., Any]
) -> None:
    launcher = LocalLauncher(small_disk / "jobs")
    text = f"head -c 1M /dev/zero > {small_disk}/ballast; exit 77"
    ref = launcher.send(request_of(text, log_dir=str(small_disk / "logs")), "key", {})
    assert end(launcher, ref) == JobState(word="failed", reason="task 0 found no room left on the store")


def test_a_log_folder_that_cannot_be_made_is_a_clear_end(
    launcher: LocalLauncher, request_of: Callable[..., Request], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    state = end(launcher, launcher.send(request_of("true", log_dir=str(tmp_path / "file" / "logs")), "key", {}))
    assert state.word == "failed" and "file" in state.reason


def test_the_longest_reason_fits_into_what_was_reserved(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text("{}")
    (tmp_path / "end.json").write_bytes(b" " * local._END_BYTES)
    write_end(tmp_path, JobState(word="failed", reason="\U0001f469" * 2000))
    state = job_state(tmp_path)
    assert state.word in FINAL_WORDS and len(state.reason) == local._END_CHARACTERS
    assert (tmp_path / "end.json").stat().st_size == local._END_BYTES


def test_no_descriptor_is_left_open(launcher: LocalLauncher, request_of: Callable[..., Request]) -> None:
    end(launcher, launcher.send(request_of("true"), "warm-up", {}))
    before = len(os.listdir("/proc/self/fd"))
    for number in range(3):
        end(launcher, launcher.send(request_of("true"), f"key-{number}", {}))
    assert len(os.listdir("/proc/self/fd")) == before


def test_slurms_own_configuration_stays(
    launcher: LocalLauncher, request_of: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", "/etc/private/slurm.conf")
    end(launcher, launcher.send(request_of("env"), "key", {}))
    assert "SLURM_CONF=/etc/private/slurm.conf\n" in (tmp_path / "logs" / "work-00000.log").read_text()


def test_ended_jobs_are_forgotten_and_living_ones_are_not(
    launcher: LocalLauncher, request_of: Callable[..., Request]
) -> None:
    ended = launcher.send(request_of("true"), "toy.0123.a.1", {})
    end(launcher, ended)
    living = launcher.send(request_of("sleep 30"), "toy.0123.b.1", {})
    other = launcher.send(request_of("true"), "toy.01234.a.1", {})
    end(launcher, other)
    launcher.forget("toy.0123.")
    words = [state.reason for state in launcher.states([ended, living, other]).values()]
    assert words[0] == "this machine does not know the job" and words[0] not in words[1:]
    launcher.cancel([living], save=False)
    end(launcher, living)
