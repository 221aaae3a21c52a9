"""The texts that configure a private Slurm.

They are pure, so that one shape always gives the same cluster. Every choice below was tried on Slurm 21.08.8, 22.05.8,
24.11.5 and 26.05.3: no key differs between them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """A private Slurm in *folder*.

    It has its shape, and the values of slurm.conf that differ from ours.
    """

    folder: Path
    user: str
    hostname: str
    address: str
    is_confined: bool
    nodes: int
    cpus: int
    gpus: int
    memory_mb: int
    ports: tuple[int, ...]
    prefix: str
    version: str
    accounting: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def conf(self) -> Path:
        """The slurm.conf, for SLURM_CONF."""
        return self.folder / "slurm.conf"

    @property
    def run_dir(self) -> Path:
        """Sockets and process ids."""
        return self.folder / "run"

    @property
    def log_dir(self) -> Path:
        """The folder of the daemons' logs."""
        return self.folder / "log"

    @property
    def munge_socket(self) -> Path:
        """The socket of munged."""
        return self.run_dir / "munge.sock"

    @property
    def database_dir(self) -> Path:
        """MariaDB's files, open to the owner only."""
        return self.folder / "db"

    @property
    def database_socket(self) -> Path:
        """The socket of MariaDB, which answers nowhere else."""
        return self.database_dir / "db.sock"

    @property
    def cluster(self) -> str:
        """A name that no other sandbox has: it marks the processes of this one's jobs."""
        return cluster_name(self.folder)

    @property
    def slurm_user(self) -> str:
        """The user that slurmctld and slurmdbd become.

        Another user than the caller needs root.
        """
        return next((value for key, value in self.settings.items() if key.lower() == "slurmuser"), self.user)

    @property
    def node_names(self) -> tuple[str, ...]:
        """n1, n2 and so on."""
        return tuple(f"n{number}" for number in range(1, self.nodes + 1))


@dataclass(frozen=True, kw_only=True)
class Daemon:
    """One process of a sandbox.

    It has its command line, where it listens once it is ready, and its log.
    """

    name: str
    command: tuple[str, ...]
    listens_at: int | Path
    log: Path
    detaches: bool = True


def daemons(box: Sandbox) -> tuple[Daemon, ...]:
    """Return the daemons in the order in which they are started."""
    munge = Daemon(
        name="munged",
        command=(
            "munged",
            "--force",
            *_options(
                socket=box.munge_socket,
                key_file=box.folder / "munge.key",
                pid_file=box.run_dir / "munged.pid",
                seed_file=box.run_dir / "munge.seed",
                log_file=box.log_dir / "munged.log",
            ),
        ),
        listens_at=box.munge_socket,
        log=box.log_dir / "munged.log",
    )
    controller = Daemon(
        name="slurmctld",
        command=("slurmctld", "-f", str(box.conf)),
        listens_at=box.ports[0],
        log=box.log_dir / "slurmctld.log",
    )
    nodes = [
        Daemon(
            name=f"slurmd {name}",
            command=("slurmd", "-N", name, "-f", str(box.conf)),
            listens_at=port,
            log=box.log_dir / f"slurmd-{name}.log",
        )
        for name, port in zip(box.node_names, box.ports[1:], strict=False)
    ]
    return (munge, *(_accounting(box) if box.accounting else ()), controller, *nodes)


def _accounting(box: Sandbox) -> tuple[Daemon, ...]:
    # No network and no grant tables: only the user can enter the private folder. That also
    # spares mariadb-install-db's seconds.
    database = (
        "mariadbd",
        "--no-defaults",
        "--skip-networking",
        "--skip-grant-tables",
        *_options(
            user=box.slurm_user,
            datadir=box.database_dir,
            tmpdir=box.run_dir,  # not /tmp: a MariaDB that starts removes the temporary tables of others there
            socket=box.database_socket,
            innodb_lock_wait_timeout=900,
            innodb_flush_log_at_trx_commit=0,
            innodb_log_file_size="16M",
        ),
    )
    return (
        Daemon(
            name="mariadbd",
            command=database,
            listens_at=box.database_socket,
            log=box.log_dir / "mariadbd.log",
            detaches=False,
        ),
        Daemon(name="slurmdbd", command=("slurmdbd",), listens_at=box.ports[-1], log=box.log_dir / "slurmdbd.log"),
    )


def _options(**values: object) -> tuple[str, ...]:
    return tuple(f"--{key.replace('_', '-')}={value}" for key, value in values.items())


def cluster_name(folder: Path) -> str:
    """Return the name of the cluster in *folder*.

    The name is known also where nothing is left there to read.
    """
    return "sandbox_" + hashlib.sha256(str(folder).encode()).hexdigest()[:8]


def slurm_conf(box: Sandbox) -> str:
    """Return slurm.conf, in which each node has an address of its own."""
    folder, run, log = box.folder, box.run_dir, box.log_dir
    values = {
        "ClusterName": box.cluster,
        "SlurmctldHost": f"{box.hostname}({box.address})",
        "SlurmctldPort": str(box.ports[0]),
        **_binding(box),
        "SlurmUser": box.user,
        "SlurmdUser": box.user,
        "AuthType": "auth/munge",
        "CredType": "cred/munge",
        # A requeued job waits until its old credential has expired: 120 s by default.
        "AuthInfo": f"socket={box.munge_socket},cred_expire=5",
        "StateSaveLocation": str(folder / "state"),
        "SlurmdSpoolDir": str(folder / "%n"),
        "SlurmctldPidFile": str(run / "slurmctld.pid"),
        "SlurmdPidFile": str(run / "slurmd-%n.pid"),
        "SlurmctldLogFile": str(log / "slurmctld.log"),
        "SlurmdLogFile": str(log / "slurmd-%n.log"),
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/linux",
        "MpiDefault": "none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core_Memory",
        "DefMemPerCPU": str(box.memory_mb // box.cpus),
        "SlurmdParameters": "config_overrides",  # nodes may claim more CPUs than the machine has
        "ReturnToService": "2",
        "JobRequeue": "1",
        "KillWait": "2",
        "MinJobAge": "300",
        "SlurmdTimeout": "20",  # a busy machine answers late; a dead node's jobs are requeued after it
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": "batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
    }
    if box.gpus:
        values["GresTypes"] = "gpu"
    if box.accounting:
        values |= {
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageHost": box.address,
            "AccountingStoragePort": str(box.ports[-1]),
            "AccountingStoragePass": str(box.munge_socket),  # else the system-wide munged is asked
            "AccountingStorageTRES": "gres/gpu",
        }
    ours = {key.lower(): key for key in values}
    values |= {ours.get(key.lower(), key): value for key, value in box.settings.items()}
    gres = f" Gres=gpu:{box.gpus}" if box.gpus else ""
    lines = [f"{key}={value}" for key, value in values.items()]
    lines += [
        f"NodeName={name} NodeAddr={box.address} NodeHostname={box.hostname} Port={port} CPUs={box.cpus} "
        f"RealMemory={box.memory_mb}{gres}"
        for name, port in zip(box.node_names, box.ports[1:], strict=False)
    ]
    limits = "Nodes=ALL State=UP DefaultTime=00:30:00 MaxTime=04:00:00"
    lines += [
        f"PartitionName=main {limits} Default=YES PriorityTier=1 PreemptMode=REQUEUE",
        f"PartitionName=urgent {limits} PriorityTier=10 PreemptMode=OFF",
        f"PartitionName=strict {limits} PriorityTier=1 PreemptMode=CANCEL GraceTime=20",
    ]
    return "\n".join(lines) + "\n"


def _binding(box: Sandbox) -> dict[str, str]:
    """Return the lines that bind daemons to the address of the machine's name.

    Without them daemons listen on every address. Slurm can be confined in no other way: NodeAddr and SlurmctldHost say
    where to connect, not where to listen.
    """
    return {"CommunicationParameters": "NoCtldInAddrAny,NoInAddrAny"} if box.is_confined else {}


def gres_conf(box: Sandbox) -> str:
    """Return gres.conf: links to /dev/null stand for devices.

    A bare count makes a node invalid, and plain files leave CUDA_VISIBLE_DEVICES out of jobs.
    """
    files = f"{box.folder}/dev/gpu[0-{box.gpus - 1}]" if box.gpus > 1 else f"{box.folder}/dev/gpu0"
    return f"NodeName={','.join(box.node_names)} Name=gpu Flags=nvidia_gpu_env File={files}\n" if box.gpus else ""


def cgroup_conf() -> str:
    """Return cgroup.conf.

    Slurm reads it where ProctrackType or TaskPlugin was set to Linux's control groups.
    """
    return "ConstrainRAMSpace=yes\n"


def slurmdbd_conf(box: Sandbox) -> str:
    """Return slurmdbd.conf; MYSQL_UNIX_PORT in its environment leads to the database."""
    values = {
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={box.munge_socket}",
        "DbdHost": box.hostname,
        "DbdAddr": box.address,
        "DbdPort": str(box.ports[-1]),
        **_binding(box),
        "SlurmUser": box.slurm_user,
        "PidFile": str(box.run_dir / "slurmdbd.pid"),
        "LogFile": str(box.log_dir / "slurmdbd.log"),
        "StorageType": "accounting_storage/mysql",
        "StorageHost": "localhost",
        "StorageUser": "root",
        "StorageLoc": "slurm",
    }
    return "".join(f"{key}={value}\n" for key, value in values.items())
