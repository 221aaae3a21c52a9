"""Read sites from files: a machine elsewhere, the memory of a cluster's GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..cluster.site import NodeKind, Partition, Site
from ..errors import NotFoundError, RecipeError, UsageError, nearest
from ..user_folders import config_file
from .catalog import search_dirs
from .facts import DiskSpace
from .schema import validate
from .schema.fields import key
from .yaml_files import check_size


@dataclass(frozen=True, kw_only=True)
class SiteFile:
    """What a site file says of a machine, or of the nodes of a Slurm partition."""

    gpus_per_node: int = key(0, "GPUs of a node", at_least=0)
    gpu_memory_gb: float = key(0.0, "memory of one GPU (1 GB = 10^9 B)", at_least=0)
    cpus_per_node: int = key(1, "cores of a node", at_least=1)
    memory_gb: float = key(16.0, "host memory of a node", above=0)
    disk_gb: float = key(100.0, "free space for runs", above=0)
    nodes: int = key(1, "nodes; more than one are those of a Slurm partition", at_least=1)


def read_site_file(name: str) -> tuple[Site, DiskSpace]:
    """Return the site that a file describes, and its free space.

    *name* is a path, or the name of a file in the folder `sites` of the library or of $SOUSBATCH_RECIPES.

    Raises:
        NotFoundError: there is no such file.
        UsageError: it is no YAML, or a value of it is wrong; every fault is named.
    """
    path = _find(name)
    spec, faults = validate.build(SiteFile, _values(path))
    if spec is None:
        raise RecipeError(str(path), faults)
    node = NodeKind(
        count=spec.nodes,
        cpus=spec.cpus_per_node,
        memory_mb=int(spec.memory_gb * 1e9) >> 20,
        gpus=spec.gpus_per_node,
        gpu_memory_bytes=int(spec.gpu_memory_gb * 1e9),
    )
    is_cluster = spec.nodes > 1
    site = Site(
        name=path.stem,
        launcher="slurm" if is_cluster else "local",
        cpus_per_node=node.cpus,
        memory_bytes=int(spec.memory_gb * 1e9),
        gpus_per_node=node.gpus,
        gpu_memory_bytes=node.gpu_memory_bytes,
        partitions=(Partition(name="default", is_default=True, nodes=(node,)),) if is_cluster else (),
    )
    space = DiskSpace(
        folder=f"the disk of {path.stem}",
        free_bytes=int(spec.disk_gb * 1e9),
        free_inodes=10**9,
        source=f"disk_gb of {path}",
    )
    return site, space


def _find(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = {
        file.stem: file for folder in reversed(search_dirs()) for file in sorted((folder / "sites").glob("*.yaml"))
    }
    if name in known:
        return known[name]
    hint = f" ({nearest(name, known)})" if nearest(name, known) else ""
    raise NotFoundError(f"site {name!r} is no file here, and no known site; known: {', '.join(sorted(known))}{hint}")


def _values(path: Path) -> object:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        check_size(path, text)
        return yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"site file {path} cannot be read: {' '.join(str(error).split())}") from error


def with_gpu_memory(site: Site) -> Site:
    """Return *site* with the memory of its GPUs where the user's own file says it.

    The file's `gpu_memory_gb` has GB by type of GPU or by partition, such as {a100: 40}.

    Raises:
        UsageError: a value of it is not a number above 0.
    """
    memories = _gpu_memories()
    if not memories or site.is_one_machine:
        return site

    def told(kind: NodeKind, partition: str) -> NodeKind:
        found = memories.get(partition, memories.get(kind.gpu_type, 0.0))
        return replace(kind, gpu_memory_bytes=int(found * 1e9)) if kind.gpus else kind

    partitions = tuple(replace(one, nodes=tuple(told(kind, one.name) for kind in one.nodes)) for one in site.partitions)
    return replace(site, partitions=partitions)


def device_hour_price() -> float | None:
    """Return what an hour of one device costs, where the user's own file says it.

    Raises:
        UsageError: its value is not a number above 0.
    """
    found = _of_user("device_hour_price")
    if found is None:
        return None
    if not _is_positive(found):
        raise UsageError(f"{config_file()}: device_hour_price is {found!r}; write a number above 0, such as 1.9")
    return float(found)


def _of_user(name: str) -> Any:
    path = config_file()
    values = _values(path) if path.is_file() else {}
    return values.get(name) if isinstance(values, dict) else None


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _gpu_memories() -> Mapping[str, float]:
    found = _of_user("gpu_memory_gb")
    if found is None:
        return {}
    if not (isinstance(found, dict) and all(map(_is_positive, found.values()))):
        raise UsageError(
            f"{config_file()}: gpu_memory_gb is {found!r}; write GB by type of GPU or by partition, such as "
            "{a100: 40}"
        )
    return {str(name): float(size) for name, size in found.items()}
