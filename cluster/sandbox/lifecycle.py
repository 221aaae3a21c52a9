"""A private real Slurm of simulated nodes on this machine.

It is for trying recipes and for tests. Nothing of Debian's services is used: the binaries run with a configuration of
their own, as the user who starts them, bound to loopback, with all their files in one folder.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ... import files
from ...errors import NotFoundError, RunError, SlurmError, UsageError
from ...user_folders import state_dir
from ..ports import LOOPBACK, free_port
from ..slurm import call
from .build import PATH, check_programs, default_prefix, make_system_tables, version_of
from .config import Daemon, Sandbox, cgroup_conf, daemons, gres_conf, slurm_conf, slurmdbd_conf
from .processes import end_all, processes, running

_SHAPE = "sandbox.json"
_START_S = 60.0
_GONE_S = 1.0  # a daemon forks twice to detach, and a list of processes may show neither
_READY = {"idle", "mixed", "allocated", "completing", "drained", "draining", "reserved"}  # of nodes that answer
_MAX_FOLDER = 80  # a socket's path takes 107 bytes, and slurmstepd's lie in FOLDER/n12/


@dataclass(frozen=True, kw_only=True)
class Status:
    """The state of a sandbox now.

    Nodes are rows of name, state, CPUs and GPUs; partitions of name, state, longest job and number of nodes; jobs of
    id, partition, state, time, nodes or reason, and name.
    """

    box: Sandbox
    alive: Mapping[str, bool]
    nodes: tuple[tuple[str, ...], ...]
    partitions: tuple[tuple[str, ...], ...]
    jobs: tuple[tuple[str, ...], ...]


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
    prefix: Path | None = None,
    settings: Mapping[str, str] | None = None,
) -> Sandbox:
    """Start the sandbox in *folder* and return it once every node answers.

    Of a sandbox that is there, only what has died is started; it keeps the shape it was started with. Daemons and
    clients are those of the Slurm in *prefix*, by default of `default_prefix`. *settings* are values of slurm.conf laid
    over ours.

    Raises:
        UsageError: packages are missing, or a value cannot work.
        RunError: a daemon did not come up; the message has the end of its log, and nothing is left.
    """
    folder = _absolute(folder)
    _check(folder, nodes=nodes, cpus=cpus, gpus=gpus, settings=settings or {})
    prefix = _absolute(prefix) if prefix else default_prefix()
    check_programs(prefix, accounting=accounting)
    files.make_private_dir(folder.parent)
    with _locked(folder):
        if not (folder / _SHAPE).is_file():
            address = _own_address()
            _lay_out(
                Sandbox(
                    folder=folder,
                    user=pwd.getpwuid(os.getuid()).pw_name,
                    hostname=socket.gethostname().split(".")[0],
                    address=address or LOOPBACK,
                    is_confined=address is not None,
                    nodes=nodes,
                    cpus=cpus,
                    gpus=gpus,
                    memory_mb=max(8000, (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20) // nodes),
                    ports=tuple(free_port(address or LOOPBACK) for _ in range(nodes + 2)),
                    prefix=str(prefix),
                    version=version_of(prefix),
                    accounting=accounting,
                    settings=dict(settings or {}),
                )
            )
        box = read(folder)
        try:
            _bring_up(box)
        except RunError:
            end_all(folder)
            shutil.rmtree(folder)
            raise
    return box


def read(folder: Path) -> Sandbox:
    """Return the sandbox that was started in *folder*.

    Raises:
        NotFoundError: there is none.
        RunError: another version of this program started it.
    """
    folder = _absolute(folder)
    try:
        value = files.read_json(folder / _SHAPE)
    except FileNotFoundError as error:
        hint = "`sousbatch sandbox start` starts one, and --dir names another folder"
        raise NotFoundError(f"no sandbox in {folder}; {hint}") from error
    try:
        return Sandbox(folder=folder, **value | {"ports": tuple(value["ports"])})
    except (KeyError, TypeError) as error:
        raise RunError(
            f"the sandbox in {folder} is another version's; `sousbatch sandbox stop --dir {folder}` ends it"
        ) from error


def stop(folder: Path) -> int:
    """End every process of the sandbox in *folder*, and remove the folder.

    Return how many processes there were. Processes of a sandbox whose folder is gone are ended, too.
    """
    folder = _absolute(folder)
    if not folder.parent.is_dir():
        return end_all(folder)
    with _locked(folder) as lock:
        count = end_all(folder)
        if (folder / _SHAPE).is_file():
            _remove_control_groups(folder)
            shutil.rmtree(folder)
        lock.unlink()
    return count


def _remove_control_groups(folder: Path) -> None:
    """Remove what proctrack/cgroup leaves of version 1's hierarchies.

    Of version 2 nothing is left.
    """
    try:
        box = read(folder)
    except RunError:
        return
    if "cgroup" not in str(box.settings):
        return
    for top in (path for name in box.node_names for path in Path("/sys/fs/cgroup").glob(f"*/slurm_{name}")):
        for path, _, _ in os.walk(top, topdown=False):  # its files cannot be removed, and need not be
            try:
                os.rmdir(path)
            except OSError:  # another cluster on this machine uses it
                break


def daemons_alive(folder: Path) -> dict[str, bool]:
    """Say of each daemon of the sandbox in *folder* whether it lives.

    The answer is empty where there is no sandbox.
    """
    try:
        box = read(folder)
    except NotFoundError:
        return {}
    found = processes(box.folder)
    return {daemon.name: bool(running(daemon, found)) for daemon in daemons(box)}


def status(folder: Path) -> Status:
    """Return what lives of the sandbox in *folder*, its nodes, partitions and jobs.

    Raises:
        NotFoundError: there is none.
    """
    box = read(folder)
    alive = daemons_alive(folder)
    asks = alive["munged"] and alive["slurmctld"]

    def rows(*command: str, fields: str) -> tuple[tuple[str, ...], ...]:
        text = _ask(box, *command, "--noheader", f"--format={fields}") if asks else ""
        num_cuts = fields.count("|")  # only the last field, a job's name, may hold what separates them
        found = (tuple(line.split("|", num_cuts)) for line in text.splitlines())
        return tuple(row for row in found if len(row) > num_cuts)

    return Status(
        box=box,
        alive=alive,
        nodes=rows("sinfo", "--Node", "--partition=main", fields="%N|%T|%c|%G"),
        partitions=rows("sinfo", "--summarize", fields="%P|%a|%l|%D"),
        jobs=rows("squeue", fields="%i|%P|%T|%M|%R|%j"),
    )


def kill_node(folder: Path, name: str) -> None:
    """Kill a node's slurmd as a crash would; its steps live on until it comes back."""
    _kill(read(folder), f"slurmd {name}", signal.SIGKILL)


def start_node(folder: Path, name: str) -> None:
    """Start a node's slurmd where it does not run."""
    _start_one(read(folder), f"slurmd {name}")


def stop_controller(folder: Path) -> None:
    """Stop slurmctld, which saves its state; jobs run on."""
    _kill(read(folder), "slurmctld", signal.SIGTERM)


def start_controller(folder: Path) -> None:
    """Start slurmctld where it does not run."""
    _start_one(read(folder), "slurmctld")


def _own_address() -> str | None:
    """Return this machine's own address, if Slurm can be confined to it.

    It is the address that the machine's name means. It cannot where the name means nothing, or 127.0.1.1 as Debian has
    it: what connects there comes from 127.0.0.1, where srun would then be answered and not be found.
    """
    try:
        address = str(socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)[0][4][0])
    except OSError:
        return None
    return None if address.startswith("127.") and address != LOOPBACK else address


def _absolute(folder: Path) -> Path:
    return folder.expanduser().resolve()


@contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """Hold off others that start or stop the same sandbox, and yield the lock."""
    lock = folder.parent / f".{folder.name}.lock"
    with files.locked(lock):
        yield lock


def _check(folder: Path, *, nodes: int, cpus: int, gpus: int, settings: Mapping[str, str]) -> None:
    if len(str(folder)) > _MAX_FOLDER:
        raise UsageError(
            f"sandbox folder {str(folder)!r} has {len(str(folder))} characters, and the sockets in it leave space for "
            f"{_MAX_FOLDER}; name a shorter one with --dir"
        )
    if re.search(r"[^\w./+@:-]", str(folder)):
        problem = "has characters that slurm.conf cannot hold"
        raise UsageError(f"sandbox folder {str(folder)!r} {problem}; name another, such as --dir /tmp/slurm")
    if folder.is_dir() and not (folder / _SHAPE).is_file() and any(folder.iterdir()):
        raise UsageError(f"{folder} holds something that is no sandbox; name another folder with --dir")
    for what, count, least, most in (("nodes", nodes, 1, 99), ("CPUs", cpus, 1, 1024), ("GPUs", gpus, 0, 64)):
        if not least <= count <= most:
            raise UsageError(f"a sandbox has {least} to {most} {what}, not {count}")
    for key, value in settings.items():
        if key.lower() == "slurmuser" and os.getuid() != 0 and value != pwd.getpwuid(os.getuid()).pw_name:
            raise UsageError(f"SlurmUser={value}: only root can start a sandbox whose daemons become another user")
        if not key.isalpha() or key.lower() in ("nodename", "partitionname", "include") or not value.isprintable():
            raise UsageError(f"{key}={value!r} is no value of slurm.conf that can be set; such as JobRequeue=0")


def _lay_out(box: Sandbox) -> None:
    """Write all that the daemons read; the shape last."""
    box.folder.mkdir(exist_ok=True)
    box.folder.chmod(0o711)  # munge wants every user to reach its socket
    for name in ("run", "log", "state", "dev", *box.node_names):
        (box.folder / name).mkdir(exist_ok=True)
    box.database_dir.mkdir(mode=0o700, exist_ok=True)
    for number in range(box.gpus):
        (box.folder / "dev" / f"gpu{number}").symlink_to("/dev/null")
    _write(box.folder / "munge.key", os.urandom(128), mode=0o600)
    _write(box.conf, slurm_conf(box).encode())
    _write(box.folder / "gres.conf", gres_conf(box).encode())
    _write(box.folder / "cgroup.conf", cgroup_conf().encode())
    _write(box.folder / "slurmdbd.conf", slurmdbd_conf(box).encode(), mode=0o600)
    if box.slurm_user != box.user:
        for path in (box.database_dir, *(box.folder / name for name in ("run", "log", "state", "slurmdbd.conf"))):
            shutil.chown(path, box.slurm_user)
    shape = asdict(box)
    del shape["folder"]
    files.write_json(box.folder / _SHAPE, shape)


def _write(path: Path, content: bytes, mode: int = 0o644) -> None:
    path.touch(mode=mode)
    path.write_bytes(content)


def _bring_up(box: Sandbox) -> None:
    """Start what does not run, one after another, until all nodes have registered."""
    deadline = time.monotonic() + _START_S
    found = processes(box.folder)
    for daemon in daemons(box):
        if not running(daemon, found):
            if daemon.name == "mariadbd":
                make_system_tables(box, _environment(box))
            _launch(box, daemon, deadline)
    while not (states := _node_states(box)) or not _READY.issuperset(states):
        if time.monotonic() > deadline:
            raise RunError(f"sandbox: its nodes are {', '.join(states)}: {_tail(box.log_dir / 'slurmctld.log')}")
        time.sleep(0.05)


def _node_states(box: Sandbox) -> list[str]:
    """Return the nodes' states; one that does not answer has a star after it."""
    return _ask(box, "sinfo", "--noheader", "--Node", "--partition=main", "--format=%T").split()


def _launch(box: Sandbox, daemon: Daemon, deadline: float) -> None:
    """Start *daemon* and return when it listens."""
    detach = () if daemon.detaches else ("setsid", "--fork")
    output = daemon.log.with_suffix(".out") if daemon.detaches else daemon.log
    with output.open("ab") as stream:
        done = subprocess.run(
            (*detach, *daemon.command),
            env=_environment(box),
            cwd=box.folder,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    seen = time.monotonic()
    while not _answers(box.address, daemon.listens_at):
        now = time.monotonic()
        seen = now if running(daemon, processes(box.folder)) else seen
        if done.returncode or now > min(seen + _GONE_S, deadline):
            said = " ".join(_tail(path) for path in dict.fromkeys((output, daemon.log)))
            raise RunError(f"sandbox: {daemon.name} did not start: {said.strip() or 'it left no log'}")
        time.sleep(0.03)


def _answers(address: str, place: int | Path) -> bool:
    is_port = isinstance(place, int)
    with socket.socket(socket.AF_INET if is_port else socket.AF_UNIX) as probe:
        return probe.connect_ex((address, place) if is_port else str(place)) == 0


def _environment(box: Sandbox) -> dict[str, str]:
    """Return the daemons' environment.

    Nothing of the caller's shell reaches jobs through slurmd.
    """
    return {
        "PATH": f"{box.prefix}/sbin:{box.prefix}/bin:{PATH}",
        "HOME": pwd.getpwuid(os.getuid()).pw_dir,
        "LANG": "C.UTF-8",
        "SLURM_CONF": str(box.conf),
        "SLURM_CLUSTER_NAME": box.cluster,
        "MYSQL_UNIX_PORT": str(box.database_socket),
    }


def _ask(box: Sandbox, *command: str) -> str:
    try:
        return call(command, environment=_environment(box))
    except SlurmError:  # it is starting, or half of it has died
        return ""


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-400:].strip() if log.is_file() else ""


def _daemon(box: Sandbox, name: str) -> Daemon:
    found = {daemon.name: daemon for daemon in daemons(box)}
    if name not in found:
        raise NotFoundError(f"the sandbox in {box.folder} has no {name!r}; it has: {', '.join(found)}")
    return found[name]


def _kill(box: Sandbox, name: str, number: signal.Signals) -> None:
    daemon = _daemon(box, name)
    while found := running(daemon, processes(box.folder)):
        for process in found:
            process.send_signal(number)
        time.sleep(0.05)


def _start_one(box: Sandbox, name: str) -> None:
    daemon = _daemon(box, name)
    if not running(daemon, processes(box.folder)):
        _launch(box, daemon, time.monotonic() + _START_S)
