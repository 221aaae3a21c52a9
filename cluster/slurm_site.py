"""Slurm as a site: partitions, their nodes and limits.

They are read from sinfo, scontrol and sacctmgr.
"""

from __future__ import annotations

import os
import pwd
import re

from ..errors import SlurmError
from .site import NodeKind, Partition, Site
from .slurm import call

_TAKES_JOBS = ("up", "down")  # one that is down queues them; drained and inactive ones refuse them
# States of nodes that run jobs or will (sinfo(1), NODE STATE CODES); a draining one runs its last.
_USABLE = re.compile(r"allocated|completing|idle|mixed|planned|power", re.IGNORECASE)
_UNLIMITED = ("infinite", "UNLIMITED", "n/a", "NONE", "")


def read_site(*, patience_s: float = 0) -> Site:
    """Return what Slurm offers to this user.

    A controller that does not answer is asked for *patience_s* seconds.

    Raises:
        NoSlurmError: no Slurm is configured here.
        UnreachableError: there is a Slurm, and it does not answer.
        SlurmError: Slurm refuses to answer, or has no partition for this user.
    """
    # The configuration ends with a ping, which alone may fail, under a rate limit for example: then the exit code is 1
    text = call(["scontrol", "show", "config"], patience_s=patience_s, answer="ClusterName ")
    config = _pairs(text, r"^(\w+)\s*= (.*)$")
    partitions = _partitions(has_memory_default=_has_memory_default(config))
    usual = next((one for one in partitions if one.is_default), partitions[0])
    # without accounting it is accounting_storage/none up to 23.02, and (null) since 23.11
    has_accounting = config.get("AccountingStorageType", "(null)") not in ("accounting_storage/none", "(null)", "")
    return Site(
        name=f"Slurm ({config.get('ClusterName', 'cluster')} {config.get('SLURM_VERSION', '')})".replace(" )", ")"),
        launcher="slurm",
        cpus_per_node=max(kind.cpus for kind in usual.nodes),
        memory_bytes=max(kind.memory_mb for kind in usual.nodes) << 20,
        gpus_per_node=max(kind.gpus for kind in usual.nodes),
        gpu_memory_bytes=0,
        partitions=tuple(partitions),
        max_array_size=int(config.get("MaxArraySize", "1001")),
        max_jobs=_max_jobs() if has_accounting else None,
        has_accounting=has_accounting,
    )


def _pairs(text: str, pattern: str) -> dict[str, str]:
    return {name: value.strip() for name, value in re.findall(pattern, text, re.MULTILINE)}


def _partitions(*, has_memory_default: bool) -> list[Partition]:
    """Return every partition with its nodes.

    Partitions that take no jobs now are included: a recipe may name one.

    Raises:
        SlurmError: none takes jobs.
    """
    kinds: dict[str, list[NodeKind]] = {}
    states: dict[str, str] = {}
    for line in call(["sinfo", "--noheader", "--format=%R|%a|%D|%c|%m|%G"]).splitlines():
        name, availability, count, cpus, memory, devices = line.split("|", 5)
        if count != "0":
            states[name] = availability
            gpus, gpu_type = parse_gpus(devices)
            kind = NodeKind(count=int(count), cpus=_least(cpus), memory_mb=_least(memory), gpus=gpus, gpu_type=gpu_type)
            kinds.setdefault(name, []).append(kind)
    if not any(state in _TAKES_JOBS for state in states.values()):
        raise SlurmError("Slurm has no partition that takes jobs of this user now; `sinfo` shows why")
    found = []
    for line in call(["scontrol", "--oneliner", "show", "partition"]).splitlines():
        values = _pairs(line, r"\b(\w+)=(\S*)")
        name = values.get("PartitionName", "")
        if name not in kinds:
            continue
        found.append(
            Partition(
                name=name,
                is_default=values.get("Default") == "YES",
                nodes=tuple(kinds[name]),
                max_minutes=parse_minutes(values.get("MaxTime", "")),
                default_minutes=parse_minutes(values.get("DefaultTime", "")),
                max_nodes=int(values["MaxNodes"]) if values.get("MaxNodes", "").isdigit() else None,
                has_memory_default=has_memory_default or _has_memory_default(values),
            )
        )
    return found


def nodes_away(partition: str) -> str:
    """Say how many nodes of *partition* take no job now; '' when all do.

    They are down, drained or reserved.
    """
    lines = call(["sinfo", "--noheader", f"--partition={partition}", "--format=%a|%D|%T"]).splitlines()
    nodes = [(availability, int(count), state) for availability, count, state in (line.split("|") for line in lines)]
    total = sum(count for _, count, _ in nodes)
    away = sum(count for availability, count, state in nodes if availability == "down" or not _USABLE.match(state))
    return f"{away} of {total} nodes of partition {partition} are down, drained or reserved" if away else ""


def _has_memory_default(values: dict[str, str]) -> bool:
    return any(values.get(name, "UNLIMITED") != "UNLIMITED" for name in ("DefMemPerNode", "DefMemPerCPU"))


def _least(text: str) -> int:
    """Return the number of a field that sinfo may end with '+'.

    The sign stands for nodes that differ.
    """
    return int(text.rstrip("+") or 0)


def parse_gpus(text: str) -> tuple[int, str]:
    """Return how many GPUs a node has and their type, from sinfo's %G.

    Such a field is `gpu:a100:4(S:0-1),nvme:1`.
    """
    found = re.findall(r"\bgpu:(?:([^:,()]+):)?(\d+)", text)
    return sum(int(count) for _, count in found), next((kind for kind, _ in found if kind), "")


def parse_minutes(text: str) -> int | None:
    """Return a time of Slurm's in minutes; None for no limit.

    Its form is `days-hours:minutes:seconds` or shorter.
    """
    if text in _UNLIMITED:
        return None
    days, _, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    hours, minutes, seconds = ([0] * (3 - len(parts)) + parts) if not days else (parts + [0] * (3 - len(parts)))
    return (int(days or 0) * 24 + hours) * 60 + minutes + (seconds > 0)


def _max_jobs() -> int | None:
    """Return the most jobs that the accounting lets this user have at once.

    It is the least of the limits, and each array task counts. Limits stand on the user's association and on its quality
    of service.
    """
    limits, services = [], set()
    fields = "format=MaxSubmitJobs,GrpSubmitJobs,DefaultQOS"
    for line in _lines(["sacctmgr", "-nP", "show", "assoc", f"user={pwd.getpwuid(os.getuid()).pw_name}", fields]):
        *own, service = line.split("|")
        limits += own
        services.add(service or "normal")
    if services:
        names = ",".join(sorted(services))
        limits += _lines(["sacctmgr", "-nP", "show", "qos", names, "format=MaxSubmitJobsPerUser"])
    return min((int(limit) for limit in limits if limit.isdigit()), default=None)


def _lines(command: list[str]) -> list[str]:
    try:
        return call(command).splitlines()
    except SlurmError:  # slurmdbd is down: the queue works without it
        return []
