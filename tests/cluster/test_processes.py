"""No orphans: when a process is killed, nothing below it lives on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sousbatch.cluster import processes

DEADLINE_S = 120
# Writes its own pid and its children's to a file, one name a line, and then waits for its end.
TREE = """
import os, subprocess, sys, time
from sousbatch.cluster import processes
import signal
level, record, is_bound = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "bound"
if is_bound:
    processes.die_with_parent(signal.SIGKILL)
with open(record, "a") as stream:
    stream.write(f"{os.getpid()}\\n")
if level:
    environment = processes.child_environment(dict(os.environ))
    command = [sys.executable, __file__, str(level - 1), record, sys.argv[3]]
    subprocess.Popen(command, env=environment, start_new_session=True)
time.sleep(120)
"""


@pytest.fixture
def record(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "pids"
    path.touch()
    (tmp_path / "tree.py").write_text(TREE)
    yield path
    for pid in map(int, path.read_text().split()):
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)


def start(record: Path, level: int, kind: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(record.parent / "tree.py"), str(level), str(record), kind]
    return subprocess.Popen(command, env=environment)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def pids(record: Path, count: int) -> list[int]:
    deadline = time.monotonic() + DEADLINE_S
    while len(found := record.read_text().split()) < count and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(found) == count
    return [int(pid) for pid in found]


def assert_gone(numbers: list[int]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while (left := [pid for pid in numbers if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left


def test_a_kill_of_the_first_ends_all_though_each_has_its_own_session(record: Path) -> None:
    first = start(record, 3, "bound", processes.child_environment(dict(os.environ)))
    found = pids(record, 4)
    first.kill()
    first.wait()
    assert_gone(found)


def test_a_kill_in_the_middle_ends_what_is_below(record: Path) -> None:
    first = start(record, 2, "bound", processes.child_environment(dict(os.environ)))
    found = pids(record, 3)
    os.kill(found[1], signal.SIGKILL)
    assert_gone(found[1:])
    assert is_alive(found[0])
    first.kill()
    first.wait()


def test_a_process_whose_parent_died_before_it_could_ask_ends_at_once(record: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    claim = processes.child_environment({})[processes.PARENT_VARIABLE].replace(str(os.getpid()), str(dead.pid))
    late = start(record, 0, "bound", os.environ | {processes.PARENT_VARIABLE: claim})
    assert late.wait(DEADLINE_S) == -signal.SIGKILL


def test_a_wrapper_between_parent_and_child_is_no_death(record: Path) -> None:
    environment = processes.child_environment(dict(os.environ))
    command = [sys.executable, str(record.parent / "tree.py"), "0", str(record), "bound"]
    wrapper = subprocess.Popen(["/bin/sh", "-c", '"$@"; exit $?', "sh", *command], env=environment)
    (inner,) = pids(record, 1)
    assert is_alive(inner) and inner != wrapper.pid
    os.kill(inner, signal.SIGKILL)
    wrapper.wait()


def test_a_parent_in_another_container_is_not_looked_for(record: Path) -> None:
    inside = start(record, 0, "bound", os.environ | {processes.PARENT_VARIABLE: "1234567@pid:[1]"})
    pids(record, 1)
    assert inside.poll() is None
    inside.kill()
    inside.wait()


def test_a_process_started_by_hand_is_bound_to_nobody(record: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != processes.PARENT_VARIABLE}
    outer = subprocess.Popen(
        ["/bin/sh", "-c", '"$@" & wait', "sh", sys.executable, str(record.parent / "tree.py"), "0", record, "bound"],
        env=environment,
    )
    (inner,) = pids(record, 1)
    outer.kill()
    outer.wait()
    time.sleep(0.1)
    assert is_alive(inner)


ENDER = """
import subprocess, sys, time
from sousbatch.cluster import processes
processes.adopt_orphans()
child = subprocess.Popen([sys.executable, sys.argv[1], "2", sys.argv[2], "free"])
own = subprocess.Popen(["/bin/sh", "-c", "trap '' TERM; exec sleep 60"])
deaf = subprocess.Popen(["/bin/sh", "-c", "(setsid sleep 60 &)"])
print("ready", flush=True)
sys.stdin.readline()
print(processes.end_descendants(grace_s=0.2), len(processes.descendants()), child.poll(), own.poll(), flush=True)
"""


def named(process: psutil.Process) -> str:
    """Return `sleep`, or another program's pid, since Python shares its name; nothing of the dead."""
    try:
        name = "sleep" if process.name() == "sleep" else str(process.pid)
        return name if process.status() != psutil.STATUS_ZOMBIE else ""
    except psutil.NoSuchProcess:
        return ""


def wait_until_below(pid: int, expected: list[str]) -> None:
    """Wait until *pid* has these living descendants and no other."""
    deadline, found = time.monotonic() + DEADLINE_S, [""]
    while found != expected:
        assert time.monotonic() < deadline, f"{found} in place of {expected}"
        time.sleep(0.02)
        found = sorted(filter(None, map(named, psutil.Process(pid).children(recursive=True))))


def test_descendants_in_their_own_sessions_and_orphans_are_ended(record: Path) -> None:
    ender = subprocess.Popen(
        [sys.executable, "-c", ENDER, str(record.parent / "tree.py"), str(record)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    found = pids(record, 3)
    os.kill(found[1], signal.SIGKILL)  # its child is an orphan now, and adopted
    # until the shells between are gone, the trap is set, and the killed one is dead
    wait_until_below(ender.pid, sorted([str(found[0]), str(found[2]), "sleep", "sleep"]))
    output, _ = ender.communicate("go\n", timeout=DEADLINE_S)
    assert_gone(found)
    ended, left, child_code, own_code = output.split()[1:]
    assert (int(ended), left) == (4, "0")
    assert (child_code, own_code) == (str(-signal.SIGTERM), str(-signal.SIGKILL)), "an exit code was lost"


ABORTING = """
import atexit, os
from sousbatch.cluster import processes

class Abort:
    def __del__(self):  # as a thread of torch does that asks for an interpreter on its way out
        os.abort()

kept = Abort()
atexit.register(print, "handled")
print("done")
"""


def test_a_process_that_leaves_keeps_its_code_whatever_its_end_would_do() -> None:
    def run(last: str) -> tuple[int, str]:
        done = subprocess.run([sys.executable, "-P", "-c", ABORTING + last], capture_output=True, text=True)
        return done.returncode, done.stdout

    assert run("")[0] == -signal.SIGABRT
    assert run("processes.leave(3)") == (3, "done\nhandled\n")
