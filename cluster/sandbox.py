"""A private real Slurm of pretend nodes on this machine, to try recipes and to test.

Nothing of Debian's services is used: the binaries run with a configuration of their own, as
whoever starts them, bound to loopback, with all their files in one folder.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from .. import files
from ..errors import NotFoundError, RunError, UsageError
from ..rundir import state_dir
from .ranks import free_port
from .sandboxconf import Sandbox, cluster_name, gres_conf, slurm_conf

_SHAPE = "sandbox.json"
_PATH = os.pathsep.join(("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"))
_START_S = 30.0
_GRACE_S = 2.0  # how long a job may take to end itself when the sandbox stops
_MAX_FOLDER = 80  # a socket's path takes 107 bytes, and slurmstepd's lie in FOLDER/n12/


@dataclass(frozen=True, kw_only=True)
class Daemon:
    """One process of a sandbox: found by its marker in the environment and its command line."""

    name: str
    command: tuple[str, ...]
    log: Path


def default_folder() -> Path:
    """Return the folder of the user's own sandbox."""
    return state_dir() / "sandbox"


def start(
    folder: Path,
    *,
    nodes: int = 2,
    cpus: int = 4,
    gpus: int = 2,
    accounting: bool = False,
    settings: Mapping[str, str] | None = None,
) -> Sandbox:
    """Start the sandbox in *folder*, or what of it has died, and return it once every node is idle.

    A sandbox that is there keeps the shape it was started with.

    Raises:
        UsageError: packages are missing, or the folder's name is too long for sockets.
        RunError: a daemon did not come up; the message has the end of its log.
    """
    folder = folder.expanduser().absolute()
    if len(str(folder)) > _MAX_FOLDER:
        raise UsageError(
            f"sandbox folder {str(folder)!r} has {len(str(folder))} characters, and sockets in it allow "
            f"{_MAX_FOLDER}; give a shorter one"
        )
    files.make_private_dir(folder.parent)
    with files.locked(folder.parent / f".{folder.name}.lock"):
        if (folder / _SHAPE).is_file():
            box = read(folder)
        else:
            box = Sandbox(
                folder=folder,
                nodes=nodes,
                cpus=cpus,
                gpus=gpus,
                memory_mb=_memory_mb(nodes),
                ports=tuple(free_port() for _ in range(nodes + 2)),
                accounting=accounting,
                settings=dict(settings or {}),
            )
            _lay_out(box)
        try:
            _bring_up(box)
        except RunError:
            _end_all(box.folder)
            shutil.rmtree(folder)
            raise
    return box


def read(folder: Path) -> Sandbox:
    """Return the sandbox that was started in *folder*.

    Raises:
        NotFoundError: there is none.
    """
    folder = folder.expanduser().absolute()
    try:
        value = files.read_json(folder / _SHAPE)
    except FileNotFoundError as error:
        raise NotFoundError(f"no sandbox in {folder}; `sousbatch sandbox start` starts one") from error
    return Sandbox(folder=folder, **value | {"ports": tuple(value["ports"])})


def stop(folder: Path) -> int:
    """End every process of the sandbox in *folder*, its jobs' too, remove the folder, return their number."""
    folder = folder.expanduser().absolute()
    count = _end_all(folder)
    if (folder / _SHAPE).is_file():
        shutil.rmtree(folder)
    return count


def _memory_mb(nodes: int) -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    return max(8000, total // nodes)


def _lay_out(box: Sandbox) -> None:
    """Write all that the daemons read; the shape last."""
    box.folder.mkdir(exist_ok=True)
    box.folder.chmod(0o711)  # munge wants every user to reach its socket
    for name in ("run", "log", "state", "dev", *box.node_names):
        (box.folder / name).mkdir(exist_ok=True)
    for number in range(box.gpus):
        (box.folder / "dev" / f"gpu{number}").touch()
    key = box.folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    user = pwd.getpwuid(os.getuid()).pw_name
    box.conf.write_text(slurm_conf(box, user=user, hostname=socket.gethostname().split(".")[0]))
    (box.folder / "gres.conf").write_text(gres_conf(box))
    shape = asdict(box)
    del shape["folder"]
    files.write_json(box.folder / _SHAPE, shape)


def _daemons(box: Sandbox) -> tuple[Daemon, ...]:
    """Return the daemons in the order in which they are started."""
    run, log = box.run_dir, box.log_dir
    munge = ("--socket", run / "munge.sock", "--key-file", box.folder / "munge.key", "--pid-file", run / "munged.pid")
    munge += ("--log-file", log / "munged.log", "--seed-file", run / "munge.seed")
    return (
        Daemon(name="munged", command=("munged", "--force", *map(str, munge)), log=log / "munged.log"),
        Daemon(name="slurmctld", command=("slurmctld", "-f", str(box.conf)), log=log / "slurmctld.log"),
        *(
            Daemon(
                name=f"slurmd {name}",
                command=("slurmd", "-N", name, "-f", str(box.conf)),
                log=log / f"slurmd-{name}.log",
            )
            for name in box.node_names
        ),
    )


def _bring_up(box: Sandbox) -> None:
    alive = _processes(box.folder)
    for daemon in _daemons(box):
        if not any(_is(process, daemon) for process in alive):
            _launch(box, daemon)
    deadline = time.monotonic() + _START_S
    while True:
        found = _ask(box, "sinfo", "--noheader", "--Node", "--format", "%N %t")
        states = dict(line.split() for line in found.splitlines())
        if len(states) == box.nodes and not any(
            set(state) & set("*~#!%$") or "unk" in state or "down" in state for state in states.values()
        ):
            return
        dead = [daemon for daemon in _daemons(box) if not any(_is(one, daemon) for one in _processes(box.folder))]
        if dead or time.monotonic() > deadline:
            raise RunError(
                f"sandbox: {(dead or _daemons(box)[1:])[0].name} did not come up: {_tail((dead or _daemons(box)[1:])[0].log)}"
            )
        time.sleep(0.05)


def _launch(box: Sandbox, daemon: Daemon) -> None:
    done = subprocess.run(
        daemon.command,
        env=_environment(box),
        cwd=box.folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    if done.returncode:
        raise RunError(f"sandbox: {daemon.name} did not start: {done.stderr.strip() or _tail(daemon.log)}")


def _environment(box: Sandbox) -> dict[str, str]:
    """Return the daemons' environment: nothing of the caller's shell reaches jobs through slurmd."""
    home = pwd.getpwuid(os.getuid()).pw_dir
    return {
        "PATH": _PATH,
        "HOME": home,
        "LANG": "C.UTF-8",
        "SLURM_CONF": str(box.conf),
        "SLURM_CLUSTER_NAME": box.cluster,
    }


def _ask(box: Sandbox, *command: str) -> str:
    done = subprocess.run(command, env=_environment(box), capture_output=True, text=True, timeout=20)
    return done.stdout if done.returncode == 0 else ""


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-500:].strip() if log.is_file() else "it left no log"


def _is(process: psutil.Process, daemon: Daemon) -> bool:
    try:
        return tuple(process.cmdline()) == daemon.command
    except psutil.NoSuchProcess:
        return False


def _processes(folder: Path) -> list[psutil.Process]:
    """Return the living processes of the sandbox in *folder*: its daemons, its jobs and their descendants.

    Jobs have the cluster's name in their environment, and the daemons get it, too. Slurm's own
    helpers overwrite theirs with a title, so they are known by the files that they hold open.
    """
    mark = f"SLURM_CLUSTER_NAME={cluster_name(folder)}".encode()
    mine = {process.pid for process in (psutil.Process(), *psutil.Process().parents())}
    found = {}
    for process in psutil.process_iter():
        if process.pid not in mine and _belongs(process, mark, folder):
            found |= {one.pid: one for one in (process, *_children(process))}
    return [process for process in found.values() if _is_alive(process)]


def _belongs(process: psutil.Process, mark: bytes, folder: Path) -> bool:
    proc = Path(f"/proc/{process.pid}")
    try:
        if mark in (proc / "environ").read_bytes().split(b"\0"):
            return True
        if not os.path.basename(os.readlink(proc / "exe")).startswith("slurm"):
            return False
        return any(Path(os.readlink(link)).is_relative_to(folder) for link in _links(proc))
    except OSError:
        return False


def _links(proc: Path) -> Iterator[Path]:
    yield proc / "cwd"
    yield from (proc / "fd").iterdir()


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _end_all(folder: Path) -> int:
    """End the daemons at once, so that nothing new starts, then the jobs; return how many there were."""
    seen: set[int] = set()
    deadline = time.monotonic() + _GRACE_S
    while found := _processes(folder):
        for process in found:
            is_job = not _is_slurm(process)
            number = signal.SIGTERM if is_job and time.monotonic() < deadline else signal.SIGKILL
            try:
                if process.pid not in seen or number is signal.SIGKILL:
                    process.send_signal(number)
            except psutil.NoSuchProcess:
                continue
        seen |= {process.pid for process in found}
        time.sleep(0.05)
    return len(seen)


def _is_slurm(process: psutil.Process) -> bool:
    try:
        return os.path.basename(os.readlink(f"/proc/{process.pid}/exe")).startswith(("slurm", "munged", "mariadbd"))
    except OSError:
        return False
