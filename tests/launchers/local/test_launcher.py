"""The local launcher beyond the contract: kills, full disks, a machine that jobs share."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sousbatch.cli import follow
from sousbatch.cluster import site
from sousbatch.launchers.base import FINAL_WORDS, JobRef, JobState, Request
from sousbatch.launchers.local import job_process
from sousbatch.launchers.local import launcher as local
from sousbatch.launchers.local.launcher import LocalLauncher, job_state, write_end
from sousbatch.launchers.states import StageState
from sousbatch.recipes.plan import After
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
    """Wait for the job's process to tell its number: `send` returns before it has."""
    deadline = time.monotonic() + 60
    while not (said := (folder / "pid").exists() and (folder / "pid").read_text()):
        assert time.monotonic() < deadline, f"{folder} has no process"
        time.sleep(0.02)
    return int(said)


def end(launcher: LocalLauncher, ref: JobRef) -> JobState:
    deadline = time.monotonic() + 120
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
from sousbatch.launchers.local.launcher import LocalLauncher
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
    launcher: LocalLauncher, request_of: Callable[..., Request], tmp_path: Path, where: str, is_accepted: bool
) -> None:
    client = subprocess.run([sys.executable, "-c", CLIENT, str(tmp_path), where])
    assert client.returncode == -signal.SIGKILL
    found = launcher.find(["key"])
    assert bool(found) is is_accepted
    for ref in found.values():
        assert end(launcher, ref).word == "done"
    assert (tmp_path / "ran").exists() is is_accepted
    whole = Resources(device="cpu", cpus_per_device=1024)
    after = launcher.send(request_of("true", resources=whole), "next", {})
    assert end(launcher, after).word == "done", "what was never started keeps no place in line"


SHELL = """
import sys
from contextlib import suppress
from pathlib import Path
from sousbatch.cli.main import main
from sousbatch.launchers.base import Request
from sousbatch.launchers.local.launcher import LocalLauncher
from sousbatch.recipes.schema import Resources

with suppress(SystemExit):
    main(["--help"])
place = Path(sys.argv[1])
text = f"until [ -e {place}/go ]; do sleep 0.02; done\\n"
request = Request(stage="work", text=text, num_tasks=1, after=(),
                  resources=Resources(device="cpu"), uses_devices=False, log_dir=str(place / "logs"))
LocalLauncher(place / "jobs").send(request, "key", {})
"""


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", "<&- >&-", ">&- 2>&-"])
def test_a_job_lives_though_the_submitting_shell_has_its_streams_closed(
    launcher: LocalLauncher, tmp_path: Path, until: Callable[..., Any], closed: str
) -> None:
    subprocess.run(["bash", "-c", f'"$@" {closed}', "-", sys.executable, "-c", SHELL, str(tmp_path)], check=True)
    (ref,) = launcher.find(["key"]).values()
    until(lambda: launcher.states([ref])[ref].word in ("running", "lost"))
    assert launcher.states([ref])[ref].word == "running"
    (tmp_path / "go").touch()
    assert end(launcher, ref).word == "done"


def test_a_look_at_the_state_never_keeps_a_job_from_starting(
    launcher: LocalLauncher, request_of: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([False, False])
    real = local._try_lock
    monkeypatch.setattr(local, "_try_lock", lambda lock: next(answers, None) is None and real(lock))
    assert end(launcher, launcher.send(request_of("true"), "key", {})).word == "done"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight cores, and four GPUs as nvidia-smi reports them."""
    monkeypatch.setattr(site, "usable_cores", lambda: tuple(range(8)))
    monkeypatch.setattr(site, "memory_bytes", lambda: 64 * 10**9)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    rows = "".join(f"{index}, GPU-{index}a, 40960\\n" for index in range(4))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{rows}'\n")
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


@pytest.fixture
def work(request_of: Callable[..., Request], tmp_path: Path) -> Callable[..., Request]:
    """Make requests of runs: one writes its devices to `got-RUN`, then runs until the file `go-RUN` is there."""

    def make(run: str, stage: str = "train", **resources: Any) -> Request:
        root = tmp_path / "toy" / run
        root.mkdir(parents=True, exist_ok=True)
        text = f"echo $SOUSBATCH_DEVICES > {tmp_path}/got-{run}; until [ -e {tmp_path}/go-{run} ]; do sleep 0.02; done"
        wanted = Resources(**{"device": "cpu"} | resources)
        return request_of(
            text, stage=stage, log_dir=str(root / "logs"), resources=wanted, uses_devices=stage != "merge"
        )

    return make


def test_four_jobs_of_one_gpu_run_at_once_each_on_its_own(
    launcher: LocalLauncher, work: Callable[..., Request], tmp_path: Path, until: Callable[..., Any], machine: None
) -> None:
    refs = [launcher.send(work(run, device="gpu"), run, {}) for run in "abcd"]
    until(lambda: len(list(tmp_path.glob("got-*"))) == 4)
    large = launcher.send(work("large", device="gpu", devices_per_node=2), "large", {})
    small = launcher.send(work("small", device="gpu"), "small", {})
    until(lambda: launcher.states([small])[small].reason.endswith("2 more; number 2 in line"))
    (tmp_path / "go-b").touch()
    assert end(launcher, refs[1]).word == "done"
    until(lambda: "toy/b" not in launcher.states([small])[small].reason)
    assert launcher.states([large])[large].word == "waiting", "it is not passed by a smaller one"
    (tmp_path / "go-d").touch()
    until((tmp_path / "got-large").exists)
    for run in ("a", "c", "large", "small"):
        (tmp_path / f"go-{run}").touch()
    assert {end(launcher, ref).word for ref in [*refs, large, small]} == {"done"}
    got = {path.name[4:]: path.read_text().strip() for path in tmp_path.glob("got-*")}
    assert [got[run] for run in "abcd"] == ["0", "1", "2", "3"] and got["large"] == "1,3"


def test_granted_devices_are_named_as_the_submitting_shell_names_them(
    launcher: LocalLauncher, work: Callable[..., Request], tmp_path: Path, machine: None, monkeypatch: Any
) -> None:
    (tmp_path / "go-a").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-3a,2")
    assert end(launcher, launcher.send(work("a", device="gpu", nodes=2), "a", {})).word == "done"
    assert (tmp_path / "got-a").read_text() == "GPU-3a,2\n"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    state = end(
        LocalLauncher(tmp_path / "jobs"),
        LocalLauncher(tmp_path / "jobs").send(work("b", device="gpu", nodes=2), "b", {}),
    )
    assert (state.word, state.reason[:45]) == ("failed", "it asks for 2 GPUs and this machine shows 1; ")


def test_two_jobs_of_one_core_run_side_by_side_on_two_cores_and_a_third_says_for_whom_it_waits(
    launcher: LocalLauncher,
    work: Callable[..., Request],
    tmp_path: Path,
    until: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(site, "usable_cores", lambda: (0, 1))
    refs = [launcher.send(work(run), run, {}) for run in "ab"]
    until(lambda: len(list(tmp_path.glob("got-*"))) == 2)
    third = launcher.send(work("c", nodes=2), "c", {})
    expected = "waits for 2 of 2 cores; run toy/a (train) uses 1 core, run toy/b (train) uses 1 core"
    until(lambda: launcher.states([third])[third] == JobState(word="waiting", reason=expected))
    (line,) = tmp_path.glob("machine-*")
    before = line.stat().st_mtime_ns
    time.sleep(0.3)
    assert line.stat().st_mtime_ns == before, "one who looks and changes nothing makes nobody else look"
    (tmp_path / "go-a").touch()
    until(lambda: launcher.states([third])[third].reason == expected.replace("run toy/a (train) uses 1 core, ", ""))
    for run in "bc":
        (tmp_path / f"go-{run}").touch()
    assert {end(launcher, ref).word for ref in [*refs, third]} == {"done"}


def test_the_next_stage_of_an_earlier_run_goes_before_a_later_run(
    launcher: LocalLauncher,
    work: Callable[..., Request],
    tmp_path: Path,
    until: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(site, "usable_cores", lambda: (0,))
    first = launcher.send(work("a"), "a.train", {})
    until((tmp_path / "got-a").exists)
    other = launcher.send(work("b"), "b.train", {})
    after = {"after": (After(stage="train"),)}
    again = dataclasses.replace(work("a", "predict"), text=f"ls {tmp_path} > {tmp_path}/seen\n", **after)
    second = launcher.send(again, "a.predict", {"train": first})
    until(lambda: launcher.states([other])[other].reason)
    for run in "ab":
        (tmp_path / f"go-{run}").touch()
    assert {end(launcher, ref).word for ref in (first, second, other)} == {"done"}
    assert "got-b" not in (tmp_path / "seen").read_text().split()


def test_the_place_of_what_follows_a_short_stage_is_kept(
    launcher: LocalLauncher,
    work: Callable[..., Request],
    tmp_path: Path,
    until: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(site, "usable_cores", lambda: (0, 1))
    merge = launcher.send(work("a", "merge"), "a.merge", {})
    until((tmp_path / "got-a").exists)
    request = dataclasses.replace(work("a", "train-more"), after=(After(stage="merge"),))
    following = launcher.send(request, "a.more", {"merge": merge})
    later = launcher.send(work("b"), "b.train", {})
    expected = (
        "waits for 1 of 2 cores; run toy/a (merge) uses 1 core, run toy/a (train-more) is before it; number 2 in line"
    )
    until(lambda: launcher.states([later])[later].reason == expected)
    for run in "ab":
        (tmp_path / f"go-{run}").touch()
    assert {end(launcher, ref).word for ref in (merge, following, later)} == {"done"}


def test_a_wait_is_told_without_a_terminal_and_again_when_its_reason_changes(
    make_plan: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = follow._Lines(make_plan([]))
    for reason in ("", "waits for 1 of 1 core; run a", "waits for 1 of 1 core; run a", "waits for 1 of 1 core; run b"):
        lines.update({"train": StageState(word="waiting", reason=reason)}, [])
    lines.update({"train": StageState(word="running")}, [])
    said = [line.partition("] ")[2] for line in capsys.readouterr().err.splitlines()]
    assert said == [
        "train is waiting: waits for 1 of 1 core; run a",
        "train is waiting: waits for 1 of 1 core; run b",
        "train is running",
    ]


@pytest.mark.parametrize("victim", ["holder", "waiter"])
def test_a_kill_of_anyone_in_line_lets_the_others_go_on(
    launcher: LocalLauncher,
    work: Callable[..., Request],
    tmp_path: Path,
    until: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    victim: str,
) -> None:
    monkeypatch.setattr(site, "usable_cores", lambda: (0, 1))
    holder = launcher.send(work("a"), "holder", {})
    until((tmp_path / "got-a").exists)
    waiter = launcher.send(work("b", nodes=2), "waiter", {})
    last = launcher.send(work("c"), "last", {})
    until(lambda: "number 2 in line" in launcher.states([last])[last].reason)
    os.kill(pid_of(tmp_path / "jobs" / victim), signal.SIGKILL)
    until((tmp_path / ("got-b" if victim == "holder" else "got-c")).exists)
    for run in "abc":
        (tmp_path / f"go-{run}").touch()
    words = [end(launcher, ref).word for ref in (holder, waiter, last)]
    assert words == (["lost", "done", "done"] if victim == "holder" else ["done", "lost", "done"])


def test_a_job_waiting_for_the_machine_is_cancelled(
    launcher: LocalLauncher, request_of: Callable[..., Request], until: Callable[..., Any]
) -> None:
    whole = Resources(device="cpu", cpus_per_device=1024)
    first = launcher.send(request_of("exec sleep 60", uses_devices=True, resources=whole), "first", {})
    until(lambda: launcher.states([first])[first].word == "running")
    second = launcher.send(request_of("true", uses_devices=True), "second", {})
    until(lambda: launcher.states([second])[second].reason)
    launcher.cancel([second], save=True)
    assert end(launcher, second) == JobState(word="cancelled", reason="cancelled while waiting")
    launcher.cancel([first], save=False)
    assert end(launcher, first).word == "cancelled"


@pytest.mark.parametrize("at_once, cores", [(None, 2), (2, 8)])
def test_no_more_tasks_run_at_once_than_fit_and_than_are_allowed(
    launcher: LocalLauncher,
    request_of: Callable[..., Request],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at_once: int | None,
    cores: int,
) -> None:
    monkeypatch.setattr(site, "usable_cores", lambda: tuple(range(cores)))
    text = f"mkdir {tmp_path}/1 || mkdir {tmp_path}/2 || exit 9; sleep 0.3; rmdir {tmp_path}/2 || rmdir {tmp_path}/1"
    ref = launcher.send(
        request_of(text, num_tasks=5, resources=Resources(device="cpu", tasks_at_once=at_once)), "k", {}
    )
    assert end(launcher, ref).word == "done"
    assert len(list((tmp_path / "logs").iterdir())) == 5


def test_a_full_disk_still_leaves_a_clear_end(
    small_disk: Path, request_of: Callable[..., Request], until: Callable[..., Any]
) -> None:
    launcher = LocalLauncher(small_disk / "jobs")
    text = f"head -c 1M /dev/zero > {small_disk}/ballast; exit 77"
    ref = launcher.send(request_of(text, log_dir=str(small_disk / "logs")), "key", {})
    assert end(launcher, ref) == JobState(word="failed", reason="task 0 found no space left on the disk")


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


@pytest.mark.parametrize("stage", ["runs", "waits for its turn", "waits for a stage"])
def test_a_job_whose_run_folder_was_deleted_ends_and_says_so(
    launcher: LocalLauncher,
    work: Callable[..., Request],
    tmp_path: Path,
    until: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    monkeypatch.setattr(site, "usable_cores", lambda: (0,))
    first = ref = launcher.send(work("a"), "first", {})
    until((tmp_path / "got-a").exists)
    doomed = "a"
    if stage == "waits for its turn":
        doomed, ref = "b", launcher.send(work("b"), "second", {})
        until(lambda: launcher.states([ref])[ref].reason)
    elif stage == "waits for a stage":
        request = dataclasses.replace(work("b"), after=(After(stage="train"),))
        doomed, ref = "b", launcher.send(request, "second", {"train": ref})
        until((tmp_path / "toy" / "b" / "logs").exists)
    shutil.rmtree(tmp_path / "toy" / doomed)
    (tmp_path / "toy" / doomed).mkdir()  # as a rank does that saves in that moment
    state = end(launcher, ref)
    assert state.word == "failed"
    assert state.reason == f"its run folder {tmp_path}/toy/{doomed} was deleted or moved away"
    (tmp_path / "go-a").touch()
    end(launcher, first)


def test_a_run_folder_that_is_elsewhere_for_a_while_ends_nothing(
    launcher: LocalLauncher, work: Callable[..., Request], tmp_path: Path, until: Callable[..., Any]
) -> None:
    request = dataclasses.replace(work("a"), num_tasks=2, resources=Resources(device="cpu", tasks_at_once=1))
    ref = launcher.send(request, "key", {})
    until((tmp_path / "got-a").exists)
    (tmp_path / "toy" / "a").rename(tmp_path / "elsewhere")
    (tmp_path / "go-a").touch()  # the second task would start now
    time.sleep(0.5)
    assert launcher.states([ref])[ref].word == "running" and not (tmp_path / "toy" / "a").exists()
    (tmp_path / "elsewhere").rename(tmp_path / "toy" / "a")
    assert end(launcher, ref).word == "done"
    assert (tmp_path / "toy" / "a" / "logs" / "train-00001.log").is_file()


def test_a_run_folder_that_stays_elsewhere_ends_its_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, spec = tmp_path / "toy" / "a", {"stage": "train", "num_tasks": 1, "after": []}
    for folder in (root, tmp_path / "jobs" / "key"):
        folder.mkdir(parents=True)
    (tmp_path / "jobs" / "key" / "job.json").write_text(json.dumps(spec | {"log_dir": str(root / "logs")}))
    job = job_process._Job(tmp_path / "jobs" / "key")
    job._held_dir = os.open(root, os.O_PATH)
    root.rename(tmp_path / "elsewhere")
    assert not job._is_stopping()
    monkeypatch.setattr(job_process, "_AWAY_S", -1.0)
    assert job._is_stopping() and job._outcome().reason == f"its run folder {root} was deleted or moved away"
    os.close(job._held_dir)


@pytest.mark.parametrize(
    ("text", "word", "reason"),
    [
        ("trap 'exit 75' TERM; while :; do sleep 0.01; done", "stopped", "`resume` continues"),
        ("trap '' TERM; while :; do sleep 0.01; done", "failed", "could not stop before: raise it"),
        ("true", "done", ""),
    ],
)
def test_a_job_is_stopped_before_its_time_limit_and_ended_at_it(
    launcher: LocalLauncher, request_of: Callable[..., Request], text: str, word: str, reason: str
) -> None:
    limit: Any = 0.02  # of a minute
    state = end(launcher, launcher.send(request_of(text, resources=Resources(device="cpu", time_min=limit)), "key", {}))
    assert state.word == word and reason in state.reason
