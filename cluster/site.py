"""What a place offers to jobs; here, this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Site:
    """A place that runs jobs: its launcher and what one node of it has."""

    name: str
    launcher: Literal["local", "slurm"]
    cpus_per_node: int
    memory_bytes: int
    gpus_per_node: int
    gpu_memory_bytes: int


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
    memories = [int(float(line)) << 20 for line in done.stdout.split("\n") if line.strip()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return memories if visible is None else memories[: len([part for part in visible.split(",") if part.strip()])]
