"""What a place offers to jobs; here, this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class NodeKind:
    """Nodes of a partition that are alike."""

    count: int
    cpus: int
    memory_mb: int
    gpus: int = 0
    gpu_type: str = ""


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A partition of Slurm. Limits are None where there is none; times are in minutes."""

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

    On Slurm the node is the largest of the default partition, and memory of a GPU is unknown (0).
    """

    name: str
    launcher: Literal["local", "slurm"]
    cpus_per_node: int
    memory_bytes: int
    gpus_per_node: int
    gpu_memory_bytes: int
    partitions: tuple[Partition, ...] = ()
    max_array_size: int = 1001
    max_jobs: int | None = None
    has_accounting: bool = False

    def partition(self, name: str | None) -> Partition | None:
        """Return the partition called *name*, or the default one; None when there is no such."""
        chosen = (one for one in self.partitions if (one.name == name if name else one.is_default))
        return next(chosen, None)


def this_machine() -> Site:
    """Return this machine as a site; the only effects are reads."""
    gpus = _gpu_memories()
    return Site(
        name="this machine",
        launcher="local",
        cpus_per_node=len(os.sched_getaffinity(0)),
        memory_bytes=_memory_bytes(),
        gpus_per_node=len(gpus),
        gpu_memory_bytes=min(gpus, default=0),
    )


def _memory_bytes() -> int:
    """Return the memory this process may use: the machine's, or its cgroup's if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def _gpu_memories() -> list[int]:
    """Return the memory of each visible NVIDIA GPU in bytes, without importing torch."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return _visible(parse_memories(done.stdout), os.environ.get("CUDA_VISIBLE_DEVICES"))


def parse_memories(text: str) -> list[int]:
    """Return the bytes in nvidia-smi's lines of MiB; 0 where it says [N/A], as for memory shared with the host."""
    return [int(float(line)) << 20 if line[:1].isdigit() else 0 for line in map(str.strip, text.splitlines()) if line]


def _visible(memories: list[int], names: str | None) -> list[int]:
    """Return the memories of the devices that CUDA_VISIBLE_DEVICES names; like CUDA, stop at the first wrong one."""
    if names is None:
        return memories
    found = []
    for name in map(str.strip, names.split(",")):
        if name.isdigit() and int(name) < len(memories):
            found.append(memories[int(name)])
        elif name.startswith(("GPU-", "MIG-")):
            found.append(min(memories, default=0))
        else:
            break
    return found
