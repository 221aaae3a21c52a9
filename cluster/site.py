"""The resources that a place offers to jobs; here, this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # microseconds of each period, or "max"


@dataclass(frozen=True, kw_only=True)
class NodeKind:
    """Nodes of a partition that are alike.

    The memory of a GPU is 0 where it is unknown.
    """

    count: int
    cpus: int
    memory_mb: int
    gpus: int = 0
    gpu_type: str = ""
    gpu_memory_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A partition of Slurm.

    Limits are None where there is none; times are in minutes.
    """

    name: str
    is_default: bool
    nodes: tuple[NodeKind, ...]
    max_minutes: int | None = None
    default_minutes: int | None = None
    max_nodes: int | None = None
    has_memory_default: bool = False


@dataclass(frozen=True, kw_only=True)
class Site:
    """A place that runs jobs: its launcher and what one node of it has.

    On Slurm the node is the largest of the default partition. Slurm does not know the memory of a GPU (0), but the
    user's own file may say it.
    """

    name: str
    launcher: str
    cpus_per_node: int
    memory_bytes: int
    gpus_per_node: int
    gpu_memory_bytes: int
    partitions: tuple[Partition, ...] = ()
    max_array_size: int = 1001
    max_jobs: int | None = None
    has_accounting: bool = False

    @property
    def is_one_machine(self) -> bool:
        """Whether all nodes are simulated on one machine: a site without partitions."""
        return not self.partitions

    def partition(self, name: str | None) -> Partition | None:
        """Return the partition called *name*, or the default one.

        Return None when there is no such partition.
        """
        chosen = (one for one in self.partitions if (one.name == name if name else one.is_default))
        return next(chosen, None)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU of this machine.

    *name* is what CUDA_VISIBLE_DEVICES may call it; *key* is the same for all its names.
    """

    key: str
    name: str
    memory_bytes: int


def this_machine() -> Site:
    """Return this machine as a site; the only effects are reads."""
    gpus = visible_gpus()
    return Site(
        name="this machine",
        launcher="local",
        cpus_per_node=len(usable_cores()),
        memory_bytes=memory_bytes(),
        gpus_per_node=len(gpus),
        gpu_memory_bytes=min((gpu.memory_bytes for gpu in gpus), default=0),
    )


def usable_cores() -> tuple[int, ...]:
    """Return the numbers of the cores this process may use.

    They are those of its affinity, and as many as its cgroup pays for.
    """
    cores = sorted(os.sched_getaffinity(0))
    try:
        quota, _, period = _CPU_LIMIT.read_text().strip().partition(" ")
    except OSError:
        return tuple(cores)
    return tuple(cores[: max(1, int(quota) // int(period))]) if quota.isdigit() else tuple(cores)


def memory_bytes() -> int:
    """Return the bytes of memory this process may use.

    They are the machine's, or its cgroup's if that is less.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def visible_gpus() -> tuple[Gpu, ...]:
    """Return the NVIDIA GPUs that CUDA would show to this process.

    torch is not imported for it.
    """
    if shutil.which("nvidia-smi") is None:
        return ()
    command = ["nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return shown(done.stdout, os.environ.get("CUDA_VISIBLE_DEVICES"))


def shown(text: str, names: str | None) -> tuple[Gpu, ...]:
    """Return the GPUs in nvidia-smi's lines that CUDA_VISIBLE_DEVICES names.

    A line has index, uuid and MiB. Like CUDA, stop at the first wrong name, and at one that comes twice. Memory is 0
    where nvidia-smi says [N/A], as for memory shared with the host; a part of a GPU (MIG) counts as having the least of
    all.
    """
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.count(",") == 2]
    memories = {index: int(float(size)) << 20 if size[:1].isdigit() else 0 for index, _, size in rows}
    found: dict[str, Gpu] = {}
    for name in map(str.strip, memories if names is None else names.split(",")):
        is_uuid = name.startswith(("GPU-", "MIG-"))
        key = next((index for index, uuid, _ in rows if is_uuid and uuid.startswith(name)), name)
        if key in found or not (is_uuid or name in memories):
            break
        found[key] = Gpu(key=key, name=name, memory_bytes=memories.get(key, min(memories.values(), default=0)))
    return tuple(found.values())
