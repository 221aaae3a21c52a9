"""The processes of a private Slurm, found by the cluster's name they carry.

Process ids noted in files are stale after a reboot or a kill, and jobs leave processes that no daemon knows any more.
But Slurm puts the cluster's name into every job's environment, we put it into the daemons', and no two sandboxes share
a name.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from .config import Daemon, cluster_name

_GRACE_S = 2.0  # how long a job may take to end itself when the sandbox stops
_DAEMONS = ("slurm", "munged", "mariadbd")


def processes(folder: Path) -> list[psutil.Process]:
    """Return the living processes of the sandbox in *folder*.

    They are daemons, jobs and their descendants. The caller and its ancestors are never among them, also when it runs
    inside a job. A process that overwrote its environment with a title, as slurmscriptd does, is known by its open
    files.
    """
    mark = f"SLURM_CLUSTER_NAME={cluster_name(folder)}".encode()
    mine = {process.pid for process in (psutil.Process(), *psutil.Process().parents())}
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        if process.pid not in mine and _belongs(process, mark, folder):
            found |= {one.pid: one for one in (process, *_children(process)) if one.pid not in mine}
    return [process for process in found.values() if _is_alive(process)]


def running(daemon: Daemon, among: list[psutil.Process]) -> list[psutil.Process]:
    """Return those of the processes *among* that are *daemon*."""
    found = []
    for process in among:
        try:
            if tuple(process.cmdline()[-len(daemon.command) :]) == daemon.command:  # setsid may stand before it
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def end_all(folder: Path) -> int:
    """End the daemons, then the jobs; return how many there were.

    The daemons end at once, so that nothing new starts.
    """
    seen: dict[int, psutil.Process] = {}
    deadline = time.monotonic() + _GRACE_S
    while (found := processes(folder)) or any(_is_alive(process) for process in seen.values()):
        for process in found:
            if time.monotonic() > deadline or _executable(process).startswith(_DAEMONS):
                _send(process, signal.SIGKILL)
            elif process.pid not in seen:
                _send(process, signal.SIGTERM)
        seen |= {process.pid: process for process in found}
        time.sleep(0.05)
    return len(seen)


def _belongs(process: psutil.Process, mark: bytes, folder: Path) -> bool:
    proc = Path(f"/proc/{process.pid}")
    try:
        if mark in (proc / "environ").read_bytes().split(b"\0"):
            return True
        if not _executable(process).startswith("slurm"):
            return False
        return any(Path(os.readlink(link)).is_relative_to(folder) for link in _links(proc))
    except OSError:  # it has ended, or is another user's
        return False


def _links(proc: Path) -> Iterator[Path]:
    yield proc / "cwd"
    yield from (proc / "fd").iterdir()


def _executable(process: psutil.Process) -> str:
    try:
        return os.path.basename(os.readlink(f"/proc/{process.pid}/exe"))
    except OSError:
        return ""


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        pass
